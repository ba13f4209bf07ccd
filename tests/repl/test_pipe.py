"""The pipe on a real engine: a line is answered before the next one is read."""

from __future__ import annotations

import io
import time

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Pin
from streamchat.engine.jobs import Job
from streamchat.engine.owner import Owner
from streamchat.repl.pipe import Pipe
from tests.support.real_engine import running

handle = Owner.handle


def handle_slowly(owner: Owner, job: Job) -> None:
    if isinstance(job.request, Pin):
        owner._emit(ev.TextCounted("the draft of another front end", 6))
        time.sleep(0.3)
    handle(owner, job)


@pytest.mark.parametrize("after", [b"", b"/stats\n"])
def test_a_command_is_carried_out_before_the_pipe_goes_on(after: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Owner, "handle", handle_slowly)
    err = io.StringIO()
    with running(start=False) as chat:
        assert Pipe(chat.engine, io.StringIO(), err).run(io.BytesIO(b"hello\n/pin\n" + after)) == 0
        assert [event.turn for event in chat.of(ev.TurnPinned)] == [1]
    assert "Turn 1" in err.getvalue()
    assert err.getvalue().find("Turn 1") < (err.getvalue().find("compressions") if after else 10**6)
