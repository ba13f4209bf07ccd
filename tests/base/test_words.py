"""What people read: numbers, plurals, names, and where a sentence would mislead."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pexpect
import pytest

import streamchat
from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.ascii_text import ERRORS, in_encoding
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import plural
from streamchat.cli import main as cli
from streamchat.config.keymap import KEYS, display_keys
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import _template_prompt
from streamchat.frontend.messages import cache_capacity
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import cache_summary
from streamchat.repl.toolbar import toolbar_text
from streamchat.replay.runner import end_reason
from streamchat.reports.chart import Chart, Series
from streamchat.reports.figure import svg_of
from streamchat.reports.terminal import text_of
from streamchat.tui.app import StreamchatApp
from streamchat.tui.themes import remembered_theme, use_theme
from tests.support import toy_tokenizer as toy
from tests.support.app_driver import driving
from tests.support.program import output_of
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_model import make_chat

SOURCES = sorted(Path(streamchat.__file__).parent.rglob("*.py"))


# --- numbers and plurals ---------------------------------------------------------------------------------------


def test_one_is_one_and_thousands_have_commas() -> None:
    assert plural(0, "turn") == "0 turns"
    assert plural(1, "turn") == "1 turn"
    assert plural(16412, "compression") == "16,412 compressions"
    assert plural(1, "turn was", "turns were") == "1 turn was"
    assert plural(2, "turn was", "turns were") == "2 turns were"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_plural_is_made_by_hand(path: Path) -> None:
    """Or the next one is forgotten: `1 compressions`, `turn(s)`."""
    if path.name == "units.py":
        return
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\w\(s\)(?![\w(])", text)
    assert not re.search(r"""\{["']s["'] if |else ["']s["']\}""", text)
    counted = r"\{[\w.\[\]\"']*(?:compressions|tokens_evicted)[\"'\]]*(?::,)?\} (?:compressions|tokens evicted)"
    assert not re.search(counted, text)


def board(**cache: Any) -> StatusBoard:
    return StatusBoard(cache=ev.CacheState(**cache))


def test_the_toolbar_counts() -> None:
    assert "1 compression ·" in toolbar_text(board(length=6069, cache_size=16412, compressions=1), 200)
    assert "cache 6,069/16,412 [" in toolbar_text(board(length=6069, cache_size=16412), 200)


def test_what_is_pinned_and_by_whom() -> None:
    info = cast(ev.ModelInfo, SimpleNamespace(cache_size=1024, num_sink_tokens=4, pinned_tokens=17))
    assert cache_capacity(info) == "The cache holds 1,024 tokens (4 sinks, system prompt 17 tokens)."
    system = ev.Segment("system", 0, 17, 17, pinned=True)
    pinned = ev.Segment("user", 1, 30, 30, pinned=True)
    cache = ev.CacheState(sinks=4, pinned=17, window=100, segments=(system,))
    assert cache_summary(cache) == "4 sinks, 17 system prompt, 100 window"
    cache = ev.CacheState(sinks=1, pinned=47, window=1000, segments=(system, pinned))
    assert cache_summary(cache) == "1 sink, 17 system prompt, 30 pinned, 1,000 window"
    assert cache_summary(ev.CacheState(sinks=4, window=9)) == "4 sinks, 9 window"


def test_an_axis_of_turns_names_no_half_turn() -> None:
    series = (Series("compressions", [1, 2, 3, 4], [0, 1, 1, 2]),)
    chart = Chart("compressions", "Compressions", "", "turn", "", series)
    for drawn in (svg_of(chart), text_of(chart, 80, color=False)):
        labels = re.findall(r"<!-- ([\d.]+) -->", drawn) or re.findall(r"\d+\.\d+|\d+", drawn)
        assert labels
        assert not [label for label in labels if "." in label]
    half = Chart("half", "Half", "", "turn", "", (Series("x", [0, 1], [0.5, 1.0]),))
    assert "0.5" in text_of(half, 80, color=False)


# --- sentences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["--cach-size", "9"], "--cach-size is not a flag; did you mean --cache-size?"),
        (["--qqqqq"], "--qqqqq is not a flag; see streamchat --help"),
        (["--foo"], "--foo is not a flag; see streamchat --help"),
        (["serve", "--foo"], "--foo is not a flag; see streamchat serve --help"),
        (["serve", "--lvie", "2"], "--lvie is not a flag; did you mean --live?"),
        (["serve", "--theme", "nord"], "unexpected argument --theme nord; see streamchat serve --help"),
        (["sessions", "export", "--fromat", "html"], "--fromat is not a flag; did you mean --format?"),
        (["sesions"], "sesions is not a command; did you mean sessions?"),
    ],
)
def test_a_question_ends_a_sentence(arguments: list[str], end: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == ExitCode.USAGE
    assert capsys.readouterr().err.strip() == f"streamchat: {end}"


def test_keys_have_their_names() -> None:
    assert display_keys("pageup,ctrl+pagedown,escape") == "Page Up, Ctrl+Page Down, Escape"
    assert not [key.id for key in KEYS if re.search("Pageup|Pagedown", display_keys(key.keys))]


def test_the_default_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "SmolLM2-135M-Instruct (the default)" in out
    assert "(default, the default)" not in out


def test_refused_turns_are_counted_at_the_end_of_a_replay() -> None:
    def why(failed: int) -> str:
        totals = SimpleNamespace(turns=4, failed=failed)
        stop = SimpleNamespace(is_set=lambda: False)
        return end_reason(cast(Any, SimpleNamespace(failure=None, stop=stop, totals=totals)), None, 4)

    assert why(0) == "all turns replayed"
    assert why(1) == "all turns replayed; 1 turn was refused"
    assert why(3) == "all turns replayed; 3 turns were refused"


def test_too_many_sinks_do_not_blame_a_system_prompt() -> None:
    with pytest.raises(ConfigError) as error:
        make_chat(cache_size=16, num_sink_tokens=15)
    assert str(error.value).startswith("num_sink_tokens = 15 leaves 1 of cache_size = 16 for the conversation")
    assert "system prompt" not in str(error.value)


def test_the_template_s_own_prompt_is_shown() -> None:
    assert "Be kind." in _template_prompt(toy.toy_tokenizer(toy.CHATML), Settings())
    assert _template_prompt(toy.toy_tokenizer(toy.INSIDE), Settings()) == ""
    engine = ScriptedEngine(info={"template_prompt": "<|im_start|>system\nYou are toy."})
    context = SlashContext(engine, StatusBoard())
    context.board.apply(ev.ModelReady(engine._info(), 0.0))
    result = default_registry().run(context, "/system")
    assert result is not None
    assert (
        result.text
        == "system prompt: not set; the chat template's default is pinned:\n<|im_start|>system\nYou are toy."
    )


# --- the way in and out ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/nope", "./nope.gguf", "empty", "no such/name/at all"])
@pytest.mark.parametrize("arguments", [[], ["--plain"]], ids=["app", "prompt"])
def test_a_model_that_is_not_here_opens_no_app(name: str, arguments: list[str]) -> None:
    Path("empty").mkdir()
    name = str(Path("empty").resolve()) if name == "empty" else name
    command = ["-m", "streamchat", "--model", name, *arguments]
    child = pexpect.spawn(sys.executable, command, timeout=60, encoding="utf-8", dimensions=(24, 200))
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == ExitCode.MODEL
    said = output_of(child)
    assert "\x1b" not in said
    assert re.fullmatch(r"streamchat: [^\n]*\r?\n", said)


@pytest.mark.parametrize(("front_end", "says"), [("app", True), ("prompt", True), ("pipe", False)])
def test_leaving_says_how_to_resume(
    front_end: str, says: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine()

    def run(*_: object) -> int:
        engine.emit(ev.SessionOpened("first"))
        engine.emit(ev.ConversationCleared("", 0))
        engine.emit(ev.SessionOpened("a1b2"))
        return 0

    monkeypatch.setattr(cli, "make_engine", lambda *_: engine)
    monkeypatch.setattr(cli, "choose_front_end", lambda *_: front_end)
    monkeypatch.setattr(cli, "run_front_end", run)
    assert cli.main([]) == 0
    said = "streamchat: saved as a1b2; resume it with: streamchat --resume a1b2\n"
    assert capsys.readouterr().err == (said if says else "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([False], "the latest turns of a1b2 were not saved"),
        ([False, True], "saved as a1b2; resume it with: streamchat --resume a1b2"),
    ],
)
def test_leaving_says_when_the_latest_turns_are_not_saved(
    changes: list[bool], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine()

    def run(*_: object) -> int:
        engine.emit(ev.SessionOpened("a1b2"))
        for works in changes:
            engine.emit(ev.SavingChanged(works))
        return 0

    monkeypatch.setattr(cli, "make_engine", lambda *_: engine)
    monkeypatch.setattr(cli, "choose_front_end", lambda *_: "app")
    monkeypatch.setattr(cli, "run_front_end", run)
    assert cli.main([]) == 0
    assert capsys.readouterr().err == f"streamchat: {said}\n"


def test_a_pipe_whose_turns_are_not_saved_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine()

    def run(*_: object) -> int:
        engine.emit(ev.SessionOpened("a1b2"))
        engine.emit(ev.SavingChanged(False))
        engine.emit(ev.ConversationCleared())
        engine.emit(ev.SavingChanged(True))
        engine.emit(ev.SessionOpened("c3d4"))
        return 0

    monkeypatch.setattr(cli, "make_engine", lambda *_: engine)
    monkeypatch.setattr(cli, "choose_front_end", lambda *_: "pipe")
    monkeypatch.setattr(cli, "run_front_end", run)
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "streamchat: the latest turns of a1b2 were not saved\n"


@pytest.mark.slow
async def test_the_theme_is_remembered_and_a_configured_one_wins() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/theme nord")
        assert driver.outputs == ["theme: nord, also for the next start"]
    assert remembered_theme() == "nord"
    assert stat.S_IMODE((paths.state_dir() / "theme").stat().st_mode) == 0o600
    async with driving(ScriptedEngine()) as driver:
        assert driver.app.theme == "nord"
        driver.app.theme = "gruvbox"  # as the palette does
        await driver.until(lambda: remembered_theme() == "gruvbox")
    engine = ScriptedEngine(settings=Settings(theme="textual-light"))
    app = StreamchatApp(engine, Configuration(engine.settings, {"theme": "config.toml"}))
    async with app.run_test() as pilot:
        await pilot.pause()
        assert app.theme == "textual-light"
        assert "config.toml" in use_theme(app, "nord", app._configuration)
    assert engine.close(60)
    assert remembered_theme() == "gruvbox"
    (paths.state_dir() / "theme").write_text("no-such-theme")
    async with driving(ScriptedEngine()) as driver:
        assert driver.app.theme == "textual-dark"
        assert driver.toasts == []


async def test_toasts_make_no_pile() -> None:
    async with driving(ScriptedEngine()) as driver:
        for number in range(5):
            driver.chat.toast(f"warning {number}", "warning")
        await driver.until(lambda: driver.toasts)
        assert driver.toasts == ["warning 3", "warning 4"]
        driver.chat.toast("warning 3", "warning")
        await driver.until(lambda: driver.toasts[-1] == "warning 3")
        assert driver.toasts == ["warning 4", "warning 3"]


@pytest.mark.slow
async def test_the_panel_compares_only_what_was_evicted() -> None:
    async with driving(ScriptedEngine(["one two"], settings=Settings(cache_size=64))) as driver:
        await driver.ask("hello")
        assert "without eviction" not in driver.figures("evicted")
        for _ in range(12):
            await driver.ask("tell me more about it, please, and at length")
        await driver.until(lambda: driver.board.cache.tokens_evicted)
        await driver.until(lambda: "without eviction" in driver.figures("evicted"))


# --- consoles without Unicode ----------------------------------------------------------------------------------


def test_marks_have_a_likeness_in_ascii() -> None:
    shown = "“12 tokens” · cache 3/4 — it’s… ┄ ▾ ◆ ü日"
    assert in_encoding(shown, "utf-8") == shown
    assert in_encoding(shown, "ascii") == '"12 tokens" * cache 3/4 -- it\'s... - v # ü日'
    assert shown.encode("ascii", ERRORS) == b'"12 tokens" * cache 3/4 -- it\'s... - v # ??'
    assert in_encoding(shown, "no-such-encoding") == shown
    assert in_encoding("·", "latin-1") == "·"
