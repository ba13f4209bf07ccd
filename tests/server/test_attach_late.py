"""Front ends whose session was set aside while they were away, and turns that are paged in on a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Quote, Stop, Submit
from streamchat.server import known
from streamchat.server.attached import sessions as shared_sessions
from streamchat.server.options import Options
from tests.support.api_server import Running, serving

pytest.importorskip("websockets", reason="the package websockets is not installed")

from tests.support.attached import Front, LaterConnections, attached
from tests.support.attached import api as api  # fixtures
from tests.support.attached import front as front


def test_a_turn_that_is_paged_in_ends_its_request(api: Running, front: Front) -> None:
    """Also after the session has left its seat; every front end gets the event."""
    for number in range(10):
        front.turn(f"message {number} {'word ' * 5}")
    for number in range(5):  # the session leaves its seat
        api.respond(f"of another client {number}")
    with attached(api, front.attached.session) as other:
        front.engine.send(Quote("quoted", "I see.", pin=True, turn=2))
        assert front.wait(ev.TurnPagedIn).turn == 2
        assert other.wait(ev.TurnPagedIn) == front.of(ev.TurnPagedIn)[0]
        assert not front.engine.busy
        front.turn("and now?")
        assert not front.engine.busy


def test_a_front_end_that_comes_back_after_many_sessions_of_others_gets_events(
    api: Running, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_sessions, "MAX_IDLE", 1)
    front.turn("first")
    later = front.attached._connect = LaterConnections(front.attached._connect)
    front.cut()
    front.wait(ev.ConnectionChanged)
    for _ in range(3):
        with attached(api, new=True):
            pass
    later.is_open = True
    front.wait(ev.ConnectionChanged, 2)
    front.engine.send(Submit("second"))
    assert front.wait(ev.TurnFinished, 2, timeout_s=20).stats.turn == 2


def test_a_front_end_whose_session_is_set_aside_before_it_is_placed_gets_events(
    api: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when many front ends start at once."""
    monkeypatch.setattr(shared_sessions, "MAX_IDLE", 0)
    with attached(api, new=True) as front:
        front.engine.send(Submit("first"))
        assert front.wait(ev.TurnFinished, timeout_s=20).stats.turn == 1


def test_the_session_of_a_front_end_stays_known(api: Running, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a client of the API that continues it would find it locked, and the front end would see nothing."""
    monkeypatch.setattr(known, "MAX_KNOWN", 3)
    front.turn("first")
    ours = [each for each in api.server.model.known if each.id == front.attached.session]
    for number in range(8):
        api.respond(f"of another client {number}")
    assert len(ours) == 1
    assert api.server.model.known.get(front.attached.session) is ours[0]


def test_a_message_that_waits_for_a_seat_can_be_stopped(tmp_path: Path) -> None:
    options = Options(port=0, live=1)
    with (
        serving(tmp_path, options=options) as api,
        attached(api, new=True) as front,
        attached(api, new=True) as other,
    ):
        other.turn("has the only seat")
        busy = api.server.model.known.get(other.attached.session)
        assert busy is not None
        api.on_model_thread(lambda: setattr(busy, "is_busy", True))  # as during a reply
        try:
            front.engine.send(Submit("waits"))
            front.engine.send(Stop())
            stopped = front.wait(ev.TurnFinished, timeout_s=20)
        finally:
            busy.is_busy = False
            api.server.model.scheduler.wake()
        assert (stopped.text, stopped.rolled_back, stopped.finish_reason) == ("waits", True, "cancelled")
        assert front.turn("and now?").stats.turn == 1
