"""Prepares a loaded model for fast decoding: kernels, quantized weights and a decode step."""

from __future__ import annotations

from typing import Any

from streamchat.base.progress import Progress
from streamchat.decode.install import install
from streamchat.kernels.library import Kernels, load_kernels
from streamchat.models.fingerprint import set_contents_digest
from streamchat.models.quantize.cpu import use_weights


def prepare_decoding(
    model: Any,
    tokenizer: Any,
    *,
    weights: str,
    kernels: str,
    device: str,
    name: str,
    digest: str,
    progress: Progress,
) -> tuple[str, Kernels | None, tuple[str, ...]]:
    """Quantize layers of `model` if `weights` says so, and install a decode step.

    Args:
        model: In eval mode on `device`; changed in place.
        tokenizer: Its tokenizer.
        weights: `auto`, `native`, `int8` or `int4`, see `use_weights`.
        kernels: The setting: `auto` or `torch`.
        device: Device of the model.
        name: Name of the model, for messages.
        digest: Digest of the files that the model was loaded from.
        progress: Called with the stage; may raise to cancel.

    Returns:
        "native", "int8" or "int4"; the compiled kernels that the model uses, if any; and notes for the user.

    Raises:
        ConfigError: The weights are not possible here.
    """
    compiled = None
    if device == "cpu":
        progress("Preparing kernels", 0, 0, "")
        compiled = load_kernels(kernels)
    set_contents_digest(model, digest)
    used, notes = use_weights(model, tokenizer, weights, device=device, name=name, kernels=kernels, progress=progress)
    install(model, compiled)
    return used, compiled, notes
