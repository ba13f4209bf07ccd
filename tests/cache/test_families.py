"""Every family against the paper's arithmetic, in float32, on tiny random models whose logits have a spread of 1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.rotation import RotarySource
from streamchat.cache.positions.selfcheck import self_check
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.press import StreamingPress
from streamchat.cache.streaming import StreamingCache
from streamchat.verify.run import verify
from tests.support.families import FAMILIES, SERVED, build, text
from tests.support.family_runs import (
    BUDGET,
    SINKS,
    TOLERANCE,
    Subject,
    expected,
    largest,
    rebasing,
    schedule,
    stream,
    subject,
    with_lost_sinks,
    with_unmoved_sinks,
    with_unturned_rebase,
)
from tests.support.paper_reference import banded_logits

# One of each kind also runs at the other end of the transformers range; hybrids read single tokens only there.
SMOKE = {"llama", "gpt_neox", "gemma3_window_16", "phi3_longrope", "deepseek_v3", "bloom", "gpt2"}
ROTATED = [name for name in SERVED if FAMILIES[name].served == "rotation"]
MOVED = [name for name in SERVED if FAMILIES[name].served != "recompute"]
PINNED_SINKS = [name for name in ROTATED if FAMILIES[name].sinks_seen]


def over(names: list[str], attentions: bool = False) -> list[Any]:
    """Parameters for these families: the smoke ones, and the others, which are slow together."""
    return [
        pytest.param(*case, id="-".join(case), marks=[pytest.mark.smoke if case[0] in SMOKE else pytest.mark.slow])
        for name in names
        for case in ([(name, attention) for attention in FAMILIES[name].attentions] if attentions else [(name,)])
    ]


def default_attention(name: str) -> str:
    return FAMILIES[name].attentions[0]


def beginnings(it: Subject, cache: StreamingCache) -> tuple[Tensor, Tensor]:
    """Logits of the first 90 tokens through `cache`, and the right ones: 58 evict, and 26 follow a rebase."""
    sizes = schedule(it.name)[:71]
    count, goal = sum(sizes), expected(it.name, default_attention(it.name))
    return stream(it.model, cache, text(count), sizes), goal.logits[:count]


def test_there_are_enough_of_them() -> None:
    assert len(SERVED) >= 50
    assert len(ROTATED) >= 45


# --- what is served is right -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attention"), over(SERVED, attentions=True))
def test_logits_are_the_paper_s(name: str, attention: str) -> None:
    """A prompt, 112 single tokens of which 100 evict, chunks of 7, singles; with one attention also with rebases."""
    it = subject(name, attention)
    goal = expected(name, attention)
    assert it.fit.method == FAMILIES[name].served
    cache = it.new_cache()
    logits = it.run(cache)
    assert list(cache.ledger) == goal.kept
    assert set(cache.lengths) == {len(goal.kept)}
    assert largest(logits, goal.logits) <= TOLERANCE
    if attention != default_attention(name):
        return
    rebased = rebasing(it.new_cache())
    assert largest(it.run(rebased), goal.logits) <= TOLERANCE
    if it.fit.rotates:
        assert rebased.next_position <= 2 * BUDGET < cache.next_position or it.fit.position_limit is not None


@pytest.mark.parametrize("name", over([n for n in MOVED if FAMILIES[n].in_one_text is not None]))
def test_without_sinks_it_is_one_forward_under_a_banded_mask(name: str) -> None:
    """A reference without any cache, rotation or ledger: evicted is masked."""
    family = FAMILIES[name]
    it = subject(name, default_attention(name))
    sizes = [12] + [1] * 60 + ([5] * 3 if family.chunks else [])
    ids = text(sum(sizes))
    logits = stream(it.model, it.new_cache(sinks=0), ids, sizes)
    model = build(name, default_attention(name), **dict(family.in_one_text or {}))
    # Qwen3-Next's recurrent layers round differently at once and in steps: by 3e-5, also with nothing evicted.
    tolerance = 3 * TOLERANCE if name == "qwen3_next" else TOLERANCE
    assert largest(logits, banded_logits(model, ids, sizes, BUDGET)) <= tolerance


@pytest.mark.parametrize("name", over([name for name in SERVED if FAMILIES[name].chunks]))
def test_a_chunk_is_its_tokens_one_by_one(name: str) -> None:
    """On a cache that has evicted, with the room for the chunk made before."""
    it = subject(name, default_attention(name))
    ids = text(80)

    def tail(sizes: list[int]) -> Tensor:
        cache = it.new_cache()
        stream(it.model, cache, ids, [20] + [1] * 50)
        cache.make_room(7)
        return stream(it.model, cache, ids[:, 70:], sizes)

    assert largest(tail([7]), tail([1] * 7)) <= TOLERANCE


@pytest.mark.parametrize("name", over(SERVED))
def test_generate_goes_far_past_the_budget(name: str) -> None:
    """`generate` under the press writes what feeding its own output token by token gives."""
    it = subject(name, default_attention(name))
    prompt = text(12)
    with StreamingPress(it.model, cache_size=BUDGET, num_sink_tokens=SINKS, fit=it.fit) as press:
        out = it.model.generate(prompt, max_new_tokens=70, min_new_tokens=70, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
    ids = out.sequences
    logits = stream(it.model, it.new_cache(), ids[:, :-1], [12] + [1] * 69)
    assert largest(torch.cat(list(out.logits)), logits[11:]) <= TOLERANCE
    assert max(press.lengths) <= BUDGET


@pytest.mark.parametrize("name", over(SERVED))
def test_verify_is_green(name: str) -> None:
    it = subject(name, default_attention(name))
    result = verify(it.model, text(40)[0].tolist(), cache_size=24, new_tokens=24)
    assert [check for check in result.checks if not check.ok] == []


# --- mistakes are caught, by the comparison above and at load ---------------------------------------------------


@pytest.mark.parametrize("name", over(PINNED_SINKS))
def test_sinks_that_are_not_moved_show(name: str) -> None:
    it = subject(name, default_attention(name))
    if all(layer.keys is None and layer.values is None for layer in it.fit.layers):
        pytest.skip("nothing is turned")
    assert largest(*beginnings(it, with_unmoved_sinks(it.new_cache()))) > 100 * TOLERANCE


@pytest.mark.parametrize("name", over(ROTATED))
def test_a_rebase_that_does_not_turn_keys_shows(name: str) -> None:
    it = subject(name, default_attention(name))
    assert largest(*beginnings(it, with_unturned_rebase(it.new_cache()))) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "name", over([n for n in SERVED if FAMILIES[n].served != "recompute" and FAMILIES[n].sinks_seen])
)
def test_sinks_that_are_dropped_show(name: str) -> None:
    it = subject(name, default_attention(name))
    assert largest(*beginnings(it, with_lost_sinks(it.new_cache()))) > 100 * TOLERANCE


class _Doubled:
    """A rotary source whose base is another one: all angles are twice as large."""

    def __init__(self, source: RotarySource) -> None:
        self._source = source

    def angles_range(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = self._source.angles_range(start, count, device)
        return cos * cos - sin * sin, 2 * cos * sin

    def wide_range(self, start: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles_range(start, count, device)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _changed(fit: PositionFit, change: Callable[[int, str, Any], Any]) -> PositionFit:
    layers = [
        LayerRotation(*(change(i, name, getattr(layer, name)) for name in ("keys", "values")))
        for i, layer in enumerate(fit.layers)
    ]
    return replace(fit, layers=tuple(layers))


def swapped_layout(fit: PositionFit) -> PositionFit:
    return _changed(fit, lambda i, name, r: r and replace(r, interleaved=not r.interleaved))


def turned_back(fit: PositionFit) -> PositionFit:
    return _changed(fit, lambda i, name, r: r and replace(r, reverse=not r.reverse))


def doubled_base(fit: PositionFit) -> PositionFit:
    return _changed(fit, lambda i, name, r: r and replace(r, source=_Doubled(r.source)))


def one_layer_forgotten(fit: PositionFit) -> PositionFit:
    rotated = [i for i, layer in enumerate(fit.layers) if layer.keys is not None or layer.values is not None]
    return _changed(fit, lambda i, name, r: None if i == rotated[-1] else r)


WRONG = [swapped_layout, turned_back, doubled_base, one_layer_forgotten]


@pytest.mark.parametrize("name", over(ROTATED))
def test_wrong_rotations_fail_the_self_check(name: str) -> None:
    it = subject(name, default_attention(name))
    assert self_check(it.model, it.fit).ok
    for mistake in WRONG:
        wrong = mistake(it.fit)
        assert wrong != it.fit
        assert not self_check(it.model, wrong).ok, mistake.__name__


@pytest.mark.parametrize("name", over([name for name in ROTATED if name in SMOKE]))
def test_wrong_rotations_show_in_the_logits(name: str) -> None:
    """Independent of the self-check: whatever a mistake in the fit does, the comparison with the paper sees it."""
    it = subject(name, default_attention(name))
    for mistake in WRONG:
        cache = rebasing(replace(it, fit=mistake(it.fit)).new_cache())
        assert largest(*beginnings(it, cache)) > 100 * TOLERANCE, mistake.__name__


@pytest.mark.parametrize("name", over([n for n in ("smollm3", "cohere2_window_16", "llama4") if n in SERVED]))
def test_turning_what_carries_no_position_fails_the_self_check(name: str) -> None:
    it = subject(name, default_attention(name))
    some = next(layer.keys for layer in it.fit.layers if layer.keys is not None)
    still = [i for i, layer in enumerate(it.fit.layers) if layer.keys is None]
    assert still
    wrong = _changed(it.fit, lambda i, which, r: some if i in still and which == "keys" else r)
    assert not self_check(it.model, wrong).ok


# --- what is not served is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", over([n for n, f in FAMILIES.items() if f.served == "refused" and f.available]))
def test_others_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=FAMILIES[name].reason):
        choose_fit(build(name, default_attention(name)))


def test_attention_in_chunks_needs_a_budget_within_one() -> None:
    it = subject("llama4", "sdpa")
    config = copy.deepcopy(it.model.config)
    config.attention_chunk_size = 16
    model = type(it.model)(config).eval()
    with pytest.raises(UnsupportedModelError, match="set cache_size to at most 16"):
        StreamingPress(model, cache_size=BUDGET)


def test_schedules_evict_a_hundred_times_and_more() -> None:
    sizes = schedule("llama")
    assert sizes[0] < BUDGET
    assert sum(sizes) > 4 * BUDGET
