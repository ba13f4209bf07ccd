"""Which streaming layer takes the place of each layer that transformers chose for a model."""

from __future__ import annotations

from typing import Any, cast

from torch import LongTensor, Tensor
from transformers.cache_utils import LinearAttentionLayer

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer


class MixedStreamingLayer(LinearAttentionLayer, StreamingLayer):  # type: ignore[misc, override, no-untyped-call]
    """Full attention, served as a `StreamingLayer`, beside a recurrent state of constant size, left as it is.

    The recurrent state goes on remembering evicted text: it has no tokens to drop.
    """

    is_compileable = False

    def __init__(self, plain: Any, cache_size: int, rotation: LayerRotation) -> None:
        StreamingLayer.__init__(self, cache_size, rotation)
        # Before transformers 5.17 every layer has one state and there is no such argument.
        states = getattr(plain, "number_of_states", None)
        LinearAttentionLayer.__init__(self, **({} if states is None else {"number_of_states": states}))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Two tensors: keys and values. Keywords: the states."""
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
    """Whether the layer has a recurrent state beside its tokens."""
    return isinstance(layer, MixedStreamingLayer)


def streaming_layer(index: int, layer: Any, config: Any, rotation: LayerRotation, cache_size: int) -> Any:
    """The layer that serves layer `index` of a model.

    A sliding layer is served like a full one: what leaves, leaves all layers, and the library's mask restricts each
    query to the window, counted in slots. Evicting never brings an old token back into the window: the sinks come
    closer, but only when fewer tokens than the window are left.

    Raises:
        UnsupportedModelError: It cannot be evicted from, or attends in a way that slots do not represent.
    """
    kind = kind_of(layer)
    if kind == "recurrent":
        return layer
    if kind == "mixed":
        return MixedStreamingLayer(layer, cache_size, rotation)
    if kind == "unknown":
        raise UnsupportedModelError(
            f"layer {index} keeps a {type(layer).__name__}, which cannot be evicted from; models with plain attention "
            "layers can stream"
        )
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    chunked = kind == "sliding" and index < len(types) and types[index] == "chunked_attention"
    if chunked and layer.sliding_window < cache_size:
        raise UnsupportedModelError(
            f"layer {index} attends within chunks of {layer.sliding_window} tokens, fewer than cache_size = "
            f"{cache_size}; set cache_size to at most {layer.sliding_window}"
        )
    return StreamingLayer(cache_size, rotation)
