"""Remembering that a model passed the numeric checks, so that they run once and not at every start.

The fit itself is always measured; only the longer checks are left out, and the limit of positions that they measure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from streamchat.base import paths
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import Verdict, choose_fit
from streamchat.models.fingerprint import computed_config

_log = logging.getLogger(__name__)


def remembered_fit(model: Any) -> PositionFit:
    """`choose_fit(model)`, without its checks where they passed before under the same conditions.

    Those are: configuration, number format, devices, attention implementation, versions of torch and transformers,
    and this program's own cache code. A memory that cannot be read or written only costs the check.

    Raises:
        UnsupportedModelError: An endless cache would be wrong with this model.
    """
    file = verdict_file(model)
    verdict = _known(file)
    fit = choose_fit(model, verdict=verdict)
    if verdict is None and fit.method != "recompute":
        _remember(file, fit.position_limit if fit.scales_queries else None)
    return fit


def verdict_file(model: Any) -> Path:
    """Where the verdict on this model under these conditions is kept."""
    conditions = {
        "config": computed_config(model.config),
        "dtype": str(model.dtype),
        "device": _device_words(model),
        "attention": str(model.config._attn_implementation),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": _code_digest(),
    }
    text = json.dumps(conditions, sort_keys=True, default=str)
    return paths.cache_dir() / "verdicts" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _device_words(model: Any) -> str:
    """`cuda`, or `2 x cuda` where what layers pass on goes from one to another."""
    devices = {parameter.device for parameter in model.parameters()}
    kinds = "+".join(sorted({device.type for device in devices}))
    return kinds if len(devices) == 1 else f"{len(devices)} x {kinds}"


def _code_digest() -> str:
    digest = hashlib.sha256()
    with resources.as_file(resources.files("streamchat.cache")) as folder:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _known(file: Path) -> Verdict | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        limit = found["absolute_limit"]
        return Verdict(limit) if found["passed"] is True and (limit is None or type(limit) is int) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _remember(file: Path, absolute_limit: int | None) -> None:
    try:
        paths.private_dir(file.parent)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"passed": True, "absolute_limit": absolute_limit}, stream)
        os.replace(temporary, file)
    except OSError as error:
        _log.warning("the checks' verdict could not be kept: %s", error)
