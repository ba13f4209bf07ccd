"""What drawing costs while a reply streams, counted instead of timed: frames, layouts, restyled and placed widgets."""

from __future__ import annotations

import gc

import pytest
from textual.app import App, ComposeResult
from textual.content import Content
from textual.events import Resize
from textual.geometry import Size

from streamchat.base import events as ev
from streamchat.config.settings import Settings
from streamchat.tui.bridge import EventBridge
from streamchat.tui.catch_up import RENDERED_TURNS, collapse_turns
from streamchat.tui.pace import (
    FAST_TPS,
    FIGURES_S,
    FRAME_S,
    FULL_COLLECTIONS,
    MAX_FAST_FRAME_S,
    MAX_FRAME_S,
    READING_SHARE,
    READING_TPS,
    SHARE,
    FramePace,
)
from streamchat.tui.transcript import FinishedTurn
from streamchat.tui.widgets.growing import BulletList, OrderedList
from streamchat.tui.widgets.reply import Paragraph, ReplyMarkdown
from streamchat.tui.widgets.status_panel import StatusPanel
from streamchat.tui.widgets.thinking import Thinking
from streamchat.tui.widgets.turn import Turn
from tests.support.app_driver import driving
from tests.support.scripted_engine import Reply, ScriptedEngine

SAMPLE = ev.StatusSampled(ev.CacheState(), ev.MemoryState(1), None, None, True)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


# --- when to draw ---------------------------------------------------------------------------------------------------


def frame(pace: FramePace, clock: Clock, cpu: Clock, cost: float, tps: float | None = 300.0) -> float:
    interval = pace.interval(tps)
    clock.s += interval
    cpu.s += cost
    return interval


@pytest.mark.parametrize(
    ("cost", "interval"),
    [(0.001, FRAME_S), (0.008, 0.008 / SHARE), (0.5, MAX_FAST_FRAME_S)],
    ids=["cheap", "dear", "most"],
)
def test_expensive_frames_are_rare(cost: float, interval: float) -> None:
    clock, cpu = Clock(), Clock()
    pace = FramePace(clock, cpu)
    assert frame(pace, clock, cpu, cost) == FRAME_S
    for _ in range(40):
        last = frame(pace, clock, cpu, cost)
    assert last == pytest.approx(interval, rel=0.01)


@pytest.mark.parametrize("tps", [None, 3.0, READING_TPS])
def test_text_at_reading_speed_gets_more_frames(tps: float | None) -> None:
    clock, cpu = Clock(), Clock()
    pace = FramePace(clock, cpu)
    for _ in range(40):
        last = frame(pace, clock, cpu, 0.008, tps)
    assert last == pytest.approx(0.008 / READING_SHARE, rel=0.01)
    assert last < 2 / READING_TPS
    assert frame(pace, clock, cpu, 0.008, READING_TPS + 1) == pytest.approx(0.008 / SHARE, rel=0.01)


def test_text_that_nobody_can_follow_gets_fewer_frames() -> None:
    clock, cpu = Clock(), Clock()
    pace = FramePace(clock, cpu)
    for _ in range(40):
        last = frame(pace, clock, cpu, 0.5, FAST_TPS)
    assert last == MAX_FAST_FRAME_S
    assert frame(pace, clock, cpu, 0.5, FAST_TPS - 1) == MAX_FRAME_S


def test_what_is_computed_between_replies_is_no_cost_of_a_frame() -> None:
    clock, cpu = Clock(), Clock()
    pace = FramePace(clock, cpu)
    for _ in range(5):
        frame(pace, clock, cpu, 0.001)
    pace.pause()
    cpu.s += 10.0
    assert frame(pace, clock, cpu, 0.001) == FRAME_S
    assert frame(pace, clock, cpu, 0.001) == FRAME_S


def test_an_urgent_frame_waits_only_for_the_frame_before() -> None:
    clock, cpu = Clock(), Clock()
    pace = FramePace(clock, cpu)
    assert pace.wait() == 0.0
    pace.interval()
    assert pace.wait() == pytest.approx(FRAME_S)
    clock.s += 1.0
    assert pace.wait() == 0.0


def test_figures_follow_at_most_so_often_unless_they_must() -> None:
    clock = Clock()
    pace = FramePace(clock, Clock())
    assert pace.figures_due(now=False)
    clock.s += FIGURES_S / 2
    assert not pace.figures_due(now=False)
    assert pace.figures_due(now=True)
    clock.s += FIGURES_S
    assert pace.figures_due(now=False)


def test_text_is_merged_across_figures_and_evictions() -> None:
    bridge = EventBridge(lambda: None)
    evicted = ev.TokensEvicted(32, (4, 36), (1,), (), 64, 32, "decode")
    for event in (ev.TextDelta(1, "a"), SAMPLE, ev.TextDelta(1, "b"), evicted, SAMPLE, ev.TextDelta(1, "c")):
        bridge.put(event)
    assert bridge.drain() == [ev.TextDelta(1, "abc"), SAMPLE, evicted, SAMPLE]
    bridge.put(ev.TextDelta(1, "a"))
    bridge.put(ev.Notice("between"))
    bridge.put(ev.TextDelta(1, "b"))
    assert len(bridge.drain()) == 3


def test_a_turn_that_was_never_drawn_keeps_what_was_recalled_for_it() -> None:
    recalled = ev.TurnsRecalled(1, (7, 9), (), 61, ((4, 65),), 0.004, ev.CacheState())
    batch: list[ev.Event] = []
    for number in range(1, RENDERED_TURNS + 2):
        stats = ev.TurnStats(number, 5, 1, 6, 64, 0, 0, None, None, 0, 0, None, "stop")
        batch += [ev.TurnStarted(number, "hi", 5), recalled, ev.TurnFinished(stats, "stop", "ho")]
    first, *others = collapse_turns(batch, running=False)
    assert isinstance(first, FinishedTurn)
    assert first.recalls == ("Turns 7, 9 are back in context (61 tokens in 4 ms).",)
    assert others == batch[3:]


def test_what_is_not_streamed_wakes_the_app_again() -> None:
    woken: list[None] = []
    bridge = EventBridge(lambda: woken.append(None))
    for _ in range(300):
        bridge.put(ev.TextDelta(1, "a"))
        bridge.put(SAMPLE)
    assert len(woken) == 1
    bridge.put(ev.Notice("now"))
    bridge.put(ev.Notice("now"))
    assert len(woken) == 2
    bridge.drain()
    bridge.put(ev.TextDelta(1, "a"))
    assert len(woken) == 2
    bridge.put(ev.Notice("now"))
    assert len(woken) == 3


@pytest.mark.slow
async def test_tokens_between_two_frames_are_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"word{i}" for i in range(300))
    added: list[str] = []
    shown: list[None] = []
    add, show = Turn.add, StatusPanel.show

    async def counted_add(turn: Turn, text: str) -> None:
        added.append(text)
        await add(turn, text)

    def counted_show(panel: StatusPanel, *args: ev.PrefillProgress) -> None:
        shown.append(None)
        show(panel, *args)  # type: ignore[arg-type]

    engine = ScriptedEngine([words], settings=Settings(cache_size=64, num_sink_tokens=4))
    async with driving(engine) as driver:
        monkeypatch.setattr(Turn, "add", counted_add)
        monkeypatch.setattr(StatusPanel, "show", counted_show)
        # no frame is due before the end of the test: only what is urgent is drawn
        monkeypatch.setattr(FramePace, "interval", lambda pace, tps: 1e6)
        turn = await driver.ask("count")
        assert turn.reply_text == words
        assert len(driver.emitted(ev.TextDelta)) == 300
        assert len(driver.emitted(ev.TokensEvicted)) >= 5
        assert "".join(added) == words
        assert len(added) <= 3
        assert len(shown) <= 4
        assert any("300" in value for value in driver.figures("totals").values())


@pytest.mark.slow
async def test_no_full_garbage_collection_while_a_reply_streams() -> None:
    before = gc.get_threshold()
    engine = ScriptedEngine([Reply("one two", hold_after=1)])
    async with driving(engine) as driver:
        await driver.begin("count")
        assert gc.get_threshold() == (*before[:2], FULL_COLLECTIONS)
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        assert gc.get_threshold() == before


async def test_sizes_that_the_terminal_no_longer_has_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size of a storm was laid out: a busy app was minutes behind, and its memory grew by what waited."""
    async with driving(ScriptedEngine([])) as driver:
        screen, newest = driver.app.screen, driver.app.size
        widths: list[int] = []
        monkeypatch.setattr(screen, "_arrange", widths.append)
        for width in range(20, 40):
            screen.post_message(Resize(Size(width, 10), Size(width, 10)))
            screen.call_later(lambda: None)  # Textual merges neighbors
        screen.post_message(Resize(newest, newest))
        await driver.pilot.pause()
        assert widths == [newest.width]


# --- what a layout places -------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_turns_out_of_view_take_no_part_in_a_layout() -> None:
    engine = ScriptedEngine(lambda text: f"reply to {text}")
    async with driving(engine, size=(100, 12)) as driver:
        placed: list[int] = []
        for number in range(1, 15):
            await driver.ask(f"message {number}")
            placed.append(len(driver.app.screen._compositor.full_map))
        assert placed[-1] - placed[5] < 20  # eight turns, each with at least seven widgets
        turns = driver.turns
        assert len(turns) == 14
        assert turns[0].asleep
        assert turns[0].query_one(Paragraph) not in driver.app.screen._compositor.full_map
        assert not turns[-1].asleep
        height = driver.conversation.max_scroll_y
        driver.conversation.scroll_home(animate=False)
        await driver.pilot.pause()
        assert not any(turn.asleep for turn in turns)
        assert turns[0].query_one(Paragraph) in driver.app.screen._compositor.full_map
        assert driver.conversation.max_scroll_y == height
        driver.conversation.follow()
        await driver.pilot.pause()
        await driver.until(lambda: driver.turns[0].asleep)
        assert "reply to message 14" in driver.screen_text


@pytest.mark.slow
async def test_turns_wake_at_another_width_and_when_they_come_into_view() -> None:
    long = " ".join(["word"] * 60)
    engine = ScriptedEngine(lambda text: long)
    async with driving(engine, size=(100, 12)) as driver:
        for number in range(8):
            await driver.ask(str(number))
        first = driver.turns[0]
        assert first.asleep
        rows = first.size.height
        await driver.pilot.resize_terminal(50, 12)
        await driver.pilot.pause()
        await driver.until(lambda: first.size.height > rows)
        await driver.pilot.resize_terminal(50, 200)
        await driver.pilot.pause()
        assert not any(turn.asleep for turn in driver.turns)
        assert driver.screen_text.count("word word") > 8
        reply = first.query_one(Paragraph)
        assert reply.size.height > 1


@pytest.mark.slow
async def test_a_turn_out_of_view_has_the_height_of_its_changed_content() -> None:
    # so narrow that "no longer in context" adds rows to the headings
    engine = ScriptedEngine(lambda text: "<think>\nthought\n</think>\n\nreply", settings=Settings(cache_size=64))
    async with driving(engine, size=(24, 10)) as driver:
        for number in range(12):
            await driver.ask(str(number))
        first = driver.turns[0]
        assert first.asleep
        assert first.visibility.evicted
        height = driver.conversation.max_scroll_y
        driver.conversation.scroll_home(animate=False)
        await driver.pilot.pause()
        assert not driver.turns[0].asleep
        assert driver.conversation.max_scroll_y == height
        driver.conversation.follow()
        await driver.until(lambda: first.asleep)
        first.query_one(Thinking).fold(False)
        await driver.until(lambda: driver.conversation.max_scroll_y > height)
        assert driver.turns[0].asleep


@pytest.mark.slow
async def test_mounting_a_widget_restyles_no_other() -> None:
    engine = ScriptedEngine(["# One\n\n- two\n- three\n\n```\nfour\n```"])
    async with driving(engine) as driver:
        await driver.ask("go")
        ordered = {type(widget).__name__ for widget in driver.app.screen.walk_children() if widget._has_order_style}
        assert ordered == set()


# --- what a growing document lays out and replaces ------------------------------------------------------------------


class Page(App[None]):
    """One document."""

    def compose(self) -> ComposeResult:
        """Only that."""
        yield ReplyMarkdown()


GROWING = [
    ("- one\n- two\n- three is gro", "wing\n- four", BulletList, 4),
    ("1. one\n2. two\n3. three", " grows\n4. four", OrderedList, 4),
    ("- one\n\n  more\n- two\n  1. in\n  2. out", "er\n  3. side\n- three", BulletList, 3),
    ("- one\n- two\n\n  ```\n  x = 1", "\n  y = 2\n  ```\n- three", BulletList, 3),
]


@pytest.mark.parametrize(("start", "rest", "kind", "items"), GROWING)
async def test_finished_items_of_a_list_are_kept(
    start: str, rest: str, kind: type[BulletList | OrderedList], items: int
) -> None:
    app = Page()
    async with app.run_test(size=(60, 30)) as pilot:
        document = app.query_one(ReplyMarkdown)
        await document.append(start)
        await pilot.pause()
        before = list(document.query_one(kind).children)
        paragraphs = list(document.query(Paragraph))
        for letter in rest:
            await document.append(letter)
            await pilot.pause()
        after = list(document.query_one(kind).children)
        assert len(after) == items
        assert after[: len(before)] == before
        assert list(document.query(Paragraph))[: len(paragraphs)] == paragraphs
        streamed = app.screen._compositor.render_strips()
        await document.update(start + rest)
        await pilot.pause()
        assert [row.text for row in app.screen._compositor.render_strips()] == [row.text for row in streamed]


async def test_finished_paragraphs_are_neither_set_nor_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Page()
    async with app.run_test(size=(40, 60)) as pilot:
        document = app.query_one(ReplyMarkdown)
        await document.append("one two\n\nthree\n\n- four\n- five\n- six")
        await pilot.pause()
        finished = set(document.query(Paragraph)) - {document.query(Paragraph).last()}
        assert len(finished) == 4
        touched: list[Paragraph] = []
        render, set_content = Paragraph.render, Paragraph.set_content

        def noted_render(paragraph: Paragraph) -> object:
            touched.append(paragraph)
            return render(paragraph)

        def noted_set_content(paragraph: Paragraph, content: Content) -> None:
            touched.append(paragraph)
            set_content(paragraph, content)

        monkeypatch.setattr(Paragraph, "render", noted_render)
        monkeypatch.setattr(Paragraph, "set_content", noted_set_content)
        for word in ["seven"] * 30:
            await document.append(f" {word}")
            await pilot.pause()
        assert touched
        assert not finished & set(touched)
