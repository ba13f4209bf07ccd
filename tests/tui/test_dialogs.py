"""Dialogs that open or close at the moment that something else happens: the app exits, or keys are typed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from rich.style import Style
from textual.events import Click, Key, Paste
from textual.widgets import Input, OptionList

from streamchat.config.loader import Configuration
from streamchat.tui import type_ahead
from streamchat.tui.app import StreamchatApp
from streamchat.tui.screens.closable import Closable
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow

OPEN: dict[str, Callable[[Driver], object]] = {
    "help": lambda driver: driver.chat.action_open_help(),
    "sessions": lambda driver: driver.chat.action_sessions(),
    "recall": lambda driver: driver.chat.action_recall(),
    "models": lambda driver: driver.chat.action_models(),
    "settings": lambda driver: driver.chat.action_settings(),
    "palette": lambda driver: driver.app.action_command_palette(),
    "themes": lambda driver: driver.app.search_themes(),
}


async def type_keys(driver: Driver, *keys: str) -> None:
    """Press keys one right after the other, without a step of any other task between them."""
    for key in keys:
        await driver.app.on_event(Key(key, key if len(key) == 1 else None))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", [name for name in OPEN if name != "themes"])
async def test_an_exit_while_a_dialog_opens_is_an_orderly_one(name: str, steps: int) -> None:
    """SIGTERM ended the app with exit code 1: the dialog was mounted, but without its widgets, and looked for them."""
    async with driving(ScriptedEngine()) as driver:
        OPEN[name](driver)
        for _ in range(steps):
            await asyncio.sleep(0)
        driver.app.exit(143, return_code=143)
    assert driver.app._exception is None
    assert (driver.app.return_value, driver.app.return_code) == (143, 143)


async def test_an_exit_before_the_first_paint_is_an_orderly_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = StreamchatApp.on_mount

    def mounted(self: StreamchatApp) -> None:
        mount(self)
        self.exit(143, return_code=143)  # as SIGTERM, which is handled from here on

    monkeypatch.setattr(StreamchatApp, "on_mount", mounted)
    engine = ScriptedEngine()
    app = StreamchatApp(engine, Configuration(engine.settings))
    assert await app.run_async(headless=True) == 143
    assert app.return_code == 143
    assert engine.close(60)


async def test_keys_that_are_typed_while_a_dialog_opens_reach_it() -> None:
    async with driving(ScriptedEngine()) as driver:
        for name in ("sessions", "recall", "models", "settings", "palette", "themes"):
            OPEN[name](driver)
            dialog = driver.app.screen
            assert isinstance(dialog, Closable)
            assert not dialog.is_mounted
            await type_keys(driver, "z", "down", "q")
            await driver.app.on_event(Paste("7"))
            await driver.until(lambda: [each.value for each in driver.app.screen.query(Input)][:1] == ["zq7"], name)
            dialog.dismiss()
            await driver.until(lambda: driver.app.screen is driver.chat)
        assert driver.prompt.text == ""


@pytest.mark.parametrize("name", OPEN)
async def test_keys_on_their_way_to_the_input_while_a_dialog_opens_end_nothing(name: str) -> None:
    """The app ended with exit code 1: the key's action ran in the palette, which did not have its list yet."""
    keys = ("up", "down", "pageup", "pagedown", "home", "end", "left", "tab", "f2", "ctrl+home", "ctrl+end", "ctrl+d")
    async with driving(ScriptedEngine()) as driver:
        for steps in (0, 1, 3):
            OPEN[name](driver)
            for _ in range(steps):
                await asyncio.sleep(0)
            for key in keys:
                driver.prompt.post_message(Key(key, None))
            await driver.until(lambda: driver.app.screen is not driver.chat)
            await driver.until(lambda: driver.app.screen.is_mounted)
            await driver.pilot.pause()
            await driver.pilot.press("escape")
            await driver.until(lambda: driver.app.screen is driver.chat)
    assert driver.app._exception is None


async def test_keys_that_are_typed_while_a_dialog_closes_reach_the_input() -> None:
    """They went to the dialog, and were lost with it."""
    async with driving(ScriptedEngine()) as driver:
        for name, open_dialog in OPEN.items():
            open_dialog(driver)
            await type_keys(driver, "z", "escape", "w")
            await driver.until(lambda: driver.prompt.text == "w", name)
            driver.prompt.text = ""
            assert driver.app.screen is driver.chat


async def test_a_dialog_that_does_not_handle_a_key_does_not_stop_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_ahead, "LIMIT_S", 0.01)
    hangs = asyncio.Event()
    async with driving(ScriptedEngine()) as driver:
        OPEN["sessions"](driver)
        dialog = driver.app.screen
        await driver.until(lambda: dialog.is_mounted)
        dialog.call_later(hangs.wait)
        await type_keys(driver, "z", "q")
        try:
            while dialog.query_one(Input).value != "zq":
                await asyncio.sleep(0.01)
        finally:
            hangs.set()


@pytest.mark.parametrize("name", [name for name in OPEN if name != "help"])
async def test_a_click_on_an_option_that_is_gone_ends_nothing(name: str) -> None:
    """The app ended with exit code 1: the list of the palette had changed before a click was handled."""
    async with driving(ScriptedEngine()) as driver:
        OPEN[name](driver)
        await driver.until(lambda: bool(driver.app.screen.query(OptionList)), name)
        await driver.pilot.pause()
        listed = driver.app.screen.query_one(OptionList)
        style = Style(meta={"option": listed.option_count})
        at = listed.region.offset
        await listed._dispatch_message(Click(listed, 0, 0, 0, 0, 1, False, False, False, at.x, at.y, style))
        await driver.pilot.pause()
        assert driver.app._exception is None
        assert driver.app.screen.query(OptionList).first() is listed
