"""The settings screen, by keyboard: filter, edit, reset, write, and what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from textual.widgets import Input, Static

from streamchat.base import events as ev
from streamchat.base.requests import ResetOption, SetOption
from streamchat.config import loader
from streamchat.config.settings import Settings, setting_fields
from streamchat.frontend import file_access
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.settings import SettingsScreen
from streamchat.tui.widgets.text import Verbatim
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import Reply, ScriptedEngine


@asynccontextmanager
async def opened(words: str = "", size: tuple[int, int] = (80, 24), **settings: Any) -> AsyncIterator[Driver]:
    """The app with the settings screen open, filtered by `words`."""
    async with driving(ScriptedEngine(settings=Settings(**settings)), size=size) as driver:
        await driver.pilot.press("f4")
        await driver.until(lambda: driver.shows(SettingsScreen))
        await typed(driver, words)
        yield driver


async def typed(driver: Driver, text: str) -> None:
    await driver.pilot.press(*("space" if letter == " " else letter for letter in text))
    await driver.pilot.pause()


def screen_of(driver: Driver) -> SettingsScreen:
    assert isinstance(driver.app.screen, SettingsScreen)
    return driver.app.screen


def names(driver: Driver) -> list[str]:
    return [row.name for row in screen_of(driver)._rows if row is not None]


def said(driver: Driver) -> str:
    return screen_of(driver).query_one("#message", Verbatim).text


def meaning(driver: Driver) -> str:
    return str(screen_of(driver).query_one("#meaning", Static).content)


async def retype(driver: Driver, text: str) -> None:
    """Replace the text in the line of the edited setting."""
    await driver.pilot.press("home", "ctrl+k")
    await typed(driver, text)


async def test_every_setting_is_there_and_typing_filters() -> None:
    async with opened() as driver:
        assert names(driver) == list(setting_fields())
        await typed(driver, "max new")
        assert names(driver) == ["max_new_tokens"]
        await typed(driver, "zzz")
        assert names(driver) == []
        assert said(driver) == "No setting has “max newzzz”."
        await driver.pilot.press("enter", "ctrl+r", "ctrl+s", "down", "escape")
        assert driver.shows(ChatScreen)


async def test_a_setting_has_its_meaning_value_and_origin() -> None:
    async with opened(size=(140, 40)) as driver:
        driver.engine.origins["top_k"] = "a source of later versions"
        await typed(driver, "top_k")
        text = " ".join(driver.screen_text.split())
        assert "top_k 0 a source of later versions" in text
        assert "Sample from the k most likely tokens; 0 = off." in text
        assert meaning(driver).splitlines()[1] == (
            "At least 0. Default: 0. Now from: a source of later versions. A change takes effect with the next turn."
        )


async def test_an_edit_is_checked_while_typing_and_asks_the_engine() -> None:
    async with opened("temperature") as driver:
        await driver.pilot.press("enter")
        await retype(driver, "99")
        assert said(driver) == "temperature = 99.0 is not valid; it must be at least 0 and at most 10"
        await driver.pilot.press("enter")
        assert screen_of(driver)._edited == "temperature"  # a wrong value is not accepted
        assert driver.sent(SetOption) == []
        await retype(driver, "0.25")
        assert said(driver) == ""
        await driver.pilot.press("enter")
        assert driver.sent(SetOption) == [SetOption("temperature", 0.25)]
        await driver.until(lambda: "0.25" in driver.screen_text)
        row = screen_of(driver).selected
        assert row is not None
        assert (row.value, row.origin) == ("0.25", "/set")
        await driver.pilot.press("ctrl+r")
        assert driver.sent(ResetOption) == [ResetOption("temperature")]
        await driver.until(lambda: "0.25" not in driver.screen_text)


async def test_escape_cancels_the_edit_then_closes() -> None:
    async with opened("temperature") as driver:
        await driver.pilot.press("enter")
        await retype(driver, "5")
        await driver.pilot.press("escape")
        assert driver.shows(SettingsScreen)
        assert driver.sent(SetOption) == []
        await driver.pilot.press("f4")
        assert driver.shows(ChatScreen)
        assert driver.prompt.has_focus


async def test_choices_are_taken_with_the_arrows() -> None:
    async with opened("thinking") as driver:
        await driver.pilot.press("enter", "down", "enter")
        assert driver.sent(SetOption) == [SetOption("thinking", "show")]
        await driver.until(lambda: driver.conversation.thinking == "show")
        await driver.pilot.press("enter", "up", "up", "enter")
        assert driver.sent(SetOption)[1:] == [SetOption("thinking", "hide")]


async def test_the_arrows_skip_the_headings() -> None:
    async with opened() as driver:
        for name in list(setting_fields())[1:9]:
            await driver.pilot.press("down")
            row = screen_of(driver).selected
            assert row is not None
            assert row.name == name
        await driver.pilot.press(*["up"] * 9)
        assert screen_of(driver).selected == screen_of(driver)._table.row(list(setting_fields())[-1])
        await driver.pilot.press("pageup", "pagedown", "pagedown", "down")
        assert screen_of(driver).selected == screen_of(driver)._table.row("model")


async def test_a_setting_that_needs_a_load_waits_for_the_next_start() -> None:
    async with opened("cache_size") as driver:
        assert "needs a new load: it takes effect at the next start" in meaning(driver)
        await driver.pilot.press("enter")
        await retype(driver, "2048")
        await driver.pilot.press("enter")
        assert driver.engine.sent == []
        assert said(driver) == "cache_size = 2048 is for the next start: ctrl+s writes it to config.toml"
        assert "1024 → 2048" in driver.screen_text
        await driver.pilot.press("escape", "f4")  # it is kept while the screen is closed
        await typed(driver, "cache_size")
        assert "1024 → 2048" in driver.screen_text
        await driver.pilot.press("ctrl+s")
        assert said(driver) == f"cache_size = 2048 is written to {loader.user_file()}"
        row = screen_of(driver).selected
        assert row is not None
        assert (row.wanted, row.note) == ("2048", "next start")
        assert loader.load(environ={}).settings.cache_size == 2048
        await driver.pilot.press("ctrl+r", "ctrl+s")
        assert "has its default" in said(driver)
        assert loader.load(environ={}).settings.cache_size == 1024


async def test_a_refused_file_is_said() -> None:
    loader.user_file().parent.mkdir(parents=True)
    loader.user_file().write_text("[other]\n")
    async with opened("temperature") as driver:
        await driver.pilot.press("ctrl+s")
        assert "not a streamchat configuration" in said(driver)
    assert loader.user_file().read_text() == "[other]\n"


async def test_a_browser_writes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_access, "_refusal", "in the browser")
    async with opened("temperature") as driver:
        await driver.pilot.press("ctrl+s")
        assert said(driver) == "writing config.toml is off in the browser"
    assert not loader.user_file().exists()


async def test_what_the_engine_answers_is_shown() -> None:
    async with opened("temperature") as driver:
        driver.engine.emit(ev.Notice("that cannot be", "warning"))
        await driver.until(lambda: said(driver) == "that cannot be")


async def test_a_text_of_several_lines_is_not_edited_in_one() -> None:
    async with opened("system_prompt", system_prompt="one\ntwo") as driver:
        await driver.pilot.press("enter")
        assert said(driver) == "system_prompt has several lines; change it in config.toml"


async def test_the_command_opens_the_screen_with_words() -> None:
    async with driving(ScriptedEngine(), size=(80, 24)) as driver:
        await driver.enter("/settings top")
        await driver.until(lambda: driver.shows(SettingsScreen))
        assert "top_p" in names(driver)
        assert "seed" not in names(driver)
        row = screen_of(driver).selected
        assert row is not None
        assert row.name == "top_p"


async def test_a_value_that_the_engine_does_not_use_yet_is_the_one_that_is_written() -> None:
    """During a reply the engine answers later; Ctrl+S right after Enter must not write the old value."""
    engine = ScriptedEngine([Reply("one two three", hold_after=1)])
    async with driving(engine, size=(80, 24)) as driver:
        await driver.begin("Hello")
        engine.send = lambda request: engine.sent.append(request)  # type: ignore[method-assign]
        await driver.pilot.press("f4")
        await driver.until(lambda: driver.shows(SettingsScreen))
        await typed(driver, "temperature")
        await driver.pilot.press("enter")
        await retype(driver, "0.5")
        await driver.pilot.press("enter")
        row = screen_of(driver).selected
        assert row is not None
        assert (row.value, row.wanted, row.note) == ("0.7", "0.5", "with the next turn")
        await driver.pilot.press("ctrl+s")
        assert said(driver).startswith("temperature = 0.5 is written")
        engine.emit(ev.SettingChanged("temperature", 0.5))
        await driver.until(lambda: "→" not in driver.screen_text)
        engine.release()


async def test_after_a_failure_settings_are_for_the_next_start() -> None:
    async with driving(ScriptedEngine(), size=(80, 24)) as driver:
        driver.engine.fail("no memory")
        await driver.until(lambda: driver.app.failure is not None)
        await driver.pilot.press("f4")
        await driver.until(lambda: driver.shows(SettingsScreen))
        await typed(driver, "temperature")
        await driver.pilot.press("enter")
        await retype(driver, "0.5")
        await driver.pilot.press("enter")
        assert driver.engine.sent == []
        assert said(driver) == "temperature = 0.5 is for the next start: ctrl+s writes it to config.toml"


async def test_a_reset_that_waits_is_what_is_written() -> None:
    """During a reply the engine answers later; Ctrl+S right after Ctrl+R must not write the old value."""
    loader.user_file().parent.mkdir(parents=True, exist_ok=True)
    loader.user_file().write_text("[streamchat]\n[generation]\ntemperature = 0.5\n")
    async with opened("temperature", temperature=0.5) as driver:
        driver.engine.origins["temperature"] = "/set"
        driver.engine.send = lambda request: driver.engine.sent.append(request)  # type: ignore[method-assign]
        await driver.pilot.press("ctrl+r")
        assert driver.sent(ResetOption) == [ResetOption("temperature")]
        row = screen_of(driver).selected
        assert row is not None
        assert (row.value, row.wanted, row.note) == ("0.5", None, "reset, next turn")
        assert "reset, next turn" in driver.screen_text
        await driver.pilot.press("ctrl+s")
        assert said(driver).startswith("temperature has its default")
        assert "temperature" not in loader.user_file().read_text()
        driver.engine.emit(ev.SettingChanged("temperature", 0.7))
        await driver.until(lambda: "reset, next" not in driver.screen_text)
        assert said(driver).startswith("temperature has its default")  # what was written stays in view


@pytest.mark.parametrize("size", [(40, 12), (80, 12), (80, 16), (40, 24)])
async def test_on_a_small_screen_the_edited_setting_and_its_line_are_visible(size: tuple[int, int]) -> None:
    async with opened(size=size) as driver:
        await driver.pilot.press("up")
        await driver.pilot.pause()
        assert list(setting_fields())[-1] in driver.screen_text
        await typed(driver, "temperature")
        assert "0.7" in driver.screen_text
        await driver.pilot.press("enter")
        await retype(driver, "99")
        await driver.pilot.pause()
        assert "temperature = 99" in driver.screen_text
        assert "is not valid" in driver.screen_text


async def test_the_selected_setting_stays_in_view_when_the_window_shrinks() -> None:
    async with opened(size=(80, 40)) as driver:
        await driver.pilot.press("up", "up")
        await driver.pilot.resize_terminal(40, 12)
        await driver.until(lambda: list(setting_fields())[-2] in driver.screen_text)


async def test_no_control_character_reaches_the_terminal() -> None:
    """An imported session may have a hostile system prompt, and a page a hostile text to paste."""
    hostile = "red \x1b]0;title\x1b\\\x1b[31m\x07\u202e text"
    async with opened(system_prompt=hostile) as driver:
        driver.app.screen.query_one("#words", Input).insert_text_at_cursor(f"system_{hostile}")
        await driver.pilot.pause()
        assert driver.app.screen.query_one("#words", Input).value == "system_red  text"
        await retype(driver, "system_prompt")
        await driver.pilot.press("enter")
        assert said(driver) == "system_prompt has control characters; change it in config.toml"
        await retype(driver, "theme")
        await driver.pilot.press("enter", "home", "ctrl+k")
        driver.app.screen.query_one("#value", Input).insert_text_at_cursor(f"nord\t{hostile}")
        await driver.pilot.pause()
        assert driver.app.screen.query_one("#value", Input).value == "nord red  text"
        assert not {"\x1b", "\x07", "\u202e"} & set(driver.screen_text)
