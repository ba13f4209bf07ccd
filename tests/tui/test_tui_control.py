"""The app's input and control: sizes, files, editor, keys, themes, models, reasoning."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest
from textual.app import App
from textual.command import CommandPalette
from textual.events import Paste
from textual.widgets import Input

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.requests import CountTokens, Submit, SwitchModel
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.frontend.outbox import Phase
from streamchat.tui.app import StreamchatApp
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.closable import Closable
from streamchat.tui.themes import user_themes
from streamchat.tui.widgets.completion import Completions
from streamchat.tui.widgets.thinking import Thinking
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import Reply, ScriptedEngine

pytestmark = pytest.mark.slow

THOUGHT = "<think>\nI wonder about it\n</think>\n\nIt is **so**."


# --- size of a message -----------------------------------------------------------------------------------------


async def test_a_long_paste_is_one_message_with_its_size_before_it_is_sent() -> None:
    from textual import events

    text = "\n".join(f"line {n} of many" for n in range(3_000))
    async with driving(ScriptedEngine(settings=Settings(cache_size=1024))) as driver:
        driver.app.post_message(events.Paste(text))
        await driver.until(lambda: driver.prompt.document.line_count == 3_000)
        assert str(driver.prompt.border_subtitle).startswith("about ")
        words = "12,000 tokens in 3,000 lines, 1,020 fit: its beginning will be evicted"
        await driver.until(lambda: str(driver.prompt.border_subtitle) == words)
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)
        assert driver.engine.submitted == [text]
        assert str(driver.prompt.border_subtitle) == "Enter sends · Ctrl+J new line"


async def test_a_short_message_is_not_measured() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.write("hello")
        await driver.pilot.pause(0.5)
        assert not any(isinstance(request, CountTokens) for request in driver.engine.sent)


async def test_a_short_message_with_a_long_file_is_measured_with_it() -> None:
    Path("log.txt").write_text("two words\n" * 200)
    async with driving(ScriptedEngine()) as driver:
        await driver.write("Sum up @log.txt ")
        words = "405 tokens in 204 lines, 1,020 fit"
        await driver.until(lambda: str(driver.prompt.border_subtitle) == words)


async def test_values_are_offered_and_taken() -> None:
    async with driving(ScriptedEngine()) as driver:
        completions = driver.chat.query_one(Completions)
        driver.prompt.put("/set th")
        await driver.until(lambda: completions.chosen == "/set thinking")
        await driver.pilot.press("enter")
        await driver.until(lambda: completions.chosen == "/set thinking collapse")
        await driver.pilot.press("down", "enter")
        assert driver.prompt.text == "/set thinking show"
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.engine.settings.thinking == "show")


# --- files -----------------------------------------------------------------------------------------------------


async def test_a_file_is_sent_with_the_message() -> None:
    Path("notes.txt").write_text("first\nsecond\n")
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("Sum up @notes.txt")
        assert driver.engine.submitted == ["Sum up notes.txt:\n```txt\nfirst\nsecond\n```\n"]
        await driver.pilot.press("up")
        assert driver.prompt.text == "Sum up @notes.txt"  # what was typed


async def test_a_missing_file_is_said_and_nothing_is_lost() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("Sum up @./missing.txt")
        await driver.until(lambda: driver.toasts)
        assert driver.toasts[0].startswith("./missing.txt: no such file")
        assert driver.prompt.text == "Sum up @./missing.txt"
        assert driver.engine.submitted == []


async def test_what_looks_like_a_file_goes_as_text_with_a_word() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("请阅读@demo.txt")
        assert driver.engine.submitted == ["请阅读@demo.txt"]
        assert driver.lines == ["demo.txt: no such file; sent as text"]


async def test_a_refused_message_comes_back_as_it_was_typed() -> None:
    Path("long.txt").write_text("\n".join(f"line {number}" for number in range(205)))
    engine = ScriptedEngine([Reply(error="no room", prompt_tokens=10)])
    async with driving(engine) as driver:
        await driver.enter("//help with @long.txt")
        await driver.until(lambda: driver.prompt.text)
        assert len(engine.submitted[0].splitlines()) > 205
        assert engine.submitted[0].startswith("/help with long.txt:")
        assert driver.prompt.text == "//help with @long.txt"


async def test_a_waiting_message_comes_back_as_it_was_typed() -> None:
    Path("long.txt").write_text("\n".join(f"line {number}" for number in range(205)))
    engine = ScriptedEngine([Reply("one two", hold_after=1)])
    async with driving(engine) as driver:
        await driver.begin("go")
        await driver.enter("see @long.txt")
        assert driver.app.state.outbox.queue
        await driver.pilot.press("up")
        assert driver.prompt.text == "see @long.txt"
        engine.release()


async def test_the_first_line_of_a_paste_keeps_its_indentation() -> None:
    async with driving(ScriptedEngine()) as driver:
        driver.prompt.post_message(Paste("\n  \n    def f():\n        return 1\n\n"))
        await driver.until(lambda: driver.prompt.text)
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)
        assert driver.engine.submitted == ["    def f():\n        return 1"]


async def test_enter_sends_the_folder_of_a_model() -> None:
    Path("tiny/sub").mkdir(parents=True)
    Path("tiny/config.json").write_text("{}")
    Path("tiny/model.safetensors").write_text("")
    async with driving(ScriptedEngine()) as driver:
        for typed in ("/model ./tiny", "/model ./tiny/"):
            await driver.write(typed)
            await driver.pilot.press("enter")
            assert SwitchModel(typed.removeprefix("/model ")) in driver.engine.sent
            assert driver.prompt.text == ""
        await driver.write("/model ./ti")
        await driver.pilot.press("enter")
        assert driver.prompt.text == "/model ./tiny/"
        await driver.pilot.press("enter")
        assert driver.prompt.text == ""
        # a name that is complete is sent, also when a longer one begins with it
        Path("notes.txt").write_text("x")
        Path("notes.txt.bak").write_text("y")
        await driver.until(lambda: driver.app.state.outbox.phase is Phase.IDLE)
        await driver.write("see @notes.txt")
        await driver.pilot.press("enter")
        assert driver.engine.submitted == ["see notes.txt:\n```txt\nx\n```\n"]


async def test_ctrl_c_empties_the_input_and_undo_brings_it_back() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.write("one\ntwo")
        await driver.pilot.press("ctrl+c")
        assert (driver.prompt.text, driver.toasts) == ("", [])
        await driver.pilot.press("ctrl+z")
        assert driver.prompt.text == "one\ntwo"
        await driver.pilot.press("ctrl+c")
        await driver.pilot.press("ctrl+c")
        assert driver.toasts == ["press Ctrl+C again to quit"]
        assert driver.app.is_running


async def test_paths_complete_behind_an_at_sign() -> None:
    Path("notes.txt").write_text("x")
    Path("sub").mkdir()
    Path("sub/deep.txt").write_text("deep")
    async with driving(ScriptedEngine()) as driver:
        completions = driver.chat.query_one(Completions)
        await driver.write("one line\nlook at @no")
        assert completions.chosen == "look at @notes.txt"
        await driver.pilot.press("enter")
        assert driver.prompt.text == "one line\nlook at @notes.txt "
        await driver.write("and @su")
        await driver.pilot.press("tab")
        assert driver.prompt.text.endswith("and @sub/")
        await driver.until(lambda: completions.shown)
        await driver.pilot.press("tab")
        assert driver.prompt.text.endswith("and @sub/deep.txt ")
        assert driver.engine.submitted == []


async def test_keys_in_one_burst_meet_no_stale_list() -> None:
    from textual import events

    async with driving(ScriptedEngine()) as driver:
        await driver.pilot.press("slash")
        assert driver.chat.query_one(Completions).shown
        for character in "etc/hosts is a file":
            driver.app.post_message(events.Key("space" if character == " " else character, character))
        driver.app.post_message(events.Key("enter", "\r"))
        await driver.until(lambda: driver.finished == 1)
        assert driver.engine.submitted == ["/etc/hosts is a file"]


async def test_read_puts_a_file_into_the_input_or_sends_it() -> None:
    Path("notes.txt").write_text("x")
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/read notes.txt")
        await driver.until(lambda: driver.prompt.text == "@notes.txt ")
        driver.prompt.put("")
        await driver.ask("/read notes.txt what is it?")
        assert driver.engine.submitted == ["notes.txt:\n```txt\nx\n```\n what is it?"]


# --- editor ----------------------------------------------------------------------------------------------------


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor that appends a line; the app of a test has no terminal to give away."""
    from contextlib import nullcontext

    Path("edit.py").write_text(
        "import sys\np = sys.argv[1]\nt = open(p).read()\nopen(p, 'w').write(t + ' edited\\nsecond line\\n')\n"
    )
    monkeypatch.setenv("EDITOR", f"{sys.executable} {os.getcwd()}/edit.py")
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setattr(StreamchatApp, "suspend", lambda self: nullcontext())


@pytest.mark.usefixtures("editor")
async def test_the_editor_gets_the_draft_and_gives_it_back() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.write("draft")
        await driver.pilot.press("ctrl+g")
        await driver.until(lambda: driver.prompt.text == "draft edited\nsecond line")


@pytest.mark.usefixtures("editor")
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "no editor is set"),
        ("/nowhere/editor", "the editor /nowhere/editor could not be started (No such file or directory)"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "exited with code 3; the message is unchanged"),
        ("'", "cannot be parsed"),
    ],
)
async def test_an_editor_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, command: str, sentence: str) -> None:
    monkeypatch.setenv("EDITOR", command)
    async with driving(ScriptedEngine()) as driver:
        await driver.write("draft")
        await driver.pilot.press("ctrl+g")
        await driver.until(lambda: driver.toasts)
        assert sentence in driver.toasts[0]
        assert driver.prompt.text == "draft"


# --- keys ------------------------------------------------------------------------------------------------------


async def test_keys_can_be_remapped() -> None:
    changed = {
        "chat.sidebar": "f5",
        "prompt.send": "ctrl+s",
        "app.help": "f9",
        "app.quit": "f6",
        "chat.interrupt": "ctrl+x",
    }
    engine = ScriptedEngine()
    app = StreamchatApp(engine, Configuration(engine.settings, keys=changed))
    async with app.run_test(size=(140, 60)) as pilot:
        driver = Driver(app, engine, pilot)
        await driver.ready()
        assert str(driver.prompt.border_subtitle) == "Ctrl+S sends · Ctrl+J new line"
        shown = driver.chat.has_class("-sidebar")
        await pilot.press("f5")
        assert driver.chat.has_class("-sidebar") != shown
        await pilot.press("ctrl+b")  # the old key does nothing
        assert driver.chat.has_class("-sidebar") != shown
        await pilot.press("a", "enter", "b")
        assert driver.prompt.text == "a\nb"
        await pilot.press("ctrl+s")
        await driver.until(lambda: engine.submitted == ["a\nb"])
        assert "Ctrl+S sends · Ctrl+J new line · / commands · F9 help · F6 quits" in driver.screen_text
        await pilot.press("ctrl+x")
        assert driver.toasts == ["press Ctrl+X again to quit"]
        await pilot.press("f9")
        await driver.until(lambda: "Ctrl+S" in driver.screen_text and "F9" in driver.screen_text)
    engine.close()


# --- themes ----------------------------------------------------------------------------------------------------


def write_theme(name: str, text: str) -> None:
    folder = paths.config_dir() / "themes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text)


async def test_a_theme_of_the_user() -> None:
    write_theme("paper", 'primary = "#204080"\nbackground = "#f5f0e0"\ndark = false\n')
    settings = Settings(theme="paper")
    async with driving(ScriptedEngine(settings=settings), settings=settings) as driver:
        assert driver.app.theme == "paper"
        assert not driver.app.current_theme.dark
        await driver.enter("/theme textual-light")
        await driver.until(lambda: driver.app.theme == "textual-light")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('primary = "#zzz"', "primary = '#zzz' is not a color"),
        ('background = "#000"', "primary is missing"),
        ('primary = "#000"\ncolour = "#111"', "unknown field colour"),
        ('primary = "#000"\ndark = "yes"', "dark must be bool"),
        ("primary = ", "not a valid theme: "),
    ],
)
async def test_a_broken_theme_is_said_and_skipped(text: str, sentence: str) -> None:
    write_theme("broken", text)
    write_theme("fine", 'primary = "#123456"')
    themes, problems = user_themes()
    assert [theme.name for theme in themes] == ["fine"]
    assert sentence in problems[0]
    async with driving(ScriptedEngine()) as driver:
        assert sentence in driver.toasts[0]


# --- another model ---------------------------------------------------------------------------------------------


async def test_another_model_without_a_restart() -> None:
    Path("tiny").mkdir()  # not fetched first
    async with driving(ScriptedEngine(["one", Reply("two", hold_after=0), "three"])) as driver:
        await driver.ask("first")
        await driver.enter("second")
        await driver.until(lambda: len(driver.turns) == 2)
        await driver.enter("/model ./tiny")  # stops the reply first
        await driver.until(lambda: driver.board.info and driver.board.info.name == "./tiny")
        await driver.until(lambda: driver.turns == [])
        turn = await driver.ask("third")
        assert turn.number == 1
        assert driver.figures("model")


async def test_what_an_old_model_leaves_is_collected() -> None:
    class Model:
        """In a cycle with itself, as modules with hooks are."""

        def __init__(self) -> None:
            self.me = self

    async with driving(ScriptedEngine()) as driver:
        old = Model()
        gone = weakref.ref(old)
        driver.app.model_ready()
        del old
        assert gone() is not None
        driver.app.model_ready()
        assert gone() is None


async def test_at_the_first_model_there_is_no_garbage_to_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.2 s, in which the app draws nothing."""
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("collected"))
    engine = ScriptedEngine()
    async with driving(engine):
        monkeypatch.undo()
    assert [event for event in engine.events if isinstance(event, ev.ModelReady)]


async def test_a_model_that_cannot_be_loaded_leaves_the_old_one() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("first")
        await driver.enter("/model missing")
        await driver.until(lambda: any("keeping the current model" in line for line in driver.lines))
        assert len(driver.turns) == 1
        turn = await driver.ask("second")
        assert turn.number == 2


# --- reasoning -------------------------------------------------------------------------------------------------


async def test_reasoning_is_folded_and_opens() -> None:
    async with driving(ScriptedEngine([THOUGHT])) as driver:
        turn = await driver.ask("why?")
        block = turn.query_one(Thinking)
        assert "▸ thought for 4 words" in driver.screen_text
        assert "I wonder" not in driver.screen_text
        assert turn.reply_text == "It is **so**."
        await driver.pilot.click(block)
        assert "I wonder about it" in driver.screen_text
        await driver.pilot.press("ctrl+o")
        assert "I wonder about it" not in driver.screen_text
        await driver.pilot.press("ctrl+y")
        assert driver.app.clipboard == "It is **so**."


@pytest.mark.parametrize("mode", ["show", "hide"])
async def test_reasoning_shown_or_hidden(mode: str) -> None:
    async with driving(ScriptedEngine(["first", THOUGHT])) as driver:
        await driver.ask("hello")
        await driver.enter(f"/set thinking {mode}")
        await driver.until(lambda: driver.conversation.thinking == mode)
        turn = await driver.ask("why?")
        assert turn.reply_text == "It is **so**."
        assert ("I wonder about it" in driver.screen_text) == (mode == "show")
        assert len(turn.query(Thinking)) == (mode == "show")


async def test_reasoning_while_it_streams() -> None:
    async with driving(ScriptedEngine([Reply("<think>one two three four</think> yes", hold_after=3)])) as driver:
        await driver.enter("why?")
        await driver.until(lambda: driver.chat.query(Thinking) and "thinking · " in driver.screen_text)
        driver.engine.release()
        await driver.until(lambda: driver.finished == 1)
        assert "thought for 4 words" in driver.screen_text


# --- the palette -----------------------------------------------------------------------------------------------


async def test_the_palette_has_every_command_that_needs_no_argument() -> None:
    async with driving(ScriptedEngine()) as driver:
        titles = {command.title for command in driver.app.get_system_commands(driver.app.screen)}
        assert {"/pin", "Models", "/stats", "/set", "Context map", "Panel: Speed", "Editor", "Reasoning"} <= titles
        assert "/read" not in titles


async def test_what_was_typed_into_the_palette_before_it_was_closed_ends_nothing() -> None:
    """On a busy machine, the last letters are handled after Escape."""
    async with driving(ScriptedEngine()) as driver:
        driver.app.action_command_palette()
        await driver.until(lambda: driver.shows(CommandPalette))
        palette = driver.app.screen
        assert isinstance(palette, CommandPalette)
        driver.app.action_command_palette()
        await driver.pilot.press("m", "o")
        field = palette.query_one(Input)
        palette.dismiss()
        await driver.until(lambda: not driver.shows(CommandPalette) and not palette.query(Input))
        palette._gather_commands("mo")
        palette._list_visible = True
        await palette._dispatch_message(Input.Submitted(field, "mo"))
        await driver.ask("hi")
        assert driver.app._exception is None


PALETTES = ("command_palette", "change_theme")
SCREENS = ("open_help", "sessions", "models", "settings", "recall")


@pytest.mark.parametrize("action", [*PALETTES, *SCREENS])
async def test_a_screen_that_is_closed_before_it_is_drawn_ends_nothing(action: str) -> None:
    async with driving(ScriptedEngine()) as driver:
        owner: App[int] | ChatScreen = driver.app if action in PALETTES else driver.chat
        for _ in range(2):  # again while the first one is removed
            getattr(owner, f"action_{action}")()
            screen = driver.app.screen
            assert isinstance(screen, Closable)
            screen.dismiss()
        await driver.ask("hi")
        assert driver.app._exception is None


# --- small terminals and the first paint ------------------------------------------------------------------------


async def test_a_terminal_of_20_by_5_and_back() -> None:
    async with driving(ScriptedEngine(["word " * 30])) as driver:
        await driver.ask("hello")
        for size in ((20, 5), (8, 2), (140, 40), (40, 10), (140, 40)):
            await driver.pilot.resize_terminal(*size)
            await driver.pilot.pause(0.05)
        assert "word word" in driver.screen_text
        await driver.ask("again")


def test_the_first_paint_comes_without_torch() -> None:
    import subprocess

    program = """
import asyncio, sys
sys.path.insert(0, ROOT)
from tests.support.scripted_engine import ScriptedEngine
from streamchat.config.loader import Configuration
from streamchat.tui.app import StreamchatApp
async def main():
    engine = ScriptedEngine()
    app = StreamchatApp(engine, Configuration(engine.settings))
    async with app.run_test() as pilot:
        await pilot.pause()
        print("torch" in sys.modules, "transformers" in sys.modules)
    engine.close()
asyncio.run(main())
""".replace("ROOT", repr(str(Path(__file__).parents[2])))
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == ["False", "False"]


async def test_looking_on_there_is_no_input_and_nothing_to_change() -> None:
    engine = ScriptedEngine(["A reply.", "Another one."])
    app = StreamchatApp(engine, Configuration(engine.settings), watching=True)
    async with app.run_test(size=(120, 40)) as pilot:
        driver = Driver(app, engine, pilot)
        await driver.ready()
        assert not driver.prompt.display
        engine.send(Submit("from a script"))
        await driver.until(lambda: [turn.reply_text for turn in driver.turns] == ["A reply."])
        names = {command.title for command in app.get_system_commands(app.screen)}
        assert {"Copy last reply", "Context map", "Theme", "Quit"} <= names
        assert not names & {
            "New conversation",
            "Stop the reply",
            "Recall",
            "Sessions",
            "Models",
            "Editor",
            "/retry",
            "/undo",
        }
        await pilot.press("x", "enter", "ctrl+r", "ctrl+l", "ctrl+n")
        assert app.screen is driver.chat
        engine.send(Submit("and again"))
        await driver.until(lambda: len(driver.turns) == 2)
        assert engine.submitted == ["from a script", "and again"]
    assert engine.close(60)
