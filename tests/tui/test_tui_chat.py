"""The app from the user's side: messages, streaming, stopping, waiting, commands, figures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from textual.widgets import Markdown

from streamchat.base import events as ev
from streamchat.base.requests import Stop
from streamchat.config.settings import Settings
from streamchat.frontend.messages import STOPPED_EARLY
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.gauge import Gauge
from streamchat.tui.widgets.lines import FailurePanel, RecallLine, SystemPrompt, Welcome
from streamchat.tui.widgets.loading import LoadingPanel
from streamchat.tui.widgets.reply import Reply as ReplyWidget
from streamchat.tui.widgets.status_line import StatusLine, fitting
from streamchat.tui.widgets.turn import Turn, UserMessage
from tests.support.app_driver import NASTY, driving
from tests.support.scripted_engine import Reply, ScriptedEngine

pytestmark = pytest.mark.slow  # each test starts the app


def markdown_of(turn: Turn) -> Markdown:
    return turn.query_one(ReplyWidget).query_one(Markdown)


@pytest.mark.slow
async def test_message_flow() -> None:
    engine = ScriptedEngine(["# Paris\n\nIt is **Paris**."])
    async with driving(engine) as driver:
        assert driver.conversation.query(Welcome)
        turn = await driver.ask("What is the capital of France?")
        assert engine.submitted == ["What is the capital of France?"]
        assert turn.number == 1
        assert turn.query_one(UserMessage).text == "What is the capital of France?"
        assert "You · 1" in driver.screen_text
        assert "SmolLM2-135M-Instruct · 1" in driver.screen_text
        assert "It is Paris." in driver.screen_text
        assert turn.figures_text.startswith("5 tokens · ")
        assert "tok/s" in turn.figures_text
        assert "first token" in turn.figures_text
        assert driver.prompt.text == ""


@pytest.mark.slow
async def test_streams_while_the_reply_is_written() -> None:
    engine = ScriptedEngine([Reply("one two three four", hold_after=2)])
    async with driving(engine) as driver:
        await driver.enter("count")
        await driver.until(lambda: driver.turns and driver.turns[0].reply_text == "one two ")
        assert "one two" in driver.screen_text
        assert "three" not in driver.screen_text
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        assert driver.turns[0].reply_text == "one two three four"


@pytest.mark.slow
async def test_markdown_after_streaming_is_that_of_the_whole_text() -> None:
    text = "Before:\n\n```python\nx = 1\n\ny = [2]\n```\n\n1. one\n2. two\n\n| a | b |\n| - | - |\n| c | d |\n\nafter"
    engine = ScriptedEngine([Reply(text, tokens_per_s=200)])
    async with driving(engine) as driver:
        turn = await driver.ask("code, please")
        assert markdown_of(turn).source == text
        for part in ("x = 1", "y = [2]", "1. one", "after"):
            assert part in driver.screen_text


@pytest.mark.slow
async def test_html_in_a_reply_does_not_vanish() -> None:
    engine = ScriptedEngine(["It <think>deep</think>\n\n<div>\nblock\n</div>\n\nend"])
    async with driving(engine) as driver:
        await driver.ask("think")
        for part in ("It <think>deep</think>", "<div>", "block", "end"):
            assert part in driver.screen_text


@pytest.mark.slow
async def test_markup_is_literal_everywhere() -> None:
    settings = Settings(cache_size=512, system_prompt=NASTY)
    engine = ScriptedEngine(
        [f"Reply {NASTY}", Reply("x", error=f"error {NASTY}")], settings=settings, info={"name": NASTY}
    )
    async with driving(engine, size=(160, 60)) as driver:
        assert driver.conversation.query_one(SystemPrompt).text == NASTY
        turn = await driver.ask(f"Question {NASTY}")
        assert turn.reply_text == f"Reply {NASTY}"
        engine.emit(ev.Notice(f"notice {NASTY}", "warning"))
        await driver.until(lambda: any("notice" in line for line in driver.lines))
        await driver.enter("fails")
        await driver.until(lambda: any("error arr" in line for line in driver.lines))
        await driver.pilot.press("ctrl+u")
        await driver.enter(f"/nosuch {NASTY}")
        await driver.enter("\n")
        screen = driver.screen_text
        for begin in ("Question ", "Reply ", "notice ", "error ", ""):
            assert f"{begin}{NASTY}" in screen
        assert NASTY in str(driver.sidebar.query_one("#model-name").render())


@pytest.mark.slow
async def test_control_sequences_never_reach_the_screen() -> None:
    engine = ScriptedEngine(["a\x1b]0;title\x07b \x1b[31mc\x1b[0m\r d"])
    async with driving(engine) as driver:
        turn = await driver.ask("x\x1b[2Jy")
        assert turn.reply_text == "ab c d"
        assert "\x1b" not in driver.screen_text


@pytest.mark.slow
@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_stop_keeps_what_was_said_and_the_chat_goes_on(key: str) -> None:
    engine = ScriptedEngine([Reply("one two three", hold_after=2), "again"])
    async with driving(engine) as driver:
        await driver.enter("count")
        await driver.until(lambda: driver.turns and driver.turns[0].reply_text == "one two ")
        await driver.pilot.press(key)
        await driver.until(lambda: driver.finished == 1)
        assert Stop() in engine.sent
        assert driver.turns[0].reply_text == "one two "
        assert driver.turns[0].figures_text.startswith("stopped · 2 tokens")
        assert (await driver.ask("more")).reply_text == "again"
        assert driver.app.is_running


@pytest.mark.slow
async def test_stop_before_the_first_word_gives_the_message_back() -> None:
    engine = ScriptedEngine([Reply("never", hold_after=0), "second"])
    async with driving(engine) as driver:
        await driver.enter("my question")
        await driver.until(lambda: driver.turns and driver.turns[0].number == 1)
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.prompt.text == "my question")
        assert driver.turns == []
        assert driver.lines == [STOPPED_EARLY, "Your message is back in the input."]
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)
        assert driver.turns[0].reply_text == "second"
        assert driver.turns[0].number == 1


@pytest.mark.slow
async def test_given_back_message_does_not_overwrite_a_draft() -> None:
    engine = ScriptedEngine([Reply("never", hold_after=0)])
    async with driving(engine) as driver:
        await driver.enter("first")
        await driver.until(lambda: driver.turns and driver.turns[0].number == 1)
        await driver.write("my draft")
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.turns == [])
        assert driver.prompt.text == "my draft"
        assert "Your message is held in the queue." in driver.lines
        assert "  1. first" in driver.chat.queue_panel.text


@pytest.mark.slow
async def test_failed_turn_is_taken_back_and_said() -> None:
    engine = ScriptedEngine([Reply("half a", error="the cache is on fire"), "fine"])
    async with driving(engine) as driver:
        await driver.enter("hello")
        await driver.until(lambda: any("the cache is on fire" in line for line in driver.lines))
        assert driver.turns == []
        assert driver.prompt.text == "hello"
        assert driver.toasts == []  # the line is enough
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 1)


@pytest.mark.slow
async def test_reply_at_the_limit_says_so() -> None:
    engine = ScriptedEngine(["one two three four"], settings=Settings(max_new_tokens=3))
    async with driving(engine) as driver:
        turn = await driver.ask("count")
        assert "stopped at the limit (/set max_new_tokens) · 3 tokens · " in turn.figures_text


@pytest.mark.slow
async def test_usable_while_loading() -> None:
    engine = ScriptedEngine(["hello back"], hold_loading=True)
    async with driving(engine, ready=False) as driver:
        await driver.until(lambda: driver.conversation.query(LoadingPanel))
        await driver.until(lambda: "50 %" in driver.conversation.query_one(LoadingPanel).text)
        await driver.enter("hello")
        assert "queued until the model is ready" in driver.screen_text
        assert engine.submitted == []
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        assert driver.turns[0].reply_text == "hello back"
        assert not driver.conversation.query(LoadingPanel)
        assert "queued until" not in driver.screen_text


@pytest.mark.slow
async def test_loading_shows_bytes() -> None:
    loading = [ev.ModelLoading("Fetching SmolLM2", 46_500_000, 92_900_000, "bytes")]
    engine = ScriptedEngine(loading=loading, hold_loading=True)
    async with driving(engine, ready=False) as driver:
        await driver.until(lambda: "46.5 MB of 92.9 MB" in driver.screen_text)
        assert "Fetching SmolLM2" in driver.screen_text
        engine.release()
        await driver.ready()


async def test_load_failure_is_shown_and_keeps_its_exit_code() -> None:
    failure = ev.EngineFailed("Model not available", f"no model {NASTY} here", 3, "Traceback")
    engine = ScriptedEngine(load_failure=failure, hold_loading=True)
    async with driving(engine, ready=False) as driver:
        await driver.until(lambda: driver.conversation.query(LoadingPanel))
        await driver.enter("hello")
        engine.release()
        await driver.until(lambda: driver.conversation.query(FailurePanel))
        assert f"no model {NASTY} here" in driver.screen_text
        assert "Traceback" not in driver.screen_text
        assert "1 not sent: the engine has stopped" in driver.screen_text  # what waited is not lost
        await driver.pilot.press("up")
        assert driver.prompt.text == "hello"
        await driver.pilot.press("enter")
        assert any("engine has stopped" in toast for toast in driver.toasts)
        await driver.pilot.press("ctrl+q")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 3
    assert driver.app.return_code == 3


@pytest.mark.slow
async def test_engine_failure_in_a_reply() -> None:
    engine = ScriptedEngine(["fine"])
    async with driving(engine) as driver:
        await driver.ask("hello")
        engine.fail("out of memory")
        await driver.until(lambda: driver.conversation.query(FailurePanel))
        assert "out of memory" in driver.screen_text
        await driver.enter("/quit")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == 1


@pytest.mark.slow
async def test_evictions_are_said_and_fade() -> None:
    settings = Settings(cache_size=48, num_sink_tokens=4, max_new_tokens=200)
    engine = ScriptedEngine(["word " * 10, "word " * 10, "word " * 10, "word " * 100], settings=settings)
    async with driving(engine, size=(120, 80)) as driver:
        first = await driver.ask("one")
        assert driver.evictions == []
        assert first.visibility.complete
        await driver.ask("two")
        await driver.ask("three")
        await driver.until(lambda: driver.evictions)
        assert driver.evictions[0].startswith("┄ turn 1 is no longer in context (")
        assert first.visibility.evicted
        assert first.has_class("-evicted")
        assert "You · 1 · no longer in context" in driver.screen_text
        # a reply longer than the window evicts a token at a time: one line that grows
        before = len(driver.evictions)
        last = await driver.ask("four")
        assert len(driver.evictions) <= before + 2
        assert len(driver.emitted(ev.TokensEvicted)) > 40
        assert last.query_one(ReplyWidget).has_class("-partial")
        assert last.query_one(UserMessage).has_class("-evicted")
        assert "turn 4 is now only partly in context" in driver.evictions[-1]
        sentences = "".join(sentence for turn in driver.turns for sentence in turn.evictions)
        counted = sum(int(count) for count in re.findall(r"\((\d+) tokens? evicted", sentences))
        assert counted == driver.board.cache.tokens_evicted


RECALLED = ev.TurnsRecalled(2, (1,), (), 43, ((4, 47),), 0.0084, ev.CacheState())
SENTENCE = "↩ Turn 1 is back in context (43 tokens in 8 ms)."


async def test_a_recall_is_said_above_the_reply_for_which_it_was() -> None:
    engine = ScriptedEngine(["one", Reply("the code is 48213", hold_prefill=True)])
    async with driving(engine, size=(100, 60)) as driver:
        await driver.ask("first")
        await driver.enter("second")
        await driver.until(lambda: driver.turns[-1].number == 2)
        engine.emit(RECALLED)
        await driver.until(lambda: driver.conversation.query(RecallLine))
        engine.release()
        await driver.until(lambda: "48213" in driver.turns[-1].reply_text)
        await driver.pilot.pause()
        kinds = [type(child) for child in driver.turns[-1].children]
        assert kinds.index(UserMessage) < kinds.index(RecallLine) < kinds.index(ReplyWidget)
        assert driver.screen_text.count(SENTENCE) == 1
        # a turn that is rebuilt when the user scrolls back says it as well
        past = driver.turns[-1].finished_turn
        again = Turn(past.text, "model")
        await driver.conversation.mount(again)
        await again.restore(past)
        kinds = [type(child) for child in again.children]
        assert kinds.index(UserMessage) < kinds.index(RecallLine) < kinds.index(ReplyWidget)
        assert again.finished_turn.recalls == past.recalls == (SENTENCE[2:],)


@pytest.mark.slow
async def test_what_a_turn_taken_back_pushed_out_is_seen_again() -> None:
    settings = Settings(cache_size=64, num_sink_tokens=4, max_new_tokens=16)
    engine = ScriptedEngine(["word " * 14, "word " * 14, Reply("x", hold_after=0, prompt_tokens=40)], settings=settings)
    async with driving(engine) as driver:
        first = await driver.ask("one")
        await driver.ask("two")
        await driver.enter("three")
        await driver.until(lambda: len(driver.turns) == 3 and driver.turns[2].evictions)
        await driver.until(lambda: first.has_class("-evicted"))
        await driver.pilot.press("escape")
        await driver.until(lambda: len(driver.turns) == 2)
        await driver.until(lambda: not first.has_class("-evicted"))
        assert not driver.evictions


@pytest.mark.slow
async def test_sidebar_numbers_at_two_moments() -> None:
    settings = Settings(cache_size=128, num_sink_tokens=4, system_prompt="Be kind.")
    engine = ScriptedEngine(["word " * 30] * 5, settings=settings)
    async with driving(engine) as driver:
        await driver.ask("one")
        await driver.until(lambda: driver.figures("cache")["cached"] == "41 / 128 · 32 %")
        assert driver.figures("evicted")["compressions"] == "0"
        assert driver.figures("memory") == {"VRAM": "n/a (on CPU)", "process memory": "612 MB"}
        totals = driver.figures("totals")
        assert totals.pop("uptime").endswith(" s")
        assert totals == {"turns": "1", "prompt tokens": "5", "generated tokens": "30"}
        for text in ("two", "three", "four"):
            await driver.ask(text)
        await driver.until(lambda: driver.figures("evicted")["tokens evicted"] != "0")
        state = engine.cache.state()
        await driver.until(lambda: driver.board.cache == state)
        assert driver.figures("cache") == {"cached": f"{state.length} / 128 · {100 * state.length // 128} %"}
        assert driver.figures("evicted") == {
            "compressions": str(state.compressions),
            "tokens evicted": str(state.tokens_evicted),
            "KV cache": "7.4 MB",
            "without eviction": f"{state.full_kv_bytes / 1e6:.1f} MB",
            "length over time": "",
        }
        assert driver.figures("totals")["turns"] == "4"
        assert driver.chat.query_one(Gauge).cache == state


@pytest.mark.slow
async def test_device_memory_is_named() -> None:
    engine = ScriptedEngine(info={"device": "cuda:0"})
    async with driving(engine) as driver:
        await driver.until(lambda: "VRAM allocated" in driver.figures("memory"))
        assert driver.figures("memory") == {
            "VRAM allocated": "1.2 GB",
            "VRAM reserved": "1.5 GB",
            "VRAM of device": "25.4 GB",
            "process memory": "612 MB",
        }
        assert driver.figures("model")["device"] == "cuda:0"


@pytest.mark.slow
async def test_reading_a_prompt_is_shown() -> None:
    engine = ScriptedEngine([Reply("x", prompt_tokens=600, hold_prefill=True)])
    async with driving(engine) as driver:
        await driver.enter("long")
        await driver.until(lambda: "prefill" in driver.figures("speed"))
        assert driver.figures("speed")["prefill"] == "320 / 600"
        assert driver.turns[0].figures_text == "prefill: 320 of 600 tokens"
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        assert "prefill" not in driver.figures("speed")


FORMS = ["cache 1,024/1,024", "1,234 compressions", "memory 1.23 GB", "280.1 tok/s"]


@pytest.mark.parametrize(
    ("width", "parts"), [(69, [0, 1, 2, 3]), (68, [0, 2, 3]), (61, [0, 2, 3]), (47, [0, 3]), (10, [0, 3])]
)
def test_the_status_line_leaves_out_the_least_useful(width: int, parts: list[int]) -> None:
    assert fitting(FORMS, width) == " · ".join(FORMS[part] for part in parts)


async def test_the_speed_is_on_the_status_line_of_80_columns() -> None:
    engine = ScriptedEngine(["x"])
    async with driving(engine, size=(80, 24)) as driver:
        await driver.ask("hello")
        board, line = driver.board, driver.chat.query_one(StatusLine)

        def shows(text: str) -> bool:
            # again each time: a late event of the turn replaces the figures
            board.cache = replace(board.cache, length=1024, cache_size=1024, compressions=1234)
            board.decode_tps = 280.1
            line.show(board)
            return text in line.text

        wanted = "cache 1,024/1,024 · memory 612 MB · 280.1 tok/s"
        await driver.until(lambda: shows(wanted) and wanted in driver.screen_text)
        await driver.pilot.resize_terminal(99, 24)
        await driver.until(lambda: shows("1,234 compressions"))


async def test_narrow_and_wide() -> None:
    engine = ScriptedEngine(["x"])
    async with driving(engine, size=(80, 24)) as driver:
        line = driver.chat.query_one(StatusLine)
        await driver.ask("hello")
        assert (line.display, driver.sidebar.display) == (True, False)
        assert "/1,024 · 0 compressions · memory 612 MB" in line.text
        await driver.pilot.press("ctrl+b")
        assert (line.display, driver.sidebar.display) == (False, True)
        await driver.pilot.press("ctrl+b")
        assert (line.display, driver.sidebar.display) == (True, False)
    async with driving(ScriptedEngine(), size=(140, 40)) as driver:
        assert driver.sidebar.display
        assert 34 <= driver.sidebar.size.width + 3 <= 38
        await driver.pilot.press("ctrl+b")
        assert not driver.sidebar.display


@pytest.mark.parametrize("size", [(20, 5), (1, 1), (300, 90)])
async def test_odd_sizes_do_not_break(size: tuple[int, int]) -> None:
    engine = ScriptedEngine(["# Title\n\n- item\n\n```\ncode\n```\n"])
    async with driving(engine, size=(80, 24)) as driver:
        await driver.ask("hello")
        await driver.pilot.resize_terminal(*size)
        await driver.pilot.press("ctrl+b", "f1", "escape", "ctrl+b")
        await driver.pilot.resize_terminal(80, 24)
        assert "Title" in driver.screen_text


async def test_scroll_stays_with_the_reader_and_follows_again() -> None:
    text = "\n\n".join(f"line {number}" for number in range(60))
    engine = ScriptedEngine([text, Reply(text, hold_after=60), "short"])
    async with driving(engine, size=(80, 24)) as driver:
        view = driver.conversation
        await driver.ask("one")
        assert (view.following, view.scroll_y) == (True, view.max_scroll_y)
        await driver.enter("two")
        await driver.until(lambda: len(driver.turns) == 2 and len(driver.turns[1].reply_text.split()) >= 60)
        await driver.pilot.press("pageup")
        await driver.pilot.pause()
        assert (view.following, view.scroll_y < view.max_scroll_y) == (False, True)
        place = view.scroll_y
        engine.release()
        await driver.until(lambda: driver.finished == 2)
        assert view.scroll_y == place
        await driver.pilot.press("end")
        await driver.pilot.pause()
        assert (view.following, view.scroll_y) == (True, view.max_scroll_y)
        await driver.pilot.press("ctrl+home")
        await driver.pilot.pause()
        assert view.scroll_y == 0
        await driver.ask("three")  # a new question follows its own answer
        assert view.scroll_y == view.max_scroll_y


async def test_clear_starts_over() -> None:
    engine = ScriptedEngine(
        ["first", Reply("second one", hold_after=1), "third"], settings=Settings(system_prompt="Be kind.")
    )
    async with driving(engine) as driver:
        await driver.ask("one")
        await driver.enter("two")
        await driver.until(lambda: len(driver.turns) == 2 and driver.turns[1].reply_text)
        await driver.enter("/clear")  # in the middle of a reply
        await driver.until(lambda: any("New conversation" in line for line in driver.lines))
        assert driver.turns == []
        assert driver.conversation.query(SystemPrompt)
        turn = await driver.ask("three")
        assert (turn.number, turn.reply_text) == (1, "third")


async def test_system_prompt_can_change() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        assert not driver.conversation.query(SystemPrompt)
        await driver.enter(f"/system {NASTY}")
        await driver.until(lambda: driver.conversation.query(SystemPrompt))
        assert NASTY in driver.screen_text
        assert isinstance(driver.conversation.children[0], SystemPrompt)


async def test_notices() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        engine.emit(ev.Notice("for your information"))
        engine.emit(ev.Notice("take care", "warning"))
        await driver.until(lambda: driver.lines == ["for your information", "take care"])
        assert driver.toasts == []


@pytest.mark.parametrize("away", ["ctrl+home", "f1"])
async def test_an_error_is_shown_twice_only_if_its_line_is_not_on_the_screen(away: str) -> None:
    async with driving(ScriptedEngine(["word " * 2_000]), size=(80, 24)) as driver:
        await driver.ask("much")
        await driver.enter("/model missing")
        sentence = "missing is not a model; keeping the current model"
        await driver.until(lambda: sentence in driver.lines)
        assert driver.toasts == []
        await driver.pilot.press(away)
        driver.engine.emit(ev.Notice(f"again: {NASTY}", "warning"))
        await driver.until(lambda: f"again: {NASTY}" in driver.lines)
        assert driver.toasts == [f"again: {NASTY}"]


async def test_the_panel_that_only_the_map_needs_closes_with_it() -> None:
    async with driving(ScriptedEngine(["x"]), size=(80, 24)) as driver:
        await driver.ask("hello")
        shown = []
        for keys in (["ctrl+t"], ["escape"], ["ctrl+b", "ctrl+t", "escape"], ["ctrl+b", "ctrl+t", "ctrl+b"]):
            await driver.pilot.press(*keys)
            shown.append(driver.sidebar.display)
        assert shown == [True, False, True, False]  # the third time, the user wanted it before
        assert driver.prompt.has_focus
        await driver.pilot.resize_terminal(140, 40)
        assert not driver.sidebar.display


def test_conversation_never_takes_the_focus() -> None:
    assert not Conversation().can_focus
