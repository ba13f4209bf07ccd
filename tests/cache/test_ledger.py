"""The ledger and the eviction plan, against lists that are written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.errors import CacheFullError, ChunkTooLargeError
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Occupancy, Retention, merged_runs, plan_cuts, plan_eviction

STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "evict", "crop"]), st.integers(0, 12), st.integers(0, 12)), max_size=30
)


@given(STEPS)
def test_the_ledger_is_a_list_of_log_indices(steps: list[tuple[str, int, int]]) -> None:
    ledger, slots, fed = Ledger(), list[int](), 0
    for kind, count, prefix in steps:
        if kind == "append":
            ledger.append(count)
            slots += range(fed, fed + count)
            fed += count
        elif kind == "evict":
            dropped = ledger.evict(prefix, count)
            expected, slots = slots[prefix : prefix + count], slots[:prefix] + slots[prefix + count :]
            assert [i for first, stop in dropped for i in range(first, stop)] == expected
        else:
            kept = max(0, len(slots) - count)
            ledger.crop(count)
            fed = slots[kept] if kept < len(slots) else fed
            slots = slots[:kept]
        assert list(ledger) == slots
        assert len(ledger) == len(slots)
        assert ledger.next_index == fed
        assert all(first < stop for first, stop in ledger.runs)
        # neighbouring runs are joined, or there would be one per token in the end
        assert all(a[1] < b[0] for a, b in zip(ledger.runs, ledger.runs[1:], strict=False))
        for index in range(fed + 2):
            assert ledger.slot_from(index) == sum(i < index for i in slots)
        for slot, index in enumerate(slots):
            assert ledger.index_at(slot) == index
        assert ledger.index_at(len(slots)) == fed
        assert ledger.count_in(2, 7) == sum(2 <= i < 7 for i in slots)


def test_dropping_nothing_splits_nothing() -> None:
    ledger = Ledger()
    ledger.append(10)
    assert ledger.evict(3, 0) == []
    assert ledger.runs == [(0, 10)]


def test_a_slot_past_the_end_is_an_error() -> None:
    ledger = Ledger()
    ledger.append(3)
    with pytest.raises(IndexError, match="past the end"):
        ledger.index_at(4)


def plan(length: int, incoming: int, **options: Any) -> int:
    """Of a cache of 100 tokens with 10 that stay."""
    return plan_eviction(Occupancy(length, 10, 100), incoming, **options)


@pytest.mark.parametrize(
    ("length", "incoming", "options", "dropped"),
    [
        (99, 1, {}, 0),
        (100, 1, {}, 1),
        (100, 1, {"block": 16}, 16),
        (90, 30, {"block": 16}, 20),
        (100, 90, {}, 90),
        # whole turns: the first start that makes the room, the whole reserve where that is possible
        (100, 5, {"boundaries": [10, 12, 30, 60]}, 20),
        (100, 5, {"boundaries": [10, 12, 30, 60], "reserve": 20}, 50),
        (60, 30, {"boundaries": [10, 30, 50], "reserve": 20}, 20),
        # the reserve is never worth the newest turn
        (100, 5, {"boundaries": [10, 30, 60, 100], "reserve": 80}, 50),
        (95, 5, {"boundaries": [10, 95], "reserve": 20}, 0),
        # but what must fit does go before it
        (95, 20, {"boundaries": [10, 95], "reserve": 20}, 85),
        # one turn larger than what is left: tokens of it
        (100, 5, {"boundaries": [10]}, 5),
        (100, 5, {"boundaries": [10], "block": 16}, 16),
        # the window begins where the caller says that it may
        (100, 5, {"clean_cut": lambda slot: slot + 2}, 7),
        (100, 5, {"clean_cut": lambda slot: 1000}, 90),
    ],
)
def test_what_is_dropped(length: int, incoming: int, options: dict[str, object], dropped: int) -> None:
    assert plan(length, incoming, **options) == dropped


@given(
    length=st.integers(10, 100),
    incoming=st.integers(1, 90),
    reserve=st.integers(0, 200),
    boundaries=st.lists(st.integers(0, 110), max_size=6).map(sorted),
    block=st.integers(1, 40),
    step=st.integers(0, 50),
)
def test_there_is_always_room_and_the_prefix_always_stays(
    length: int, incoming: int, reserve: int, boundaries: list[int], block: int, step: int
) -> None:
    count = plan(
        length, incoming, reserve=reserve, boundaries=boundaries, block=block, clean_cut=lambda slot: slot + step
    )
    assert 0 <= count <= length - 10
    assert length - count + incoming <= 100
    if length + incoming + reserve <= 100:
        assert count == 0


def test_a_chunk_larger_than_the_room_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ChunkTooLargeError, match=r"91 new tokens .* at most 90"):
        plan(50, 91)


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=4)


@given(
    fed=st.integers(0, 100),
    already=st.integers(0, 40),
    sinks=st.integers(0, 6),
    pins=RUNS,
    size=st.integers(8, 64),
    incoming=st.integers(1, 64),
    reserve=st.integers(0, 30),
    starts=st.lists(st.integers(0, 100), max_size=5).map(sorted),
    block=st.integers(1, 16),
    step=st.integers(0, 4),
)
def test_cuts_keep_sinks_pins_and_order(
    fed: int,
    already: int,
    sinks: int,
    pins: list[tuple[int, int]],
    size: int,
    incoming: int,
    reserve: int,
    starts: list[int],
    block: int,
    step: int,
) -> None:
    """Whatever is asked: room is made or refused with what fits, and only the oldest unpinned tokens are gone."""
    ledger = Ledger()
    ledger.append(fed)
    ledger.evict(sinks, min(already, max(0, fed - sinks)))
    ledger.evict(0, 0)
    if len(ledger) > size:
        ledger.crop(len(ledger) - size)
    retention = Retention(size, sinks, tuple(merged_runs((first, first + count) for first, count in pins)))
    before = list(ledger)
    kept = set(before[:sinks]) | {i for i in before for first, stop in retention.pins if first <= i < stop}
    planned = partial(plan_cuts, ledger, retention, incoming, reserve=reserve, turn_starts=starts, block=block)
    if incoming > size - len(kept):
        with pytest.raises(ChunkTooLargeError, match=f"at most {size - len(kept)}"):
            planned()
        return
    cuts = planned(clean_cut=lambda index: index + step)
    assert list(ledger) == before
    for cut in cuts:
        ledger.evict(cut.at, cut.count)
    after = list(ledger)
    assert len(after) + incoming <= size
    assert kept <= set(after)
    assert after == sorted(after)
    gone = [i for i in before if i not in after]
    # oldest unpinned first, without a gap
    assert gone == [i for i in before if i not in kept][: len(gone)]
    if len(before) + incoming + reserve <= size:
        assert not gone
    if not gone:
        assert cuts == []


def test_nothing_is_evicted_where_that_is_not_wanted() -> None:
    ledger = Ledger()
    ledger.append(20)
    assert plan_cuts(ledger, Retention(24, 4), 4, reserve=9, evict=False) == []
    with pytest.raises(CacheFullError, match="5 new tokens do not fit next to the 20 cached ones in a cache of 24"):
        plan_cuts(ledger, Retention(24, 4), 5, evict=False)
