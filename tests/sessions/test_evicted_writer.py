"""What evicted tokens wait for, and who waits for them: nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.base.requests import Quote, Undo
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.layers.slots import CopiedStates
from streamchat.sessions import evicted_archive
from streamchat.sessions.evicted_writer import EvictedWriter, Limits
from streamchat.store.evicted import EvictedPage, EvictedPages
from streamchat.store.store import Store
from tests.support.real_engine import Watched, running
from tests.support.saved_sessions import a_session, a_turn

pytestmark = pytest.mark.smoke
LIMITS = Limits(10**8, 10**8)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Pages are written only when the event is set."""
    free, append = threading.Event(), EvictedPages.append

    def slow(*args: Any, **named: Any) -> None:
        assert free.wait(30)
        append(*args, **named)

    monkeypatch.setattr(EvictedPages, "append", slow)
    try:
        yield free
    finally:
        free.set()


def talk(chat: Watched, turns: int = 9) -> None:
    for number in range(turns):
        chat.turn(f"question number {number}, please")


def pages(database: Path) -> list[EvictedPage]:
    with Store(database) as store:
        return [page for page, _ in store.evicted.pages(store.find("last").id)]


def some(turn: int) -> tuple[EvictedPage, EvictedTokens]:
    runs = ((10 * turn, 10 * turn + 4),)
    states = CopiedStates((("keys", (0,), torch.zeros(1, 1, 1, 4, 2)),))
    return EvictedPage(turn, runs, "i", "f", "float32", "native", 3), EvictedTokens(runs, states, CopiedStates(), 3)


def test_what_is_not_written_yet_is_found_without_waiting(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evicted_archive, "PATIENCE_S", 1e6)
    with slow_disk(monkeypatch) as free, running(store=database) as chat:
        talk(chat)
        monkeypatch.setattr(chat.conversation.cache.history, "since", lambda mark: ())
        chat.engine.send(Quote("quoted text", "I see.", pin=True, turn=2))
        assert chat.wait(ev.TurnPagedIn).turn == 2
        free.set()
    assert pages(database)


def test_what_an_undone_turn_evicted_is_not_written_later(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evicted_archive, "PATIENCE_S", 0.0)
    with slow_disk(monkeypatch) as free, running(store=database) as chat:
        talk(chat)
        chat.engine.send(Undo())
        chat.wait(ev.TurnUndone)
        free.set()
    written = [page.turn for page in pages(database)]
    assert written
    assert max(written) < 9


def test_a_page_of_an_undone_turn_that_is_being_written_is_removed(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(database) as store:
        session = a_session(store)
        store.write(session, turns=[a_turn(1, "text", "reply")])
        writer = EvictedWriter(store.evicted, LIMITS, lambda text: None)
        with slow_disk(monkeypatch) as free:
            for turn in (3, 4, 2):
                writer.put(session, *some(turn), "native")
            writer.drop_from(session, 3, 0.05)
            free.set()
            writer.close()
        assert [page.turn for page, _ in store.evicted.pages(session)] == [2]


def test_a_store_that_cannot_be_read_has_no_archive(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise StoreError("the database is locked")

    with running(store=database) as chat:
        talk(chat)
        monkeypatch.setattr(EvictedPages, "pages", fails)
        monkeypatch.setattr(chat.conversation.cache.history, "since", lambda mark: ())
        before = len(chat.of(ev.TurnFinished))
        chat.engine.send(Quote("quoted text", "I see.", pin=True, turn=2))
        chat.wait(ev.TurnFinished, before + 1)
        assert len(chat.conversation.log.turns) == 10
        assert any("turn 2 are not archived; the message is quoted" in each.text for each in chat.of(ev.Notice))


def test_no_thread_to_write_with_costs_the_archive_only(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fails(thread: threading.Thread) -> None:
        if thread.name == "evicted tokens":
            raise RuntimeError("can't start new thread")
        start(thread)

    with Store(database) as store:
        session = a_session(store)
        store.write(session, turns=[a_turn(1, "text", "reply")])
        writer = EvictedWriter(store.evicted, LIMITS, lambda text: None)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            writer.put(session, *some(2), "native")
            assert writer.drain(0.1)
        writer.put(session, *some(3), "native")
        writer.close()
        assert [page.turn for page, _ in store.evicted.pages(session)] == [3]


def test_the_thread_starts_with_the_chat_and_not_when_memory_may_have_run_out(database: Path) -> None:
    def writers() -> int:
        return sum(thread.name == "evicted tokens" for thread in threading.enumerate())

    before = writers()
    with running(store=database) as chat:
        chat.turn("nothing is evicted")
        assert not chat.of(ev.TokensEvicted)
        assert writers() == before + 1
    assert writers() == before
