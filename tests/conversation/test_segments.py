"""Segments, pins, and the event of an eviction, token by token, without a model."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamchat.base import events as ev
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.options import Eviction
from streamchat.conversation.eviction_events import eviction_event
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.pins import is_pinned, pinned_turns
from streamchat.conversation.segments import segments
from tests.support.runs import runs_of

TURNS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=5)
INDICES = st.sets(st.integers(0, 40))


def a_log(turns: list[tuple[int, int]], system: int, is_running: bool) -> TokenLog:
    """A log with turns of (tokens of the message, tokens of the reply)."""
    log = TokenLog(array("i", range(system)))
    for number, (message, reply) in enumerate(turns, 1):
        start = len(log)
        log.append([0] * (message + reply))
        end = None if is_running and number == len(turns) else len(log)
        log.turns.append(TurnRecord(number, start, start, start + message, end))
    return log


def a_ledger(cached: set[int], log: TokenLog) -> Ledger:
    return Ledger(list(runs_of(cached, len(log))), len(log))


def test_the_system_block_is_pinned_and_a_message_is_not() -> None:
    log = a_log([(2, 0)], 3, False)
    assert segments(a_ledger({*range(5)}, log), log, sinks=0, pins=()) == (
        ev.Segment("system", 0, 3, 3, pinned=True),
        ev.Segment("user", 1, 2, 2),
    )


@given(TURNS, INDICES, INDICES, st.integers(0, 6), st.integers(0, 4), st.booleans())
def test_segments_count_each_cached_token_once(
    turns: list[tuple[int, int]], cached: set[int], pinned: set[int], sinks: int, system: int, is_running: bool
) -> None:
    log = a_log(turns, system, is_running)
    parts = [("system", 0)] * system
    for number, (message, reply) in enumerate(turns, 1):
        parts += [("user", number)] * message + [("assistant", number)] * reply
    expected = []
    if at := [i for i in range(min(sinks, len(parts))) if i in cached]:
        expected.append(ev.Segment("sinks", 0, len(at), len(at), pinned=True))
    for part in sorted(set(parts), key=parts.index):
        tokens = [i for i, each in enumerate(parts) if each == part and i >= sinks]
        if count := sum(i in cached for i in tokens):
            is_retained = part[0] == "system" or all(i in pinned for i in tokens)
            expected.append(ev.Segment(part[0], part[1], count, len(tokens), is_retained))  # type: ignore[arg-type]
    pins = runs_of(pinned, len(log))
    assert segments(a_ledger(cached, log), log, sinks=sinks, pins=iter(pins)) == tuple(expected)


@given(TURNS, INDICES, st.integers(0, 6), st.booleans())
def test_a_turn_is_pinned_if_all_its_tokens_but_sinks_are(
    turns: list[tuple[int, int]], pinned: set[int], sinks: int, is_running: bool
) -> None:
    log, expected = a_log(turns, 2, is_running), []
    pins = runs_of(pinned, len(log))
    for turn in log.turns:
        own = range(turn.start, turn.end or 0)
        if turn.end is not None and turn.end > sinks and all(i in pinned for i in own if i >= sinks):
            expected.append(turn)
        if turn.end is None or turn.end > sinks:
            assert is_pinned(turn, iter(pins), sinks) == (turn in expected)
    assert [turn for turn in pinned_turns(log, iter(pins), sinks) if (turn.end or 0) > sinks] == expected


def test_the_event_of_an_eviction_names_the_turns_that_it_affects() -> None:
    log = a_log([(2, 3), (2, 3), (2, 3)], 3, is_running=True)  # 3 to 7, 8 to 12, and 13 to 17, which runs
    cache: Any = SimpleNamespace(ledger=Ledger([(0, 4), (10, 13)], 18), num_sink_tokens=4)
    state: Any = object()
    eviction = Eviction(((4, 10), (13, 18)), 18, 7, "decode")
    assert eviction_event(eviction, log, cache, state) == ev.TokensEvicted(
        count=11,
        token_range=(4, 18),
        turns=(1, 2, 3),
        turns_gone=(1,),  # of turn 1, only a sink is left
        cache_len_before=18,
        cache_len_after=7,
        trigger="decode",
        runs=((4, 10), (13, 18)),
        cache=state,
    )
