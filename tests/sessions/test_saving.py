"""What of a running chat is on the disk, and when; and what follows if it cannot be written."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from types import MethodType
from typing import Any, cast

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.base.requests import (
    Clear,
    CountTokens,
    Edit,
    Pin,
    Retry,
    SetOption,
    Undo,
)
from streamchat.sessions import snapshot as snapshots
from streamchat.sessions.evicted_archive import EvictedArchive
from streamchat.sessions.recorder import Recorder
from streamchat.store import connection as connections
from streamchat.store import database as databases
from streamchat.store.health import examine
from streamchat.store.lock import SessionLock
from streamchat.store.store import Store
from tests.support.real_engine import running
from tests.support.saved_chats import QUESTIONS, said, session_of
from tests.support.saved_chats import database as database  # a fixture

pytestmark = pytest.mark.smoke


def test_a_message_is_on_the_disk_before_its_reply_begins_and_the_reply_as_it_streams(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.sessions.recorder.BATCH_S", 0.0)
    seen: dict[str, list[Any]] = {"begun": [], "streamed": []}

    def look(event: ev.Event) -> None:
        if isinstance(event, ev.TurnStarted | ev.TextDelta):
            with sqlite3.connect(database) as connection:
                rows = connection.execute(
                    "SELECT t.state, m.role, m.text, length(t.ids) FROM messages m JOIN turns t ON t.id = m.turn "
                    "ORDER BY m.id"
                ).fetchall()
            seen["begun" if isinstance(event, ev.TurnStarted) else "streamed"].append(rows)

    with running(store=database) as chat:
        chat.engine.subscribe(look)
        finished = chat.turn("remember the dragon")
        with Store(database) as store:
            whole = store.load(session_of(database))
    assert seen["begun"] == [[("running", "user", "remember the dragon", 0)]]
    replies = [rows[1][2] for rows in seen["streamed"] if len(rows) == 2]
    assert replies == sorted(replies, key=len)
    assert finished.reply.startswith(replies[0])
    assert replies[-1] == finished.reply
    sizes = [rows[0][3] for rows in seen["streamed"]]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0
    [turn] = whole.turns
    assert (turn.state, turn.reply, turn.finish_reason) == ("done", finished.reply, finished.finish_reason)
    assert turn.stats == finished.stats.as_dict()


def test_evictions_settings_and_pins_are_on_the_disk(database: Path) -> None:
    with running(store=database, cache_size=160) as chat:
        said(chat, QUESTIONS[:2])
        chat.engine.send(Pin(2))
        chat.engine.send(SetOption("temperature", 0.25))
        said(chat, QUESTIONS * 2)
        told = chat.of(ev.TokensEvicted)
        conversation: Any = chat.conversation
        pins = conversation.cache.pins
        session = session_of(database)
    assert len(told) > 2
    with Store(database) as store:
        saved = store.load(session)
    assert [(e.runs, e.cause, e.length_after) for e in saved.evictions] == [
        (e.runs, e.trigger, e.cache_len_after) for e in told
    ]
    assert saved.info.settings["temperature"] == 0.25
    assert saved.info.pins == pins
    assert len(pins) == 2
    with running(store=database, session=session) as chat:
        chat.wait(ev.ConversationResumed)
        assert chat.conversation.cache.pins == pins
        assert chat.engine.settings.temperature == 0.25


def test_undo_retry_and_edit_on_the_disk(database: Path) -> None:
    with running(store=database, temperature=1.0, cache_size=512) as chat:
        said(chat, QUESTIONS[:3])
        chat.engine.send(Undo())
        undone = chat.wait(ev.TurnUndone)
        assert (undone.turn, undone.text, undone.replaced) == (3, QUESTIONS[2], False)
        first = chat.of(ev.TurnFinished)[1].reply
        again = chat.turn("", lambda _: chat.engine.send(Retry()))
        assert (again.text, again.stats.turn) == (QUESTIONS[1], 2)
        assert again.reply != first  # another draw
        other = chat.turn("And of the knight?", lambda text: chat.engine.send(Edit(text)))
        assert other.stats.turn == 2
        session = session_of(database)
    with Store(database) as store:
        saved = store.load(session)
        assert [turn.text for turn in saved.turns] == [QUESTIONS[0], "And of the knight?"]
        assert saved.turns[1].reply == other.reply
        [found] = store.search("dragon")[:1]
        assert found.undone
    with running(store=database, session=session) as chat:
        assert [turn.text for turn in chat.wait(ev.ConversationResumed).turns] == [QUESTIONS[0], "And of the knight?"]


def test_clear_begins_another_session_and_empty_ones_are_not_kept(database: Path) -> None:
    with running(store=database) as chat:
        said(chat, QUESTIONS[:1])
        chat.engine.send(Clear())
        said(chat, QUESTIONS[1:3])
        chat.engine.send(Clear())
        chat.wait(ev.ConversationCleared, 2)
    with Store(database) as store:
        assert [(s.title, s.turns, s.opened_by) for s in store.sessions()] == [
            (QUESTIONS[1], 2, None),
            (QUESTIONS[0], 1, None),
        ]


def test_a_full_disk_is_told_once_and_all_is_saved_afterwards(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(store=database) as chat:
        chat.wait(ev.ModelReady)
        chat.turn("one")
        recorder: Any = chat.engine._owner.archive.recorder
        limit = recorder.store._open.writer.execute("PRAGMA page_count").fetchone()[0]
        recorder.store._open.writer.execute(f"PRAGMA max_page_count = {limit}")
        for _ in range(3):
            chat.turn("a long message " * 300)
        [told] = [notice.text for notice in chat.of(ev.Notice) if "not saved" in notice.text]
        assert "database or disk is full; free some disk space" in told
        recorder.store._open.writer.execute("PRAGMA max_page_count = 100000")
        chat.turn("two")
        assert any("saved again" in notice.text for notice in chat.of(ev.Notice))
        assert [event.works for event in chat.of(ev.SavingChanged)] == [False, True]
    with Store(database) as store:
        assert [turn.text[:3] for turn in store.load(session_of(database)).turns] == ["one", "a l", "a l", "a l", "two"]
        assert examine(store.path).problems == []


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The next call of a method of the store fails as on a full disk; later ones work."""
    method = getattr(Store, name)

    def fail(self: Store, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(Store, name, method)
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, name, fail)


def test_a_setting_that_could_not_be_written_is_written_with_the_next_turn(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(store=database, temperature=0.5) as chat:
        chat.turn("one")
        failing_once(monkeypatch, "change")
        chat.engine.send(SetOption("temperature", 0.75))
        chat.wait(ev.SavingChanged)
        chat.turn("two")
    with Store(database) as store:
        assert store.load(session_of(database)).info.settings["temperature"] == 0.75


def test_new_ids_that_could_not_be_written_are_written_with_their_tokenizer(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(store=database) as chat:
        said(chat, QUESTIONS[:2])
    session = session_of(database)
    with Store(database) as store, store._open.write() as connection:
        connection.execute("UPDATE sessions SET tokenizer = 'another'")
    with running(store=database, start=False, session=session) as chat:
        failing_once(monkeypatch, "write")
        chat.engine.start()
        chat.wait(ev.ConversationResumed)
        chat.turn("three")
        tokenizer = chat.engine._owner.archive.recorder._identity.tokenizer  # type: ignore[union-attr]
    with Store(database) as store:
        assert store.load(session).info.tokenizer == tokenizer


def test_a_session_whose_lock_fails_is_not_created_twice(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        monkeypatch.setattr("streamchat.store.store.SessionLock", SessionLock)
        raise StoreError("too many files are open")

    with running(store=database) as chat:
        chat.wait(ev.ModelReady)
        monkeypatch.setattr("streamchat.store.store.SessionLock", full)
        said(chat, QUESTIONS[:2])
    with Store(database) as store:
        assert [info.turns for info in store.sessions()] == [2]


def test_what_is_lost_when_leaving_a_session_is_said(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(store=database) as chat:
        chat.turn("one")
        session = session_of(database)
        works = Store.write

        def full(*_: Any, **__: Any) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(Store, "write", full)
        chat.turn("two")
        chat.engine.send(Clear())
        chat.wait(ev.ConversationCleared)
        assert f"The latest changes of the session {session} could not be saved." in [
            n.text for n in chat.of(ev.Notice)
        ]
        monkeypatch.setattr(Store, "write", works)
        chat.turn("three")
        assert chat.of(ev.Notice)[-1].text == "The conversation is saved again."


def test_a_store_that_opens_later_gets_all_turns(database: Path) -> None:
    database.parent.write_text("in the way")
    with running(store=database) as chat:
        chat.turn("one")
        chat.turn("two")
        assert len([notice for notice in chat.of(ev.Notice) if "is not saved" in notice.text]) == 1
        database.parent.unlink()
        chat.turn("three")
        assert chat.of(ev.Notice)[-1].text == "The conversation is saved now, from its first turn on."
    with Store(database) as store:
        assert [turn.text for turn in store.load(session_of(database)).turns] == ["one", "two", "three"]


def test_a_store_that_cannot_be_opened_does_not_stop_the_chat(database: Path) -> None:
    database.parent.mkdir(parents=True)
    database.write_bytes(b"this is no database " * 100)
    with running(store=database) as chat:
        assert "is damaged; move it aside" in chat.wait(ev.Notice).text
        chat.turn("hello")
    assert database.read_bytes().startswith(b"this is no database")


def test_a_snapshot_every_so_many_turns(database: Path) -> None:
    with running(store=database, snapshot_turns=2) as chat:
        moments: list[int] = []
        for question in QUESTIONS:
            chat.turn(question)
            chat.engine.send(CountTokens("x"))  # after the snapshot
            chat.wait(ev.TextCounted, len(moments) + 1)
            with Store(database) as store:
                path = store.snapshot_path(session_of(database))
            moments.append(snapshots.load(path).checkpoint.next_index if path.exists() else 0)
        stops = [turn.end for turn in chat.conversation.log.turns]
    assert moments == [0, stops[1], stops[1], stops[3], stops[3]]
    assert path.stat().st_mode & 0o077 == 0
    assert snapshots.load(path).checkpoint.next_index == stops[4]


def test_an_undo_that_could_not_be_written_is_written_when_leaving(database: Path) -> None:
    with running(store=database) as chat:
        said(chat, QUESTIONS[:3])
        recorder: Any = chat.engine._owner.archive.recorder
        connection = recorder.store._open.writer
        connection.execute("PRAGMA query_only = ON")
        chat.engine.send(Undo())
        chat.wait(ev.TurnUndone)
        assert any("not saved" in notice.text for notice in chat.of(ev.Notice))
        connection.execute("PRAGMA query_only = OFF")
    with Store(database) as store:
        assert [turn.text for turn in store.load(session_of(database)).turns] == QUESTIONS[:2]


def test_the_folder_of_a_deleted_database_is_not_created_again(database: Path, tmp_path: Path) -> None:
    """Snapshot and archive would be those of a session that no database has, and nothing would ever delete them."""
    with running(store=database, cache_size=64) as chat:
        said(chat, QUESTIONS)
        assert (database.parent / "evicted").exists()
        cast(EvictedArchive, cast(MethodType, chat.conversation.find_evicted).__self__).drain()
        database.parent.rename(tmp_path / "elsewhere")
        said(chat, QUESTIONS)
    assert not database.parent.exists()
    assert any("was deleted or replaced" in notice.text for notice in chat.of(ev.Notice))


def test_leaving_waits_for_a_locked_database(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it chats, it does not wait again and again; what would be lost on leaving is worth the time."""
    for module in (connections, databases):
        monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 1.0)
    with running(store=database) as chat:
        chat.turn("one")
        with closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            chat.turn("two")
            released = threading.Timer(0.5, other.execute, ["ROLLBACK"])
            released.start()
            assert chat.engine.close(30)
            released.join()
    with Store(database) as store:
        assert [turn.text for turn in store.load(session_of(database)).turns] == ["one", "two"]


@pytest.mark.parametrize(("owner", "step"), [(Recorder, "flush"), (EvictedArchive, "close"), (Store, "close")])
def test_leaving_waits_for_everything_that_is_saved_at_the_end(
    owner: type[Any], step: str, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, save = threading.Event(), threading.Event(), getattr(owner, step)

    def slow(saver: Any) -> None:
        if threading.current_thread().name == "streamchat-engine":
            begun.set()
            assert may_end.wait(60)
        save(saver)

    with running(store=database) as chat:
        chat.turn("one")
        monkeypatch.setattr(owner, step, slow)
        ended: list[bool] = []
        leaving = threading.Thread(target=lambda: ended.append(chat.engine.close(60)))
        leaving.start()
        assert begun.wait(60)
        assert chat.engine.saving  # so it waits longer than it was asked to
        may_end.set()
        leaving.join()
        assert ended == [True]
        assert not chat.engine.saving
