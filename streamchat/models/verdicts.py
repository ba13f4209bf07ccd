"""Remembering that a model passed the numeric self-check, so that it runs once and not at every start.

The fit itself is always measured; only the longer check is left out.
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

from streamchat import paths
from streamchat.cache.fit import PositionFit
from streamchat.cache.method import choose_fit
from streamchat.models.fingerprint import computed_config

_log = logging.getLogger(__name__)


def remembered_fit(model: Any) -> PositionFit:
    """`choose_fit(model)`, without its self-check where that passed before under the same conditions.

    Those are: configuration, number format, devices, attention implementation, versions of torch and transformers,
    and this program's own cache code. A memory that cannot be read or written only costs the check.

    Raises:
        UnsupportedModelError: An endless cache would be wrong with this model.
    """
    file = verdict_file(model)
    passed = _passed(file)
    fit = choose_fit(model, checked=passed)
    if not passed and fit.method != "recompute":
        _remember(file)
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
    folder = resources.files("streamchat.cache")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _passed(file: Path) -> bool:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("passed") is True
    except (OSError, ValueError, AttributeError):
        return False


def _remember(file: Path) -> None:
    try:
        paths.private_dir(file.parent)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"passed": True}, stream)
        os.replace(temporary, file)
    except OSError as error:
        _log.warning("the self-check's verdict could not be kept: %s", error)
