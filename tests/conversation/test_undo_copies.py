"""Undo by a copy of the cache, by what was archived, or by a prefill: which of them, at what cost, without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamchat.cache import checkpoint
from streamchat.cache.form import Form
from streamchat.cache.history import SMALLEST_LIMIT
from streamchat.cache.past import PastState
from streamchat.conversation import rollback
from streamchat.conversation.rollback import UndoResult, release_memory
from tests.support.scripted_model import Chat, make_chat

LONG = "and then, " * 12


def talk(family: str, turns: int = 5, size: int = 128) -> Chat:
    chat = make_chat(cache_size=size, family=family, max_new_tokens=16, seed=3)
    for number in range(turns):
        chat.say(f"question {number}", f"the answer {number}")
    return chat


def runs_of(chat: Chat) -> list[tuple[int, int]]:
    return list(chat.conversation.cache.ledger.runs)


def fails(error: BaseException, times: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises `error` so many times before it calls `then`."""
    left = [error] * times

    def call(*args: Any, **named: Any) -> Any:
        if left:
            raise left.pop()
        return then(*args, **named)

    return call


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_only_the_allocator_of_the_device_releases_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append("mps"))
    release_memory(torch.device(device))
    assert released == ([] if device == "cpu" else [device])


def test_what_could_not_be_restored_is_said() -> None:
    cache: Any = SimpleNamespace(length=1230, cache_size=2048)
    assert UndoResult().notices(cache) == []
    unpinned, missing = UndoResult(missing=4, unpinned=(3,)).notices(cache)
    assert unpinned.startswith("Turn 3 is no longer pinned: with cache_size = 2048,")
    assert missing.startswith("Out of memory: 4 of 1,234 tokens could not be restored to the cache; use /clear")


# --- copies, for caches without a history -------------------------------------------------------------------------


def test_one_copy_is_kept_of_the_latest_turn_that_evicted() -> None:
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    before = runs_of(chat)
    chat.say(f"another one, {LONG}", "short")
    chat.say("x", "y")  # evicts nothing, so that the copy stays
    middle = runs_of(chat)
    assert chat.conversation.undo() == UndoResult(is_exact=True)
    assert runs_of(chat)[:-1] == middle[:-1]
    undone = chat.conversation.undo()
    assert runs_of(chat) == before
    assert (undone.restored > 0, undone.read_again, undone.missing, undone.is_exact) == (True, 0, 0, True)
    again = chat.conversation.undo()  # the only copy was used
    assert again.read_again == chat.conversation.cache.length > again.restored > 0
    assert (again.missing, again.is_exact) == (0, False)
    chat.check()


def test_an_undo_over_several_turns_does_not_use_the_copy_of_a_later_one() -> None:
    chat = talk("gpt2")
    first = runs_of(chat)
    chat.say(f"a longer question, {LONG}", "short")
    chat.say(f"another one, {LONG}", "short")
    undone = chat.conversation.undo(6)
    assert (undone.read_again, runs_of(chat)) == (sum(b - a for a, b in first), first)
    assert chat.conversation.rollback._copy is None
    chat.check()


def test_a_copy_of_an_older_turn_stays_for_it() -> None:
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    undo, before, latest = chat.conversation.rollback, runs_of(chat), runs_of(chat)
    while undo._copy is not None and undo._copy.turn is chat.conversation.log.turns[-1]:
        before, latest = latest, runs_of(chat)
        chat.say("x", "y")
    copy = undo._copy  # of the turn that evicted the long one: the newest one had room
    assert copy is not None
    assert copy.turn is chat.conversation.log.turns[-2]
    chat.conversation.undo()
    assert undo._copy is copy
    assert chat.conversation.undo().read_again == 0
    assert runs_of(chat) == before


def test_a_turn_that_is_stopped_uses_its_own_copy_and_leaves_the_older_one() -> None:
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    before, copy = runs_of(chat), chat.conversation.rollback._copy
    chunks = iter([False] * 12)
    outcome = chat.say(f"another one, {LONG}", "short", lambda: next(chunks, True))
    assert outcome.rolled_back or chat.conversation.log.turns[-1].number == 7
    if not outcome.rolled_back:
        assert chat.conversation.undo().read_again == 0
    assert runs_of(chat) == before
    assert copy is not None


def test_a_recurrent_state_is_copied_at_the_start_of_each_turn() -> None:
    chat = talk("falcon_h1", turns=2)
    state = checkpoint.capture(chat.conversation.cache).tensors
    chat.say("one", "more")
    undone = chat.conversation.undo()
    assert (undone.read_again, undone.missing) == (0, 0)
    again = checkpoint.capture(chat.conversation.cache).tensors
    assert state
    assert all(torch.equal(state[name], again[name]) for name in state | again)


def test_without_memory_for_two_copies_the_older_one_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    before = runs_of(chat)
    monkeypatch.setattr(checkpoint, "capture", fails(MemoryError(), 1, checkpoint.capture))
    chat.say(f"another one, {LONG}", "short")
    assert not caplog.records
    assert chat.conversation.undo().read_again == 0
    assert runs_of(chat) == before


def test_without_memory_for_a_copy_an_undo_prefills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    before = runs_of(chat)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "capture", fails(MemoryError(), 2, checkpoint.capture))
        chat.say(f"another one, {LONG}", "short")
        assert "not enough memory for a copy of the cache" in caplog.text
        assert chat.conversation.undo().read_again == sum(stop - first for first, stop in before)
    assert runs_of(chat) == before
    chat.check()


def test_a_copy_that_fails_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk("gpt2")
    before = runs_of(chat)
    monkeypatch.setattr(checkpoint, "capture", fails(RuntimeError("a shape is wrong"), 1, checkpoint.capture))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        chat.say(f"a longer question, {LONG}", "short")
    assert runs_of(chat) == before


# --- prefill with little memory -------------------------------------------------------------------------------------


def undo_with_less_memory(
    monkeypatch: pytest.MonkeyPatch, failures: int, error: BaseException | None = None
) -> tuple[Chat, UndoResult, list[int]]:
    """Undo by a prefill that fails so many times; also return the number of tokens of each try."""
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    chat.conversation.rollback._copy = None
    feeder, tries = chat.conversation.feeder, list[int]()
    prefill = fails(error or MemoryError(), failures, feeder.prefill_runs)

    def noted(runs: Sequence[tuple[int, int]], stop: int) -> int:
        assert stop == len(chat.conversation.log)
        tries.append(sum(last - first for first, last in runs))
        count: int = prefill(runs, stop)
        return count

    monkeypatch.setattr(feeder, "prefill_runs", noted)
    return chat, chat.conversation.undo(), tries


def test_a_prefill_without_memory_is_tried_with_half_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released: list[torch.device] = []
    monkeypatch.setattr(rollback, "release_memory", released.append)
    chat, undone, tries = undo_with_less_memory(monkeypatch, 1)
    assert released == [torch.device("cpu")]
    assert caplog.text.count("not enough memory to prefill") == 1
    assert len(tries) == 2
    assert tries[0] > tries[1] >= tries[0] // 2 - 32
    assert (undone.read_again, undone.missing) == (tries[1], tries[0] - tries[1])
    assert chat.conversation.cache.length == tries[1]
    chat.check()


def test_a_prefill_that_never_finds_memory_restores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, undone, tries = undo_with_less_memory(monkeypatch, 99)
    assert len(tries) > 2
    assert tries == sorted(tries, reverse=True)
    # what the failed forwards left in the cache
    assert undone.read_again == chat.conversation.cache.length
    assert undone.missing == tries[0] - chat.conversation.cache.length


def test_a_prefill_that_fails_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        undo_with_less_memory(monkeypatch, 1, RuntimeError("a shape is wrong"))


# --- the history of a cache, and what was archived ------------------------------------------------------------------


def test_a_mark_has_the_bookkeeping_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk("llama", turns=7)
    cache = chat.conversation.cache
    layer = cache.streaming_layers[0]
    assert layer.num_originals > 0
    mark = chat.conversation.rollback.mark()
    assert (mark.held, mark.pins, mark.compressions) == (tuple(cache.ledger.runs), cache.pins, cache.compression_count)
    assert mark.turn_starts == tuple(cache.turn_starts) != ()
    assert (mark.base, mark.originals) == (layer.base, layer.num_originals)
    assert (mark.generation, mark.epoch) == (cache.form.generation, cache.form.epoch)
    assert mark.generation > 0
    monkeypatch.setattr(type(cache), "streaming_layers", ())
    nothing = chat.conversation.rollback.mark()
    assert (nothing.held, nothing.base, nothing.originals) == (mark.held, 0, 0)


def test_what_was_archived_is_put_together_for_the_marked_state(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk("llama", turns=7)
    undo, mark = chat.conversation.rollback, chat.conversation.rollback.mark()
    asked: list[Any] = []

    def find(wanted: Any, generation: int) -> list[str]:
        asked.append((wanted, generation))
        return ["found"]

    monkeypatch.setattr(undo, "find_past", find)
    monkeypatch.setattr(rollback, "rebuild", lambda cache, past, found: (cache, past, found))
    built: Any = undo.rebuilt(mark, 77)
    form = Form(mark.generation, mark.epoch)
    past = PastState(mark.held, 77, mark.base, mark.originals, form, mark.pins, mark.turn_starts, mark.compressions)
    assert built == (chat.conversation.cache, past, ["found"])
    assert asked == [(mark.held, mark.generation)]
    assert undo.rebuilt(replace(mark, generation=0), 77) is None
    assert len(asked) == 1


def test_a_state_without_a_history_is_not_rebuilt() -> None:
    chat = talk("gpt2", turns=1)
    undo = chat.conversation.rollback
    undo.find_past = lambda wanted, generation: pytest.fail("not to be asked")
    assert undo.rebuilt(replace(undo.mark(), generation=1), 10) is None


def test_a_state_is_not_rebuilt_without_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chat = talk("llama", turns=1)
    undo = chat.conversation.rollback
    monkeypatch.setattr(rollback, "rebuild", fails(MemoryError(), 1, lambda *_: "built"))
    assert undo.rebuilt(undo.mark(), 10) is None
    assert "not enough memory to rebuild" in caplog.text
    monkeypatch.setattr(rollback, "rebuild", fails(RuntimeError("a shape is wrong"), 1, lambda *_: "built"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        undo.rebuilt(undo.mark(), 10)


def test_without_history_the_cache_is_rebuilt_or_prefilled() -> None:
    chat, other = talk("llama", turns=7), talk("llama", turns=7)
    before, tensors = runs_of(chat), checkpoint.capture(chat.conversation.cache).tensors
    archived: list[Any] = []
    for each in (chat, other):
        history = each.conversation.cache.history
        assert history is not None
        if each is chat:
            history.on_evicted = archived.append
        each.say(f"a longer question, {LONG}", "short")
        history.clear()
    chat.conversation.rollback.find_past = lambda wanted, generation: archived
    undone = chat.conversation.undo()
    assert (undone.read_again, undone.missing, undone.is_exact) == (0, 0, True)
    assert (undone.restored > 0, runs_of(chat)) == (True, before)
    again = checkpoint.capture(chat.conversation.cache).tensors
    assert all(torch.equal(tensors[name], again[name]) for name in tensors | again)
    undone = other.conversation.undo()
    assert undone.read_again == other.conversation.cache.length
    assert (undone.missing, undone.is_exact, runs_of(other)) == (0, False, before)


def test_a_turn_that_evicted_nothing_is_cropped_without_history() -> None:
    chat = talk("llama", turns=2, size=512)
    before = runs_of(chat)
    chat.say("x", "y")
    history = chat.conversation.cache.history
    assert history is not None
    history.clear()
    assert chat.conversation.undo() == UndoResult(is_exact=True)
    assert runs_of(chat) == before


def test_the_history_may_use_twice_the_memory_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk("llama", turns=1)
    cache = chat.conversation.cache
    assert cache.history is not None
    chat.say("x", "y")
    assert cache.history.limit_bytes == SMALLEST_LIMIT
    monkeypatch.setattr(rollback, "SMALLEST_LIMIT", 1)
    chat.say("x", "y")
    assert cache.history.limit_bytes == 2 * cache.kv_bytes


def test_what_is_too_old_to_undo_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "REACH", 2)
    chat = talk("llama", turns=3)
    undo, turns = chat.conversation.rollback, chat.conversation.log.turns
    assert [turn.before is None for turn in turns] == [True, False, False]
    for number in range(6):
        chat.say(f"a longer question {number}", "short")
    history = chat.conversation.cache.history
    assert history is not None
    assert sorted(undo._marks) == [8, 9]
    assert next(iter(history.since(0)), None) is next(iter(history.since(undo._marks[8])), None)
    chat.conversation.undo(8)
    assert undo._marks == {}


def test_a_hidden_turn_leaves_copy_archive_and_age_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "REACH", 6)
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    before, copy, conversation = runs_of(chat), chat.conversation.rollback._copy, chat.conversation
    assert copy is not None
    with conversation.muted(conversation.settings):
        chat.say(f"a hidden one, {LONG}", "short")
        assert conversation.log.turns[0].before is not None
        conversation.undo()
    assert runs_of(chat) == before
    assert conversation.rollback._copy is copy
    chat.say("x", "y")
    assert conversation.log.turns[0].before is None  # the first of 7


def test_a_hidden_turn_archives_nothing() -> None:
    chat = talk("llama", turns=6)
    history, found = chat.conversation.cache.history, list[Any]()
    assert history is not None
    history.on_evicted = archive = found.append
    with chat.conversation.rollback.hidden_turn():
        chat.say(f"a hidden one, {LONG}", "short")
        chat.conversation.undo()
    assert found == []
    assert history.on_evicted == archive
    chat.say(f"a longer question, {LONG}", "short")
    assert found


def test_clear_drops_all_copies_and_records() -> None:
    chat = talk("gpt2")
    chat.say(f"a longer question, {LONG}", "short")
    undo = chat.conversation.rollback
    undo.clear()
    assert (undo._copy, undo._running_copy, undo._uncopied, undo._marks) == (None, None, None, {})
    chat = talk("llama", turns=7)
    history = chat.conversation.cache.history
    assert history is not None
    assert history.nbytes > 0
    chat.conversation.rollback.clear()
    assert (history.nbytes, chat.conversation.rollback._marks) == (0, {})
