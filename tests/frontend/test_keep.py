"""`/keep N` asks for the turn itself if it is of this conversation, and quotes its text otherwise."""

from __future__ import annotations

import pytest

from streamchat.base import events as ev
from streamchat.frontend.slash.session_commands import turn_done, turn_here
from streamchat.store.records import SearchHit


def hit(session: str, *, undone: bool = False) -> SearchHit:
    return SearchHit(session, "title", 7, "user", 1.0, "excerpt", "text", undone)


@pytest.mark.parametrize(
    ("found", "session", "turn"),
    [(hit("a"), "a", 7), (hit("b"), "a", 0), (hit("a"), None, 0), (hit("a", undone=True), "a", 0)],
)
def test_only_a_turn_of_this_conversation_is_paged_in(found: SearchHit, session: str | None, turn: int) -> None:
    assert turn_here(found, session) == turn


def test_the_command_ends_when_the_turn_is_back() -> None:
    assert turn_done(ev.TurnPagedIn(7, 10, 0.1, ev.CacheState()))
    assert not turn_done(ev.TurnPinned(7, True, 10, ev.CacheState()))
