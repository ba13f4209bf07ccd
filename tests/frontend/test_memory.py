"""What the model still sees, read from the segments of a cache state; no screen."""

from __future__ import annotations

from streamchat.base.events import CacheState, Segment
from streamchat.frontend.status import SERIES_LIMIT, Series
from streamchat.frontend.visibility import ContextView, TurnVisibility

SINKS = Segment("sinks", 0, 4, 4, True)
SYSTEM = Segment("system", 0, 10, 10, True)


def state(*segments: Segment, evicted: int = 100) -> CacheState:
    return CacheState(length=sum(s.tokens for s in segments), tokens_evicted=evicted, segments=segments)


def test_each_message_is_judged_by_itself() -> None:
    context_view = ContextView(
        state(
            SINKS,
            SYSTEM,
            Segment("user", 2, 5, 5, True),
            Segment("assistant", 2, 9, 9, True),
            Segment("assistant", 4, 3, 20),
            Segment("user", 5, 7, 7),
            Segment("assistant", 5, 8, 8),
            Segment("user", 6, 2, 2),
        )
    )
    assert context_view.turn(1) == TurnVisibility("evicted", "evicted")
    assert context_view.turn(1).evicted
    assert context_view.turn(2) == TurnVisibility("visible", "visible", pinned=True)
    assert context_view.turn(3).evicted
    assert context_view.turn(4) == TurnVisibility("evicted", "partial")
    assert context_view.turn(5).complete
    assert context_view.turn(6) == TurnVisibility("visible", "visible")  # its reply has not begun
    assert context_view.turn(7).complete  # not read yet
    assert context_view.oldest == 4  # a pinned turn is no part of the window


def test_the_window_starts_after_the_last_turn_that_was_evicted() -> None:
    """A policy may keep the first turn, or any other: the edge is below the gap."""

    def turn(number: int, *, pinned: bool = False) -> list[Segment]:
        return [Segment("user", number, 5, 5, pinned), Segment("assistant", number, 9, 9, pinned)]

    assert ContextView(state(SINKS, *turn(1), *turn(6), *turn(7))).oldest == 6
    assert ContextView(state(SINKS, *turn(1), *turn(3), Segment("assistant", 6, 2, 9), *turn(7))).oldest == 6
    assert ContextView(state(SINKS, *turn(1), *turn(5, pinned=True), *turn(6), *turn(7))).oldest == 6
    assert ContextView(state(SINKS, *turn(1), *turn(2), *turn(3))).oldest == 1
    assert ContextView(state(SINKS, *turn(1), *turn(3, pinned=True))).oldest == 0


def test_while_nothing_was_evicted_all_is_seen() -> None:
    context_view = ContextView(state(SINKS, Segment("user", 1, 3, 3), evicted=0))
    assert context_view.turn(1).complete
    assert context_view.oldest == 1
    assert ContextView(CacheState()).oldest == 0
    assert ContextView(CacheState()).turn(1).complete


def test_a_long_reply_that_pushed_its_own_question_out() -> None:
    context_view = ContextView(state(SINKS, Segment("assistant", 3, 40, 90)))
    assert context_view.turn(3) == TurnVisibility("evicted", "partial")
    assert context_view.turn(2).evicted


def test_a_pin_of_half_a_turn_is_no_pinned_turn() -> None:
    context_view = ContextView(state(SINKS, Segment("user", 1, 5, 5, True), Segment("assistant", 1, 9, 9)))
    assert not context_view.turn(1).pinned


def test_a_series_keeps_the_whole_run_in_bounded_memory() -> None:
    series = Series()
    for value in range(100_000):
        series.add(value)
    assert SERIES_LIMIT / 2 <= len(series.values) < SERIES_LIMIT
    steps = {b - a for a, b in zip(series.values, series.values[1:], strict=False)}
    assert len(steps) == 1
    assert series.values[0] < 2_000
    assert series.values[-1] > 98_000
