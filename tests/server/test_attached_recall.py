"""A recall on a server: its front ends see it, and each of them can switch it on."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import SetOption
from tests.support.api_server import serving

pytest.importorskip("websockets", reason="the package websockets is not installed")

from tests.support.attached import attached

OTHER = "well, what do you think about it now? please tell me some more"


@pytest.mark.slow
def test_a_turn_is_recalled_for_all_front_ends_of_a_session(tmp_path: Path) -> None:
    with serving(tmp_path, cache_size=192, loop_guard="off") as api, attached(api, new=True) as front:
        front.turn("my locker code is 48213")
        for _ in range(9):
            front.turn(OTHER)
        front.engine.send(SetOption("auto_recall", "on"))
        front.wait(ev.SettingChanged)
        with attached(api, front.attached.session) as other:
            front.turn("what is my locker code?")
            event = front.wait(ev.TurnsRecalled)
            assert event.turns == (1,)
            assert event.tokens > 0
            assert {segment.turn for segment in event.cache.segments if segment.recalled} == {1}
            assert other.wait(ev.TurnsRecalled) == event
            assert front.of(ev.TurnFinished)[-1].stats.recalled == (1,)
