"""A fork by itself: the cache it starts with, and what its snapshot contains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from streamchat.base.errors import StoreError
from streamchat.cache import checkpoint
from streamchat.conversation.log import TurnStart
from streamchat.sessions import fork as module
from streamchat.sessions.fork import captured, fork
from streamchat.store.forks import Fork
from streamchat.store.records import CacheMark, ModelIdentity
from tests.support.scripted_model import Chat, make_chat

IDENTITY = ModelIdentity("tiny", "tiny", "float32", "print", "t")


class Desk:
    """A conversation of 4 turns that is saved as session s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chat: Chat = make_chat(cache_size=256, max_new_tokens=16, seed=3)
        for number in range(4):
            self.chat.say(f"question {number}", f"the answer {number}")
        self.conversation = self.chat.conversation
        self.store = Mock()
        self.store.fork.return_value = "new"
        self.store.snapshot_path.side_effect = lambda session: Path(f"{session}.cache")
        self.saved: list[Any] = []
        monkeypatch.setattr(module, "save", lambda *given: self.saved.append(given))

    def fork(self, at: int, turns: int) -> str:
        return fork(self.store, "s", self.conversation, IDENTITY, at, turns)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def test_a_snapshot_has_cache_ids_generator_and_settings(desk: Desk) -> None:
    cache, log = desk.conversation.cache, desk.conversation.log
    saved = captured("s", desk.conversation, IDENTITY)
    assert (saved.session, saved.fingerprint, saved.dtype) == ("s", "print", "float32")
    assert saved.ids.typecode == "i"
    assert saved.ids.tolist() == log.ids_at(cache.ledger.runs)
    assert torch.equal(saved.generator, desk.conversation.rng_state)
    assert saved.settings == asdict(desk.conversation.settings)
    tensors = checkpoint.capture(cache).tensors
    assert all(torch.equal(saved.checkpoint.tensors[name], tensors[name]) for name in tensors)


def test_a_fork_of_the_whole_conversation_has_its_cache(desk: Desk) -> None:
    assert desk.fork(3, 4) == "new"
    desk.store.fork.assert_called_once_with(Fork("s", 3, 4, desk.conversation.rollback.mark()))
    [(path, saved)] = desk.saved
    assert (path, saved.session) == (Path("new.cache"), "new")
    assert saved.checkpoint.next_index == len(desk.conversation.log)


def test_an_earlier_fork_has_the_cache_of_then(desk: Desk) -> None:
    turn = desk.conversation.log.turns[2]
    assert turn.before is not None
    assert desk.fork(2, 2) == "new"
    desk.store.fork.assert_called_once_with(Fork("s", 2, 2, turn.before.cache))
    [(_, saved)] = desk.saved
    assert (saved.checkpoint.next_index, saved.checkpoint.runs) == (turn.start, turn.before.cache.held)


def test_the_saved_mark_is_used_if_the_process_does_not_know_it(desk: Desk) -> None:
    mark = CacheMark(((0, 7),))
    for before in (None, TurnStart(CacheMark())):
        desk.conversation.log.turns[2].before = before
        desk.store.marks.return_value = {3: mark}
        assert desk.fork(2, 2) == "new"
        desk.store.marks.assert_called_with("s", 3, 3)
        assert desk.store.fork.call_args.args[0].cache == mark
    desk.store.marks.return_value = {}
    assert desk.fork(2, 2) == "new"
    assert desk.store.fork.call_args.args[0].cache == desk.conversation.full_mark(2)
    assert desk.saved == []


def test_a_fork_without_a_snapshot_is_still_a_fork(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(module, "save", fail)
    assert desk.fork(3, 4) == "new"
    assert "the fork new has no snapshot" in caplog.text
    desk.store.fork.side_effect = StoreError("the database is locked")
    with pytest.raises(StoreError, match="the database is locked"):
        desk.fork(3, 4)
