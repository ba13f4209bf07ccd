"""The app shows what the model still sees: fading messages, the edge, pins, the map; and thousands of turns."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from textual.widgets import Sparkline, Static

from streamchat.base.events import CacheState, MemoryState, Segment, StatusSampled, TurnsRecalled
from streamchat.base.requests import Pin, Submit, Unpin
from streamchat.config.settings import Settings
from streamchat.tui.widgets.context_map import ContextMap, describe, layout
from streamchat.tui.widgets.edge import ContextEdge
from streamchat.tui.widgets.mounted_turns import PlaceholderLine
from streamchat.tui.widgets.section import Section
from streamchat.tui.widgets.text import Verbatim
from streamchat.tui.widgets.turn import Turn, UserMessage
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow

SMALL = Settings(cache_size=160, num_sink_tokens=4, max_new_tokens=40, system_prompt="Be kind.")


def engine() -> ScriptedEngine:
    return ScriptedEngine(lambda text: "word " * 20, settings=SMALL)


def edges(driver: Driver) -> list[tuple[int, str]]:
    """(number of the turn below, words) of the edge of memory."""
    children = list(driver.conversation.children)
    below = []
    for i, child in enumerate(children):
        if isinstance(child, ContextEdge):
            following = children[i + 1]
            assert isinstance(following, Turn)
            below.append((following.number, child.text))
    return below


async def test_the_edge_of_memory_moves_with_the_cache() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        await driver.ask("one")
        assert edges(driver) == []
        seen = set()
        for number in range(2, 12):
            await driver.ask(f"question {number}")
            await driver.until(lambda: driver.board.cache == driver.engine.cache.state())
            held = {s.turn for s in driver.board.cache.segments if s.turn}
            forgotten = [turn.number for turn in driver.turns if turn.visibility.evicted]
            assert forgotten == [turn.number for turn in driver.turns if turn.number not in held]
            if forgotten:
                assert edges(driver) == [(min(held), "context starts here")]
                seen.add(min(held))
        assert len(seen) > 3
        await driver.enter("/clear")
        await driver.until(lambda: not driver.turns)
        assert edges(driver) == []


async def test_messages_fade_one_by_one() -> None:
    settings = Settings(cache_size=64, num_sink_tokens=4, max_new_tokens=200)
    async with driving(ScriptedEngine(["word " * 90], settings=settings), settings=settings) as driver:
        turn = await driver.ask("a question of some words")
        await driver.until(lambda: turn.visibility.reply == "partial")
        assert turn.visibility.user == "evicted"
        assert turn.query_one(UserMessage).has_class("-evicted")
        assert "You · 1 · no longer in context" in driver.screen_text
        assert "SmolLM2-135M-Instruct · 1 · partly evicted" in driver.screen_text
        assert edges(driver) == [(1, "context starts inside this turn")]


async def test_pins_are_marked_and_stay() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        await driver.ask("keep this")
        driver.engine.send(Pin(1))
        await driver.until(lambda: driver.turns[0].visibility.pinned)
        assert "You · 1 · ◆ pinned" in driver.screen_text
        for number in range(2, 9):
            await driver.ask(f"question {number}")
        await driver.until(lambda: driver.turns[1].visibility.evicted)
        assert driver.turns[0].visibility.complete
        number, _ = edges(driver)[0]
        assert number > 2  # the window, not the pinned turn
        driver.engine.send(Unpin(1))
        await driver.until(lambda: not driver.turns[0].visibility.pinned)


async def test_a_recalled_turn_is_marked_in_its_heading_and_in_the_map() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        for number in range(1, 9):
            await driver.ask(f"question {number}")
        await driver.until(lambda: driver.turns[0].visibility.evicted)
        state = driver.engine.cache.state()
        sinks, window = state.segments[0], [each for each in state.segments[1:] if each.turn != 0]
        back = [Segment("user", 1, 6, 6, recalled=True), Segment("assistant", 1, 20, 20, recalled=True)]
        cache = replace(state, segments=(sinks, *back, *window), recalled=26)
        driver.engine.emit(TurnsRecalled(8, (1,), (), 26, ((4, 30),), 0.004, cache))
        heading = driver.turns[0].query_one(UserMessage).query_one(".heading", Verbatim)
        await driver.until(lambda: str(heading.render()) == "You · 1 · ↩ recalled")
        assert "Turn 1 is back in context (26 tokens in 4 ms)." in driver.lines[-1]
        described = [describe(cell, driver.board.cache) for cell in layout(driver.board.cache, 160)]
        assert "turn 1 · reply · 20 tokens · recalled" in described
        driver.engine.emit(StatusSampled(state, MemoryState(1)))
        await driver.until(lambda: str(heading.render()) == "You · 1 · no longer in context")


# --- the map ---------------------------------------------------------------------------------------------------


def test_the_map_is_in_proportion_and_complete() -> None:
    segments = (
        Segment("sinks", 0, 4, 4, True),
        Segment("user", 7, 1, 1),
        Segment("assistant", 7, 300, 300),
        Segment("user", 8, 95, 95),
    )
    cache = CacheState(length=400, cache_size=800, segments=segments)
    shown = layout(cache, 200)
    assert [s.segment for s in shown] == [*segments, None]
    assert shown[0].first == 0
    assert shown[-1].stop == 200
    assert all(a.stop == b.first for a, b in pairwise(shown))
    cells = [s.stop - s.first for s in shown]
    assert cells[0] == cells[1] == 1  # what is there is visible
    assert abs(cells[2] - 75) <= 2
    assert abs(cells[-1] - 100) <= 2
    # more messages than cells
    crowd = tuple(Segment("user", n, 1, 1) for n in range(1, 400))
    assert layout(CacheState(length=399, cache_size=399, segments=crowd), 100)[-1].stop == 100


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        (None, "free · 88 tokens"),
        (Segment("sinks", 0, 4, 4, True), "attention sinks · 4 tokens"),
        (Segment("system", 0, 1, 1, True), "system prompt · 1 token"),
        (Segment("user", 12, 1143, 1143), "turn 12 · you · 1,143 tokens"),
        (Segment("assistant", 3, 5, 20), "turn 3 · reply · 5 of 20 tokens"),
        (Segment("assistant", 3, 20, 20, True), "turn 3 · reply · 20 tokens · pinned"),
    ],
)
def test_segments_in_words(segment: Segment | None, words: str) -> None:
    cache = CacheState(length=12, cache_size=100, segments=() if segment is None else (segment,))
    shown = next(s for s in layout(cache, 100) if s.segment == segment)
    assert describe(shown, cache) == words


def words(driver: Driver) -> str:
    return str(driver.sidebar.query_one("#map-words", Static).visual)


async def test_the_map_is_walked_with_keys() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        for number in range(1, 8):
            await driver.ask(f"question {number}")
        await driver.until(lambda: driver.board.cache == driver.engine.cache.state())
        memory_map = driver.chat.query_one(ContextMap)
        await driver.pilot.press("ctrl+t")
        assert memory_map.has_focus
        assert memory_map.description.startswith("turn 7 · reply")
        await driver.pilot.press("left", "left", "left")
        assert memory_map.description.startswith("turn 6 · you")
        assert words(driver) == memory_map.description
        await driver.pilot.press("enter")
        await driver.pilot.pause()
        chosen = [turn.number for turn in driver.turns if turn.has_class("-chosen")]
        assert chosen == [6]
        assert not driver.conversation.following
        await driver.pilot.press("p")
        await driver.until(lambda: driver.turns[5].visibility.pinned)
        assert driver.engine.sent[-1] == Pin(6)
        await driver.pilot.press("p")
        await driver.until(lambda: not driver.turns[5].visibility.pinned)
        await driver.pilot.press(*["left"] * 40)
        assert memory_map.description == "attention sinks · 4 tokens"
        await driver.pilot.press("enter")  # leads nowhere
        await driver.pilot.press("escape")
        assert driver.prompt.has_focus
        assert words(driver) == ""


async def test_map_and_conversation_point_at_each_other_by_mouse() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        for number in range(1, 5):
            await driver.ask(f"question {number}")
        await driver.until(lambda: driver.board.cache == driver.engine.cache.state())
        memory_map = driver.chat.query_one(ContextMap)
        turn = next(t for t in driver.turns if t.number == 4)
        await driver.pilot.click(turn.query_one(UserMessage), offset=(3, 0))
        assert memory_map.description.startswith("turn 4 · you")
        assert turn.has_class("-chosen")
        place = next(s for s in layout(driver.board.cache, memory_map.content_size.width * 6)
                     if s.segment and s.segment.turn == 2)  # fmt: skip
        row, column = divmod(place.first, memory_map.content_size.width)
        await driver.pilot.hover(memory_map, offset=(column, row))
        assert words(driver).startswith("turn 2 · you")
        await driver.pilot.click(memory_map, offset=(column, row))
        await driver.pilot.pause()
        assert [t.number for t in driver.turns if t.has_class("-chosen")] == [2]


async def test_turns_are_stepped_through_with_keys() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        for number in range(1, 5):
            await driver.ask(f"question {number}")
        await driver.pilot.press("alt+up")
        await driver.pilot.press("alt+up")
        await driver.pilot.pause()
        assert [t.number for t in driver.turns if t.has_class("-chosen")] == [3]
        await driver.pilot.press("alt+down", "alt+down")
        await driver.pilot.pause()
        assert [t.number for t in driver.turns if t.has_class("-chosen")] == []
        assert driver.conversation.following


# --- many turns ------------------------------------------------------------------------------------------------


def numbers(driver: Driver) -> list[int]:
    return [turn.number for turn in driver.turns]


def elsewhere(driver: Driver) -> list[str]:
    return [line.text for line in driver.conversation.query(PlaceholderLine)]


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_TURNS": 8, "READING_MAX_TURNS": 12, "TAIL": 3, "STEP": 4}.items():
        monkeypatch.setattr(f"streamchat.tui.widgets.mounted_turns.{name}", value)


@pytest.mark.usefixtures("few_at_a_time")
async def test_older_turns_come_back_when_the_reader_goes_there() -> None:
    async with driving(ScriptedEngine(lambda text: f"answer to {text}"), size=(120, 24)) as driver:
        for number in range(1, 31):
            await driver.ask(f"question {number}")
        assert numbers(driver) == list(range(23, 31))
        assert elsewhere(driver) == ["▴ 22 older turns · scroll or click to show"]
        for first in (19, 15, 11, 7, 3, 1):
            await driver.pilot.press("ctrl+home")
            await driver.until(lambda: numbers(driver)[0] == first, f"turn {first}")  # noqa: B023
            await driver.pilot.pause()
        assert driver.turns[0].reply_text == "answer to question 1"
        assert numbers(driver)[-3:] == [28, 29, 30]  # the newest stay mounted
        assert len(numbers(driver)) <= 16
        assert elsewhere(driver) == [f"▾ {30 - len(numbers(driver))} newer turns · scroll or click to show"]
        assert "answer to question 1" in driver.screen_text
        await driver.pilot.press("ctrl+end")
        await driver.until(lambda: len(elsewhere(driver)) == 1 and elsewhere(driver)[0].startswith("▴"))
        assert numbers(driver)[-1] == 30
        assert numbers(driver) == list(range(numbers(driver)[0], 31))
        assert driver.conversation.following


@pytest.mark.usefixtures("few_at_a_time")
async def test_the_text_in_view_stays_in_view_when_older_turns_come() -> None:
    async with driving(ScriptedEngine(lambda text: f"answer to {text}"), size=(100, 24)) as driver:
        for number in range(1, 21):
            await driver.ask(f"question {number}")
        first = driver.turns[0]
        await driver.pilot.press("ctrl+home")
        await driver.until(lambda: numbers(driver)[0] < first.number)
        await driver.pilot.pause(0.1)
        assert first.region.y in range(24)


@pytest.mark.usefixtures("few_at_a_time")
async def test_the_map_leads_to_a_turn_that_is_not_mounted() -> None:
    settings = Settings(cache_size=2048)
    async with driving(ScriptedEngine(settings=settings), settings=settings) as driver:
        for number in range(1, 31):
            await driver.ask(f"question {number}")
        turn = await driver.conversation.go_to(5)
        assert turn is not None
        assert turn.number == 5
        await driver.until(lambda: "question 5" in driver.screen_text)
        assert await driver.conversation.go_to(99) is None


@pytest.mark.usefixtures("few_at_a_time")
async def test_reading_back_while_a_reply_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.scripted_engine import Reply

    replies: Any = [f"answer {n}" for n in range(1, 21)] + [Reply("slow one here", hold_after=1)]
    async with driving(ScriptedEngine(replies), size=(100, 24)) as driver:
        for number in range(1, 21):
            await driver.ask(f"question {number}")
        await driver.enter("question 21")
        await driver.until(lambda: driver.turns[-1].reply_text)
        while numbers(driver)[0] > 1:
            before = numbers(driver)[0]
            await driver.pilot.press("ctrl+home")
            await driver.until(lambda: numbers(driver)[0] < before, f"turns before {before}")  # noqa: B023
            await driver.pilot.pause()
        driver.engine.release()
        await driver.until(lambda: driver.finished == 21)
        assert driver.turns[-1].reply_text == "slow one here"
        assert numbers(driver)[0] == 1  # the reader was left alone


async def test_two_thousand_turns_stay_few_widgets() -> None:
    async with driving(
        ScriptedEngine(lambda text: "word " * 5, settings=SMALL), settings=SMALL, size=(100, 24)
    ) as driver:
        await driver.ask("first")
        counts = []
        for batch in range(20):
            for number in range(100):
                driver.engine.send(Submit(f"question {batch}.{number}"))
            await driver.until(lambda: driver.finished == (batch + 1) * 100 + 1, "the batch", 60)  # noqa: B023
            counts.append(len(list(driver.app.screen.walk_children())))
        assert max(counts) < 700  # some 10 a turn
        assert len(driver.turns) <= 60
        assert driver.turns[-1].number == 2001
        assert len(driver.conversation.mounted.history) == 2001
        assert driver.board.turns == 2001
        turn = await driver.conversation.go_to(1000)
        assert turn is not None
        assert turn.text == "question 9.98"
        assert turn.visibility.evicted


# --- the panel -------------------------------------------------------------------------------------------------


async def test_sections_fold() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        await driver.ask("one")
        section = driver.sidebar.query_one("#section-speed", Section)
        assert "first token" in driver.screen_text
        await driver.pilot.click(section.query_one(".section"))
        assert section.folded
        assert driver.sidebar.query_one("#speed").region.height == 0
        await driver.pilot.click(section.query_one(".section"))
        assert not section.folded


async def test_sparklines_show_the_whole_run() -> None:
    async with driving(engine(), settings=SMALL) as driver:
        for number in range(6):
            await driver.ask(f"question {number}")
        board = driver.board
        await driver.until(lambda: len(board.lengths.values) > 5)
        await driver.until(lambda: driver.sidebar.query_one("#lengths", Sparkline).data == board.lengths.values)
        assert max(board.lengths.values) <= 160
        assert driver.sidebar.query_one("#lengths").display
