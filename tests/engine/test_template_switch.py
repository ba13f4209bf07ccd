"""Template arguments on the real engine: `/think`, audits of what is fed, and sessions that keep them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Clear, OpenSession, ResetOption, SetOption, Undo
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.models.sampling import SamplingAdvice
from streamchat.sessions.settings import resumed_configuration
from streamchat.store.store import Store
from tests.support import toy_tokenizer as toy
from tests.support.real_engine import Watched, running, tiny_loaded

pytestmark = pytest.mark.smoke

OFF = '{"enable_thinking": false}'
CLOSED = "<think>\n\n</think>\n"


def load(*_: Any) -> Any:
    return tiny_loaded(toy.SWITCHED)


def load_at_the_start(*_: Any) -> Any:
    return tiny_loaded(toy.SWITCHED_AT_THE_START)


def fed_text(chat: Watched) -> str:
    conversation = chat.conversation
    return str(conversation.tokenizer.decode(conversation.log.ids.tolist()))


def switch(chat: Watched, value: str) -> None:
    """Change the setting and wait for it."""
    count = len(chat.of(ev.SettingChanged))
    chat.engine.send(SetOption("template_args", value))
    chat.wait(ev.SettingChanged, count + 1)


def test_the_model_says_which_arguments_its_template_reads() -> None:
    with running(load, template_args='{"colour": "red"}') as chat:
        info = chat.wait(ev.ModelReady).info
        assert (info.template_reads, info.thinks, info.template_defaults) == (("enable_thinking",), True, "{}")
        assert "does not read colour; it reads enable_thinking." in chat.wait(ev.Notice).text


@pytest.mark.parametrize("loader", [load, load_at_the_start], ids=["in the reply", "at the start"])
def test_what_is_fed_around_a_change_is_the_templates_own(loader: Any) -> None:
    """The audits compare each turn with what the template renders, with the arguments of that turn."""
    with running(loader, audit=True, max_new_tokens=8) as chat:
        chat.wait(ev.ModelReady)
        chat.turn("one")
        before = chat.conversation.log.ids.tolist()
        switch(chat, OFF)
        chat.turn("two")
        chat.turn("three")
        switch(chat, "{}")
        chat.turn("four")
        text = fed_text(chat)
        assert chat.conversation.log.ids.tolist()[: len(before)] == before
        audited = [event.turn for event in chat.of(ev.CacheAudited) if event.after == "turn"]
        assert [turn.difference for turn in audited if turn] == [""] * 4
        assert CLOSED not in text.split("two")[0]
        assert text.split("two")[1].split("four")[0].count(CLOSED) == 2
        assert CLOSED not in text.split("four")[1]
        notices = [event.text for event in chat.of(ev.Notice) if "until /clear" in event.text]
        assert len(notices) == (loader is load_at_the_start)


def test_a_conversation_without_turns_gets_the_new_start_at_once() -> None:
    with running(load_at_the_start, max_new_tokens=8) as chat:
        chat.wait(ev.ModelReady)
        assert fed_text(chat).startswith("<|im_start|>system\nMode: /think\n")
        switch(chat, OFF)
        assert fed_text(chat).startswith("<|im_start|>system\nMode: /no_think\n")
        assert len(chat.of(ev.ConversationCleared)) == 1
        chat.turn("one")
        switch(chat, "{}")
        assert fed_text(chat).startswith("<|im_start|>system\nMode: /no_think\n")
        chat.engine.send(Clear())
        chat.wait(ev.ConversationCleared, 2)
        assert fed_text(chat).startswith("<|im_start|>system\nMode: /think\n")


def test_arguments_that_the_template_refuses_change_nothing() -> None:
    template = "{% if level | default(1) > 2 %}{{ raise_exception('too high') }}{% endif %}" + toy.CHATML
    with running(lambda *_: tiny_loaded(template), max_new_tokens=8) as chat:
        chat.wait(ev.ModelReady)
        chat.engine.send(SetOption("template_args", '{"level": 3}'))
        notice = chat.wait(ev.Notice).text
        assert "cannot be used with level=3: it raises: too high; the arguments stay as they were" in notice
        assert "plain" not in notice  # no turn changes its form
        assert chat.engine.settings.template_args == "{}"
        assert chat.turn("one").finish_reason != "error"


def test_a_conversation_without_the_template_stays_without_it_until_it_starts_over() -> None:
    """Its template raises with the arguments that it started with, and not with the later ones."""
    template = "{% if level | default(1) > 2 %}{{ raise_exception('too high') }}{% endif %}" + toy.CHATML
    with running(lambda *_: tiny_loaded(template), max_new_tokens=8, template_args='{"level": 3}') as chat:
        chat.wait(ev.ModelReady)
        chat.turn("one")
        switch(chat, '{"level": 1}')
        chat.turn("two")
        assert fed_text(chat).count("User: ") == 2
        chat.engine.send(Clear())
        chat.wait(ev.ConversationCleared)
        chat.turn("three")
        assert "<|im_start|>user\nthree" in fed_text(chat)


def test_a_session_keeps_its_arguments_and_its_ids(tmp_path: Path) -> None:
    database = tmp_path / "streamchat.db"
    with running(load, store=database, max_new_tokens=8) as chat:
        chat.wait(ev.ModelReady)
        chat.turn("one")
        switch(chat, OFF)
        chat.turn("two")
        ids = chat.conversation.log.ids.tolist()
    with Store(database) as store:
        session = store.find("last").id
    with running(load, store=database, session=session, max_new_tokens=8) as chat:
        assert chat.wait(ev.ConversationResumed).prefilled == 0
        assert chat.conversation.log.ids.tolist() == ids
        assert chat.engine.settings.template_args == OFF
        chat.turn("three")
        assert fed_text(chat).split("three")[1].count(CLOSED) == 1


def test_flags_at_a_resume_override_single_arguments(tmp_path: Path) -> None:
    database = tmp_path / "streamchat.db"
    with running(load, store=database, max_new_tokens=8, template_args='{"a": 1, "enable_thinking": false}') as chat:
        chat.turn("one")
    with Store(database) as store:
        info = store.find("last")
    origins = {"template_args": "--template-arg", "template_args.a": "--template-arg", "template_args.b": "config.toml"}
    given = Configuration(Settings(template_args='{"a": 2, "b": 3}'), origins)
    assert resumed_configuration(given, info).settings.template_args == '{"a": 2, "enable_thinking": false}'
    assert resumed_configuration(Configuration(), info).settings.template_args == '{"a": 1, "enable_thinking": false}'


def test_a_session_of_an_earlier_version_has_no_arguments(tmp_path: Path) -> None:
    database = tmp_path / "streamchat.db"
    with running(load, store=database, max_new_tokens=8) as chat:
        chat.turn("one")
        chat.turn("two")
    with Store(database) as store:
        info = store.find("last")
        del info.settings["template_args"]  # type: ignore[attr-defined]
    assert resumed_configuration(Configuration(), info).settings.template_args == "{}"
    with running(load, store=database, session=info.id, max_new_tokens=8) as chat:
        assert chat.wait(ev.ConversationResumed).prefilled == 0


def test_undo_and_another_session_go_on_with_the_arguments(tmp_path: Path) -> None:
    database = tmp_path / "streamchat.db"
    with running(load, store=database, max_new_tokens=8, template_args=OFF) as chat:
        chat.turn("one")
    with Store(database) as store:
        session = store.find("last").id
    with running(load, store=database, max_new_tokens=8) as chat:
        chat.turn("other")
        switch(chat, OFF)
        chat.engine.send(Undo())
        chat.wait(ev.TurnUndone)
        chat.turn("again")
        assert fed_text(chat).count(CLOSED) == 1
        switch(chat, "{}")
        chat.engine.send(OpenSession(session))
        chat.wait(ev.ConversationResumed)
        assert chat.engine.settings.template_args == OFF


def test_a_reset_brings_back_the_default_or_the_advice_of_the_model() -> None:
    advice = SamplingAdvice({"temperature": 0.2}, {"temperature": "the catalogue"})
    with running(lambda *_: replace(load(), advice=advice), max_new_tokens=8, template_args=OFF) as chat:
        chat.wait(ev.ModelReady)
        for name, value in (("temperature", 0.9), ("top_k", 5)):
            chat.engine.send(SetOption(name, value))
            chat.engine.send(ResetOption(name))
        chat.engine.send(ResetOption("template_args"))
        chat.engine.send(ResetOption("cache_size"))
        chat.wait(ev.SettingChanged, 5)
        chat.turn("one")
        assert "cache_size cannot change during a chat" in chat.of(ev.Notice)[-1].text
        assert [(e.name, e.value) for e in chat.of(ev.SettingChanged)] == [
            ("temperature", 0.9), ("temperature", 0.2), ("top_k", 5), ("top_k", 0), ("template_args", "{}"),
        ]  # fmt: skip
        assert (chat.engine.origin("temperature"), chat.engine.origin("top_k")) == ("the catalogue", "the default")
        assert CLOSED not in fed_text(chat)


def test_a_first_turn_after_a_kept_start_is_the_templates_own_behind_it() -> None:
    with running(load_at_the_start, audit=True, max_new_tokens=8) as chat:
        chat.turn("one")
        switch(chat, OFF)
        chat.engine.send(Undo())
        chat.wait(ev.TurnUndone)
        chat.turn("again")
        assert fed_text(chat).startswith("<|im_start|>system\nMode: /think\n")
        assert CLOSED in fed_text(chat)
        audited = [event.turn for event in chat.of(ev.CacheAudited) if event.after == "turn"]
        assert [turn.difference for turn in audited if turn] == [""] * 2
