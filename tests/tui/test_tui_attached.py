"""The app on a session that others use as well, over a connection that can be lost."""

from __future__ import annotations

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Request, Submit
from streamchat.engine.missing_turn import missing_turn
from streamchat.frontend.outbox import Phase
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow


class SilentEngine(ScriptedEngine):
    """Emits only what the test says."""

    def send(self, request: Request) -> None:
        self.sent.append(request)


def turn(number: int, text: str, reply: str) -> list[ev.Event]:
    """The events of a turn."""
    stats = ev.TurnStats(number, 3, 2, 10, 64, 0, 0, 0.1, 10.0, 1, 1, None, "stop")
    return [
        ev.TurnStarted(number, text, 3),
        ev.TextDelta(number, reply),
        ev.TurnFinished(stats, "stop", reply, text),
    ]


def shown(driver: Driver) -> list[tuple[str, str]]:
    return [(turn.text, turn.reply_text) for turn in driver.turns]


async def test_a_turn_of_another_front_end_is_shown_and_own_messages_wait() -> None:
    engine = SilentEngine()
    async with driving(engine) as driver:
        started, delta, finished = turn(1, "from elsewhere", "hello")
        engine.emit(started)
        engine.emit(delta)
        await driver.until(lambda: shown(driver) == [("from elsewhere", "hello")])
        await driver.enter("mine")
        assert engine.sent == []
        engine.emit(finished)
        await driver.until(lambda: Submit("mine") in engine.sent)


async def test_another_turn_may_start_before_the_own_one() -> None:
    engine = SilentEngine()
    async with driving(engine) as driver:
        await driver.enter("mine")
        await driver.until(lambda: Submit("mine") in engine.sent)
        for event in turn(1, "theirs", "for them"):
            engine.emit(event)
        await driver.until(lambda: driver.finished == 1 and shown(driver) == [("theirs", "for them")])
        assert driver.app.state.outbox.phase is Phase.REPLYING
        for event in turn(2, "mine", "for me"):
            engine.emit(event)
        await driver.until(lambda: shown(driver) == [("theirs", "for them"), ("mine", "for me")])
        await driver.until(lambda: driver.app.state.outbox.phase is Phase.IDLE)


async def test_a_message_that_another_front_end_loses_does_not_come_here() -> None:
    engine = SilentEngine()
    async with driving(engine) as driver:
        engine.emit(ev.TurnStarted(1, "theirs", 3))
        await driver.until(lambda: driver.turns)
        await driver.write("a draft")
        engine.emit(missing_turn("", "the turn failed"))
        await driver.until(lambda: not driver.turns)
        assert driver.prompt.text == "a draft"
        assert driver.app.state.outbox.queue == ()


async def test_a_lost_connection_is_shown_and_nothing_typed_is_lost() -> None:
    engine = SilentEngine()
    async with driving(engine, size=(80, 24)) as driver:
        await driver.write("a draft")
        engine.emit(ev.ConnectionChanged(False, "the server is gone"))
        await driver.until(lambda: "the server is gone; connecting again" in driver.screen_text)
        assert driver.prompt.text == "a draft"
        await driver.pilot.press("enter")
        await driver.until(lambda: engine.sent == [Submit("a draft")])
        engine.emit(missing_turn("a draft"))
        await driver.until(lambda: driver.prompt.text == "a draft")
        engine.emit(ev.ConnectionChanged(True))
        await driver.until(lambda: "Connected to the server again." in driver.screen_text)
        assert "connecting again" not in driver.chat.query_one("StatusLine").text  # type: ignore[attr-defined]


async def test_detach_leaves() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.enter("/detach")
        await driver.until(lambda: any("streamchat attach" in toast for toast in driver.toasts))
        engine.pretended_server = "http://127.0.0.1:8080"
        driver.prompt.empty()
        await driver.enter("/detach")
        await driver.until(lambda: driver.app.return_code == 0)
