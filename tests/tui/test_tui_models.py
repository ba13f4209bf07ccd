"""Choosing a model in the app: the list, fetching beside the chat, switching, and everything that can go wrong."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.widgets import OptionList

from streamchat.base.requests import CancelFetch, FetchModel, Submit, SwitchModel
from streamchat.frontend import file_access
from streamchat.frontend.model_list import ModelList
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.models import ModelsScreen
from tests.support.app_driver import Driver, driving
from tests.support.model_lists import LIST
from tests.support.scripted_engine import Reply, ScriptedEngine

pytestmark = pytest.mark.slow


async def open_list(driver: Driver, models: ModelList = LIST) -> OptionList:
    """Open the list by its key; the rows, when they are there."""
    driver.app.state.find_models = lambda info: models
    await driver.pilot.press("ctrl+n")
    await driver.until(lambda: driver.shows(ModelsScreen))
    rows = driver.app.screen.query_one(OptionList)
    await driver.until(lambda: rows.option_count == len(models.choices))
    return rows


async def test_the_key_the_command_and_the_palette_open_the_list() -> None:
    async with driving(ScriptedEngine()) as driver:
        await open_list(driver)
        assert "pythia-410m" in driver.screen_text
        await driver.pilot.press("escape")
        assert driver.shows(ChatScreen)
        await driver.enter("/model")
        await driver.until(lambda: driver.shows(ModelsScreen))
        await driver.pilot.press("escape")
        titles = {entry.title: entry for entry in driver.app.get_system_commands(driver.app.screen)}
        titles["Models"].callback()
        await driver.until(lambda: driver.shows(ModelsScreen))
        assert not [request for request in driver.engine.sent if not isinstance(request, Submit)]


async def test_rows_have_size_context_and_what_fits() -> None:
    async with driving(ScriptedEngine(), size=(80, 24)) as driver:
        rows = await open_list(driver)
        lines = driver.screen_text.splitlines()
        [row] = [line for line in lines if "pythia-12b" in line]
        assert row.split("│")[1].split()[:8] == ["pythia-12b", "~23.7", "GB", "2,048", "fetch", "·", "too", "large"]
        assert rows.highlighted == 0
        await driver.pilot.press("down", "down")
        assert "EleutherAI/pythia-410m; needs about 1.7 GB of memory" in driver.screen_text
        await driver.pilot.press("pagedown", "pagedown", "pagedown")
        assert rows.highlighted == len(LIST.choices) - 1
        last = LIST.choices[-1].name
        assert any(last in line for line in driver.screen_text.splitlines())  # scrolled into the panel


async def test_typing_filters_and_enter_switches_at_once_if_the_model_is_here() -> None:
    Path("tiny").mkdir()
    engine = ScriptedEngine(["one", Reply("two", hold_after=0), "three"])
    async with driving(engine) as driver:
        await driver.ask("first")
        rows = await open_list(driver)
        await driver.pilot.press(*"tiny")
        await driver.until(lambda: rows.option_count == 1)
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.board.info and driver.board.info.name == "./tiny")
        assert driver.engine.sent[-1] == SwitchModel("./tiny")
        assert driver.turns == []


async def test_nothing_matches() -> None:
    async with driving(ScriptedEngine()) as driver:
        await open_list(driver)
        await driver.pilot.press(*"zzz")
        await driver.until(lambda: "No models match “zzz”." in driver.screen_text)
        await driver.pilot.press("enter")
        assert driver.shows(ModelsScreen)


async def test_the_list_is_built_beside_the_app() -> None:
    """A slow Hub cache: the screen is there at once, says so, and closes."""
    release = threading.Event()

    def slow(info: Any) -> ModelList:
        assert release.wait(10)
        return LIST

    async with driving(ScriptedEngine()) as driver:
        driver.app.state.find_models = slow
        await driver.pilot.press("ctrl+n")
        await driver.until(lambda: "Looking for models" in driver.screen_text)
        await driver.pilot.press("enter", "escape")
        assert driver.shows(ChatScreen)
        await driver.pilot.press("ctrl+n")
        release.set()
        await driver.until(lambda: "pythia-410m" in driver.screen_text)


async def test_a_list_that_fails_says_why() -> None:
    def broken(info: Any) -> ModelList:
        raise OSError(5, "Input/output error")

    async with driving(ScriptedEngine()) as driver:
        driver.app.state.find_models = broken
        await driver.pilot.press("ctrl+n")
        await driver.until(lambda: "The models could not be listed (OSError: " in driver.screen_text)


async def test_enter_right_after_the_last_letter_takes_what_was_typed() -> None:
    """The list is filtered a moment after the last letter."""
    async with driving(ScriptedEngine()) as driver:
        await open_list(driver)
        for key in ("4", "1", "0", "m", "enter"):
            driver.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await driver.until(lambda: FetchModel("pythia-410m") in driver.engine.sent)


async def test_a_model_is_fetched_beside_the_chat_and_then_loaded() -> None:
    engine = ScriptedEngine(["one", "two"], hold_fetch=True)
    async with driving(engine) as driver:
        await driver.ask("first")
        rows = await open_list(driver)
        await driver.pilot.press(*"410m", "enter")
        await driver.until(lambda: "456 MB of 911 MB (50 %) · Esc cancels" in driver.screen_text)
        assert rows is not None
        await driver.ask("second")  # the chat continues with the old model
        assert [turn.reply_text for turn in driver.turns] == ["one", "two"]
        engine.release_fetch()
        await driver.until(lambda: driver.board.info and driver.board.info.name == "pythia-410m")
        assert engine.sent == [Submit("first"), FetchModel("pythia-410m"), Submit("second"), SwitchModel("pythia-410m")]
        await driver.until(lambda: not driver.chat.fetch_line.display)


async def test_a_fetched_model_waits_for_the_end_of_the_reply() -> None:
    engine = ScriptedEngine([Reply("a long reply", hold_after=1), "next"], hold_fetch=True)
    async with driving(engine) as driver:
        await driver.enter("/model pythia-410m")
        await driver.begin("first")
        assert "cancels" not in driver.chat.fetch_line.text  # Esc would stop the reply
        engine.release_fetch()
        await driver.until(lambda: "loads when this reply is done" in driver.screen_text)
        await driver.enter("queued")
        assert SwitchModel("pythia-410m") not in engine.sent
        engine.release()
        await driver.until(lambda: driver.board.info and driver.board.info.name == "pythia-410m")
        await driver.until(lambda: [turn.text for turn in driver.turns] == ["queued"])  # for the new model


@pytest.mark.parametrize("how", ["key", "palette"])
async def test_a_fetch_is_canceled(how: str) -> None:
    engine = ScriptedEngine(["one"], hold_fetch=True)
    async with driving(engine) as driver:
        await driver.enter("/model pythia-410m")
        await driver.until(lambda: driver.chat.fetch_line.display)
        if how == "key":
            await driver.pilot.press("escape")
        else:
            entries = {entry.title: entry for entry in driver.app.get_system_commands(driver.app.screen)}
            entries["Cancel the fetch"].callback()
        await driver.until(lambda: any("was canceled" in line for line in driver.lines))
        assert not driver.chat.fetch_line.display
        assert [each for each in engine.sent if isinstance(each, CancelFetch | SwitchModel)] == [CancelFetch()]
        assert (await driver.ask("still there?")).reply_text == "one"


async def test_a_fetch_that_fails_keeps_the_model() -> None:
    async with driving(ScriptedEngine(["one"])) as driver:
        await driver.enter("/model a/missing")
        await driver.until(lambda: "a/missing is not a model; keeping the current model" in driver.lines)
        assert not driver.chat.fetch_line.display
        assert (await driver.ask("still there?")).reply_text == "one"


async def test_a_name_that_is_no_name_stays_in_the_input() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/model ./nothing")
        assert "There is no folder" in driver.toasts[-1]
        assert driver.prompt.text == "/model ./nothing"
        assert driver.engine.sent == []


async def test_another_choice_ends_the_first_fetch() -> None:
    Path("tiny").mkdir()
    engine = ScriptedEngine(hold_fetch=True)
    async with driving(engine) as driver:
        await driver.enter("/model pythia-410m")
        await driver.enter("/model pythia-410m")  # the same: it goes on
        await driver.enter("/model ./tiny")
        await driver.until(lambda: driver.board.info and driver.board.info.name == "./tiny")
        assert engine.sent == [FetchModel("pythia-410m"), CancelFetch(), SwitchModel("./tiny")]
        engine.release_fetch()
        await driver.pilot.pause(0.2)
        assert driver.board.info is not None
        assert driver.board.info.name == "./tiny"


async def test_a_browser_without_files_lists_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("local.gguf").write_bytes(b"GGUF")
    async with driving(ScriptedEngine()) as driver:
        await driver.pilot.press("ctrl+n")
        await driver.until(lambda: "./local.gguf" in driver.screen_text)
        await driver.pilot.press("escape")
        monkeypatch.setattr(file_access, "allowed", lambda: False)
        await driver.pilot.press("ctrl+n")
        await driver.until(lambda: "pythia-70m" in driver.screen_text)
        assert "local.gguf" not in driver.screen_text
