"""Taking back, finding, keeping and resuming in the app."""

from __future__ import annotations

from typing import Any

import pytest
from textual.widgets import Input, OptionList

from streamchat.base import events as ev
from streamchat.base.requests import OpenSession, Quote, SetTitle
from streamchat.config.settings import Settings
from streamchat.frontend.outbox import Phase
from streamchat.store.store import Store
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.finder import RecallScreen, SessionsScreen
from streamchat.tui.widgets.lines import Welcome
from streamchat.tui.widgets.loading import LoadingPanel
from streamchat.tui.widgets.turn import Turn
from tests.support.app_driver import NASTY, Driver, driving
from tests.support.saved_sessions import a_session, a_turn
from tests.support.scripted_engine import Reply, ScriptedEngine

pytestmark = pytest.mark.slow


def stored(*titles: str) -> list[str]:
    """Sessions in the user's own store, each with a turn about its title."""
    ids = []
    with Store() as store:
        for title in titles:
            ids.append(a_session(store, title))
            store.write(ids[-1], turns=[a_turn(1, f"Tell me about {title}", f"{title} is {NASTY}")])
    return ids


async def idle(driver: Driver) -> None:
    await driver.until(lambda: driver.app.state.outbox.phase is Phase.IDLE, "an idle engine")


async def test_undo_takes_the_turn_off_the_screen_and_out_of_the_figures() -> None:
    async with driving(ScriptedEngine(["first", "second"])) as driver:
        await driver.ask("one")
        await driver.ask("two")
        await driver.enter("/undo")
        await driver.until(lambda: "Turn 2 was undone." in driver.lines)
        assert [turn.text for turn in driver.turns] == ["one"]
        board = driver.board
        assert (board.turns, board.new_tokens) == (1, 1)
        assert driver.prompt.text == ""
        await idle(driver)
        await driver.ask("three")
        assert [(turn.number, turn.text) for turn in driver.turns] == [(1, "one"), (2, "three")]


async def test_what_comes_back_is_told_with_its_cost() -> None:
    settings = Settings(cache_size=64, num_sink_tokens=4, max_new_tokens=16)
    async with driving(ScriptedEngine(["word " * 14] * 3, settings=settings)) as driver:
        for text in ("one", "two", "three"):
            await driver.ask(text)
        event = ev.TurnUndone(3, "three", "word", driver.engine.cache.state(), 31, 52, 0.25)
        driver.engine.emit(event)
        await driver.until(lambda: any("undone" in line for line in driver.lines))
        assert driver.lines[-1] == ("Turn 3 was undone. 31 evicted tokens were restored (prefill took 250 ms).")


async def test_retry_and_edit_replace_the_turn() -> None:
    engine = ScriptedEngine(["first", "second", "third", "fourth"])
    async with driving(engine) as driver:
        await driver.ask("one")
        await driver.enter("/retry")
        await driver.until(lambda: [t.reply_text for t in driver.turns] == ["second"])
        await idle(driver)
        await driver.enter("/edit two")
        await driver.until(lambda: [(t.text, t.reply_text) for t in driver.turns] == [("two", "third")])
        await idle(driver)
        await driver.enter("/edit")
        await driver.until(lambda: driver.prompt.text == "two")
        assert driver.turns == []
        await driver.pilot.press("!", "enter")
        await driver.until(lambda: [(t.text, t.reply_text) for t in driver.turns] == [("two!", "fourth")])
        assert engine.submitted == ["one", "two!"]


async def test_nothing_to_take_back() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/undo")
        await driver.until(lambda: any("nothing to undo yet" in line for line in driver.lines))
        await idle(driver)
        for command in ("/retry", "/edit", "/edit x"):
            await driver.enter(command)
            assert "yet" in driver.toasts[-1]
            driver.prompt.clear()


async def test_what_works_on_turns_waits_for_the_reply() -> None:
    async with driving(ScriptedEngine([Reply("a slow reply", hold_after=1)])) as driver:
        await driver.begin("one")
        for command in ("/undo", "/retry", "/edit x", "/compact", "/keep x", "/resume abc"):
            await driver.enter(command)
            assert driver.toasts[-1] == f"{command.split()[0]} is not available: a reply is in progress"
            driver.prompt.clear()
        driver.engine.release()


async def test_recall_finds_while_one_types_and_enter_puts_it_before_the_model() -> None:
    stored("the sea", "a dragon")
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.pilot.press("ctrl+r")
        await driver.until(lambda: isinstance(driver.app.screen, RecallScreen))
        assert "Type words to search all messages." in driver.screen_text
        await driver.pilot.press(*"drag")
        rows = driver.app.screen.query_one(OptionList)
        await driver.until(lambda: rows.option_count == 2)
        assert f"a dragon is {NASTY}" in driver.screen_text
        await driver.pilot.press("down")
        assert rows.highlighted == 1
        await driver.pilot.press("enter")
        await driver.until(lambda: bool(driver.sent(Quote)))
        [quote] = driver.sent(Quote)
        assert quote.text.startswith("Remember what ")
        assert "a dragon" in quote.text
        assert (quote.reply, quote.pin) == ("Noted.", False)
        await driver.until(lambda: driver.turns and driver.turns[0].reply_text == "Noted.")
        await idle(driver)


async def test_recall_with_words_and_pinning() -> None:
    stored("the sea")
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.enter("/recall the sea")
        await driver.until(lambda: isinstance(driver.app.screen, RecallScreen))
        assert driver.app.screen.query_one(Input).value == "the sea"
        await driver.until(lambda: driver.app.screen.query_one(OptionList).option_count == 2)
        await driver.pilot.press("ctrl+k")
        await driver.until(lambda: bool(driver.emitted(ev.TurnPinned)))
        assert [quote.pin for quote in driver.sent(Quote)] == [True]
        await driver.until(lambda: driver.turns[0].visibility.pinned)


async def test_nothing_found_and_back() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/recall unicorn")
        await driver.until(lambda: "No messages match “unicorn”." in driver.screen_text)
        await driver.pilot.press("enter", "ctrl+k", "down")
        assert driver.shows(RecallScreen)
        await driver.pilot.press("escape")
        assert driver.shows(ChatScreen)
        await driver.pilot.press("ctrl+l")
        await driver.until(lambda: "No saved sessions yet." in driver.screen_text)
        await driver.pilot.press("escape")
        assert driver.app.focused is driver.prompt


async def test_a_conversation_is_chosen_and_goes_on() -> None:
    sea, dragon = stored("the sea", "a dragon")
    engine = ScriptedEngine()
    engine.sessions = {sea: [(f"question {n}", f"answer {n}") for n in range(1, 31)]}
    async with driving(engine) as driver:
        await driver.ask("something else")
        await driver.pilot.press("ctrl+l")
        screen: Any = driver.app.screen
        assert isinstance(screen, SessionsScreen)
        assert [info.id for info in screen._rows] == [dragon, sea]
        await driver.pilot.press(*"sea")
        await driver.until(lambda: [info.id for info in screen._rows] == [sea])
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.board.turns == 30)
        assert engine.sent[-1] == OpenSession(sea)
        await driver.until(lambda: [turn.number for turn in driver.turns] == list(range(21, 31)))
        assert driver.turns[-1].reply_text == "answer 30"
        assert driver.turns[-1].figures_text == "5 tokens · 20.0 tok/s · first token 100 ms"
        assert driver.lines[-1] == (
            f"“question 1” ({sea}) resumed at turn 30; {driver.board.cache.length} tokens cached, "
            "restored in 200 ms without prefill."
        )
        assert "▴ 20 older turns" in "\n".join(str(w.render()) for w in driver.conversation.query("PlaceholderLine"))
        await idle(driver)
        last = await driver.ask("go on")
        assert last.number == 31
        # the older ones come back as one scrolls to them
        turn = await driver.conversation.go_to(3)
        assert isinstance(turn, Turn)
        assert (turn.text, turn.reply_text) == ("question 3", "answer 3")


async def test_a_conversation_that_cannot_be_opened_changes_nothing() -> None:
    [sea] = stored("the sea")
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("one")
        await driver.enter(f"/resume {sea}")
        await driver.until(lambda: any("no saved session" in line for line in driver.lines))
        await idle(driver)
        assert [turn.text for turn in driver.turns] == ["one"]
        await driver.enter("/resume zzz")
        assert "no saved session has the id 'zzz'" in driver.toasts[-1]


async def test_a_summary_is_offered_and_pinned_as_the_user_leaves_it() -> None:
    engine = ScriptedEngine()
    async with driving(engine) as driver:
        await driver.ask("one")
        await driver.enter("/compact")
        await driver.until(lambda: driver.prompt.text == "/keep They spoke of the sea.")
        await idle(driver)
        await driver.pilot.press("backspace", "!", "enter")
        await driver.until(lambda: bool(driver.emitted(ev.TurnPinned)))
        text = "Remember this about our conversation so far:\n\nThey spoke of the sea!"
        assert driver.sent(Quote) == [Quote(text, "Noted.", pin=True)]


async def test_a_message_that_was_never_answered_is_in_the_input_again() -> None:
    async with driving(ScriptedEngine()) as driver:
        cache, info = driver.engine.cache.state(), driver.board.info
        assert info is not None
        driver.engine.emit(ev.ConversationResumed("abc", "The sea", (), cache, info, "", 0.1, 0, "why is it green?"))
        await driver.until(lambda: driver.prompt.text == "why is it green?")


async def test_the_id_is_in_the_panel_and_export_writes_a_file() -> None:
    [sea] = stored("the sea")
    async with driving(ScriptedEngine()) as driver:
        await driver.enter("/export")
        assert "is saved after its first turn" in driver.toasts[-1]
        driver.prompt.clear()
        driver.engine.emit(ev.SessionOpened(sea))
        await driver.ask("one")
        await driver.until(lambda: driver.figures("totals")["saved as"] == sea)
        await driver.enter("/export sea.md")
        await driver.until(lambda: bool(driver.outputs))
        assert driver.outputs[-1] == "1 turn written to sea.md"
        await driver.enter("/export sea.md")
        assert "already exists" in driver.toasts[-1]
        driver.prompt.clear()
        await driver.enter("/export sea.doc")
        assert "must end in .md, .html, .jsonl, .json" in driver.toasts[-1]
        driver.prompt.clear()
        await driver.enter("/title  Of the   sea ")
        await driver.until(lambda: any("title changed to “Of the sea”" in line for line in driver.lines))
        assert driver.sent(SetTitle) == [SetTitle("Of the   sea")]


async def test_a_resumed_conversation_has_no_welcome_in_it() -> None:
    async with driving(ScriptedEngine(hold_loading=True), ready=False) as driver:
        await driver.until(lambda: driver.conversation.query(LoadingPanel), "the loading panel")
        turn = ev.SavedTurn(1, "one", "first")
        info, cache = driver.engine._info(), driver.engine.cache.state()
        driver.engine.emit(ev.ConversationResumed("abc", "one", (turn,), cache, info, "", 0.1))
        driver.engine.release()
        await driver.ready()
        await idle(driver)
        assert [turn.reply_text for turn in driver.turns] == ["first"]
        assert not driver.conversation.query(Welcome)
        assert not driver.conversation.query(LoadingPanel)
        await driver.enter("/clear")
        await driver.until(lambda: driver.turns == [])
