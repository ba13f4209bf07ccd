"""Every registered eviction policy without a model, and the guard that refuses what a policy must not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.errors import CacheFullError, ChunkTooLargeError, ConfigError, EvictionPlanError
from streamchat.base.eviction_policies import DEFAULT_POLICY, POLICIES, RENAMED_POLICIES
from streamchat.cache.eviction import policies
from streamchat.cache.eviction.guard import plan_cuts
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policies import load_policy
from streamchat.cache.eviction.policy import CacheView, Cut, Retention, merged_runs, starts_after

OLDEST_FIRST = ("oldest-turns", "oldest-tokens")


def view_of(
    length: int,
    incoming: int,
    *,
    cache_size: int = 100,
    sinks: int = 10,
    pins: tuple[tuple[int, int], ...] = (),
    **options: Any,
) -> CacheView:
    """Of a cache in which log indices are slots."""
    ledger = Ledger()
    ledger.append(length)
    retained = tuple(Retention(cache_size, sinks, pins).retained_slots(ledger))
    return CacheView(ledger, retained, cache_size, incoming, **options)


def left_by(policy: str, view: CacheView) -> list[int]:
    """The log indices that stay."""
    ledger = view.ledger.first(len(view.ledger))
    for cut in plan_cuts(load_policy(policy), view):
        ledger.evict(cut.at, cut.count)
    return list(ledger)


# --- the registry ---------------------------------------------------------------------------------------------


def test_each_registered_policy_is_the_module_of_its_name_and_there_are_no_others() -> None:
    for name in POLICIES:
        assert load_policy(name).name == name
    modules = {path.stem for path in Path(policies.__file__).parent.glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in POLICIES} == modules
    assert DEFAULT_POLICY in POLICIES
    assert set(RENAMED_POLICIES.values()) <= set(POLICIES)
    assert not set(RENAMED_POLICIES) & set(POLICIES)


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="newest is not an eviction policy; choose from oldest-turns, oldest-tokens"):
        load_policy("newest")


# --- oldest first ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "incoming", "options", "dropped"),
    [
        (99, 1, {}, 0),
        (100, 1, {}, 1),
        (100, 1, {"block": 16}, 16),
        (90, 30, {"block": 16}, 20),
        (100, 90, {}, 90),
        # whole turns: the first start that makes the room, the whole reserve where that is possible
        (100, 5, {"turn_starts": (10, 12, 30, 60)}, 20),
        (100, 5, {"turn_starts": (10, 12, 30, 60), "reserve": 20}, 50),
        (60, 30, {"turn_starts": (10, 30, 50), "reserve": 20}, 20),
        # the reserve is never worth the newest turn
        (100, 5, {"turn_starts": (10, 30, 60, 100), "reserve": 80}, 50),
        (95, 5, {"turn_starts": (10, 95), "reserve": 20}, 0),
        # but what must fit does go before it
        (95, 20, {"turn_starts": (10, 95), "reserve": 20}, 85),
        # one turn larger than what is left: tokens of it
        (100, 5, {"turn_starts": (10,)}, 5),
        (100, 5, {"turn_starts": (10,), "block": 16}, 16),
        # the window begins where the caller says that it may
        (100, 5, {"clean_cut": lambda index: index + 2}, 7),
        (100, 5, {"clean_cut": lambda index: 1000}, 90),
    ],
)
def test_what_the_oldest_turns_are(length: int, incoming: int, options: dict[str, Any], dropped: int) -> None:
    left = left_by("oldest-turns", view_of(length, incoming, **options))
    assert left == [*range(10), *range(10 + dropped, length)]


def test_the_oldest_tokens_are_evicted_wherever_turns_start() -> None:
    view = view_of(100, 5, turn_starts=(10, 12, 30, 60))
    assert left_by("oldest-tokens", view) == [*range(10), *range(15, 100)]


def test_a_chunk_larger_than_the_room_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ChunkTooLargeError, match=r"91 new tokens .* at most 90"):
        plan_cuts(load_policy(DEFAULT_POLICY), view_of(50, 91))


def test_nothing_is_evicted_where_that_is_not_wanted() -> None:
    view, policy = view_of(20, 4, cache_size=24, sinks=4, reserve=9), load_policy(DEFAULT_POLICY)
    assert plan_cuts(policy, view, evict=False) == []
    with pytest.raises(CacheFullError, match="5 new tokens do not fit next to the 20 cached ones in a cache of 24"):
        plan_cuts(policy, replace(view, incoming=5), evict=False)


# --- every policy ---------------------------------------------------------------------------------------------

SLOTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=4)


@st.composite
def views(draw: st.DrawFn) -> tuple[CacheView, Retention]:
    """A cache after some evictions, anywhere behind the sinks, and what is asked of it."""
    size, sinks = draw(st.integers(8, 64)), draw(st.integers(0, 6))
    pins = tuple(merged_runs((first, first + count) for first, count in draw(SLOTS)))
    retention, ledger = Retention(size, sinks, pins), Ledger()
    ledger.append(draw(st.integers(0, 100)))
    starts = sorted(draw(st.sets(st.integers(0, ledger.next_index), max_size=8)))
    for first, count in draw(SLOTS):
        ledger.evict(max(sinks, first), count)
    if len(ledger) > size:
        ledger.evict(sinks, len(ledger) - size)
    starts = [start for start in starts if ledger.count_in(start, start + 1) or start == ledger.next_index]
    step = draw(st.integers(0, 4))
    keys = torch.randn(
        2, 1, 2, max(1, len(ledger)), 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
    )
    view = CacheView(
        ledger,
        tuple(retention.retained_slots(ledger)),
        size,
        draw(st.integers(1, 64)),
        draw(st.integers(0, 30)),
        tuple(starts),
        draw(st.integers(1, 16)),
        draw(st.sampled_from([None, lambda index: index + step, lambda index: -(-index // 5) * 5])),
        draw(st.sampled_from([None, lambda first, stop: iter(keys[..., first:stop, :])])),
    )
    return view, retention


@pytest.mark.parametrize("name", POLICIES)
@given(asked=views())
def test_room_is_made_and_nothing_else_is_touched(name: str, asked: tuple[CacheView, Retention]) -> None:
    """Whatever is asked: room is made or refused with what fits; sinks, pins and order stay; the guard agrees."""
    view, retention = asked
    before = list(view.ledger)
    kept = {i for slot, i in enumerate(before) if any(first <= slot < stop for first, stop in view.retained)}
    assert set(before[: retention.num_sink_tokens]) <= kept
    policy = load_policy(name)
    if view.incoming > view.cache_size - len(kept):
        with pytest.raises(ChunkTooLargeError, match=f"at most {view.cache_size - len(kept)}"):
            plan_cuts(policy, view)
        return
    cuts = plan_cuts(policy, view)
    assert list(view.ledger) == before
    assert plan_cuts(policy, view) == cuts
    ledger = view.ledger.first(len(before))
    dropped = [run for cut in cuts for run in ledger.evict(cut.at, cut.count)]
    after = list(ledger)
    assert len(after) + view.incoming <= view.cache_size
    assert kept <= set(after)
    assert after == [i for i in before if i in set(after)]
    if len(before) + view.incoming + view.reserve <= view.cache_size:
        assert cuts == []
    if cuts:
        left = starts_after(view.turn_starts, dropped, retention, ledger)
        assert set(left) <= set(after) | {ledger.next_index}
    if name in OLDEST_FIRST:
        gone = [i for i in before if i not in set(after)]
        assert gone == [i for i in before if i not in kept][: len(gone)]


# --- the guard ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """Makes a plan that was written out."""

    cuts: Sequence[Cut] | Callable[[CacheView], Sequence[Cut]]
    name: str = "planned"

    def plan(self, view: CacheView) -> Sequence[Cut]:
        return self.cuts(view) if callable(self.cuts) else self.cuts


# 40 tokens in a cache of 40 with 4 sinks and slots 10 to 14 pinned; turns start at 4, 20 and 30; text may start at
# every third token
GUARDED = view_of(
    *(40, 6),
    cache_size=40,
    sinks=4,
    pins=((10, 15),),
    turn_starts=(4, 20, 30),
    clean_cut=lambda index: -(-index // 3) * 3,
)


@pytest.mark.parametrize(
    ("cuts", "fault"),
    [
        ([Cut(4, 0), Cut(5, 6)], "cuts 0 slots at slot 4 of 40, which is outside of the cache"),
        ([Cut(-6, 6)], "cuts 6 slots at slot -6 of 40, which is outside of the cache"),
        ([Cut(30, 11)], "cuts 11 slots at slot 30 of 40, which is outside of the cache"),
        ([Cut(20, 5), Cut(30, 6)], "cuts 6 slots at slot 30 of 35, which is outside of the cache"),
        ([Cut(20, 10), Cut(4, 6)], "cuts at slot 4 after slot 20, which is not in increasing order"),
        ([Cut(20, 4), Cut(20, 6)], "cuts at slot 20 after slot 20, which is not in increasing order"),
        ([Cut(3, 7)], "evicts sink or pinned tokens: slots 3 to 9 are not all evictable"),
        ([Cut(9, 11)], "evicts sink or pinned tokens: slots 9 to 19 are not all evictable"),
        ([Cut(4, 6), Cut(8, 2)], "evicts sink or pinned tokens: slots 14 to 15 are not all evictable"),
        ([], "leaves room for 0 of 6 new tokens"),
        ([Cut(15, 5)], "leaves room for 5 of 6 new tokens"),
        ([Cut(20, 8)], "cuts at token 28, which is inside a character or the header of a turn"),
        ([Cut(23, 7)], "cuts at token 23, which is inside a character or the header of a turn"),
    ],
)
def test_a_bad_plan_is_refused_with_the_policy_and_the_rule(cuts: list[Cut], fault: str) -> None:
    before = list(GUARDED.ledger)
    with pytest.raises(EvictionPlanError, match=f"the eviction policy planned made a plan that {fault}; nothing was"):
        plan_cuts(Planned(cuts), GUARDED)
    assert list(GUARDED.ledger) == before


@pytest.mark.parametrize(
    "cuts",
    [
        [Cut(4, 6)],  # from the sinks to a pin
        [Cut(20, 10)],  # a turn
        [Cut(30, 10)],  # the newest turn, to the end
        [Cut(21, 6)],  # clean places inside of a turn
        [Cut(4, 6), Cut(9, 5), Cut(19, 10)],  # all but what is retained and one turn, numbered as they apply
    ],
)
def test_a_good_plan_is_carried_out_as_it_is(cuts: list[Cut]) -> None:
    assert plan_cuts(Planned(cuts), GUARDED) == cuts


def test_places_that_the_view_called_clean_are_clean_although_it_would_move_them_again() -> None:
    """A run of bytes that continue no character moves on each time that it is asked."""
    view = replace(GUARDED, clean_cut=lambda index: index + 1)

    def asks(view: CacheView) -> list[Cut]:
        assert view.clean_cut is not None
        return [Cut(20, view.clean_cut(26) - 20)]

    assert plan_cuts(Planned(asks), view) == [Cut(20, 7)]
    with pytest.raises(EvictionPlanError, match="cuts at token 27"):
        plan_cuts(Planned([Cut(20, 7)]), view)


def test_a_policy_that_changes_what_it_is_shown_harms_nothing() -> None:
    def vandal(view: CacheView) -> list[Cut]:
        view.ledger.clear()
        return [Cut(3, 7)]

    with pytest.raises(EvictionPlanError, match="slots 3 to 9"):
        plan_cuts(Planned(vandal), GUARDED)
    assert len(GUARDED.ledger) == 40


def test_a_view_splits_turns_at_starts_pins_and_gaps() -> None:
    assert GUARDED.turns == ((4, 10), (15, 20), (20, 30), (30, 40))
    ledger = Ledger([(0, 8), (15, 40)], 40)
    view = replace(GUARDED, ledger=ledger, retained=((0, 4),))
    assert view.turns == ((4, 8), (8, 13), (13, 23), (23, 33))


def test_starts_of_turns_in_the_middle_stay_boundaries() -> None:
    ledger = Ledger([(0, 40)], 40)
    dropped = ledger.evict(20, 10)
    assert starts_after([4, 10, 20, 30], dropped, Retention(40, 4), ledger) == [4, 10, 30]
    # but not those of pinned turns, which are no longer in order with the window
    assert starts_after([4, 10, 20, 30], dropped, Retention(40, 4, ((10, 15),)), ledger) == [4, 30]


# --- keep-first-turn ------------------------------------------------------------------------------------------


def test_the_first_turn_stays_behind_sinks_and_system_block() -> None:
    view = view_of(100, 5, sinks=4, pins=((0, 10),), turn_starts=(10, 30, 60, 90))
    assert left_by("keep-first-turn", view) == [*range(30), *range(60, 100)]
    # the next time there is a gap behind it
    after = replace(view, ledger=Ledger([(0, 30), (60, 130)], 130), turn_starts=(10, 60, 90, 100))
    assert left_by("keep-first-turn", after) == [*range(30), *range(90, 130)]


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        # no other turn, and tokens of the first one are all that there is
        ({"turn_starts": (10,)}, [*range(10), *range(15, 100)]),
        # more than half of the room
        ({"turn_starts": (10, 56, 90)}, [*range(10), *range(56, 100)]),
        # what must fit does go before it
        ({"turn_starts": (10, 30, 60), "incoming": 80}, [*range(10), *range(90, 100)]),
        # it lost its start
        ({"ledger": Ledger([(0, 10), (15, 105)], 105), "turn_starts": (30, 60)}, [*range(10), *range(30, 105)]),
        # it is pinned: the second one is not the first
        (
            {"retained": ((0, 30),), "turn_starts": (10, 30, 60, 90)},
            [*range(30), *range(60, 100)],
        ),
    ],
)
def test_what_is_not_a_whole_first_turn_is_evicted_as_usual(changes: dict[str, Any], left: list[int]) -> None:
    assert left_by("keep-first-turn", replace(view_of(100, 5), **changes)) == left


# --- key-diversity --------------------------------------------------------------------------------------------


def alike(*directions: Sequence[float], length: int = 30, noise: float = 0.01) -> CacheView:
    """A view of turns of `length` tokens in a full cache, whose keys point in these directions (2 layers, 3 heads)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([direction for direction in directions for _ in range(length)])
    keys = rows + noise * torch.randn(2, 1, 3, *rows.shape, generator=generator)
    starts = tuple(range(0, len(rows), length))
    return view_of(
        *(len(rows), 5),
        cache_size=len(rows),
        sinks=0,
        turn_starts=starts,
        fetch_keys=lambda first, stop: iter(keys[..., first:stop, :]),
    )


@pytest.mark.parametrize(
    ("directions", "gone"),
    [
        # the two of a kind: the older one is not more alike, so noise decides between them
        ([(1, 0, 0), (0, 1, 0), (0, 1, 0.1), (0, 0, 1), (0.5, 0, 1)], {1, 2}),
        # opposite is not alike
        ([(1, 0, 0), (-1, 0, 0), (0.9, 0.1, 0), (0, 0, 1)], {0, 2}),
        # the length of keys does not matter
        ([(9, 0, 0), (0, 0.1, 0), (0, 5, 0.1), (0, 0, 1)], {1, 2}),
        # the newest turn is compared, but stays
        ([(1, 0, 0), (0, 1, 0), (0, 0.2, 1), (0, 0, 1)], {2}),
    ],
)
def test_the_turn_that_is_most_like_the_others_is_evicted(directions: list[Sequence[float]], gone: set[int]) -> None:
    view = alike(*directions)
    left = set(left_by("key-diversity", view))
    evicted = {slot // 30 for slot in range(len(view.ledger)) if slot not in left}
    assert len(evicted) == 1
    assert evicted <= gone


def test_of_three_equal_turns_one_stays() -> None:
    view = alike((1, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 0), (0, 0, 1), noise=0)
    left = left_by("key-diversity", replace(view, incoming=60))
    assert {slot // 30 for slot in left} >= {1, 4}
    assert left == [*range(30, 60), *range(90, 150)]  # the oldest of equals go


def test_without_keys_or_other_turns_the_oldest_go() -> None:
    view = alike((1, 0, 0), (0, 1, 0), (0, 1, 0))
    assert left_by("key-diversity", replace(view, fetch_keys=None)) == list(range(30, 90))
    assert left_by("key-diversity", replace(view, turn_starts=())) == list(range(5, 90))
    assert left_by("key-diversity", replace(view, incoming=70)) == left_by("oldest-turns", replace(view, incoming=70))


def test_keys_that_overflowed_count_as_like_no_other() -> None:
    view = alike((float("inf"), 0, 0), (0, 1, 0), (0, 1, 0.1), (0, 0, 1))
    left = left_by("key-diversity", view)
    assert set(range(30)) <= set(left)
    assert len(left) == 90
