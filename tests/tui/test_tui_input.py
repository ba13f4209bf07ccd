"""The input of the app: keys, paste, history, commands, clipboard, leaving."""

from __future__ import annotations

import json
import stat

import pytest
from textual import events

from streamchat.base import paths
from streamchat.base.requests import Stop
from streamchat.config.settings import Settings
from streamchat.tui.history import PromptHistory
from streamchat.tui.screens.help import HelpScreen
from streamchat.tui.widgets.completion import Completions
from streamchat.tui.widgets.turn import Turn
from tests.support.app_driver import NASTY, Driver, driving
from tests.support.scripted_engine import Reply, ScriptedEngine

pytestmark = pytest.mark.slow  # each test starts the app


def completions(driver: Driver) -> Completions:
    return driver.chat.query_one(Completions)


@pytest.mark.slow
async def test_new_lines_and_growth() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        assert driver.prompt.size.height == 1
        await driver.pilot.press("a", "ctrl+j", "b", "shift+enter", "c", "alt+enter", "d")
        assert driver.prompt.text == "a\nb\nc\nd"
        assert driver.prompt.size.height == 4
        await driver.pilot.press(*["ctrl+j"] * 20)
        assert driver.prompt.size.height == 8
        assert engine.submitted == []
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)
        assert engine.submitted == ["a\nb\nc\nd"]
        assert driver.prompt.size.height == 1


async def test_what_is_typed_or_pasted_without_a_focus_is_in_the_input() -> None:
    async with driving(ScriptedEngine()) as driver:
        driver.chat.set_focus(None)
        await driver.pilot.press("h", "i")
        assert driver.prompt.text == "hi"
        driver.chat.set_focus(None)
        driver.app.post_message(events.Paste(" there"))
        await driver.until(lambda: driver.prompt.text == "hi there")
        driver.app.post_message(events.AppBlur())
        await driver.until(lambda: driver.chat.focused is None)
        driver.app.post_message(events.Paste("!"))
        await driver.until(lambda: driver.prompt.text == "hi there!")


async def test_paste_is_one_unsent_message() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        driver.prompt.post_message(events.Paste("def f():\r\n\treturn 1\r\n\rprint(f())\x1b[2J\nend"))
        await driver.until(lambda: driver.prompt.text)
        assert driver.prompt.text == "def f():\n    return 1\n\nprint(f())\nend"
        assert engine.submitted == []
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)
        assert engine.submitted == ["def f():\n    return 1\n\nprint(f())\nend"]


@pytest.mark.slow
async def test_paste_of_thousands_of_lines_is_sent_whole_and_shown_folded() -> None:
    engine = ScriptedEngine(["ok"])
    text = "\n".join(f"line {number} of a long log" for number in range(5000))
    async with driving(engine) as driver:
        driver.prompt.post_message(events.Paste(text))
        await driver.until(lambda: driver.prompt.document.line_count == 5000)
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)
        assert engine.submitted == [text]
        assert "4,984 more lines; click to show them" in driver.screen_text


def burst(driver: Driver, text: str) -> None:
    """Type faster than the app can handle what each key leads to; a line end is Enter."""
    for character in text:
        key = "enter" if character == "\n" else {"/": "slash", " ": "space"}.get(character, character)
        driver.prompt.post_message(events.Key(key, None if key == "enter" else character))


async def test_keys_right_behind_enter_belong_to_the_next_message() -> None:
    engine = ScriptedEngine(["ok"])
    async with driving(engine) as driver:
        burst(driver, "one\ntwo")
        await driver.until(lambda: driver.finished == 1 and driver.prompt.text == "two")
        assert engine.submitted == ["one"]


async def test_what_cannot_be_sent_comes_back_before_the_keys_behind_it() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        burst(driver, "/nothing\ntwo")
        await driver.until(lambda: driver.prompt.text == "/nothing\ntwo")
        assert engine.submitted == []


async def test_blank_is_not_sent() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.pilot.press("enter", "space", "ctrl+j", "enter")
        assert engine.submitted == []


@pytest.mark.slow
async def test_history_across_restarts() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("first")
        await driver.ask("second\nwith two lines")
        await driver.enter("/stats")
    file = paths.state_dir() / "typed.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == [
        "first",
        "second\nwith two lines",
        "/stats",
    ]
    async with driving(ScriptedEngine()) as driver:
        await driver.write("draft")
        await driver.pilot.press("up")
        assert driver.prompt.text == "/stats"
        assert not completions(driver).shown
        await driver.pilot.press("up")
        assert driver.prompt.text == "second\nwith two lines"
        await driver.pilot.press("up")  # inside the text first
        assert driver.prompt.text == "second\nwith two lines"
        await driver.pilot.press("up", "up")
        assert driver.prompt.text == "first"
        await driver.pilot.press("down", "down")
        assert driver.prompt.text == "/stats"
        await driver.pilot.press("down")
        assert driver.prompt.text == "draft"


@pytest.mark.slow
async def test_history_can_be_off() -> None:
    settings = Settings(history=False)
    async with driving(ScriptedEngine(settings=settings)) as driver:
        await driver.ask("secret")
        await driver.pilot.press("up")
        assert driver.prompt.text == "secret"  # in memory
    assert not (paths.state_dir() / "typed.jsonl").exists()


async def test_history_that_cannot_be_kept_is_said() -> None:
    folder = paths.state_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where a folder should be")
    async with driving(ScriptedEngine()) as driver:
        await driver.until(lambda: any("input history is disabled" in line for line in driver.lines))
        await driver.ask("hello")
        await driver.pilot.press("up")
        assert driver.prompt.text == "hello"


async def test_slash_opens_the_list_and_tab_completes() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.pilot.press("slash")
        assert completions(driver).shown
        assert completions(driver).chosen == "/help"
        await driver.pilot.press("s", "e")
        assert completions(driver).chosen == "/set"
        await driver.pilot.press("tab")
        assert driver.prompt.text == "/set "
        await driver.pilot.press("t", "e", "m")
        assert completions(driver).chosen == "/set temperature"
        await driver.pilot.press("tab")
        await driver.write("0.2")
        await driver.pilot.press("enter")
        await driver.until(lambda: engine.settings.temperature == 0.2)
        assert driver.outputs == ["temperature = 0.2, starting with the next turn"]
        assert driver.prompt.text == ""


async def test_arrows_and_enter_choose_a_command() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.pilot.press("slash", "s")
        await driver.pilot.press("down", "down", "up", "down")
        assert completions(driver).chosen == "/stats"
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.outputs)
        assert "compressions" in driver.outputs[0]
        assert not completions(driver).shown


async def test_escape_closes_the_list_first() -> None:
    engine = ScriptedEngine([Reply("one two", hold_after=1)])
    async with driving(engine) as driver:
        await driver.begin("go")
        await driver.pilot.press("slash", "escape")
        assert not completions(driver).shown
        assert Stop() not in engine.sent
        await driver.pilot.press("escape")
        assert Stop() in engine.sent


@pytest.mark.slow
async def test_unknown_commands_never_reach_the_model() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.enter("/statz")
        assert any("did you mean /stats?" in toast for toast in driver.toasts)
        assert driver.prompt.text == "/statz"  # to be put right
        assert engine.submitted == []
        driver.prompt.put("")
        await driver.ask("/usr/bin/env is a path")
        await driver.ask("//statz")
        assert engine.submitted == ["/usr/bin/env is a path", "/statz"]


async def test_set_refuses_what_is_illegal() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.enter("/set temperature -1")
        assert any("at least 0" in toast for toast in driver.toasts)
        assert engine.settings.temperature == 0.7


@pytest.mark.slow
async def test_help_lists_keys_and_commands() -> None:
    async with driving(ScriptedEngine(), size=(100, 90)) as driver:
        await driver.pilot.press("f1")
        await driver.until(lambda: "Keys" in driver.screen_text)
        for word in ("Ctrl+J", "Shift+drag", "/set [NAME [VALUE]]", "/theme [NAME]", "/quit"):
            assert word in driver.screen_text
        await driver.pilot.press("escape")
        await driver.enter("/help")
        await driver.until(lambda: isinstance(driver.app.screen, HelpScreen))
        await driver.pilot.press("q")
        assert not isinstance(driver.app.screen, HelpScreen)
        await driver.enter("/help set")
        await driver.until(lambda: driver.outputs)


@pytest.mark.slow
async def test_themes() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/theme nord")
        assert driver.app.theme == "nord"
        await driver.write("/theme textual-l")
        assert completions(driver).chosen == "/theme textual-light"
        await driver.pilot.press("escape")
        driver.prompt.put("")
        await driver.enter(f"/theme {NASTY}")
        assert any("does not exist" in toast for toast in driver.toasts)
        assert driver.app.theme == "nord"


async def test_invalid_theme_in_the_settings() -> None:
    settings = Settings(theme="textual-drak")
    async with driving(ScriptedEngine(settings=settings)) as driver:
        assert driver.app.theme == "textual-dark"
        assert any(
            "theme 'textual-drak' does not exist" in toast and "textual-dark" in toast for toast in driver.toasts
        )


async def test_light_theme_from_the_settings() -> None:
    settings = Settings(theme="textual-light")
    async with driving(ScriptedEngine(settings=settings)) as driver:
        assert driver.app.theme == "textual-light"
        assert driver.toasts == []


@pytest.mark.slow
async def test_copy() -> None:
    engine = ScriptedEngine(["Look:\n\n```python\nx = 1\n\ny = 2\n```\n\nDone."])
    async with driving(engine) as driver:
        await driver.pilot.press("ctrl+y")
        assert any("no reply" in toast for toast in driver.toasts)
        await driver.ask("code")
        await driver.pilot.press("ctrl+y")
        assert driver.app.clipboard == "Look:\n\n```python\nx = 1\n\ny = 2\n```\n\nDone."
        assert any("OSC 52" in toast and "Shift+drag" in toast for toast in driver.toasts)
        await driver.enter("/copy code")
        assert driver.app.clipboard == "x = 1\n\ny = 2"


@pytest.mark.slow
async def test_ctrl_c_copies_a_selection_first() -> None:
    engine = ScriptedEngine([Reply("one two", hold_after=1)])
    async with driving(engine) as driver:
        await driver.begin("go")
        await driver.write("abc")
        await driver.pilot.press("shift+left", "shift+left", "ctrl+c")
        assert driver.app.clipboard == "bc"
        assert Stop() not in engine.sent
        await driver.pilot.press("ctrl+c")
        assert Stop() in engine.sent
        assert driver.prompt.text == "abc"


async def test_ctrl_c_twice_quits() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.pilot.press("ctrl+c")
        assert driver.toasts == ["press Ctrl+C again to quit"]
        assert driver.app.is_running
        await driver.pilot.press("ctrl+c")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 0
    assert driver.engine.closing


@pytest.mark.slow
@pytest.mark.parametrize("key", ["ctrl+q", "ctrl+d"])
async def test_quit_keys(key: str) -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.pilot.press(key)
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 0


async def test_ctrl_d_deletes_in_a_text() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.write("ab")
        await driver.pilot.press("home", "ctrl+d")
        assert driver.prompt.text == "b"
        assert driver.app.is_running


async def test_quit_while_loading() -> None:
    engine = ScriptedEngine(hold_loading=True)
    async with driving(engine, ready=False) as driver:
        await driver.enter("/quit")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 0


@pytest.mark.slow
async def test_quit_while_streaming() -> None:
    engine = ScriptedEngine([Reply("word " * 2000, tokens_per_s=100)])
    async with driving(engine) as driver:
        await driver.begin("go")
        await driver.pilot.press("ctrl+q")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 0


async def test_quit_at_the_moment_the_reply_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are told to widgets that Textual takes down meanwhile."""
    add = Turn.add

    async def leave_first(turn: Turn, text: str) -> None:
        turn.app.exit(0)
        await add(turn, text)

    monkeypatch.setattr(Turn, "add", leave_first)
    async with driving(ScriptedEngine(["hello"])) as driver:
        await driver.enter("go")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 0


@pytest.mark.slow
async def test_quit_does_not_wait_for_a_stuck_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.tui.leaving.CLOSE_S", 0.05)
    engine = ScriptedEngine([Reply("one two", hold_after=1)], stuck=True)
    async with driving(engine) as driver:
        await driver.begin("go")
        await driver.pilot.press("ctrl+q")
        await driver.until(lambda: not driver.app.is_running)
        assert engine._thread is not None
        assert engine._thread.is_alive()
        engine.release()
    assert driver.app.return_value == 0


@pytest.mark.slow
async def test_command_palette_offers_the_actions() -> None:
    async with driving(ScriptedEngine(["hello"])) as driver:
        names = {command.title for command in driver.app.get_system_commands(driver.app.screen)}
        assert {"New conversation", "Copy last reply", "Sidebar", "Help", "Theme", "Quit"} <= names
        await driver.ask("hi")
        driver.chat.run_slash("/clear")
        await driver.until(lambda: driver.turns == [])
        await driver.pilot.press("ctrl+p")
        await driver.pilot.press("escape")
        await driver.pilot.press("ctrl+p", *"help")
        await driver.until(lambda: "Keys and commands" in driver.screen_text)
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.shows(HelpScreen))


def test_bindings_have_ids_and_tooltips() -> None:
    from textual.binding import Binding

    from streamchat.tui.app import StreamchatApp
    from streamchat.tui.screens.keys import CHAT_KEYS

    for binding in (*CHAT_KEYS, *StreamchatApp.BINDINGS):
        assert isinstance(binding, Binding)
        assert binding.id, binding
        assert binding.tooltip, binding


def test_history_walk_is_pure() -> None:
    history = PromptHistory(None)
    for text in ("one", "two", "two", "  "):
        history.add(text)
    assert history.entries == ["one", "two"]
    assert history.older("draft") == "two"
    assert history.older("edited") == "one"
    assert history.older("edited") is None
    assert history.newer() == "two"
    assert history.newer() == "draft"
    assert history.newer() is None
