"""A streaming cache without a model: random keys and values, and a slow reference that keeps the keys unrotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from streamchat.cache.fed_tokens import FedTokens
from streamchat.cache.history import CacheHistory
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.rotation import RotarySource, TensorRotation
from streamchat.cache.streaming import StreamingCache
from tests.support.tiny import kv_of

HEADS, WIDTH = 2, 8


def bare_config(layers: int = 2) -> LlamaConfig:
    """The configuration of a model that is never built."""
    sizes: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": layers}
    return LlamaConfig(hidden_size=HEADS * WIDTH, intermediate_size=8, vocab_size=300, **sizes)


def rotary_source() -> RotarySource:
    """The rotary module of that model, with an ordinary call."""
    call = (torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
    return RotarySource(LlamaRotaryEmbedding(bare_config()), call, {})


def fit_of(layers: int = 2, *, rotation: LayerRotation | None = None, **changes: Any) -> PositionFit:
    """A fit whose keys rotate by halves."""
    each = LayerRotation(TensorRotation(rotary_source(), 0, False)) if rotation is None else rotation
    limit, devices = changes.pop("position_limit", None), (torch.device("cpu"),) * layers
    return PositionFit((each,) * layers, devices, limit, 0.0, **changes)


def rotated(x: Tensor, first: int) -> Tensor:
    """Rotate (..., n, WIDTH) by halves to the positions from `first` on, in float64."""
    half = x.shape[-1] // 2
    positions = torch.arange(first, first + x.shape[-2], dtype=torch.float64)
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x.double()[..., :half], x.double()[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def bare_cache(size: int = 16, sinks: int = 2, layers: int = 2, **options: Any) -> StreamingCache:
    """An empty cache with a history and a record of fed tokens."""
    fit = options.pop("fit", None) or fit_of(layers)
    cache = StreamingCache(bare_config(layers), fit, cache_size=size, num_sink_tokens=sinks, **options)
    cache.history, cache.fed_tokens = CacheHistory(cache), FedTokens()
    return cache


@dataclass
class Fed:
    """What a cache was fed: unrotated keys and values, (layers, rows, HEADS, tokens, WIDTH). Ids are indices.

    `base` is the position that the first slot must have.
    """

    cache: StreamingCache
    rows: int = 1
    seed: int = 0
    base: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.keys, self.values = (torch.zeros(len(self.cache.layers), self.rows, HEADS, 0, WIDTH) for _ in range(2))

    def feed(self, count: int, *, layers: int | None = None) -> None:
        """Make room for `count` tokens and write them to all layers, or to the first `layers` as a failed forward does.

        Tokens that follow undone ones replace these.
        """
        cache, at = self.cache, self.cache.ledger.next_index
        before = cache.tokens_evicted
        cache.make_room(count)
        self.base += cache.tokens_evicted - before
        shape = (*self.keys.shape[:3], count, WIDTH)
        new = [torch.randn(shape, generator=self.generator) for _ in range(2)]
        self.keys, self.values = (
            torch.cat([x[..., :at, :], y], dim=-2) for x, y in zip((self.keys, self.values), new, strict=True)
        )
        keys = rotated(new[0], cache.next_position).float()
        cache.note_input_ids(torch.arange(at, at + count).expand(self.rows, -1))
        for layer in range(len(cache.layers) if layers is None else layers):
            cache.update(keys[layer], new[1][layer], layer)

    def check(self) -> None:
        """The layers have the tokens of the ledger, at the positions from `base` on, within float32 rounding."""
        cache, indices = self.cache, list(self.cache.ledger)
        assert cache.lengths == [len(indices)] * len(cache.layers)
        if not indices:
            return
        keys = rotated(self.keys[..., indices, :], self.base)
        for number, layer in enumerate(cache.streaming_layers):
            assert layer.base == self.base
            found, values = kv_of(layer)
            torch.testing.assert_close(found.double(), keys[number], atol=2e-5, rtol=0)
            assert torch.equal(values, self.values[number][..., indices, :])


def fed(size: int = 16, sinks: int = 2, count: int = 0, *, layers: int = 2, rows: int = 1, **options: Any) -> Fed:
    """A cache that was fed `count` tokens one by one."""
    it = Fed(bare_cache(size, sinks, layers, **options), rows)
    for _ in range(count):
        it.feed(1)
    return it
