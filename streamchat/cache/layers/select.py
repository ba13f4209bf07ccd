"""Maps each transformers cache layer to its streaming counterpart."""

from __future__ import annotations

from typing import Any, cast

from torch import LongTensor, Tensor
from transformers.cache_utils import LinearAttentionLayer

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer


class MixedStreamingLayer(LinearAttentionLayer, StreamingLayer):  # type: ignore[misc, override, no-untyped-call]
    """A `StreamingLayer` for full attention, combined with transformers' recurrent state of constant size.

    The recurrent state still contains evicted text: it has no tokens to drop.
    """

    is_compileable = False

    def __init__(self, plain: Any, cache_size: int, rotation: LayerRotation, dtype: CacheDtype | None = None) -> None:
        StreamingLayer.__init__(self, cache_size, rotation, dtype)
        # before transformers 5.17 there is one state per layer, and no such argument
        states = getattr(plain, "number_of_states", None)
        LinearAttentionLayer.__init__(self, **({} if states is None else {"number_of_states": states}))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Initialize keys and values (two positional tensors) or the states (keyword arguments)."""
        if args:
            StreamingLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Empty both."""
        LinearAttentionLayer.reset(self)
        StreamingLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch of both for beam search."""
        LinearAttentionLayer.reorder_cache(self, cast(LongTensor, beam_idx))
        StreamingLayer.reorder_cache(self, beam_idx)


def is_mixed(layer: Any) -> bool:
    """Return whether the layer has both cached tokens and a recurrent state."""
    return isinstance(layer, MixedStreamingLayer)


def streaming_layer(
    index: int, layer: Any, config: Any, rotation: LayerRotation, cache_size: int, dtype: CacheDtype | None = None
) -> Any:
    """Return the streaming layer for layer `index` of a model.

    A sliding layer is handled like a full one: evictions apply to all layers, and transformers' mask restricts each
    query to the window, counted in slots. Eviction never brings an old token back into the window: the sinks move
    closer, but only when fewer tokens than the window remain.

    Raises:
        UnsupportedModelError: It does not support eviction, or attends in a way that slots do not represent.
    """
    kind = kind_of(layer)
    if kind == "recurrent":
        return layer
    if kind == "mixed":
        return MixedStreamingLayer(layer, cache_size, rotation, dtype)
    if kind == "unknown":
        raise UnsupportedModelError(
            f"layer {index} uses a {type(layer).__name__}, which does not support eviction; choose a model with plain "
            "attention layers"
        )
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    chunked = kind == "sliding" and index < len(types) and types[index] == "chunked_attention"
    if chunked and layer.sliding_window < cache_size:
        raise UnsupportedModelError(
            f"layer {index} attends within chunks of {layer.sliding_window} tokens, fewer than cache_size = "
            f"{cache_size}; set cache_size to at most {layer.sliding_window}"
        )
    return StreamingLayer(cache_size, rotation, dtype)
