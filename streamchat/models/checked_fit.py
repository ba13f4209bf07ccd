"""Cached results of the numeric checks of a model, so that they do not run at every start.

The fit itself is always measured. Only the longer checks are skipped, with the position limit that they measure.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from streamchat.base import paths
from streamchat.base.atomic_files import read_json, save_result
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import Verdict, choose_fit
from streamchat.models.fingerprint import computed_config


def choose_checked_fit(model: Any) -> PositionFit:
    """Return `choose_fit(model)`; skip its checks if they passed before under the same conditions.

    The conditions are the configuration, dtype, devices, attention implementation, the versions of torch and
    transformers, and streamchat's cache code. If the result cannot be read or written, the checks run again.

    Raises:
        UnsupportedModelError: A streaming cache would give wrong results with this model.
    """
    file = verdict_file(model)
    verdict = _read_verdict(file)
    fit = choose_fit(model, verdict=verdict)
    if verdict is None and fit.method != "recompute":
        limit = fit.position_limit if fit.scales_queries else None
        save_result(file, {"passed": True, "absolute_limit": limit}, "the result of a model's checks")
    return fit


def verdict_file(model: Any) -> Path:
    """Return the file that stores the verdict for this model under the current conditions."""
    conditions = {
        "config": computed_config(model.config),
        "dtype": str(model.dtype),
        "device": _device_summary(model),
        "attention": str(model.config._attn_implementation),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": code_digest("streamchat.cache"),
    }
    return paths.cache_path("verdicts", json.dumps(conditions, sort_keys=True, default=str), ".json")


def _device_summary(model: Any) -> str:
    """Return `cuda`, or `2 x cuda` if the layers are spread over two devices."""
    devices = {parameter.device for parameter in model.parameters()}
    kinds = "+".join(sorted({device.type for device in devices}))
    return kinds if len(devices) == 1 else f"{len(devices)} x {kinds}"


def code_digest(package: str) -> str:
    """Return a digest of the Python files of a package."""
    digest = hashlib.sha256()
    with resources.as_file(resources.files(package)) as folder:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _read_verdict(file: Path) -> Verdict | None:
    found = read_json(file)
    limit = found.get("absolute_limit", "missing")
    return Verdict(limit) if found.get("passed") is True and (limit is None or type(limit) is int) else None
