"""What the model still sees of a saved session, token by token."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from streamchat.sessions.transcripts.context import (
    TokenRun,
    edge_of,
    is_pinned,
    num_sinks,
    system_prompt,
    token_runs,
    turn_visibility,
)
from streamchat.store.records import SessionInfo, StoredSession, StoredTurn
from tests.support.runs import runs_of

SYSTEM = 3
LENGTHS = st.lists(st.integers(1, 6), max_size=6)
INDICES = st.sets(st.integers(0, 40))


def a_session(lengths: list[int], cached: Iterable[int], pinned: Iterable[int], **settings: object) -> StoredSession:
    """A session with a system block of 3 tokens and turns of these lengths."""
    starts = [SYSTEM + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    turns = [
        StoredTurn(i + 1, "", "", starts[i], starts[i], starts[i], array("i", range(length)))
        for i, length in enumerate(lengths)
    ]
    held, pins = runs_of(cached, starts[-1]), runs_of(pinned, starts[-1])
    info = SessionInfo("a", "", 0, 0, "", "", "", "", "", settings, held, pins)
    return StoredSession(info, array("i", range(SYSTEM)), tuple(turns))


@given(LENGTHS, INDICES, INDICES, st.integers(0, 8))
def test_visibility_is_that_of_each_token(lengths: list[int], cached: set[int], pinned: set[int], sinks: int) -> None:
    session = a_session(lengths, cached, pinned, num_sink_tokens=sinks)
    found, edges = turn_visibility(session), list[int]()
    assert len(found) == len(lengths)
    for turn in session.turns:
        tokens = [index for index in range(turn.start, turn.start + len(turn.ids)) if index >= sinks]
        seen = [index in cached for index in tokens]
        expected = "seen" if all(seen) else "partly" if any(seen) else "forgotten"
        assert found[turn.number] == expected
        if tokens:
            assert is_pinned(session, turn) == all(index in pinned for index in tokens)
        if expected != "forgotten" and not is_pinned(session, turn):
            edges.append(turn.number)
    sees_all = bool(edges) and found[edges[0]] == "seen" and "forgotten" not in found.values()
    assert edge_of(session) == (edges[0] if edges and not sees_all else None)


@given(LENGTHS, INDICES, INDICES, st.integers(0, 8))
def test_runs_of_tokens_are_those_of_each_token(
    lengths: list[int], cached: set[int], pinned: set[int], sinks: int
) -> None:
    session = a_session(lengths, cached, pinned, num_sink_tokens=sinks)
    states = [
        "evicted" if i not in cached else "sinks" if i < sinks else "pinned" if i in pinned else "cached"
        for i in range(SYSTEM + sum(lengths))
    ]
    assert token_runs(session) == [TokenRun(state, len(list(same))) for state, same in groupby(states)]  # type: ignore[arg-type]


def test_settings_of_a_session_may_be_missing_or_odd() -> None:
    assert num_sinks(a_session([], [], [])) == 0
    assert num_sinks(a_session([], [], [], num_sink_tokens="4")) == 0
    assert num_sinks(a_session([], [], [], num_sink_tokens=4)) == 4
    assert system_prompt(a_session([], [], [])) == ""
    assert system_prompt(a_session([], [], [], system_prompt=None)) == ""
    assert system_prompt(a_session([], [], [], system_prompt="Be kind.")) == "Be kind."
