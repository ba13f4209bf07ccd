"""Cached results of the numeric checks of a model, so that they do not run at every start.

The verdict of the longer checks holds for all models that compute the same. The fit itself is remembered only for the
very weights that it was measured on.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from streamchat.base import paths
from streamchat.base.atomic_files import read_checked, read_json, save_checked, save_result
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.plain import fit_from_plain, fit_to_plain
from streamchat.cache.positions.strategy import Verdict, choose_fit
from streamchat.models.fingerprint import computed_config, model_fingerprint


def choose_checked_fit(model: Any) -> PositionFit:
    """Return `choose_fit(model)`; skip its checks if they passed before under the same conditions.

    The conditions are the configuration, dtype, devices, attention implementation, the versions of torch and
    transformers, and streamchat's cache code. If the result cannot be read or written, the checks run again.

    Raises:
        UnsupportedModelError: A streaming cache would give wrong results with this model.
    """
    file, fit_file = verdict_file(model), _fit_file(model)
    verdict = _read_verdict(file)
    if verdict is not None and (known := fit_from_plain(model, read_checked(fit_file))) is not None:
        return known
    fit = choose_fit(model, verdict=verdict)
    if (plain := fit_to_plain(model, fit)) is not None:
        save_checked(fit_file, plain, "how a model carries positions")
    if verdict is None and fit.method != "recompute":
        limit = fit.position_limit if fit.scales_queries else None
        save_result(file, {"passed": True, "absolute_limit": limit}, "the result of a model's checks")
    return fit


def verdict_file(model: Any) -> Path:
    """Return the file that stores the verdict for this model under the current conditions."""
    return paths.cache_path("verdicts", json.dumps(_conditions(model), sort_keys=True, default=str), ".json")


def _fit_file(model: Any) -> Path:
    """Return the file that stores the fit for this model, with these weights, under the current conditions."""
    conditions = _conditions(model) | {"fit of": model_fingerprint(model)}
    return paths.cache_path("verdicts", json.dumps(conditions, sort_keys=True, default=str), ".json")


def _conditions(model: Any) -> dict[str, Any]:
    """Return everything that the checks depend on, except for the weights."""
    return {
        "config": computed_config(model.config),
        "dtype": str(model.dtype),
        "device": _device_summary(model),
        "attention": str(model.config._attn_implementation),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": code_digest("streamchat.cache"),
    }


def _device_summary(model: Any) -> str:
    """Return `cuda`, or `2 x cuda` if the layers are spread over two devices."""
    devices = {parameter.device for parameter in model.parameters()}
    kinds = "+".join(sorted({device.type for device in devices}))
    return kinds if len(devices) == 1 else f"{len(devices)} x {kinds}"


@functools.cache
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
