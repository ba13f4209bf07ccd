"""Changes of a small cache that are undone after newer tokens were removed: every change, every number of tokens left.

The expected state is that of another cache with the same changes up to the mark, and then the same tokens removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from streamchat.cache.checkpoint import capture
from streamchat.cache.eviction.policy import Cut
from streamchat.cache.history import CacheHistory, evicted_by
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.paging import page_in
from streamchat.cache.positions.rotation import TensorRotation
from tests.support.bare_cache import HEADS, WIDTH, Fed, bare_cache, fed, fit_of, rotary_source

SIZE, SINKS = 8, 1
TURN = TensorRotation(rotary_source(), 0, False)
KEYS, BOTH = LayerRotation(TURN), LayerRotation(TURN, TURN)
Change = Callable[[Fed], object]


def history_of(it: Fed) -> CacheHistory:
    assert it.cache.history is not None
    return it.cache.history


def cut(first: int, count: int) -> Change:
    """Evict `count` slots from slot `first` on."""
    return lambda it: it.cache._cut(Cut(first, count))


def rebase(to: int) -> Change:
    return lambda it: it.cache.rebase_positions(to)


def paged(*skipped: int) -> Change:
    """Page in what the last eviction evicted, without its tokens of these numbers."""

    def change(it: Fed) -> None:
        tokens = [found for step in history_of(it).since(0) if (found := evicted_by(step)) is not None]
        indices = [i for first, stop in tokens[-1].runs for i in range(first, stop)]
        wanted = [(index, index + 1) for number, index in enumerate(indices) if number not in skipped]
        page_in(it.cache, tokens, wanted)

    return change


CASES: dict[str, list[Change]] = {
    "first slots": [cut(0, 3)],
    "after a sink": [cut(1, 7)],
    "from the middle": [cut(3, 2)],
    "the newest": [cut(5, 3)],
    "twice": [cut(2, 2), cut(1, 2)],
    "moved ones": [cut(4, 1), cut(1, 4)],
    "moved ones, then later ones": [cut(4, 2), cut(2, 3)],
    "rebased": [cut(2, 2), rebase(0)],
    "rebased, then evicted": [cut(3, 1), rebase(3), cut(1, 4)],
    "paged in": [cut(3, 3), paged()],
    "paged in apart": [cut(1, 5), paged(1, 2)],
    "paged in between moved ones": [cut(5, 1), cut(2, 2), paged(0)],
    "paged in, then evicted": [cut(2, 3), paged(), cut(1, 3)],
}
LAYERS = [(1, KEYS, None), (2, BOTH, None), (2, KEYS, torch.int8)]


def started(layers: int, rotation: LayerRotation, dtype: Any) -> Fed:
    """A cache whose tokens end with its buffers, some of them moved before."""
    it = Fed(bare_cache(SIZE, SINKS, layers, fit=fit_of(layers, rotation=rotation), dtype=dtype))
    for count in (8, 7, 7, 2):
        it.feed(count)
    assert it.cache.streaming_layers[0].end == it.cache.streaming_layers[0].slots == 24
    return it


def agree(found: Fed, expected: Fed) -> None:
    assert (found.cache.ledger, found.cache.lengths) == (expected.cache.ledger, expected.cache.lengths)
    one, other = capture(found.cache), capture(expected.cache)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    if other.length:
        assert one.bases == other.bases
    assert [layer.base for layer in found.cache.streaming_layers if not layer.length] == (
        [] if other.length else [0] * len(other.bases)
    )


@pytest.mark.parametrize(("layers", "rotation", "dtype"), LAYERS)
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_changes_are_undone_up_to_any_earlier_token(
    changes: list[Change], layers: int, rotation: LayerRotation, dtype: Any
) -> None:
    assert list(started(1, KEYS, None).cache.ledger) == [0, *range(17, 24)]
    # one layer tells all cases apart; the others add what depends on values, on several layers, and on scales
    marks, stops = (len(changes), (0, *range(17, 25))) if layers == 1 else (1, (17, 20, 24))
    for done in range(marks):
        for stop in stops:
            it, expected = (started(layers, rotation, dtype) for _ in range(2))
            for change in changes[:done]:
                change(it)
                change(expected)
            mark, form = history_of(it).mark, it.cache.form
            for change in changes[done:]:
                change(it)
            it.cache.crop_from(stop)
            history_of(it).undo_to(mark, stop)
            expected.cache.crop_from(stop)
            assert (history_of(it).mark, it.cache.form) == (mark, form)
            agree(it, expected)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_cache_goes_on_after_an_undo_as_if_nothing_had_happened(changes: list[Change]) -> None:
    for stop in (22, 20, 19):
        it, expected = (started(1, KEYS, None) for _ in range(2))
        mark = history_of(it).mark
        for change in changes:
            change(it)
        it.cache.crop_from(stop)
        history_of(it).undo_to(mark, stop)
        expected.cache.crop_from(stop)
        for each in (it, expected):
            later = history_of(each).mark
            at = each.cache.ledger.next_index
            each.feed(3)
            each.cache._cut(Cut(2, 1))
            each.cache.rebase_positions(7)
            each.cache.crop_from(at)
            history_of(each).undo_to(later, at)
        agree(it, expected)


def test_only_tokens_before_the_running_turn_are_recorded() -> None:
    it = fed(16, 2, 12)
    cut(4, 2)(it)
    history_of(it).begin_turn()
    it.feed(2)
    cut(2, 10)(it)
    *_, step = history_of(it).since(0)
    tokens = evicted_by(step)
    assert tokens is not None
    assert (tokens.runs, tokens.count, tokens.moved) == (((2, 4), (6, 12)), 8, 2)
    assert torch.equal(tokens.slots.of(1)["values"], it.values[1][..., [2, 3, *range(6, 12)], :])


def test_an_insertion_saves_only_what_cannot_be_written_again() -> None:
    it = fed(8, 1, 8, layers=1)
    cut(3, 2)(it)
    before = history_of(it).nbytes
    paged()(it)  # the slots before it are written from their originals
    assert history_of(it).nbytes == before


def test_an_eviction_saves_only_what_cannot_be_written_again() -> None:
    it, token = fed(8, 1, 8, layers=1), 2 * HEADS * WIDTH * 4
    history = history_of(it)
    cut(4, 1)(it)
    assert history.nbytes == (1 + 4) * token  # the evicted one, and those that it moves for the first time
    cut(1, 2)(it)
    assert history.nbytes == (5 + 2 + 2) * token  # two, and their originals
    history.undo_to(1, 8)
    cut(4, 1)(it)
    assert history.nbytes == (5 + 1) * token  # those before it are again as their originals
