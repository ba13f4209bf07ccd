"""Installs the short path of a model if its logits are those of the model's own forward pass; remembers the verdict."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from streamchat.base import paths
from streamchat.base.atomic_files import read_json, save_result
from streamchat.base.errors import describe_unexpected
from streamchat.config.settings import Decode
from streamchat.decode.check import check_step
from streamchat.decode.install import install, is_compiled, uninstall
from streamchat.kernels.build import library_path
from streamchat.kernels.library import Kernels
from streamchat.models.checked_fit import code_digest
from streamchat.models.fingerprint import model_fingerprint

_log = logging.getLogger(__name__)


def install_checked(model: Any, kernels: Kernels | None, weights: str, decode: Decode = "auto") -> tuple[str, ...]:
    """Install the short path of `model`, unless its logits differ from those of the model's own forward pass.

    On a GPU, the captured step has its own check.

    Args:
        model: A causal LM in eval mode; its `forward` may be replaced.
        kernels: Compiled kernels for a CPU; None for PyTorch's.
        weights: What the weights are: `native`, `int8`, `int4` or `int4 and int8`.
        decode: The setting.

    Returns:
        Notes for the user.
    """
    try:
        if not install(model, kernels, decode) or any(weight.device.type != "cpu" for weight in model.parameters()):
            return ()
        file = _verdict_file(model, weights)
        if read_json(file).get("passed") is True:
            return ()
        found = check_step(model)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a step raises, the model's own forward pass still works
        uninstall(model)
        return (
            f"The short path for this model fails ({describe_unexpected(error)}), so transformers' forward is used, "
            "which is slower.",
        )
    _log.info("short path: off by %.2g of the logits' spread (allowed %.2g)", found.error, found.allowed)
    if found.passed:
        save_result(file, {"passed": True, "error": found.error}, "the result of a model's checks")
        return ()
    uninstall(model)
    return (
        f"The short path for this model gives other logits than transformers' forward (off by {found.error:.2g} of "
        f"their spread, allowed {found.allowed:.2g}), so transformers' forward is used, which is slower.",
    )


def _verdict_file(model: Any, weights: str) -> Path:
    """Return the file that stores the verdict for this model under the current conditions."""
    conditions = {
        "model": model_fingerprint(model),
        "dtype": str(model.dtype),
        "weights": weights,
        "attention": str(model.config._attn_implementation),
        "kernels": library_path().stem if is_compiled(model) else "torch",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": code_digest("streamchat.decode"),
    }
    return paths.cache_path("verdicts", json.dumps(conditions, sort_keys=True), ".json")
