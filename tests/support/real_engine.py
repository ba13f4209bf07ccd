"""The real `Engine` on a tiny random model, with its events kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from streamchat.base import events as ev
from streamchat.base.requests import Submit
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.conversation import Conversation
from streamchat.engine.engine import Engine
from streamchat.engine.fetcher import Fetch, fetch_model
from streamchat.models.load import LoadedModel
from streamchat.store.store import Store
from tests.support.tiny import tiny_model
from tests.support.toy_tokenizer import CHATML, VOCABULARY, toy_tokenizer

E = TypeVar("E", bound=ev.Event)


def tiny_loaded(template: str | None = CHATML, family: str = "llama", notes: tuple[str, ...] = ()) -> LoadedModel:
    """A tiny random model and tokenizer, as `load_model` returns them."""
    tokenizer: Any = toy_tokenizer(template)
    return LoadedModel(tiny_model(family, vocab_size=VOCABULARY), tokenizer, "tiny", "tests", "cpu", "float32", notes)


def conversation_of(engine: Engine) -> Conversation:
    """The conversation of an engine that has loaded its model and is idle: not for front ends."""
    conversation = engine._owner.conversation
    assert conversation is not None
    return conversation


class Watched:
    """An engine and what it said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[ev.Event] = []
        self._news = threading.Condition()
        engine.subscribe(self._take)

    def _take(self, event: ev.Event) -> None:
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    @property
    def conversation(self) -> Conversation:
        """The one of a loaded model."""
        return conversation_of(self.engine)

    def of(self, kind: type[E]) -> list[E]:
        """Events of one class so far."""
        return [event for event in list(self.events) if isinstance(event, kind)]

    def wait(self, kind: type[E], count: int = 1, timeout_s: float = 60) -> E:
        """The `count`-th event of a class, when it is there."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.of(kind)) >= count, timeout_s), (kind, self._latest)
        return self.of(kind)[count - 1]

    @property
    def _latest(self) -> list[ev.Event]:
        """What happened last, without figures."""
        return [event for event in self.events if not isinstance(event, ev.StatusSampled)][-3:]

    def until(self, holds: Callable[[list[ev.Event]], bool], timeout_s: float = 60) -> None:
        """Wait until the events so far are as wanted."""
        with self._news:
            assert self._news.wait_for(lambda: holds(self.events), timeout_s), self._latest

    def turn(self, text: str, how: Callable[[str], object] | None = None) -> ev.TurnFinished:
        """Say `text`, by `Submit` or another way, and wait for the end of the turn."""
        count = len(self.of(ev.TurnFinished)) + 1
        if how is None:
            self.engine.send(Submit(text))
        else:
            how(text)
        return self.wait(ev.TurnFinished, count)


@contextmanager
def running(
    load: Callable[..., LoadedModel] | None = None,
    start: bool = True,
    *,
    store: Path | None = None,
    session: str | None = None,
    audit: bool = False,
    fetch: Fetch = fetch_model,
    **settings: Any,
) -> Iterator[Watched]:
    """An engine with these settings, saving into the database `store`; closed at the end."""
    chosen = Settings(**({"max_new_tokens": 12, "seed": 1, "cache_size": 128} | settings))
    origins = dict.fromkeys(settings, "flag")
    engine = Engine(
        Configuration(chosen, origins, None),
        load or (lambda *_: tiny_loaded()),
        open_store=None if store is None else lambda: Store(store),
        session=session,
        audit=audit,
        fetch=fetch,
    )
    watched = Watched(engine)
    try:
        if start:
            engine.start()
        yield watched
    finally:
        assert engine.close(30)
