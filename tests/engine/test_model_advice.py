"""Sampling settings that a model advises: used where the user gave none, for new conversations and other models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.base.requests import OpenSession, SetOption, SwitchModel
from streamchat.config.loader import Configuration
from streamchat.config.settings import default_of
from streamchat.models.load import LoadedModel
from streamchat.models.sampling import SamplingAdvice
from tests.support.real_engine import Watched, running, tiny_loaded

ADVICE = {
    "hot": {"temperature": 1.5, "top_k": 40},
    "cool": {"temperature": 0.25, "repetition_penalty": 1.0},
}


def load(configuration: Configuration, *_: Any) -> LoadedModel:
    """A tiny model with the advice of its name."""
    values = ADVICE.get(configuration.settings.model, {})
    advice = SamplingAdvice(values, dict.fromkeys(values, "the catalogue"))
    return replace(tiny_loaded(), name=configuration.settings.model, advice=advice)


def sampling(chat: Watched) -> tuple[float, int, float]:
    """Temperature, top_k and penalty, which the conversation has as well."""
    settings = chat.engine.settings
    assert chat.conversation.settings == settings
    return settings.temperature, settings.top_k, settings.repetition_penalty


def change(chat: Watched, name: str, value: float) -> None:
    chat.engine.send(SetOption(name, value))
    chat.wait(ev.SettingChanged, len(chat.of(ev.SettingChanged)) + 1)


def switch(chat: Watched, name: str) -> None:
    chat.engine.send(SwitchModel(name))
    chat.wait(ev.ModelReady, len(chat.of(ev.ModelReady)) + 1)


def test_a_new_chat_uses_the_advice_and_says_where_each_value_is_from() -> None:
    with running(load, model="hot", top_k=7) as chat:
        chat.wait(ev.ModelReady)
        assert sampling(chat) == (1.5, 7, default_of("repetition_penalty"))
        names = ("temperature", "top_k", "repetition_penalty")
        assert [chat.engine.origin(name) for name in names] == ["the catalogue", "flag", "the default"]
        change(chat, "repetition_penalty", 1.3)
        assert chat.engine.origin("repetition_penalty") == "/set"


def test_another_model_brings_its_advice_and_leaves_what_the_user_gave() -> None:
    with running(load, model="hot") as chat:
        chat.wait(ev.ModelReady)
        switch(chat, "cool")
        assert sampling(chat) == (0.25, default_of("top_k"), 1.0)
        change(chat, "temperature", 0.9)
        switch(chat, "hot")
        assert sampling(chat) == (0.9, 40, default_of("repetition_penalty"))
        assert (chat.engine.origin("temperature"), chat.engine.origin("model")) == ("/set", "/model")
        switch(chat, "unknown")
        assert sampling(chat) == (0.9, default_of("top_k"), default_of("repetition_penalty"))


def saved(database: Path, make: Callable[[Watched], object]) -> str:
    """The id of a session with one turn, after `make`."""
    with running(load, store=database, model="hot") as chat:
        chat.wait(ev.ModelReady)
        make(chat)
        chat.turn("hello")
        return chat.wait(ev.SessionOpened).session


def test_a_resumed_session_keeps_its_values_and_says_so(tmp_path: Path) -> None:
    database = tmp_path / "chats.db"
    session = saved(database, lambda chat: change(chat, "temperature", 0.8))
    with running(load, store=database, session=session, model="hot") as chat:
        chat.wait(ev.ConversationResumed)
        kept = chat.wait(ev.Notice).text
        assert sampling(chat) == (0.8, 40, default_of("repetition_penalty"))
        assert chat.engine.origin("temperature") == f"session {session}"
        assert kept == (
            "This session keeps the sampling settings that it was run with: temperature 0.8; a new chat would use "
            "temperature 1.5."
        )
        switch(chat, "cool")  # a new conversation
        assert sampling(chat) == (0.25, default_of("top_k"), 1.0)


def test_after_a_session_another_model_has_the_values_of_the_start(tmp_path: Path) -> None:
    database = tmp_path / "chats.db"
    session = saved(database, lambda chat: None)
    with running(load, store=database, model="cool", top_k=3) as chat:
        chat.wait(ev.ModelReady)
        chat.engine.send(OpenSession(session))
        chat.wait(ev.ConversationResumed)
        assert sampling(chat)[:2] == (1.5, 40)
        switch(chat, "cool")
        assert sampling(chat) == (0.25, 3, 1.0)
        assert chat.engine.origin("top_k") == "flag"


def test_a_session_that_samples_as_a_new_chat_has_no_notice(tmp_path: Path) -> None:
    database = tmp_path / "chats.db"
    session = saved(database, lambda chat: None)
    with running(load, store=database, session=session, model="hot") as chat:
        chat.wait(ev.ModelReady)
        chat.turn("and on")
        assert not [notice for notice in chat.of(ev.Notice) if "sampling settings" in notice.text]
