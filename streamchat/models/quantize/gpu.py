"""int8 and int4 weights on a GPU, by torchao: they take the place of the model's own."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from streamchat.base.errors import ConfigError, short
from streamchat.base.progress import Progress
from streamchat.models.quiet import quiet
from streamchat.quantization.quality import AUTO_LIMIT, divergence_from, predictions
from streamchat.quantization.weights import GROUP, Kind

_log = logging.getLogger(__name__)


def quantise(model: Any, tokenizer: Any, kind: Kind, *, name: str, progress: Progress) -> tuple[str, ...]:
    """Put weights in `kind` in the place of those of all linear layers but the output layer.

    The output layer stays as it is: in int4 it costs too much, and torchao's int8 product makes a 16-bit copy of its
    matrix for every token.

    Args:
        model: In eval mode, on its device; changed in place.
        tokenizer: For the text by which the quality is measured.
        kind: int8 (a scale for each row) or int4 (a scale and a zero for each 32 of a row).
        name: Of the model, for messages.
        progress: Told what is going on; may raise to cancel.

    Returns:
        What the user should know: a measured loss of quality.

    Raises:
        ConfigError: torchao is not installed, or cannot do it here. The model is of no use then.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"weights = {kind!r} on a GPU needs torchao; pip install torchao, or choose weights = native")
    before = predictions(model, tokenizer)
    progress(f"Quantising {name} in {kind}", 0, 0, "")
    output = model.get_output_embeddings()

    def takes(module: nn.Module, _: str) -> bool:
        if type(module) is not nn.Linear or module is output:  # subclasses compute something else with it
            return False
        assert isinstance(module, nn.Linear)
        return kind == "int8" or module.in_features % GROUP == 0

    try:
        with quiet():
            from torchao.quantization import quantize_

            quantize_(model, _config(kind), filter_fn=takes)
            after = predictions(model, tokenizer)
    except Exception as error:  # no kernel, another number format, no memory: each library has words of its own
        raise ConfigError(
            f"weights = {kind!r} cannot be used: torchao says {short(error)}; choose weights = native"
        ) from error
    nats = divergence_from(before, after)
    _log.info("%s with %s weights: %.5f nats a token from its own", name, kind, nats)
    if nats <= AUTO_LIMIT:
        return ()
    return (
        f"{name} predicts worse with {kind} weights: {nats:.3f} nats a token from its own, where {AUTO_LIMIT:.3f} are "
        "1 % of perplexity; choose weights = native for its own",
    )


def _config(kind: Kind) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if not torch.cuda.is_available():
        raise NotImplementedError("int4 has kernels for CUDA only")
    # of its layouts the one whose kernel PyTorch itself has
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
