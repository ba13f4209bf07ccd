"""`/rewind` and `/fork` of a session on a server, which other front ends use as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Fork, Rewind
from tests.support.api_server import serving

pytest.importorskip("websockets", reason="the package websockets is not installed")

from tests.support.attached import attached


def test_a_rewind_is_seen_by_all_and_a_fork_moves_one(tmp_path: Path) -> None:
    with serving(tmp_path, temperature=0.8) as api, attached(api, new=True) as front:
        for number in range(6):
            front.turn(f"message {number} {'word ' * 5}")
        session = front.attached.session
        with attached(api, session) as other:
            front.engine.send(Rewind(3))
            done = front.wait(ev.ConversationRewound)
            assert (done.turn, done.undone, done.is_exact) == (3, 3, True)
            assert other.wait(ev.ConversationRewound) == done
            assert [event.turn for event in other.of(ev.TurnUndone)] == [6, 5, 4]
            front.turn("another way")
            other.wait(ev.TurnFinished)
            moved = len(front.of(ev.ConversationResumed)) + 1
            front.engine.send(Fork(2))
            resumed = front.wait(ev.ConversationResumed, moved)
            assert [turn.number for turn in resumed.turns] == [1, 2]
            assert resumed.session == front.attached.session != session
            assert (resumed.parent, resumed.parent_turn) == (session, 2)
            front.turn("in the fork")
            assert other.turn("in the session").stats.turn == 5
        with attached(api, done.kept_as) as kept:
            assert len(kept.wait(ev.ConversationResumed).turns) == 6
