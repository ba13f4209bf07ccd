"""Success means effect: what a slash command says it did is looked at by another path than the program's own.

Every command of the registries has an entry here, so that a new one without a test fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.frontend.outbox import Message, Outbox
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.queue import queue_command
from streamchat.frontend.slash.registry import SlashContext, SlashRegistry
from streamchat.store.store import Store
from tests.support.app_driver import driving
from tests.support.desk import Desk
from tests.support.effects import indices_of_turn, other_process, rows, said, talking
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import tiny_loaded
from tests.support.saved_sessions import stored
from tests.support.scripted_engine import ScriptedEngine

Effect = Callable[..., Any]
EFFECTS: dict[str, Effect] = {}
"""The test of each command that claims an effect."""
SHOWS = {
    "help": "prints the commands",
    "stats": "prints figures",
    "sessions": "prints the list of sessions",
    "quit": "the chat was saved as it went: `resume` and `clear` look at that",
    "settings": "opens a screen; what it writes is in test_effects_keys.py",
    "sidebar": "shows or hides a panel",
}
"""Commands that claim none, and why."""


def effect(name: str) -> Callable[[Effect], Effect]:
    """Enter a test for the command `name`."""

    def enter(test: Effect) -> Effect:
        assert name not in EFFECTS
        EFFECTS[name] = test
        return test

    return enter


async def test_every_command_has_an_entry() -> None:
    async with driving(ScriptedEngine()) as driver:
        names = {command.name for command in driver.chat.state.registry}
    names |= {command.name for command in default_registry()}
    assert names == set(EFFECTS) | set(SHOWS)
    assert not set(EFFECTS) & set(SHOWS)
    tests = {value for name, value in globals().items() if name.startswith("test_")}
    assert set(EFFECTS.values()) <= tests


# --- turns ----------------------------------------------------------------------------------------------------------


@effect("pin")
def test_a_pinned_turn_is_cached_after_1000_tokens_and_after_each_resume() -> None:
    with talking() as talk:
        session = [talk.turn("the capital"), talk.turn("the sea"), talk.session][2]
        talk.say("/pin 1", then=ev.TurnPinned)
        pinned = indices_of_turn(session, 1)
        talk.go_on()
        assert pinned <= talk.cached
        assert not indices_of_turn(session, 2) & talk.cached
    for _ in range(2):
        with talking(session) as talk:
            assert pinned <= talk.cached
            talk.go_on()
            assert pinned <= talk.cached
    [[pins, held]] = rows("SELECT pins, held FROM sessions WHERE id = ?", session)
    for runs in (json.loads(pins), json.loads(held)):
        assert pinned <= {index for first, stop in runs for index in range(first, stop)}


@effect("unpin")
def test_an_unpinned_turn_is_evicted_like_any_other() -> None:
    with talking() as talk:
        talk.turn("the capital")
        talk.say("/pin 1", then=ev.TurnPinned)
        talk.say("/unpin 1", then=ev.TurnPinned)
        turn = indices_of_turn(talk.session, 1)
        assert turn <= talk.cached
        talk.go_on()
        assert not turn & talk.cached
        assert not turn & {i for a, b in json.loads(rows("SELECT pins FROM sessions")[0][0]) for i in range(a, b)}


@effect("undo")
def test_an_undone_turn_is_gone_from_cache_log_and_database() -> None:
    with talking() as talk:
        talk.turn("the sea")
        before, log = talk.cached, talk.log
        talk.turn("the unicorn")
        assert "the unicorn" in said(talk.session)
        talk.say("/undo")
        session = talk.session
        assert (talk.cached, talk.log) == (before, log)
        assert "the unicorn" not in said(session)
    with talking(session) as talk:
        assert (talk.cached, talk.log) == (before, log)
        assert "unicorn" not in talk.decoded(talk.log)


@effect("retry")
def test_a_retried_reply_takes_the_place_of_the_first() -> None:
    with talking(temperature=1.0, max_new_tokens=12) as talk:
        first = talk.turn("the sea").reply
        talk.say("/retry")
        session, second = talk.session, talk.watched.of(ev.TurnFinished)[-1].reply
        assert first != second
        assert said(session) == ["the sea", second]
        assert talk.decoded(talk.log).count("the sea") == 1
    with talking(session) as talk:
        assert [turn.reply for turn in talk.watched.of(ev.ConversationResumed)[0].turns] == [second]


@effect("edit")
def test_an_edited_message_takes_the_place_of_the_first() -> None:
    with talking() as talk:
        talk.turn("the unicorn")
        talk.say("/edit the dragon")
        assert said(talk.session)[::2] == ["the dragon"]
        text = talk.decoded(talk.log)
        assert ("the dragon" in text, "unicorn" in text) == (True, False)
        talk.say("/edit")  # puts it into the input
        assert said(talk.session) == []
        assert talk.watched.of(ev.TurnUndone)[-1].text == "the dragon"


@effect("compact")
def test_a_summary_is_of_the_oldest_turns_and_changes_nothing_by_itself() -> None:
    with talking(cache_size=256, max_new_tokens=12) as talk:
        for word in ("the sea", "the dragon", "the girl", "the capital"):
            talk.turn(word)
        before = talk.cached, talk.log, said(talk.session)
        talk.say("/compact")
        ready = talk.watched.of(ev.SummaryReady)[-1]
        assert ready.text
        assert ready.turns[0] == 1
        assert (talk.cached, talk.log, said(talk.session)) == before


# --- conversations --------------------------------------------------------------------------------------------------


@effect("clear")
def test_a_cleared_conversation_is_not_seen_by_the_model_and_stays_saved() -> None:
    with talking() as talk:
        talk.turn("the unicorn")
        old = talk.session
        talk.say("/clear", then=ev.ConversationCleared)
        talk.turn("the sea")
        assert "unicorn" not in talk.decoded(talk.log)
        assert len(talk.cached) == len(talk.log)
        assert talk.session != old
        assert said(old)[0] == "the unicorn"
        assert said(talk.session)[0] == "the sea"


@effect("system")
def test_a_new_system_prompt_is_what_the_cache_begins_with() -> None:
    with talking() as talk:
        talk.turn("the sea")
        talk.say("/system Speak as a dragon.", then=ev.ConversationCleared)
        talk.turn("the girl")
        assert "Speak as a dragon." in talk.decoded(talk.log).split("the girl")[0]
        talk.go_on()
        assert "Speak as a dragon." in talk.decoded([talk.log[index] for index in sorted(talk.cached)])
        session = talk.session
    with talking(session) as talk:
        assert "Speak as a dragon." in talk.decoded(talk.log[:40])


@effect("resume")
def test_a_resumed_session_goes_on_with_what_was_cached() -> None:
    with talking() as talk:
        talk.turn("the unicorn")
        talk.go_on(400)
        session, cached, log = talk.session, talk.cached, talk.log
    with talking() as talk:
        talk.turn("the sea")
        talk.say(f"/resume {session}")
        assert (talk.cached, talk.log) == (cached, log)
        talk.turn("and now the girl")
        assert talk.log[: len(log)] == log
    assert said(session)[0] == "the unicorn"
    assert "and now the girl" in said(session)


@effect("title")
def test_a_title_is_in_the_database_and_in_the_next_process() -> None:
    with talking() as talk:
        talk.turn("the sea")
        talk.say("/title The green sea", then=ev.StatusSampled)
        talk.turn("the girl")
        session = talk.session
        assert rows("SELECT title FROM sessions WHERE id = ?", session) == [["The green sea"]]
    with Store() as store:
        assert store.find(session).title == "The green sea"


class Texts(HTMLParser):
    """The text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.found += data


@effect("export")
def test_an_exported_file_has_every_message_for_another_program(tmp_path: Path) -> None:
    with talking(max_new_tokens=12) as talk:
        for text in ("the sea & <b>the girl</b>", "the dragon"):
            talk.turn(text)
        texts = said(talk.session)
        for suffix in ("md", "html", "jsonl", "json"):
            talk.say(f"/export {tmp_path / f'chat.{suffix}'}")
    lines = "import json, sys; print(json.dumps([json.loads(line) for line in open(sys.argv[1], encoding='utf-8')]))"
    assert json.dumps(other_process(lines, str(tmp_path / "chat.jsonl"))).count("the dragon") >= 1
    whole = "import json, sys; print(json.dumps(json.load(open(sys.argv[1], encoding='utf-8'))))"
    strings = list(_strings(other_process(lines, str(tmp_path / "chat.jsonl"))))
    assert [text for text in texts if text not in strings] == []
    strings = list(_strings(other_process(whole, str(tmp_path / "chat.json"))))
    assert [text for text in texts if text not in strings] == []
    page = Texts((tmp_path / "chat.html").read_text(encoding="utf-8")).found
    assert "the sea & <b>the girl</b>" in page
    assert "the dragon" in (tmp_path / "chat.md").read_text(encoding="utf-8")


def _strings(value: Any) -> Any:
    """All strings in JSON."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(each)


@effect("import")
def test_imported_conversations_are_in_the_database(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat = [{"role": "user", "content": "the unicorn"}, {"role": "assistant", "content": "it is green"}]
    file.write_text(json.dumps({"messages": chat}))
    with talking() as talk:
        talk.say(f"/import {file}")
        [[session]] = rows("SELECT id FROM sessions")
        assert said(session) == ["the unicorn", "it is green"]
        talk.say(f"/resume {session} yes")
        assert "it is green" in talk.decoded(talk.log)


# --- search and quote -----------------------------------------------------------------------------------------------


@effect("recall")
def test_a_search_finds_what_another_process_finds() -> None:
    for title in ("unicorn", "unicorns and dragons", "sea"):
        stored(title)
    desk = Desk()
    text = desk.say("/recall unicorn").text
    assert [[text.count("Tell me about")]] == rows("SELECT count(*) FROM messages WHERE text LIKE '%unicorn%'") == [[2]]


@effect("quote")
def test_a_quoted_message_is_what_the_model_reads() -> None:
    stored("the unicorn")
    with talking() as talk:
        talk.turn("the sea")
        talk.say("/recall unicorn")
        talk.say("/quote 1")
        assert "Tell me about the unicorn" in talk.decoded(talk.log)
        assert "Tell me about the unicorn" in said(talk.session)[2]
        quoted = indices_of_turn(talk.session, 2)
        assert quoted <= talk.cached
        talk.go_on()
        assert not quoted & talk.cached


@effect("keep")
def test_a_kept_text_is_cached_after_1000_tokens_and_after_a_resume() -> None:
    with talking() as talk:
        talk.turn("the sea")
        talk.say("/keep the key is under the stone")
        session = talk.session
        kept = indices_of_turn(session, 2)
        assert "the key is under the stone" in talk.decoded([talk.log[index] for index in sorted(kept)])
        talk.go_on()
        assert kept <= talk.cached
    with talking(session) as talk:
        assert kept <= talk.cached


@effect("read")
def test_a_file_that_is_read_is_in_the_message(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("the key is under the stone\n")
    with talking() as talk:
        talk.say(f"/read {file} what is it?")
        assert "the key is under the stone" in said(talk.session)[0]
        assert "the key is under the stone" in talk.decoded(talk.log)


# --- settings and models --------------------------------------------------------------------------------------------


@effect("set")
def test_a_changed_setting_holds_for_the_next_turn_and_after_a_resume() -> None:
    with talking(max_new_tokens=12) as talk:
        talk.turn("the sea")
        talk.say("/set max_new_tokens 3", then=ev.SettingChanged)
        assert talk.turn("the girl").stats.new_tokens == 3
        session = talk.session
        assert ["max_new_tokens", "3"] in rows("SELECT name, value FROM changes WHERE session = ?", session)


SWITCH = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@effect("think")
def test_the_switch_of_reasoning_is_in_the_prompt() -> None:
    with talking(load=lambda *_: tiny_loaded(SWITCH)) as talk:
        talk.turn("the sea")
        assert "</think>" not in talk.decoded(talk.log)
        talk.say("/think off", then=ev.SettingChanged)
        talk.turn("the girl")
        assert talk.decoded(talk.log).count("<think>\n\n</think>") == 1


@effect("model")
def test_another_model_replies_and_is_the_one_of_the_session(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "other")
    other = replace(tiny_loaded(family="gpt_neox"), name="other", source=str(folder))

    def load(configuration: Any, progress: Any) -> Any:
        return other if configuration.settings.model == str(folder) else tiny_loaded()

    with talking(load=load) as talk:
        talk.turn("the sea")
        talk.say(f"/model {folder}", then=ev.ModelReady)
        talk.turn("the girl")
        assert talk.watched.conversation.model is other.model
        names = rows("SELECT model_name FROM sessions JOIN turns ON turns.session = sessions.id ORDER BY turns.id")
        assert names == [["tiny"], ["other"]]
        assert "the sea" not in talk.decoded(talk.log)


@pytest.mark.parametrize("line", ["/set temperature 0.5", "/set temperature=0.5"])
async def test_no_setting_is_said_to_change_after_the_engine_failed(line: str) -> None:
    async with driving(ScriptedEngine()) as driver:
        driver.engine.fail("no memory")
        await driver.until(lambda: driver.app.failure is not None)
        sent = list(driver.engine.sent)
        await driver.enter(line)
        await driver.until(lambda: bool(driver.toasts))
        assert driver.outputs == []
        assert driver.engine.sent == sent
        await driver.pilot.press("ctrl+u")
        await driver.enter("/set temperature")  # shows it
        await driver.until(lambda: bool(driver.outputs))
        assert driver.outputs[-1].startswith("temperature = 0.7")


# --- the app's own --------------------------------------------------------------------------------------------------


@effect("queue")
def test_removed_messages_of_the_queue_never_reach_the_engine() -> None:
    sent: list[str] = []
    outbox = Outbox(sent.append)
    outbox.idle()
    outbox.offer(Message("first", "first"))
    for text in ("second", "third", "fourth"):
        outbox.offer(Message(text, text))
    desk, registry = Desk(), SlashRegistry()
    registry.add(queue_command(outbox))
    context = SlashContext(desk.engine, desk.board)
    assert registry.run(context, "/queue drop 2") is not None
    for _ in range(3):
        outbox.idle()
        outbox.send_next()
    assert sent == ["first", "second", "fourth"]
    outbox.offer(Message("fifth", "fifth"))
    outbox.offer(Message("sixth", "sixth"))
    assert registry.run(context, "/queue clear") is not None
    for _ in range(3):
        outbox.idle()
        outbox.send_next()
    assert sent[-1] == "fifth"


@effect("theme")
async def test_a_theme_is_that_of_the_next_start() -> None:
    async with driving(ScriptedEngine()) as driver:
        other = "textual-light" if driver.app.theme != "textual-light" else "nord"
        await driver.enter(f"/theme {other}")
        await driver.until(lambda: driver.app.theme == other)
    async with driving(ScriptedEngine()) as driver:
        assert driver.app.theme == other


@effect("copy")
async def test_a_copied_reply_is_what_the_terminal_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(replies=["Here:\n\n```python\nx = 1\n```\n"])
    async with driving(engine) as driver:
        await driver.ask("hello")
        written: list[str] = []
        assert driver.app._driver is not None
        monkeypatch.setattr(driver.app._driver, "write", written.append)
        await driver.enter("/copy code")
        await driver.until(lambda: any("]52;c;" in text for text in written))
        import base64
        import re

        [code] = re.findall(r"\x1b]52;c;([^\x07\x1b]*)", "".join(written))
        assert base64.b64decode(code).decode() == "x = 1"
