"""The archive of evicted turns together with keys and values in 8 and 4 bits, and with what pages them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.requests import Quote, Undo
from streamchat.cache import checkpoint
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import K8V4, CacheDtype
from streamchat.models.load import LoadedModel
from streamchat.store.store import Store
from tests.support.real_engine import Watched, running, tiny_loaded

pytestmark = pytest.mark.smoke
TURNS = 9
DTYPES: dict[str, CacheDtype] = {"float32": torch.float32, "int8": torch.int8, "k8v4": K8V4}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


def loaded(kv: str) -> LoadedModel:
    model = tiny_loaded()
    set_cache_dtype(model.model, DTYPES[kv])
    return model


def talk(chat: Watched, turns: int = TURNS) -> None:
    for number in range(turns):
        chat.turn(f"question number {number}, please")


def cached_turns(chat: Watched) -> set[int]:
    return {segment.turn for segment in chat.conversation.state().segments if segment.turn}


def keep(chat: Watched, turn: int) -> ev.TurnPagedIn:
    count = len(chat.of(ev.TurnPagedIn)) + 1
    chat.engine.send(Quote("quoted text", "I see.", pin=True, turn=turn))
    return chat.wait(ev.TurnPagedIn, count)


def evicted_and_archived(database: Path) -> tuple[set[int], set[int]]:
    with Store(database) as store:
        session = store.find("last").id
        evicted = {i for e in store.load(session).evictions for run in e.runs for i in range(*run)}
        pages = [page for page, _ in store.evicted.pages(session) if page.part == "evicted"]
        return evicted, {i for page in pages for run in page.runs for i in range(*run)}


@pytest.mark.parametrize("then", ["leave", "undo", "nothing"])
def test_what_paging_in_evicts_is_archived(database: Path, then: str) -> None:
    with running(store=database) as chat:
        talk(chat)
        keep(chat, 2)
        if then != "leave":
            chat.turn("a turn that comes after it")
        if then == "undo":  # takes back what this turn evicted, not what the page did
            chat.engine.send(Undo())
            chat.wait(ev.TurnUndone)
    evicted, archived = evicted_and_archived(database)
    assert evicted
    assert archived == evicted


def same(one: checkpoint.CacheCheckpoint, other: checkpoint.CacheCheckpoint) -> bool:
    return one.runs == other.runs and all(torch.equal(other.tensors[name], x) for name, x in one.tensors.items())


@pytest.mark.parametrize("archive", ["native", "int8"])
@pytest.mark.parametrize("kv", ["int8", "k8v4"])
def test_undo_and_page_in_and_resume_with_codes(database: Path, kv: str, archive: str) -> None:
    with running(lambda *_: loaded(kv), store=database, archive=archive, cache_size=160, audit=True) as chat:
        talk(chat, 14)
        assert not {2, 3} & cached_turns(chat)
        before = checkpoint.capture(chat.conversation.cache)
        for turn in range(3):
            chat.turn("a longer question that evicts others, for good")
            chat.engine.send(Undo())
            assert chat.wait(ev.TurnUndone, turn + 1).prefilled == 0
            assert same(before, checkpoint.capture(chat.conversation.cache))
        keep(chat, 2)
        chat.turn("what follows knows it")
        wanted = chat.conversation.next_logits().clone()
    with running(lambda *_: loaded(kv), store=database, session="last", archive=archive, cache_size=160) as chat:
        chat.wait(ev.ConversationResumed)
        assert torch.equal(chat.conversation.next_logits(), wanted)
        assert 2 in cached_turns(chat)
        assert chat.conversation.cache.streaming_layers[0].stored_dtype == DTYPES[kv]
        keep(chat, 3)
        chat.turn("and again")
        assert {2, 3} <= cached_turns(chat)


def test_a_store_that_opens_later_archives_from_then_on(database: Path) -> None:
    database.parent.write_text("in the way")
    with running(store=database) as chat:
        talk(chat, 3)
        database.parent.unlink()
        talk(chat, TURNS)
    assert evicted_and_archived(database)[1]
