"""Messages written while the model is busy: they wait in order, and can be edited, removed, held and resumed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from textual import events

from streamchat.base import events as ev
from streamchat.base.requests import Request, Stop, Submit
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.tui.app import StreamchatApp, run_app
from streamchat.tui.widgets.lines import FailurePanel, Welcome
from tests.support.app_driver import NASTY, Driver, driving
from tests.support.scripted_engine import Reply, ScriptedEngine

pytestmark = pytest.mark.slow


def held_engine(*replies: str | Reply, **options: object) -> ScriptedEngine:
    """An engine whose first reply waits for `release` after one word."""
    return ScriptedEngine([Reply("one two", hold_after=1), *replies], **options)  # type: ignore[arg-type]


async def queue_up(driver: Driver, *texts: str) -> None:
    """Send 'first', and the `texts` while it is answered."""
    await driver.enter("first")
    await driver.until(lambda: driver.turns and driver.turns[0].reply_text)
    for text in texts:
        await driver.enter(text)


def rows(driver: Driver) -> list[str]:
    """Rows of the list, without its heading."""
    return [row.strip() for row in driver.chat.queue_panel.text.split("\n")[1:]]


def heading(driver: Driver) -> str:
    return driver.chat.queue_panel.text.split("\n")[0]


async def test_messages_wait_in_order_and_are_sent_one_after_the_other() -> None:
    engine = held_engine("a1", "b1", "c1")
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta", "gamma")
        assert engine.submitted == ["first"]
        assert rows(driver) == ["1. alpha", "2. beta", "3. gamma"]
        assert heading(driver) == "3 queued until this reply is done · Up edits · Shift+Delete removes"
        assert "2. beta" in driver.screen_text
        await driver.write("a draft")
        engine.release()
        await driver.until(lambda: driver.finished == 4)
        assert engine.submitted == ["first", "alpha", "beta", "gamma"]
        assert [turn.reply_text for turn in driver.turns] == ["one two", "a1", "b1", "c1"]
        assert driver.prompt.text == "a draft"
        assert not driver.chat.queue_panel.display


async def test_stop_holds_the_queue_and_enter_resumes_it() -> None:
    engine = held_engine("a1", "b1")
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta")
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.finished == 1)
        assert rows(driver) == ["1. alpha", "2. beta"]
        assert heading(driver).startswith("2 held · Enter (empty input) sends")
        await driver.pilot.pause(0.2)
        assert engine.submitted == ["first"]
        assert driver.prompt.text == ""
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["first", "alpha", "beta"]


async def test_a_message_written_after_stop_goes_first_and_alone() -> None:
    engine = held_engine(Reply("a b", hold_after=1), "now")
    async with driving(engine) as driver:
        await queue_up(driver, "alpha")
        await driver.pilot.press("ctrl+c")
        await driver.until(lambda: driver.finished == 1)
        await driver.enter("rather this")
        await driver.until(lambda: len(driver.turns) == 2 and driver.turns[1].reply_text)
        await driver.enter("and this")
        assert rows(driver) == ["1. and this", "2. (held) alpha"]
        assert heading(driver).startswith("1 queued until this reply is done, 1 held")
        engine.release()
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["first", "rather this", "and this"]
        assert rows(driver) == ["1. alpha"]
        assert heading(driver).startswith("1 held")


async def test_a_command_that_waits_for_the_reply_says_so() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver)
        await driver.enter("/stats")  # answers at once
        assert driver.toasts == []
        await driver.enter("/pin 1")
        assert driver.toasts == ["/pin takes effect when this reply is done"]
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        await driver.enter("/unpin 1")
        assert len(driver.toasts) == 1


async def test_up_walks_through_the_queue_and_an_edit_keeps_its_place() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta", "gamma")
        await driver.pilot.press("up")
        assert driver.prompt.text == "gamma"
        await driver.pilot.press("up")
        assert driver.prompt.text == "beta"
        assert rows(driver) == ["1. alpha", "2. (editing) beta", "3. gamma"]
        assert heading(driver).startswith("editing 2 of 3 · Enter saves it · Esc cancels")
        assert str(driver.prompt.border_subtitle).startswith("Enter saves")
        await driver.write(" two")
        await driver.pilot.press("up", "down")  # a changed text is not left
        assert driver.prompt.text == "beta two"
        await driver.pilot.press("enter")
        assert rows(driver) == ["1. alpha", "2. beta two", "3. gamma"]
        assert driver.prompt.text == ""
        assert str(driver.prompt.border_subtitle).startswith("Enter sends")
        engine.release()
        await driver.until(lambda: driver.finished == 4)
        assert engine.submitted == ["first", "alpha", "beta two", "gamma"]


async def test_down_leaves_the_queue_and_up_at_its_end_reaches_the_history() -> None:
    async with driving(held_engine()) as driver:
        await queue_up(driver, "alpha", "beta")
        await driver.pilot.press("up", "up", "down", "down")
        assert driver.prompt.text == ""
        assert rows(driver) == ["1. alpha", "2. beta"]
        await driver.pilot.press("up", "up", "up")
        assert driver.prompt.text == "beta"  # the newest input
        assert rows(driver) == ["1. alpha", "2. beta"]  # and no edit
        driver.engine.release()


async def test_escape_undoes_an_edit_and_only_then_stops() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha")
        await driver.pilot.press("up")
        await driver.write(" changed")
        await driver.pilot.press("escape")
        assert (driver.prompt.text, rows(driver)) == ("", ["1. alpha"])
        assert Stop() not in engine.sent
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.finished == 1)
        assert Stop() in engine.sent


async def test_nothing_passes_a_message_that_is_edited() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta")
        await driver.pilot.press("up", "up")
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        await driver.pilot.pause(0.2)
        assert engine.submitted == ["first"]
        await driver.write("!")
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["first", "alpha!", "beta"]


async def test_a_command_ends_the_edit() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha")
        await driver.pilot.press("up", "ctrl+u")
        await driver.enter("/stats")
        await driver.until(lambda: driver.outputs)
        engine.release()
        await driver.until(lambda: driver.finished == 2)
        assert engine.submitted == ["first", "alpha"]


async def test_messages_are_removed_one_by_one_or_all_at_once() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta", "gamma", "delta", "epsilon")
        await driver.pilot.press("shift+delete")  # the newest
        assert rows(driver)[-1] == "4. delta"
        assert driver.toasts[-1] == "removed (the input history has it): epsilon"
        await driver.pilot.press("up", "up", "shift+delete")  # the edited one
        assert driver.prompt.text == ""
        assert rows(driver) == ["1. alpha", "2. beta", "3. delta"]
        await driver.pilot.press("up", "up", "ctrl+u", "enter")  # emptied and sent
        assert rows(driver) == ["1. alpha", "2. delta"]
        await driver.pilot.press("ctrl+shift+delete")
        assert not driver.chat.queue_panel.display
        await driver.pilot.press("shift+delete")
        assert driver.toasts[-1] == "no messages are queued"
        engine.release()
        await driver.until(lambda: driver.finished == 1)
        assert engine.submitted == ["first"]
        await driver.pilot.press("up")
        assert driver.prompt.text == "epsilon"


async def test_the_command_queue() -> None:
    engine = held_engine("x", "y")
    async with driving(engine) as driver:
        await driver.enter("/queue")
        await driver.until(lambda: driver.outputs == ["no messages are queued"])
        await queue_up(driver, "alpha", "beta\nwith\nlines", "gamma")
        await driver.enter("/queue")
        await driver.until(lambda: len(driver.outputs) == 2)
        assert driver.outputs[-1] == "  1. alpha\n  2. (3 lines) beta with lines\n  3. gamma"
        await driver.enter("/queue drop 1")
        await driver.until(lambda: driver.outputs[-1] == "removed: alpha")
        await driver.enter("/queue drop 7")
        assert driver.toasts[-1] == "/queue drop needs the number of a message; 2 messages are queued"
        await driver.pilot.press("ctrl+u")
        await driver.enter("/queue fly")
        assert driver.toasts[-1] == "usage: /queue, or /queue edit, drop, clear, send"
        await driver.pilot.press("ctrl+u")
        await driver.enter("/queue edit 2")
        await driver.until(lambda: driver.prompt.text == "gamma")
        await driver.write("!")
        await driver.pilot.press("enter")
        assert rows(driver) == ["1. (3 lines) beta with lines", "2. gamma!"]
        await driver.pilot.press("escape")
        await driver.until(lambda: driver.finished == 1)
        await driver.enter("/queue send")
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["first", "beta\nwith\nlines", "gamma!"]
        await driver.enter("/queue clear")
        await driver.until(lambda: driver.outputs[-1] == "no messages are queued")


async def test_files_are_read_when_a_message_is_queued_and_again_after_an_edit() -> None:
    file = Path("notes.txt")
    file.write_text("old")
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "see @notes.txt", "also @notes.txt")
        file.write_text("new")
        await driver.pilot.press("up")
        assert driver.prompt.text == "also @notes.txt"
        await driver.pilot.press("enter")
        engine.release()
        await driver.until(lambda: driver.finished == 3)
        assert ["old" in text for text in engine.submitted[1:]] == [True, False]


async def test_an_edit_with_a_missing_file_goes_on() -> None:
    async with driving(held_engine()) as driver:
        await queue_up(driver, "alpha")
        await driver.pilot.press("up")
        await driver.write(" @./missing.txt ")
        await driver.pilot.press("enter")
        assert driver.toasts[-1].startswith("./missing.txt: no such file")
        assert driver.prompt.text == "alpha @./missing.txt "
        assert rows(driver) == ["1. (editing) alpha"]
        driver.engine.release()


@pytest.mark.parametrize(("size", "shown"), [((80, 24), 4), ((140, 40), 6), ((40, 8), 2)])
async def test_a_long_queue_shows_its_ends(size: tuple[int, int], shown: int) -> None:
    engine = held_engine()
    async with driving(engine, size=size) as driver:
        await queue_up(driver, *(f"message {number}" for number in range(1, 51)))
        listed = [f"{number}. message {number}" for number in range(1, shown - 1)]
        assert rows(driver) == [*listed, f"and {51 - shown} more (/queue lists all)", "50. message 50"]
        assert driver.chat.queue_panel.size.height <= size[1] // 2
        if size[1] > 20:
            assert "50. message 50" in driver.screen_text
            assert driver.prompt.region.bottom <= size[1] - 1
        await driver.pilot.press("ctrl+shift+delete")
        engine.release()


async def test_long_and_odd_messages_take_one_row() -> None:
    async with driving(held_engine(), size=(80, 24)) as driver:
        await queue_up(driver, f"see {NASTY}")
        driver.prompt.insert("word " * 100_000 + "\nlast")
        await driver.pilot.press("enter")
        driver.prompt.insert("a\x1b[2Jb\x1b]0;title\x07\u202ec")
        await driver.pilot.press("enter")
        assert driver.chat.queue_panel.size.height == 4
        assert rows(driver)[0] == f"1. see {NASTY}"
        assert rows(driver)[1].startswith("2. (2 lines) word word")
        assert len(rows(driver)[1]) < 250
        assert rows(driver)[2] == "3. abc"
        assert NASTY in driver.screen_text
        await driver.pilot.press("ctrl+shift+delete")
        driver.engine.release()


async def test_a_failed_turn_holds_the_queue() -> None:
    engine = held_engine(Reply("x", error="no room"), "y", "z")
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta")
        engine.release()
        await driver.until(lambda: driver.finished == 1 and driver.prompt.text == "alpha")
        await driver.pilot.pause(0.2)
        assert (engine.submitted, rows(driver)) == (["first", "alpha"], ["1. beta"])
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 2)
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["first", "alpha", "alpha", "beta"]


async def test_a_failed_turn_does_not_touch_an_edit() -> None:
    engine = held_engine(Reply("x y", error="no room", hold_after=1), "y", "z")
    async with driving(engine) as driver:
        await queue_up(driver, "alpha", "beta")
        engine.release()
        await driver.until(lambda: len(driver.turns) == 2 and driver.turns[1].reply_text)
        await driver.pilot.press("up")
        engine.release()
        await driver.until(lambda: len(rows(driver)) == 2)
        assert driver.prompt.text == "beta"
        assert rows(driver) == ["1. alpha", "2. (editing) beta"]
        await driver.pilot.press("enter", "enter")
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["first", "alpha", "alpha", "beta"]


async def test_starting_over_holds_the_queue() -> None:
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha")
        await driver.enter("/clear")
        await driver.until(lambda: any("New conversation" in line for line in driver.lines))
        await driver.pilot.pause(0.2)
        assert (engine.submitted, rows(driver)) == (["first"], ["1. alpha"])


async def test_what_is_written_after_a_stop_is_not_held_when_the_turn_ends_without_a_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = ScriptedEngine([Reply("a b", hold_after=0)])
    send, stats = engine.send, ev.TurnStats(1, 0, 0, 0, 64, 0, 0, None, None, 0, 0, None, "cancelled")
    sent: list[Request] = []

    def send_all_but_stops(request: Request) -> None:  # stopping takes a while
        sent.append(request)
        if not isinstance(request, Stop):
            send(request)

    monkeypatch.setattr(engine, "send", send_all_but_stops)
    async with driving(engine) as driver:
        await driver.enter("first")
        await driver.until(lambda: engine.submitted == ["first"])
        await driver.enter("old")
        await driver.pilot.press("escape")
        await driver.enter("new")
        assert rows(driver) == ["1. new", "2. (held) old"]
        engine.emit(ev.TurnFinished(stats, "cancelled", "", "first", rolled_back=True))
        await driver.until(lambda: sent[-1] == Submit("new"))
        assert rows(driver) == ["1. old"]
        assert driver.prompt.text == "first"
        engine.release()


async def test_fast_keys_take_effect_in_order() -> None:
    """Several keys may arrive at once, on a slow connection or from a busy app."""
    async with driving(held_engine()) as driver:
        await queue_up(driver, "alpha")

        async def burst(*keys: str) -> None:
            for key in keys:
                driver.app.post_message(events.Key(key, key if len(key) == 1 else None))
            await driver.pilot.pause(0.2)

        await burst("a", "b", "backspace", "c", "left", "d")
        assert driver.prompt.text == "adc"
        await burst("ctrl+u", "delete", "x", "y", "ctrl+w", "z")
        assert driver.prompt.text == "z"
        await burst("ctrl+u", "up")
        assert driver.prompt.text == "alpha"
        await burst("escape", "n", "e", "w")
        assert (driver.prompt.text, rows(driver)) == ("new", ["1. alpha"])
        await burst("ctrl+u", "up", "n", "o")  # typed before the message is in the input
        assert driver.prompt.text in ("no", "alphano")
        await burst("enter")
        assert rows(driver) in (["1. alpha", "2. no"], ["1. alphano"])
        await burst("up", "o", "k", "enter")  # the step comes after the message has left the input
        assert [row[3:] for row in rows(driver)][-1] in ("ok", "nook", "alphanook")
        assert any("alpha" in row for row in rows(driver))
        driver.engine.release()


async def test_a_command_during_an_edit_keeps_what_is_typed_meanwhile() -> None:
    async with driving(held_engine()) as driver:
        await queue_up(driver, "alpha")
        await driver.pilot.press("up", "ctrl+u")
        await driver.write("/stats")
        for key in ("enter", "n", "e", "w"):
            driver.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await driver.until(lambda: driver.prompt.text == "new")
        await driver.until(lambda: rows(driver) == ["1. alpha"])
        assert driver.prompt.text == "new"
        driver.engine.release()


async def test_messages_wait_for_another_model() -> None:
    Path("tiny").mkdir()  # not fetched first
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.enter("/model ./tiny")
        for text in ("alpha", "beta", "gamma"):
            await driver.enter(text)
        await driver.until(lambda: driver.finished == 3)
        assert engine.submitted == ["alpha", "beta", "gamma"]
        assert [turn.number for turn in driver.turns] == [1, 2, 3]
        assert [turn.reply_text for turn in driver.turns] == [f"You said: {text}" for text in engine.submitted]


async def test_a_model_that_gets_ready_after_a_message_was_sent_frees_no_other_one() -> None:
    """Right after /model, a message is sent before the app has seen that the model loads."""
    engine = held_engine()
    async with driving(engine) as driver:
        await queue_up(driver, "alpha")
        engine.emit(ev.ModelReady(engine._info(), 0.1))
        await driver.until(lambda: len(driver.conversation.query(Welcome)) == 2)
        assert (engine.submitted, rows(driver)) == (["first"], ["1. alpha"])
        engine.release()
        await driver.until(lambda: driver.finished == 2)
        assert [turn.number for turn in driver.turns] == [1, 2]


async def test_a_failed_engine_loses_nothing() -> None:
    engine = ScriptedEngine(hold_loading=True)
    async with driving(engine, ready=False) as driver:
        for text in ("alpha", "beta"):
            await driver.enter(text)
        assert heading(driver).startswith("2 queued until the model is ready")
        engine.fail("out of memory")
        engine.release()
        await driver.until(lambda: driver.conversation.query(FailurePanel))
        assert heading(driver) == "2 not sent: the engine has stopped; they are printed when you quit"
        assert [row[-5:].strip() for row in rows(driver)][-1] == "beta"


@pytest.mark.parametrize("history", [True, False])
def test_what_is_queued_on_quit_is_printed(
    history: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full if no file has it."""
    settings = Settings(history=history)
    engine = held_engine(settings=settings)

    def run(app: StreamchatApp) -> int | None:
        async def use() -> None:
            async with app.run_test(size=(140, 40)) as pilot:
                driver = Driver(app, engine, pilot)
                await driver.ready()
                await queue_up(driver, "alpha\nand more", *(f"message {number}" for number in range(2, 13)))
                await pilot.press("ctrl+q")
                await driver.until(lambda: not app.is_running)

        asyncio.run(use())
        return app.return_value

    monkeypatch.setattr(StreamchatApp, "run", run)
    assert run_app(engine, Configuration(settings)) == 0
    printed = capsys.readouterr().err.splitlines()
    if history:
        assert printed[:3] == [
            "streamchat: 12 queued messages not sent; the input history (Up) has them",
            "  alpha and more",
            "  message 2",
        ]
        assert printed[-2:] == ["  message 10", "  and 2 more"]
    else:
        assert printed[:3] == ["streamchat: 12 queued messages not sent", "alpha", "and more"]
        assert printed[-1] == "message 12"
    assert engine.close(60)
