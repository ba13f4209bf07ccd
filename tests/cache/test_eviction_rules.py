"""How many of the oldest tokens go, which turns are alike, and what is cut: written out, or in plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policies.key_diversity import similarities
from streamchat.cache.eviction.policies.oldest_turns import count_oldest
from streamchat.cache.eviction.policy import CacheView, Cut, cuts_of
from streamchat.cache.layers.fronts import evict_slots
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer

TURNS = (0, 4, 7)
NEXT = (0, 4, 7, 10)
"""The same, with the start of a turn that is about to be fed."""


@pytest.mark.parametrize(
    ("must", "reserve", "starts", "options", "count"),
    [
        # whole turns, as few as there must be room for
        (1, 0, TURNS, {}, 4),
        (4, 0, TURNS, {}, 4),
        (5, 0, TURNS, {}, 7),
        (7, 0, TURNS, {}, 7),
        # tokens of the newest turn, if that is all there is
        (8, 0, TURNS, {}, 8),
        (8, 0, TURNS, {"block": 9}, 9),
        (8, 0, TURNS, {"block": 3}, 8),
        (8, 0, NEXT, {}, 10),
        # for a reserve, too, but not the newest turn
        (2, 2, TURNS, {}, 4),
        (2, 3, TURNS, {}, 7),
        (2, 6, TURNS, {}, 7),
        (2, 6, NEXT, {}, 7),
        (4, 6, (0, 4, 10), {}, 4),
        (0, 4, TURNS, {}, 4),
        (0, 6, (0, 4, 10), {}, 4),
        (0, 6, (0, 10), {}, 0),
        (0, 6, (0,), {}, 0),
        (0, 6, (), {}, 0),
        # unless there is no room otherwise
        (5, 6, (0, 10), {}, 10),
        (5, 6, (0, 4, 10), {}, 10),
        # tokens, wherever turns start
        (3, 4, (), {}, 3),
        (3, 4, (), {"block": 5}, 5),
        (3, 4, (), {"block": 20}, 10),
        (3, 0, (), {"clean_cut": lambda index: -(-index // 4) * 4}, 4),
        (4, 0, (), {"clean_cut": lambda index: -(-index // 4) * 4}, 4),
        (9, 0, (), {"clean_cut": lambda index: 12}, 10),
    ],
)
def test_the_oldest_are_counted(
    must: int, reserve: int, starts: tuple[int, ...], options: dict[str, Any], count: int
) -> None:
    view = CacheView(Ledger([(0, 10)], 10), (), 10, must, reserve, **options)
    assert count_oldest(view, starts) == count


def test_runs_of_slots_become_cuts_that_count_what_is_gone_before() -> None:
    assert cuts_of([]) == cuts_of([(3, 3)]) == []
    assert cuts_of([(3, 3), (5, 7), (1, 2), (2, 3)]) == [Cut(1, 2), Cut(3, 2)]
    assert cuts_of([(8, 9), (0, 4), (2, 5)]) == [Cut(0, 5), Cut(3, 1)]


def test_turns_are_compared_by_their_mean_keys() -> None:
    """The mean over layers, heads, and rows of the cosine of two turns' mean keys."""
    turns, width = ((2, 5), (5, 6), (6, 10)), 4
    keys = torch.randn(3, 2, 5, 12, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked: list[tuple[int, int]] = []

    def fetch(first: int, stop: int) -> Iterator[Tensor]:
        asked.append((first, stop))
        yield from keys[..., first:stop, :].float()

    def cosine(one: list[float], other: list[float]) -> float:
        product = sum(a * b for a, b in zip(one, other, strict=True))
        return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))

    expected = torch.zeros(3, 3, dtype=torch.float64)
    for layer in keys:
        for head in layer.flatten(0, 1):
            means = [
                [sum(float(head[slot, i]) for slot in range(*turn)) / (turn[1] - turn[0]) for i in range(width)]
                for turn in turns
            ]
            for i, one in enumerate(means):
                for j, other in enumerate(means):
                    expected[i, j] += cosine(one, other) / (3 * 2 * 5)
    view = CacheView(Ledger([(0, 12)], 12), (), 12, fetch_keys=fetch)
    found = similarities(view, turns)
    assert (found.dtype, asked) == (torch.float64, [(2, 10)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_evicting_nothing_or_from_empty_layers_changes_nothing() -> None:
    layers = [StreamingLayer(8, LayerRotation()) for _ in range(2)]
    evict_slots(layers, 0, 3)
    assert [(layer.start, layer.end, layer.base) for layer in layers] == [(0, 0, 0)] * 2
    for layer in layers:
        layer.update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2))
    evict_slots(layers, 2, 0)
    assert [(layer.length, layer.base, layer.num_originals) for layer in layers] == [(5, 0, 0)] * 2
    evict_slots(layers, 2, 1)
    assert [(layer.length, layer.base, layer.num_originals) for layer in layers] == [(4, 1, 2)] * 2
