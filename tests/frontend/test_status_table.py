"""One table of figures, and what the front ends take of it."""

from __future__ import annotations

import pytest

from streamchat.base import events as ev
from streamchat.base.formatting import human_count, human_duration
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import UNKNOWN, Row, rows_text, short_forms, status_rows, status_table
from streamchat.repl.toolbar import toolbar_text
from tests.support.app_driver import driving
from tests.support.desk import Desk
from tests.support.scripted_engine import ScriptedEngine

INFO = ScriptedEngine()._info()
CACHE = ev.CacheState(300, 1024, sinks=4, window=296, compressions=2, tokens_evicted=500, kv_bytes=5000)


def board(cache: ev.CacheState = CACHE) -> StatusBoard:
    return StatusBoard(
        info=INFO, cache=cache, memory=ev.MemoryState(612_000_000), ttft_s=0.045, decode_tps=35.12, turns=3
    )


def test_all_rows_in_order() -> None:
    rows = status_rows(board())
    assert [row.label for row in rows] == [
        *("model", "device", "dtype", "weights in memory", "trained context", "cached", "contents", "compressions"),
        *("tokens evicted", "KV cache", "without eviction", "VRAM", "process memory", "turns", "prompt tokens"),
        *("generated tokens", "tok/s", "first token"),
    ]
    values = {row.label: row.value for row in rows}
    assert values["cached"] == "300 / 1,024 · 29 %"
    assert values["contents"] == "4 sinks, 296 window"
    assert (values["tok/s"], values["first token"]) == ("35.1", "45 ms")


def test_rows_before_the_model_is_loaded() -> None:
    rows = {row.label: row.value for row in status_rows(StatusBoard())}
    assert (rows["cached"], rows["tok/s"], rows["memory"]) == ("–", "–", "n/a")
    assert "model" not in rows


def test_a_session_and_its_uptime_have_rows() -> None:
    running = StatusBoard(clock=lambda: 3725.0)
    for event in (ev.ModelReady(INFO, 1.0), ev.SessionOpened("abc")):
        running.apply(event)
    running.clock = lambda: 3725.0 * 2
    assert status_table(running)["totals"][-2:] == [Row("uptime", "1 h 02 min"), Row("saved as", "abc")]


@pytest.mark.parametrize(
    "event",
    [ev.ConversationCleared(), ev.ConversationResumed("abc", "The sea", (), CACHE, INFO, "", 0.25)],
    ids=lambda event: type(event).__name__,
)
def test_another_conversation_has_no_figures_of_the_last_one(event: ev.Event) -> None:
    status = board()
    status.apply(ev.StatusSampled(CACHE, ev.MemoryState(1), 0.1, 35.0, proposed_tokens=2000, accepted_tokens=1250))
    status.apply(event)
    speed = {row.label: row.value for row in status_table(status)["speed"]}
    assert speed == dict.fromkeys(("tok/s", "first token"), UNKNOWN)


def test_accepted_proposals_have_a_row_once_there_are_any() -> None:
    status = board()
    assert "accepted proposals" not in {row.label for row in status_rows(status)}
    status.apply(ev.StatusSampled(CACHE, ev.MemoryState(1), proposed_tokens=2000, accepted_tokens=1250))
    assert Row("accepted proposals", "62 % of 2,000") in status_table(status)["speed"]


def test_rows_as_text() -> None:
    assert rows_text([Row("a", "1"), Row("longer", "2")]) == "a       1\nlonger  2"


@pytest.mark.parametrize(
    ("memory", "short"),
    [
        (None, "memory n/a"),
        (ev.MemoryState(612_000_000), "memory 612 MB"),
        (ev.MemoryState(1_900_000_000, "cuda", 2_000_000_000, 3, 80_000_000_000), "VRAM 2.0 GB, memory 1.9 GB"),
    ],
)
def test_short_forms(memory: ev.MemoryState | None, short: str) -> None:
    shown = board()
    shown.memory = memory
    assert short_forms(shown) == ["cache 300/1,024", "2 compressions", short, "35.1 tok/s"]
    assert short_forms(shown, ev.PrefillProgress(1, 5, 2000))[-1] == "prefill 5/2,000"


def test_short_forms_before_the_first_sample() -> None:
    assert short_forms(StatusBoard(info=INFO))[0] == f"cache 0/{INFO.cache_size:,}"


def test_toolbar_and_stats_take_their_figures_from_the_table() -> None:
    shown = board()
    assert toolbar_text(shown, 200).startswith(
        " cache 300/1,024 [###.......] · 2 compressions · memory 612 MB · 35.1 tok/s · "
    )
    assert toolbar_text(shown, 30) == " cache 300/1,024 [###.......]"
    desk = Desk()
    desk.board.info, desk.board.cache = INFO, CACHE
    assert desk.say("/stats").text == rows_text(status_rows(desk.board))


@pytest.mark.slow
async def test_the_sidebar_shows_the_table() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("why?")
        await driver.until(lambda: driver.board.cache == driver.engine.cache.state())
        driver.chat._show_figures()
        for name, rows in status_table(driver.board).items():
            shown = driver.figures(name)
            shown.pop("length over time", None)
            assert shown.keys() == {row.label for row in rows}
            assert name == "totals" or shown == {row.label: row.value for row in rows}  # the uptime goes on


def test_durations_and_counts() -> None:
    assert [human_duration(s) for s in (42, 185, 3725, 90_000)] == ["42 s", "3 min 05 s", "1 h 02 min", "1 d 1 h"]
    assert [human_count(n) for n in (999, 143_800, 134_515_008, 7_000_000_000)] == [
        "999",
        "143.8 k",
        "134.5 M",
        "7.0 B",
    ]
