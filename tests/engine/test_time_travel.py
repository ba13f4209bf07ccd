"""`/rewind` and `/fork` on the real engine: exact to the bit, told how, and nothing is lost."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.requests import (
    CountTokens,
    Fork,
    OpenSession,
    Pin,
    Quote,
    Request,
    Retry,
    Rewind,
    SetOption,
    Undo,
    Unpin,
)
from streamchat.cache import checkpoint
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import INT4
from streamchat.models.load import LoadedModel
from streamchat.store.forks import Fork as ForkRows
from streamchat.store.records import CacheMark
from streamchat.store.store import Store
from tests.support.real_engine import Watched, running, tiny_loaded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": INT4}
TURNS = 14


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


def loaded(kv: str) -> LoadedModel:
    model = tiny_loaded()
    set_cache_dtype(model.model, DTYPES[kv])
    return model


class Past:
    """What the conversation was after each turn."""

    def __init__(self, chat: Watched) -> None:
        self.chat = chat
        self.logits: dict[int, Tensor] = {}
        self.pins: dict[int, Any] = {}

    def note(self) -> None:
        """As the cache is now."""
        conversation = self.chat.conversation
        number = len(conversation.log.turns)
        self.logits[number], self.pins[number] = logits_of(self.chat), conversation.cache.pins

    def talk(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            self.chat.turn(f"question number {number}, please")
            self.note()

    def must_be(self, number: int) -> None:
        conversation = self.chat.conversation
        assert len(conversation.log.turns) == number
        assert torch.equal(logits_of(self.chat), self.logits[number])
        assert conversation.cache.pins == self.pins[number]


def logits_of(chat: Watched) -> Tensor:
    """The next token's logits, with the state as it was before. After a turn, the engine also uses the cache."""
    count = len(chat.of(ev.TextCounted)) + 1
    chat.engine.send(CountTokens("once it is idle"))
    chat.wait(ev.TextCounted, count)
    conversation = chat.conversation
    before = checkpoint.capture(conversation.cache)
    history, conversation.cache.history = conversation.cache.history, None
    logits = conversation.next_logits().clone()
    conversation.cache.history = history
    layers = conversation.cache.streaming_layers
    written = [layer.written for layer in layers]
    last = conversation.cache.streaming_layers[0].length - 1
    for i, layer in enumerate(layers):  # the last token was computed again, in another way
        assert layer.storage is not None
        state = {n.partition(".")[2]: t for n, t in before.tensors.items() if n.startswith(f"{i}.")}
        raw = {name: t[:, :, last:] for name, t in state.items() if "original" not in name}
        layer.storage.write_raw(layer.start + last, raw)
        assert layer.written == written[i]
    return logits


def rewind(chat: Watched, turn: int, *, drop: bool = False) -> ev.ConversationRewound:
    count = len(chat.of(ev.ConversationRewound)) + 1
    chat.engine.send(Rewind(turn, drop))
    return chat.wait(ev.ConversationRewound, count)


def fork(chat: Watched, turn: int = 0) -> str:
    count = len(chat.of(ev.ConversationResumed)) + 1
    chat.engine.send(Fork(turn))
    return chat.wait(ev.ConversationResumed, count).session


@pytest.mark.parametrize("kv", [pytest.param(kv, marks=() if kv == "int4" else pytest.mark.slow) for kv in DTYPES])
def test_rewind_to_evicted_turns_is_exact(database: Path, kv: str) -> None:
    with running(lambda *_: loaded(kv), store=database, audit=True) as chat:
        past = Past(chat)
        past.talk(1, TURNS)
        session = chat.of(ev.SessionOpened)[-1].session
        chat.conversation.rollback.clear()  # as in a new process: nothing is in memory
        for turn in (TURNS - 1, TURNS - 5, 3, 1):
            done = rewind(chat, turn)
            assert done.is_exact, turn
            assert done.prefilled == 0
            past.must_be(turn)
        chat.turn("and on it goes")
        kept = [event.kept_as for event in chat.of(ev.ConversationRewound)]
    with Store(database) as store:
        assert store.find(session).turns == 2
        assert [store.find(each).turns for each in kept] == [TURNS, TURNS - 1, TURNS - 5, 3]
        assert {(store.find(each).parent, store.find(each).parent_turn) for each in kept} == {
            (session, turn) for turn in (TURNS - 1, TURNS - 5, 3, 1)
        }
    with running(lambda *_: loaded(kv), store=database, session=kept[0]) as chat:  # the turns that were undone first
        assert chat.wait(ev.ConversationResumed).prefilled == 0
        past.chat = chat
        past.must_be(TURNS)


def test_forks_share_the_past_and_never_mix(database: Path) -> None:
    with running(store=database) as chat:
        past = Past(chat)
        past.talk(1, TURNS)
        parent = chat.of(ev.SessionOpened)[-1].session
        branches: dict[str, dict[int, Tensor]] = {}
        for at in (5, 9):
            session = fork(chat, at)
            resumed = chat.of(ev.ConversationResumed)[-1]
            assert (resumed.parent, resumed.parent_turn, len(resumed.turns)) == (parent, at, at)
            past.must_be(at)
            for number in range(8):
                chat.turn(f"branch {at} goes on with {number}")
            mine = Past(chat)
            mine.note()
            branches[session] = mine.logits
            open_session(chat, parent)
            past.must_be(TURNS)
        for session, logits in branches.items():
            open_session(chat, session)
            mine = Past(chat)
            mine.note()
            assert torch.equal(mine.logits[max(mine.logits)], logits[max(logits)])
            assert rewind(chat, 3).is_exact  # of the shared past
            past.must_be(3)
    with Store(database) as store:
        owners = {owner for owner, _ in files(database)}
        assert owners >= {parent}
        assert {info.parent for info in store.sessions()} >= {parent, None}
        texts = [turn.text for turn in store.load(parent).turns]
        assert texts == [f"question number {number}, please" for number in range(1, TURNS + 1)]


def open_session(chat: Watched, session: str) -> None:
    count = len(chat.of(ev.ConversationResumed)) + 1
    chat.engine.send(OpenSession(session))
    chat.wait(ev.ConversationResumed, count)


def files(database: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT DISTINCT owner, file FROM evicted").fetchall()
    connection.close()
    return found


def test_pins_pages_retries_settings_and_undo_before_the_turn(database: Path) -> None:
    with running(store=database, cache_size=192) as chat:
        past = Past(chat)
        past.talk(1, 4)
        chat.engine.send(Pin(2))
        past.talk(5, 9)
        chat.engine.send(Quote("quoted", "I see.", pin=True, turn=3))
        assert chat.wait(ev.TurnPagedIn).turn == 3
        past.note()
        past.talk(10, 11)
        chat.turn("", lambda _: chat.engine.send(Retry()))
        past.note()
        chat.engine.send(SetOption("temperature", 0.3))
        chat.engine.send(Unpin(2))
        chat.wait(ev.TurnPinned, 2)
        past.note()
        past.talk(12, 16)
        chat.engine.send(Undo())
        chat.wait(ev.TurnUndone, 2)
        past.talk(16, 18)
        chat.conversation.rollback.clear()
        # what the user did between two turns belongs to the first one
        for turn in (17, 15, 12, 11, 9, 6, 2):
            assert rewind(chat, turn).is_exact, turn
            past.must_be(turn)
        chat.turn("another one")
        for turn in (2, 1):
            count = len(chat.of(ev.TurnUndone)) + 1
            chat.engine.send(Undo())
            assert chat.wait(ev.TurnUndone, count).prefilled == 0
            past.must_be(turn)


@pytest.mark.parametrize("how", ["int8", pytest.param("off", marks=pytest.mark.slow), "missing pages", "no store"])
def test_an_incomplete_archive_is_told_and_reads_again(database: Path, how: str) -> None:
    settings: dict[str, Any] = {"archive": how} if how in ("int8", "off") else {}
    with running(store=None if how == "no store" else database, **settings) as chat:
        past = Past(chat)
        past.talk(1, TURNS)
        chat.conversation.rollback.clear()
        if how == "missing pages":
            wait_for_writer(chat)
            with sqlite3.connect(database) as connection:
                connection.execute("DELETE FROM evicted WHERE turn > 5")
            connection.close()
        if how == "no store":
            chat.engine.send(Rewind(5))
            chat.until(lambda events: any("would be lost" in e.text for e in events if isinstance(e, ev.Notice)))
            assert len(chat.conversation.log.turns) == TURNS
        done = rewind(chat, 5, drop=True)
        assert not done.is_exact
        assert done.prefilled > 0
        assert bool(done.kept_as) == (how != "no store")
        ids = chat.conversation.log.ids_at(chat.conversation.cache.ledger.runs)
        found = logits_of(chat)
    with running() as fresh:
        fresh.wait(ev.ModelReady)
        fresh.conversation.cache.reset()
        fresh.conversation.log.clear()
        fresh.conversation.feeder.feed(ids)
        assert torch.equal(logits_of(fresh), found)


def wait_for_writer(chat: Watched) -> None:
    archive: Any = chat.engine._owner.archive
    assert archive._evicted._writer.drain(60)


def test_wrong_turns_are_refused(database: Path) -> None:
    with running(store=database) as chat:
        chat.wait(ev.ModelReady)
        chat.engine.send(Rewind(1))
        chat.engine.send(Fork())
        chat.turn("only one")
        wrong: list[Request] = [Rewind(1), Rewind(2), Rewind(-1), Rewind(0), Fork(2), Fork(-3)]
        for request in wrong:
            chat.engine.send(request)
        chat.turn("the next")
        told = [notice.text for notice in chat.of(ev.Notice) if notice.level == "warning"]
        assert told == [
            "the conversation has no turn yet",
            "the conversation has no turn yet",
            "turn 1 is the newest one, so there is nothing to rewind",
            "2 is not a turn of this conversation; it has 1 turn",
            "-1 is not a turn of this conversation; it has 1 turn",
            "0 is not a turn of this conversation; /clear starts over",
            "2 is not a turn of this conversation; it has 1 turn",
            "-3 is not a turn of this conversation; it has 1 turn",
        ]
    with Store(database) as store:
        assert len(store.sessions()) == 1


def test_a_deleted_parent_leaves_only_what_its_forks_share(database: Path) -> None:
    with running(store=database) as chat:
        past = Past(chat)
        past.talk(1, 9)
        parent = chat.of(ev.SessionOpened)[-1].session
        child = fork(chat, 9)
        open_session(chat, parent)
        past.talk(10, TURNS)
    with Store(database) as store:
        own = [place for page, place in store.evicted.pages(parent) if page.turn > 9]
        shared = [place for _, place in store.evicted.pages(child)]
        assert own
        assert shared
        grandchild = store.fork(ForkRows(child, 3, 3, CacheMark(((0, 4),))))
        store.delete(parent)
        assert store.find(child).parent is None
        assert (store.find(grandchild).parent, store.find(grandchild).parent_turn) == (child, 3)
        path = database.parent / "evicted" / parent
        for place in own:
            file = path / f"{place.file:06}.pages"
            assert not file.exists() or not any(file.read_bytes()[place.offset : place.offset + place.length])
        assert all(store.evicted.read(page) is not None for page in store.evicted.pages(child))
    with running(store=database, session=child) as chat:
        chat.wait(ev.ConversationResumed)
        past.chat = chat
        past.must_be(9)
        assert rewind(chat, 3).is_exact
        past.must_be(3)
    with Store(database) as store:
        for info in store.sessions():
            store.delete(info.id)
    assert not list((database.parent / "evicted").iterdir())
