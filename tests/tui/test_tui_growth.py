"""What the app keeps of each turn: its text, and no widget."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest
from textual.widget import Widget

from streamchat.config.settings import Settings
from streamchat.tui.widgets import mounted_turns
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow


async def ask(driver: Driver, turns: int) -> None:
    for _ in range(turns):
        done = driver.finished
        driver.prompt.text = "a question about the sea"
        await driver.pilot.press("enter")
        while driver.finished == done:
            await asyncio.sleep(0.005)
    await driver.pilot.pause()


def widgets() -> Counter[str]:
    """All widgets in memory by class, removed ones included."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, Widget))


async def test_the_number_of_widgets_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The footer kept ten widgets of each turn, 230 kB."""
    monkeypatch.setattr(mounted_turns, "MAX_TURNS", 4)
    async with driving(ScriptedEngine(["word and so on"], settings=Settings(cache_size=128)), size=(100, 30)) as driver:
        await ask(driver, 14)
        before = widgets()
        await ask(driver, 10)
        grown = widgets() - before
    assert grown.total() < 10, grown  # one may be between two layouts
