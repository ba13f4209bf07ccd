"""Kept tokens and logits against the slow reference: every chunk size, both attention paths, through rebases."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from streamchat.base.errors import ChunkTooLargeError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.selfcheck import self_check
from streamchat.cache.streaming import StreamingCache
from tests.support.family_runs import with_lost_sinks
from tests.support.reference import Reference
from tests.support.tiny import config_of, fresh_model, random_ids, tiny_model

BUDGET, SINKS = 32, 4
TOLERANCE = 2e-5
pytestmark = pytest.mark.smoke


def stream(model: Any, cache: StreamingCache, ids: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Feed (1, n) ids in chunks under the hook; logits of each."""
    out, at = [], 0
    with StreamingHook(model, cache), torch.inference_mode():
        for size in sizes:
            out.append(model(input_ids=ids[:, at : at + size], use_cache=True, **{cache_keyword(model): cache}).logits)
            at += size
    return out


def schedule(chunk: int) -> list[int]:
    """A prompt that does not fill the budget, then chunks far past it, then single tokens."""
    return [20, *[chunk] * max(4, 120 // chunk), 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("chunk", [1, 7, BUDGET - SINKS - 1, BUDGET - SINKS])
def test_kept_tokens_and_logits_equal_the_reference(family: str, attention: str, chunk: int) -> None:
    model = tiny_model(family, attention)
    fit = fit_positions(model)
    sizes = schedule(chunk)
    ids = random_ids(sum(sizes))
    cache = StreamingCache(model.config, fit, cache_size=BUDGET, num_sink_tokens=SINKS)
    reference = Reference(model, BUDGET, SINKS)
    at = 0
    for size, logits in zip(sizes, stream(model, cache, ids, sizes), strict=True):
        expected = reference.feed(ids[0, at : at + size])
        assert (logits[0].double() - expected).abs().max().item() < TOLERANCE
        at += size
    assert list(cache.ledger) == reference.kept
    assert cache.lengths == [BUDGET] * 3
    assert expected.std() > 0.5  # a model that says nothing would agree with anything


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_rebase_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    fit = fit_positions(model)
    ids = random_ids(400)
    cache = StreamingCache(model.config, fit, cache_size=BUDGET, num_sink_tokens=SINKS)
    cache.position_limit = 2 * BUDGET
    reference = Reference(model, BUDGET, SINKS)
    positions = []
    for i in range(400):
        logits = stream(model, cache, ids[:, i : i + 1], [1])[0]
        positions.append(cache.next_position)
        expected = reference.feed(ids[0, i : i + 1])
        assert (logits[0].double() - expected).abs().max().item() < TOLERANCE
    assert max(positions) <= 2 * BUDGET
    assert sum(b < a for a, b in pairwise(positions)) > 5


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_unmoved_sinks_would_be_noticed(family: str) -> None:
    """The control of the tests above: the classic mistake is orders of magnitude above their tolerance."""
    model = tiny_model(family)
    fit = fit_positions(model)
    ids = random_ids(200)
    cache = with_lost_sinks(StreamingCache(model.config, fit, cache_size=BUDGET, num_sink_tokens=SINKS))
    reference = Reference(model, BUDGET, SINKS)
    logits = stream(model, cache, ids, [20, *[1] * 180])
    expected = reference.feed(ids[0, :20])
    for i in range(20, 200):
        expected = reference.feed(ids[0, i : i + 1])
    assert (logits[-1][0].double() - expected).abs().max().item() > 1000 * TOLERANCE


@pytest.mark.parametrize("size", [BUDGET - SINKS + 1, BUDGET + 1, 5 * BUDGET])
def test_a_chunk_that_cannot_fit_is_refused_and_changes_nothing(size: int) -> None:
    model = tiny_model("llama")
    cache = StreamingCache(model.config, fit_positions(model), cache_size=BUDGET, num_sink_tokens=SINKS)
    ids = random_ids(20 + size)
    stream(model, cache, ids, [20])
    before = list(cache.ledger)
    with pytest.raises(ChunkTooLargeError, match=f"{size} new tokens .* chunks of at most {BUDGET - SINKS}"):
        stream(model, cache, ids[:, 20:], [size])
    assert list(cache.ledger) == before
    assert cache.lengths == [20] * 3
    # the whole budget at once is fine while the cache is empty
    cache.reset()
    stream(model, cache, random_ids(BUDGET), [BUDGET])
    assert cache.lengths == [BUDGET] * 3


@pytest.mark.parametrize("weights", ["attending", "as initialised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_self_check_passes_and_catches_wrong_rotations(family: str, dtype: torch.dtype, weights: str) -> None:
    """Also on freshly initialised weights, whose attention is so flat that 16-bit logits hardly tell."""
    if weights == "attending":
        model = tiny_model(family)
    else:
        torch.manual_seed(0)
        model = fresh_model(config_of(family))
    model = model.to(dtype)
    fit = fit_positions(model)
    check = self_check(model, fit)
    assert check.ok
    assert check.tensors < (1e-5 if dtype == torch.float32 else 0.05)
    right = fit.layers[1]
    assert right.keys is not None
    swapped = LayerRotation(replace(right.keys, interleaved=True), None)
    backwards = LayerRotation(replace(right.keys, reverse=True), None)
    values_too = LayerRotation(right.keys, right.keys)
    for wrong in (LayerRotation(), swapped, backwards, values_too):
        broken = replace(fit, layers=(fit.layers[0], wrong, fit.layers[2]))
        assert not self_check(model, broken).ok
