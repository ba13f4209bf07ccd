"""int8 and int4 weights on a GPU: in tiles for the fused kernels, or with torchao; they replace the native weights."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from streamchat.base.errors import ConfigError, short
from streamchat.base.progress import Progress, silent
from streamchat.config.settings import Decode
from streamchat.models.quantize.gpu_tiles import quantize_to_tiles, why_not_tiles
from streamchat.models.quiet import quiet
from streamchat.quantization.quality import AUTO_LIMIT, divergence_from, predictions
from streamchat.quantization.weights import GROUP, Kind

_log = logging.getLogger(__name__)


def quantize_on_gpu(
    model: Any, tokenizer: Any, kind: Kind, *, name: str, progress: Progress, decode: Decode = "auto"
) -> tuple[str, ...]:
    """Quantize the linear layers: in tiles if the fused kernels can decode with them, else with torchao.

    Args:
        model: In eval mode, on its device; changed in place.
        tokenizer: For the text that the quality is measured on.
        kind: int8 or int4. With torchao, int8 has one scale per row, and int4 a scale and a zero point per 32 values of
            a row.
        name: Name of the model, for messages.
        progress: Called with the stage; may raise to cancel.
        decode: The setting; `graph` and `plain` need torchao.

    Returns:
        Notes for the user: a measured loss of quality.

    Raises:
        ConfigError: Neither is possible: the fused kernels cannot decode for the model, and torchao is not installed or
            has no int4 kernels for it; or a product fails here, which leaves the model unusable.
    """
    no_tiles = _why_not_tiles(model, kind, decode)
    before = predictions(model, tokenizer)
    _replace_layers(model, kind, name, progress, no_tiles)
    try:
        with quiet():
            after = predictions(model, tokenizer)
    except Exception as error:  # kernels may fail only when they run
        raise _unusable(kind, error, "a product") from error
    nats = divergence_from(before, after)
    _log.info("%s with %s weights: KL divergence %.5f nats/token", name, kind, nats)
    if nats <= AUTO_LIMIT:
        return ()
    return (
        f"{name} loses quality with {kind} weights: KL divergence {nats:.3f} nats/token ({AUTO_LIMIT:.3f} is 1 % of "
        "perplexity); choose weights = native to avoid it",
    )


def replace_linear_layers(model: Any, kind: Kind, decode: Decode = "auto") -> None:
    """Quantize the linear layers of `model`; changed in place. Arguments and errors are those of `quantize_on_gpu`."""
    _replace_layers(model, kind, "", silent, _why_not_tiles(model, kind, decode))


def _why_not_tiles(model: Any, kind: Kind, decode: Decode) -> str:
    """Return why torchao must quantize; '' for tiles.

    Raises:
        ConfigError: It must, and cannot.
    """
    reason = why_not_tiles(model, kind, decode)
    if reason:
        _log.info("%s weights of torchao, not in tiles for the fused kernels: %s", kind, reason)
        _require_torchao(model, kind, reason)
    return reason


def _replace_layers(model: Any, kind: Kind, name: str, progress: Progress, no_tiles: str) -> None:
    if no_tiles:
        progress(f"Quantizing {name} to {kind}", 0, 0, "")
        _use_torchao(model, kind)
        return
    try:
        quantize_to_tiles(model, kind, name, progress)
    except torch.OutOfMemoryError as error:
        raise _unusable(kind, error, "PyTorch") from error


def _use_torchao(model: Any, kind: Kind) -> None:
    """Quantize all linear layers of `model` except the output layer.

    That one stays native: int4 would lose too much quality, and torchao's int8 product would make a 16-bit copy of its
    matrix for every token.
    """
    output = model.get_output_embeddings()

    def is_quantizable(module: nn.Module, _: str) -> bool:
        if type(module) is not nn.Linear or module is output:  # subclasses may compute something else
            return False
        assert isinstance(module, nn.Linear)
        return kind == "int8" or module.in_features % GROUP == 0

    try:
        with quiet():
            from torchao.quantization import quantize_

            quantize_(model, _config(kind), filter_fn=is_quantizable)
    except Exception as error:  # no kernel, unsupported dtype, out of memory: each has its own error type
        raise _unusable(kind, error) from error


def _unusable(kind: Kind, error: Exception, reporter: str = "torchao") -> ConfigError:
    return ConfigError(
        f"weights = {kind!r} cannot be used: {reporter} reported {short(error)}; choose weights = native"
    )


def _require_torchao(model: Any, kind: Kind, no_tiles: str) -> None:
    """Raise ConfigError if torchao is not installed, or has no kernels for `kind` here.

    Args:
        model: The model to quantize.
        kind: The precision.
        no_tiles: Why the fused kernels cannot decode for it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"weights = {kind!r} on a GPU needs fused kernels, which cannot be used here ({no_tiles}), or torchao, "
            "which is not installed; pip install torchao, or choose weights = native"
        )
    if kind == "int4":
        _require_int4(model)


def _require_int4(model: Any) -> None:
    """Require what torchao's int4 kernels do.

    Raises:
        ConfigError: The model is not on a GPU, or not in bfloat16.
    """
    wrong = ""
    if model.device.type != "cuda":
        wrong = f"its kernels need a GPU with CUDA, and the model is on {model.device}"
    elif model.dtype != torch.bfloat16:
        wrong = f"its kernels need dtype = bfloat16, and the model has {str(model.dtype).removeprefix('torch.')}"
    if wrong:
        raise ConfigError(f"weights = 'int4' cannot be used: {wrong}; choose weights = native")


def _config(kind: Kind) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    # the layout whose kernel is part of PyTorch itself
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
