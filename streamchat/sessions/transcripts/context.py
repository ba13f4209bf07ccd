"""What the model still sees of a saved session, for exports and lists."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

from streamchat.store.records import Run, SessionInfo, StoredSession, StoredTurn

EDGE = "The model's context starts here: it no longer sees the turns above, except pinned ones."
"""Stands above the turn of `edge_of`."""
TurnVisibility = Literal["seen", "partly", "forgotten"]
TokenState = Literal["sinks", "pinned", "cached", "evicted"]


class TokenRun(NamedTuple):
    """Consecutive tokens of the token log in the same state."""

    state: TokenState
    tokens: int


def num_sinks(session: StoredSession) -> int:
    """Return the number of attention sinks of a session."""
    sinks = session.info.settings.get("num_sink_tokens", 0)
    return sinks if isinstance(sinks, int) else 0


def recalled_turns(turn: StoredTurn) -> list[int]:
    """Return the numbers of the evicted turns that were put back in context for a turn."""
    found = (turn.stats or {}).get("recalled", ())
    return [number for number in found if type(number) is int] if isinstance(found, list | tuple) else []


def recalled_text(turn: StoredTurn) -> str:
    """Return `turns 12, 40 were back in context`; '' without any."""
    turns = recalled_turns(turn)
    what = "turn" if len(turns) == 1 else "turns"
    return (
        f"{what} {', '.join(map(str, turns))} {'was' if len(turns) == 1 else 'were'} back in context" if turns else ""
    )


def system_prompt(session: StoredSession) -> str:
    """Return the system prompt of a session; '' for none."""
    return str(session.info.settings.get("system_prompt") or "")


def turn_visibility(session: StoredSession) -> dict[int, TurnVisibility]:
    """Return how much of each turn is cached, by turn number; sinks do not count."""
    sinks = num_sinks(session)
    answer: dict[int, TurnVisibility] = {}
    for turn in session.turns:
        first, stop = max(turn.start, sinks), turn.start + len(turn.ids)
        cached = sum(max(0, min(stop, b) - max(first, a)) for a, b in session.info.held)
        answer[turn.number] = "seen" if cached >= stop - first else "partly" if cached > 0 else "forgotten"
    return answer


def is_pinned(session: StoredSession, turn: StoredTurn) -> bool:
    """Return whether a turn is pinned."""
    first = max(turn.start, num_sinks(session))
    return any(a <= first and turn.start + len(turn.ids) <= b for a, b in session.info.pins)


def edge_of(session: StoredSession) -> int | None:
    """Return the number of the turn where the model's context starts; None if it sees everything, or nothing."""
    seen = turn_visibility(session)
    edge = next(
        (turn.number for turn in session.turns if seen[turn.number] != "forgotten" and not is_pinned(session, turn)),
        None,
    )
    if edge is not None and seen[edge] != "partly" and "forgotten" not in seen.values():
        return None
    return edge


def token_runs(session: StoredSession) -> list[TokenRun]:
    """Return the whole token log as runs of sinks, pinned, cached and evicted tokens."""
    end = max((turn.start + len(turn.ids) for turn in session.turns), default=len(session.system_ids))
    sinks, pins, held = num_sinks(session), session.info.pins, session.info.held
    cuts = {0, end, sinks, *(at for run in (*pins, *held) for at in run)}
    runs: list[TokenRun] = []
    for first, stop in pairwise(sorted(at for at in cuts if 0 <= at <= end)):
        state: TokenState = "evicted"
        if _has(held, first):
            state = "sinks" if first < sinks else "pinned" if _has(pins, first) else "cached"
        if runs and runs[-1].state == state:
            runs[-1] = TokenRun(state, runs[-1].tokens + stop - first)
        else:
            runs.append(TokenRun(state, stop - first))
    return runs


def _has(runs: tuple[Run, ...], at: int) -> bool:
    return any(first <= at < stop for first, stop in runs)


def fork_of(info: SessionInfo) -> dict[str, Any] | None:
    """Return where a session was forked: {"session": id, "turn": number}; None if it is not a fork."""
    return None if info.parent is None else {"session": info.parent, "turn": info.parent_turn}


def fork_sentence(info: SessionInfo) -> str:
    """Return a line about the session that a session was forked from; '' if it is not a fork."""
    return "" if info.parent is None else f"Fork of session {info.parent} at turn {info.parent_turn}."
