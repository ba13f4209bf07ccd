"""Success means effect: slash commands of the app alone."""

from __future__ import annotations

import base64
import re

import pytest

from streamchat.frontend.outbox import Message, Outbox
from streamchat.frontend.slash.queue import queue_command
from streamchat.frontend.slash.registry import SlashContext, SlashRegistry
from tests.support.app_driver import driving
from tests.support.desk import Desk
from tests.support.scripted_engine import ScriptedEngine


def test_removed_messages_of_the_queue_never_reach_the_engine() -> None:
    sent: list[str] = []
    outbox = Outbox(sent.append)
    outbox.idle()
    outbox.offer(Message("first", "first"))
    for text in ("second", "third", "fourth"):
        outbox.offer(Message(text, text))
    desk, registry = Desk(), SlashRegistry()
    registry.add(queue_command(outbox))
    context = SlashContext(desk.engine, desk.board)
    assert registry.run(context, "/queue drop 2") is not None
    for _ in range(3):
        outbox.idle()
        outbox.send_next()
    assert sent == ["first", "second", "fourth"]
    outbox.offer(Message("fifth", "fifth"))
    outbox.offer(Message("sixth", "sixth"))
    assert registry.run(context, "/queue clear") is not None
    for _ in range(3):
        outbox.idle()
        outbox.send_next()
    assert sent[-1] == "fifth"


async def test_a_theme_is_that_of_the_next_start() -> None:
    async with driving(ScriptedEngine()) as driver:
        other = "textual-light" if driver.app.theme != "textual-light" else "nord"
        await driver.enter(f"/theme {other}")
        await driver.until(lambda: driver.app.theme == other)
    async with driving(ScriptedEngine()) as driver:
        assert driver.app.theme == other


async def test_a_copied_reply_is_what_the_terminal_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(replies=["Here:\n\n```python\nx = 1\n```\n"])
    async with driving(engine) as driver:
        await driver.ask("hello")
        written: list[str] = []
        assert driver.app._driver is not None
        monkeypatch.setattr(driver.app._driver, "write", written.append)
        await driver.enter("/copy code")
        await driver.until(lambda: any("]52;c;" in text for text in written))
        [code] = re.findall(r"\x1b]52;c;([^\x07\x1b]*)", "".join(written))
        assert base64.b64decode(code).decode() == "x = 1"
