"""`/rewind` and `/fork` on the real engine: exact to the bit, told how, and nothing is lost."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.requests import Fork, Rewind
from streamchat.cache import checkpoint
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import INT4
from streamchat.models.load import LoadedModel
from streamchat.store.store import Store
from tests.support.real_engine import Watched, running, tiny_loaded

pytestmark = pytest.mark.smoke
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
    """The next token's logits, with the state as it was before."""
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


@pytest.mark.parametrize("kv", DTYPES)
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
            past.must_be(at)
            for number in range(8):
                chat.turn(f"branch {at} goes on with {number}")
            mine = Past(chat)
            mine.note()
            branches[session] = mine.logits
            chat.engine.send(Fork(0))
            chat.wait(ev.ConversationResumed, len(chat.of(ev.ConversationResumed)))
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
    from streamchat.base.requests import OpenSession

    count = len(chat.of(ev.ConversationResumed)) + 1
    chat.engine.send(OpenSession(session))
    chat.wait(ev.ConversationResumed, count)


def files(database: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT DISTINCT owner, file FROM evicted").fetchall()
    connection.close()
    return found
