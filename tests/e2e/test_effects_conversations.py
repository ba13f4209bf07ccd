"""Success means effect: slash commands for conversations, files, settings and models."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.store.store import Store
from tests.support.app_driver import driving
from tests.support.effects import other_process, rows, said, talking
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import tiny_loaded
from tests.support.scripted_engine import ScriptedEngine


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


def test_an_export_of_a_chat_that_is_not_saved_now_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is full")

    with talking() as talk:
        talk.turn("the sea")
        whole = talk.say(f"/export {tmp_path / 'whole.json'}").text
        assert whole == f"1 turn written to {tmp_path / 'whole.json'}"
        monkeypatch.setattr(Store, "write", full)
        talk.turn("the unicorn")
        said_of_it = talk.say(f"/export {tmp_path / 'part.json'}").text
        assert "unicorn" not in (tmp_path / "part.json").read_text(encoding="utf-8")
        assert said_of_it == (
            f"1 turn written to {tmp_path / 'part.json'}; "
            "saving fails now: the file has the conversation as it was last saved"
        )


def _strings(value: Any) -> Any:
    """All strings in JSON."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(each)


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


def test_the_switch_of_reasoning_is_in_the_prompt() -> None:
    with talking(load=lambda *_: tiny_loaded(SWITCH)) as talk:
        talk.turn("the sea")
        assert "</think>" not in talk.decoded(talk.log)
        talk.say("/think off", then=ev.SettingChanged)
        talk.turn("the girl")
        assert talk.decoded(talk.log).count("<think>\n\n</think>") == 1


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
