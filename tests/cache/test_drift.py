"""Cached keys over 100,000 tokens: their error does not grow with the number of evictions or rebases.

Every key is compared with its original, as the model's own projection gave it, rotated once to the slot's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.eviction.policy import CacheView, Cut, EvictionPolicy, cuts_of
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers import fronts
from streamchat.cache.layers.codes import INT4
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from tests.support.tiny import VOCABULARY, tiny_model

BUDGET, SINKS, CHUNK = 96, 4, 48
TOKENS = 100_000
PIN = (20, 26)

# Largest error of a key, as a share of the largest key: cached, moved back once by a rebase, and the model's own
# rotation, each rounded. Measured 1.6e-7, 8.8e-3, 9.5e-4.
ROUNDING = {
    torch.float32: 1e-6,
    torch.bfloat16: 3 * 2**-8,
    torch.float16: 3 * 2**-11,
    torch.int8: 0.02,
    INT4: 0.35,
}


class Originals:
    """Un-rotated keys (heads, n, head_dim) float32 of what the cache holds, by layer, as `k_proj` gives them."""

    def __init__(self, model: Any, cache: StreamingCache) -> None:
        self.model, self.cache = model, cache
        self.held: list[Tensor] = [torch.empty(0)] * len(model.model.layers)
        self.fresh: list[Tensor] = list(self.held)
        self.indices: list[int] = []
        for i, block in enumerate(model.model.layers):
            block.self_attn.k_proj.register_forward_hook(lambda module, args, out, i=i: self._take(i, out))

    def _take(self, layer: int, out: Tensor) -> None:
        heads = self.model.config.num_key_value_heads
        self.fresh[layer] = out[0].float().reshape(out.shape[1], heads, -1).transpose(0, 1).clone()

    def follow(self) -> None:
        """A forward is over: keep what the ledger keeps."""
        known = {index: i for i, index in enumerate([*self.indices, *self._new()])}
        self.indices = list(self.cache.ledger)
        slots = [known[index] for index in self.indices]
        for i, fresh in enumerate(self.fresh):
            both = torch.cat([self.held[i], fresh], dim=1) if self.held[i].numel() else fresh
            self.held[i] = both[:, slots]

    def _new(self) -> range:
        stop = self.cache.ledger.next_index
        return range(stop - self.fresh[0].shape[1], stop)

    def error(self) -> float:
        """The largest one over all layers and slots."""
        worst = 0.0
        for layer, originals in zip(self.cache.streaming_layers, self.held, strict=True):
            assert layer.storage is not None
            keys = layer.storage.keys.read(layer.start, layer.length)
            rotation = layer.rotation.keys
            assert rotation is not None
            angles = rotation.source.angles_range(layer.base, layer.length, torch.device("cpu"))
            once = rotation.apply(originals, angles)
            worst = max(worst, ((keys[0].float() - once).abs().max() / once.abs().max()).item())
        return worst


def errors_over(
    dtype: torch.dtype, tokens: int = TOKENS, policy: EvictionPolicy | str = "oldest-tokens", chunk: int = CHUNK
) -> tuple[list[float], StreamingCache]:
    """The largest key error within each tenth of a stream."""
    model = tiny_model("llama").to(dtype if dtype.is_floating_point else torch.float32)
    fit = choose_fit(model)
    options = EvictionOptions(policy)
    cache = make_cache(model, fit, cache_size=BUDGET, num_sink_tokens=SINKS, options=options, dtype=dtype)
    cache.position_limit = 1024  # a rebase every 928 tokens
    originals = Originals(model, cache)
    generator = torch.Generator().manual_seed(1)
    tenths = [0.0] * 10
    pinned = False
    with StreamingHook(model, cache), torch.inference_mode():
        for at in range(0, tokens, chunk):
            ids = torch.randint(3, VOCABULARY, (1, chunk), generator=generator)
            model(input_ids=ids, use_cache=True, **{cache_keyword(model): cache})
            if not pinned:
                cache.pin(*PIN)
                pinned = True
            originals.follow()
            if at // chunk % 10 == 0:
                tenth = min(9, at * 10 // tokens)
                tenths[tenth] = max(tenths[tenth], originals.error())
    return tenths, cache


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
def test_key_errors_do_not_grow(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rebases = 0
    original = StreamingLayer.move_window

    def counting(layer: StreamingLayer, to: int) -> None:
        nonlocal rebases
        rebases += 1
        original(layer, to)

    monkeypatch.setattr(StreamingLayer, "move_window", counting)
    tenths, cache = errors_over(dtype)
    assert cache.ledger.next_index >= TOKENS
    assert cache.compression_count > 2_000
    assert rebases > 100
    assert list(cache.ledger)[: SINKS + PIN[1] - PIN[0]] == [*range(SINKS), *range(*PIN)]
    assert max(tenths) <= ROUNDING[dtype]
    # the first tenth has seen every kind of move already
    assert max(tenths[1:]) <= 1.25 * tenths[0]


@pytest.mark.parametrize("dtype", [torch.int8, INT4], ids=["int8", "int4"])
def test_codes_are_rounded_from_the_originals_at_every_eviction(dtype: torch.dtype) -> None:
    tenths, cache = errors_over(dtype, tokens=6_000)
    assert cache.compression_count > 100
    assert max(tenths) <= ROUNDING[dtype]
    assert max(tenths[1:]) <= 1.3 * tenths[0]


class Deep:
    """Evicts far behind the sinks; at every fourth time also a token in front of the others, so that they move up."""

    name = "deep"

    def plan(self, view: CacheView) -> list[Cut]:
        first = [(30, 31)] if view.ledger.next_index // 8 % 4 == 0 else []
        return cuts_of([*first, (60, 60 + view.must_evict - len(first))])


@pytest.mark.slow
def test_key_errors_do_not_grow_when_other_tokens_than_the_oldest_are_evicted() -> None:
    """Tokens that survive hundreds of evictions in front of and behind them are rotated once, from their originals."""
    tenths, cache = errors_over(torch.bfloat16, 4_000, Deep(), chunk=8)
    assert cache.compression_count > 400
    assert max(tenths) <= ROUNDING[torch.bfloat16]


def test_rotating_step_by_step_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: originals that are taken anew from the cache at each eviction, in 16 bits."""
    original = fronts.save_originals

    def forgetful(layers: Sequence[StreamingLayer], prefix: int) -> None:
        for layer in layers:
            layer._originals = None
        original(layers, prefix)

    monkeypatch.setattr(fronts, "save_originals", forgetful)
    tenths, _ = errors_over(torch.bfloat16, tokens=20_000)
    assert tenths[-1] > 3 * ROUNDING[torch.bfloat16]
    assert tenths[-1] > 1.25 * tenths[0]
