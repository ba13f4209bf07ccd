"""Each event is reported by one sentence, the same in the app, at the prompt, in a pipe and in a replay."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import pytest

from streamchat.base import events as ev
from streamchat.commands.replay_view import View, log_line
from streamchat.config.settings import Settings
from streamchat.frontend.messages import EVICTED_RESTORED, figures_line, loading_text, turn_figures
from streamchat.frontend.presenter import Line, present
from streamchat.frontend.status import StatusBoard
from streamchat.repl.pipe import Pipe
from streamchat.repl.render import Narrator
from streamchat.replay.run import Totals
from streamchat.tui.widgets.lines import FailurePanel, Welcome
from streamchat.tui.widgets.loading import LoadingPanel
from streamchat.tui.widgets.text import Verbatim
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import ScriptedEngine

INFO = ScriptedEngine()._info()
CACHE = ev.CacheState(length=300, cache_size=1024)
STATS = ev.TurnStats(3, 30, 12, 300, 1024, 2, 500, 0.045, 35.12, 1000, 2000, None, "stop")


def finished(reason: ev.FinishReason = "stop", reply: str = "yes", **changes: object) -> ev.TurnFinished:
    return ev.TurnFinished(STATS, reason, reply, "why?", **changes)  # type: ignore[arg-type]


def evicted(turn: int, count: int = 120) -> ev.TokensEvicted:
    return ev.TokensEvicted(count, (0, count), (turn,), (turn,), 500, 380, "decode", ev.CacheState(cache_size=512))


RESUMED = ev.ConversationResumed("abc", "The sea", (ev.SavedTurn(1, "why?", "so"),), CACHE, INFO, "", 0.25)
SAMPLES: tuple[ev.Event, ...] = (
    ev.ModelLoading("Fetching tiny", 465_000, 929_000, "bytes"),
    ev.ModelFetching("tiny", "Fetching tiny", 465_000, 929_000, "bytes"),
    ev.ModelFetched("tiny", "there is no model tiny"),
    ev.ModelReady(INFO, 2.1),
    ev.EngineFailed("No model", "no model of that name", 3),
    ev.EngineClosed(),
    evicted(1),
    ev.TurnPinned(3, True, 5, CACHE),
    ev.TurnPagedIn(3, 120, 0.0042, CACHE),
    ev.ConversationRewound(3, 2, "abc123", True, 40, 0, 0.03, CACHE),
    ev.TurnsRecalled(9, (3,), (), 60, ((20, 80),), 0.0042, CACHE),
    ev.RecallSuggested(9, (3, 5), ("My code is 5.", "The code")),
    ev.StatusSampled(CACHE, ev.MemoryState(1)),
    ev.Notice("take care", "warning"),
    ev.SettingChanged("top_p", 0.5),
    ev.ConversationCleared("Be kind.", 17),
    ev.SummaryReady("They spoke of the sea.", (1, 2)),
    ev.TextCounted("why?", 2),
    ev.SessionOpened("abc"),
    ev.SavingChanged(False),
    ev.ConnectionChanged(False, "the server is gone"),
    RESUMED,
    ev.TurnStarted(1, "why?", 2),
    ev.PrefillProgress(1, 512, 2048),
    ev.TextDelta(1, "so"),
    finished(),
    ev.TurnUndone(3, "why?", "so", CACHE),
    ev.CacheAudited("turn", (12,), ((0, 12),), 12, 12, 512, (), 0, 1, 4096, tuple(range(12)), None),
)
"""One of each class."""
SILENT = {
    *(ev.TurnStarted, ev.TextDelta, ev.StatusSampled, ev.SettingChanged, ev.TextCounted, ev.SessionOpened),
    *(ev.SavingChanged, ev.EngineClosed, ev.CacheAudited, ev.ModelFetching),
}
"""Without a line: they are the conversation itself or figures, or a command or a notice reports them."""


def test_every_event_class_is_decided() -> None:
    """An event class that is added needs a line, or a place among the silent ones; and a sample here."""
    assert {type(event) for event in SAMPLES} == set(ev.Event.__subclasses__())
    assert {type(event) for event in SAMPLES if present(event) is None} == SILENT


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (SAMPLES[0], Line("progress", "Fetching tiny: 465 kB of 929 kB (50 %)")),
        (ev.ModelLoading("Loading", 1, 2), Line("progress", "Loading ... 50 %")),
        (ev.ModelFetched("tiny"), None),  # it is loaded next
        (ev.ModelFetched("tiny", "no\nmodel"), Line("error", "no model; keeping the current model")),
        (
            ev.ModelFetched("tiny", canceled=True),
            Line("info", "Fetching tiny was canceled; what was fetched is kept for the next try"),
        ),
        (ev.EngineFailed("No model", "no\nmodel", 3), Line("failure", "no model")),
        (evicted(2), Line("eviction", "turn 2 is no longer in context (120 tokens evicted, 380 of 512 cached)")),
        (ev.TurnPinned(3, True, 5, CACHE), Line("info", "Turn 3 (5 tokens) is pinned: it is never evicted.")),
        (ev.TurnPinned(3, False, 1, CACHE), Line("info", "Turn 3 (1 token) is unpinned.")),
        (
            ev.TurnPagedIn(3, 120, 0.0042, CACHE),
            Line(
                "info",
                "Turn 3 is back in context and pinned (120 tokens in 4 ms, without a prefill).",
            ),
        ),
        (
            replace(RESUMED, parent="xyz", parent_turn=1),
            Line(
                "info",
                "“The sea” (abc), a fork of xyz after turn 1, resumed at turn 1; 300 tokens cached, restored in 250 ms "
                "without prefill.",
            ),
        ),
        (
            replace(RESUMED, parent="xyz", parent_turn=1, seconds=0.0),
            Line("info", "“The sea” (abc), a fork of xyz after turn 1, opened at turn 1; 300 tokens cached."),
        ),
        (
            ev.TurnsRecalled(9, (3, 5), (5,), 60, ((20, 80),), 0.0042, CACHE),
            Line("info", "Turns 3, 5 are back in context, turn 5 in part (60 tokens in 4 ms)."),
        ),
        (
            ev.TurnsRecalled(9, (3,), (3,), 60, ((20, 80),), 0.0042, CACHE),
            Line("info", "Turn 3 is back in context, in part (60 tokens in 4 ms)."),
        ),
        (ev.TurnsRecalled(9, (3,), (), 0, (), 0.0, CACHE), Line("info", "Turn 3 stays in context for this message.")),
        (
            ev.RecallSuggested(9, (3, 5), ("My\ncode", "is 5")),
            Line(
                "info",
                "Evicted, but match this message: turn 3 (“My code”); turn 5 (“is 5”). /retry 3 5 puts them back in "
                "context and replies again.",
            ),
        ),
        (ev.Notice("be\x1b[2J\ncareful", "warning"), Line("warning", "be careful")),
        (ev.ConversationCleared(), Line("info", "New conversation.")),
        (
            ev.ConversationCleared("Be kind.", 17),
            Line("info", "New conversation; the system prompt is pinned (17 tokens)."),
        ),
        (
            ev.ConnectionChanged(False, "the server is gone"),
            Line("warning", "The connection to the server is lost (the server is gone); connecting again."),
        ),
        (ev.ConnectionChanged(True), Line("info", "Connected to the server again.")),
        (ev.SummaryReady("", (0, 0)), None),
        (ev.TurnUndone(3, "a", "b", CACHE, replaced=True), None),
        (ev.TurnUndone(3, "a", "b", CACHE, restored=5, replaced=True), None),
        (
            ev.TurnUndone(3, "a", "b", CACHE, prefilled=5, seconds=1.5, replaced=True),
            Line("info", "Turn 3 was undone. 5 tokens were prefilled again in 1.5 s."),
        ),
        (finished("cancelled", "", rolled_back=True), Line("info", "Stopped before the reply started; turn undone.")),
    ],
)
def test_sentences(event: ev.Event, line: Line | None) -> None:
    assert present(event) == line


def test_a_turn_that_failed_names_the_log() -> None:
    line = present(finished("error", rolled_back=True, message="out of memory"))
    assert line is not None
    assert line.kind == "error"
    assert line.text.startswith("out of memory (the log is /")


def test_the_model_is_described_once() -> None:
    line = present(ev.ModelReady(INFO, 2.1))
    assert line is not None
    name, facts, place, rest = line.text.split(" · ")
    assert (name, place) == (INFO.name, f"{INFO.precision} on {INFO.device}")
    assert facts.endswith("in memory)")
    assert rest.startswith("ready in 2.1 s. The cache holds ")


# --- the line of figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "kind", "text"),
    [
        (finished(), "figures", "12 tokens · 35.1 tok/s · first token 45 ms · cache 300/1,024"),
        (finished("cancelled"), "cut", "stopped · 12 tokens · 35.1 tok/s · first token 45 ms · cache 300/1,024"),
        (finished(reply=""), "figures", "empty reply · 12 tokens · 35.1 tok/s · first token 45 ms · cache 300/1,024"),
        (
            finished("length"),
            "cut",
            "stopped at the limit (/set max_new_tokens) · 12 tokens · 35.1 tok/s · first token 45 ms · cache 300/1,024",
        ),
        (
            finished("loop"),
            "cut",
            "stopped: it repeated itself (/set loop_guard) · 12 tokens · 35.1 tok/s · first token 45 ms · "
            "cache 300/1,024",
        ),
    ],
)
def test_figures_of_a_turn(turn: ev.TurnFinished, kind: str, text: str) -> None:
    line = present(turn)
    assert line is not None
    assert (line.kind, line.text) == (kind, text)


def test_figures_of_saved_and_supplied_turns() -> None:
    saved = ev.SavedTurn(1, "why?", "so", new_tokens=1, ttft_s=0.1, finish_reason="length")
    assert turn_figures(saved) == "stopped at the limit (/set max_new_tokens) · 1 token · first token 100 ms"
    assert turn_figures(ev.SavedTurn(1, "note", "Noted.")) == "reply supplied, not generated"
    assert figures_line(0, None, None) == "0 tokens"


def test_figures_of_a_replayed_turn() -> None:
    row = STATS.as_dict() | {"given_tokens": 0}
    line = "30 prompt tokens · 12 tokens · 35.1 tok/s · first token 45 ms · cache 300/1,024 · 4 compressions"
    assert log_line(row, Totals(turns=1200, compressions=4)) == f"turn 1,200: {line}"
    supplied = row | {"new_tokens": 0, "given_tokens": 1, "decode_tps": None, "ttft_s": None}
    assert (
        log_line(supplied, Totals(turns=1)) == "turn 1: 30 prompt tokens · 1 token · cache 300/1,024 · 0 compressions"
    )


# --- the front ends ---------------------------------------------------------------------------------------------


def printed(event: ev.Event) -> list[Line]:
    """What the prompt prints for one event outside of a reply."""
    return [piece for piece in Narrator(lambda: "hide").pieces_for(event) if piece.kind != "end"]


def shown(driver: Driver, sentence: str) -> bool:
    return sentence in driver.lines


@pytest.mark.slow
async def test_app_and_prompt_show_the_same_sentences() -> None:
    kinds = (ev.Notice, ev.TurnPinned, ev.SummaryReady, ev.ConversationCleared, ev.ConversationResumed)
    reported: list[ev.Event] = [event for event in SAMPLES if isinstance(event, kinds)]
    reported.append(ev.TurnUndone(1, "why?", "so", CACHE, restored=5))
    reported.append(finished("error", "", rolled_back=True, message="no"))
    async with driving(ScriptedEngine(["one two"], settings=Settings(max_new_tokens=1))) as driver:
        turn = await driver.ask("count")
        [end] = driver.emitted(ev.TurnFinished)
        assert [turn.figures_text] == [piece.text for piece in printed(end)]
        assert turn.figures_text.startswith("stopped at the limit")
        for event in reported:
            line = present(event)
            assert line is not None
            driver.engine.emit(event)
            await driver.until(partial(shown, driver, line.text), line.text)
            assert Line(line.kind, line.text) in printed(event)


@pytest.mark.slow
async def test_panels_of_the_app_show_the_sentences_of_the_prompt() -> None:
    engine = ScriptedEngine(hold_loading=True)
    async with driving(engine, ready=False) as driver:
        await driver.until(lambda: driver.conversation.query(LoadingPanel))
        loading = loading_text(driver.emitted(ev.ModelLoading)[-1])
        await driver.until(lambda: driver.conversation.query_one(LoadingPanel).text == loading)
        engine.release()
        await driver.until(lambda: driver.conversation.query(Welcome))
        [ready] = printed(driver.emitted(ev.ModelReady)[0])
        facts, capacity = (line.text for line in [*driver.conversation.query_one(Welcome).query(Verbatim)][1:3])
        assert ready == Line("ready", f"{facts}. {capacity.partition('.')[0]}.")
        engine.fail("the cache is on fire")
        await driver.until(lambda: driver.conversation.query(FailurePanel))
        assert driver.conversation.query_one(FailurePanel).event.message == "the cache is on fire"


def test_the_prompt_merges_and_defers() -> None:
    narrator = Narrator(lambda: "hide")
    shown = [
        piece for event in (ev.TurnStarted(5, "a", 1), evicted(1), evicted(2)) for piece in narrator.pieces_for(event)
    ]
    assert shown == []
    pieces = narrator.pieces_for(ev.TextDelta(5, "so"))
    merged = "turns 1-2 are no longer in context (240 tokens evicted, 380 of 512 cached)"
    assert pieces == [Line("eviction", merged), Line("reply", "so")]
    assert narrator.pieces_for(ev.Notice("later")) == []
    last = finished("error", rolled_back=True, message="no")
    assert narrator.pieces_for(last)[:2] == [Line("end", "\n"), Line("info", "later")]
    between = ev.TokensEvicted(9, (0, 9), (1,), (), 500, 491, "between_turns")
    for event in (ev.TurnStarted(5, "a", 1), between):
        narrator.pieces_for(event)
    assert Line("eviction", EVICTED_RESTORED) in narrator.pieces_for(last)


def test_a_pipe_reports_what_is_cut_off_but_no_figures() -> None:
    engine = ScriptedEngine(["one two", "three"], settings=Settings(max_new_tokens=1), loading=[])
    out, err = io.StringIO(), io.StringIO()
    assert Pipe(engine, out, err).run(io.BytesIO(b"a\n/pin 1\nb\n")) == 0
    engine.close()
    assert out.getvalue() == "one \nthree\n"
    cut, pinned = err.getvalue().splitlines()
    assert cut.startswith("streamchat: stopped at the limit (/set max_new_tokens) · ")
    assert pinned.startswith("streamchat: Turn 1 (")


def test_a_replay_prints_the_notices() -> None:
    stream = io.StringIO()
    view = View(stream, 3, quiet=False)
    for event in (ev.Notice("for your information"), ev.Notice("take\ncare", "warning"), finished()):
        view.loading(event)
    assert stream.getvalue() == "streamchat: take care\n"


def test_the_board_of_a_failed_turn_is_idle() -> None:
    board = StatusBoard()
    for event in (ev.TurnStarted(1, "a", 1), finished("error", rolled_back=True)):
        board.apply(event)
    assert (board.busy, board.turns) == (False, 0)
