"""What the app keeps of each turn: its text, and no widget."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest
from textual.widget import Widget

from streamchat.base.events import CacheState
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


async def test_a_turn_leaves_its_text_and_no_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The footer kept ten widgets of each turn, 230 kB, and each eviction kept the state of the cache at its time."""
    monkeypatch.setattr(mounted_turns, "MAX_TURNS", 4)
    async with driving(ScriptedEngine(["word and so on"], settings=Settings(cache_size=48)), size=(100, 30)) as driver:
        await ask(driver, 14)
        before = widgets()
        await ask(driver, 8)
        grown = widgets() - before
        assert grown.total() < 8, grown  # some may be between two layouts
        driver.engine.events.clear()
        gc.collect()
        assert sum(isinstance(each, CacheState) for each in gc.get_objects()) < 16
        [turn] = driver.conversation.mounted.history.before(18, 1)
        [(sentence, _)] = turn.evictions
        assert "no longer in context" in sentence
