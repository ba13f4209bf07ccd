"""Which way an undo takes, and what it leaves, on a cache that only counts its tokens. Without a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.cache.eviction.ledger import Ledger
from streamchat.conversation import rollback as module
from streamchat.conversation.fitting import CacheSelection
from streamchat.conversation.log import TurnRecord, TurnStart
from streamchat.conversation.rollback import UndoResult
from streamchat.store.records import CacheMark
from tests.support.counted_chat import BEFORE, CountedChat, FakeCache, FakeRecomputing, FakeRecurrent

Make = Callable[..., CountedChat]


@pytest.fixture
def chat_of(monkeypatch: pytest.MonkeyPatch) -> Make:
    return lambda kind=FakeCache: CountedChat(kind, monkeypatch)


def never(*_: Any) -> Any:
    pytest.fail("not to be called")


def test_the_result_of_an_undo_that_evicted_nothing() -> None:
    nothing = UndoResult()
    assert (nothing.restored, nothing.read_again, nothing.missing, nothing.unpinned) == (0, 0, 0, ())
    assert nothing.is_exact is False
    assert nothing.notices(SimpleNamespace()) == []  # type: ignore[arg-type]


def test_a_mark_has_the_positions_of_the_first_layer(chat_of: Make) -> None:
    chat = chat_of()
    mark = chat.undo.mark()
    assert (mark.base, mark.originals, mark.generation, mark.epoch) == (0, 0, 7, 8)
    chat.cache.streaming_layers = [SimpleNamespace(base=3, num_originals=2), SimpleNamespace(base=5, num_originals=6)]
    mark = chat.undo.mark()
    assert (mark.base, mark.originals) == (3, 2)
    assert (mark.held, mark.pins, mark.turn_starts, mark.compressions) == (tuple(BEFORE), ((0, 4),), (10, 20), 1)


@pytest.mark.parametrize(("kind", "has_history"), [(FakeCache, 1), (FakeRecomputing, 0), (FakeRecurrent, 0)])
def test_only_a_cache_that_can_be_cropped_and_keeps_keys_has_a_history(
    kind: type[FakeCache], has_history: int, chat_of: Make
) -> None:
    assert (chat_of(kind).cache.history is not None) == has_history


# --- with a history -------------------------------------------------------------------------------------------------


def test_the_history_undoes_the_changes_of_the_turn_after_its_tokens_were_cropped(chat_of: Make) -> None:
    chat = chat_of()
    chat.undo.rebuilt = never
    chat.undo._marks[2] = 5
    turn = chat.start(turn_starts=(9, 10, 20, 40), compressions=3)
    assert (chat.captured, chat.cache.history.calls) == (0, ["begin"])
    assert chat.cache.history.limit_bytes == 2 << 40
    result = chat.undo.undo(turn)
    assert result == UndoResult(restored=10, read_again=0, missing=0, unpinned=(9,), is_exact=True)
    assert chat.cache.calls == ["discard", ("crop", 30)]
    assert chat.cache.history.calls == ["begin", ("undo", 10)]
    assert (chat.cache.ledger.runs, len(chat.log), [each.number for each in chat.log.turns]) == (BEFORE, 30, [1, 2])
    assert (chat.cache.turn_starts, chat.cache.recalled, chat.cache.compression_count) == ([10, 20], ((5, 6),), 3)
    assert (chat.undo._marks, chat.prefilled) == ({2: 5}, [])


def test_a_smaller_budget_prefills_what_fits(chat_of: Make) -> None:
    chat = chat_of()
    turn = chat.start()
    chat.fitted = [(0, 4), (20, 30)]
    result = chat.undo.undo(turn)
    assert chat.prefilled == [([(0, 4), (20, 30)], 30)]
    assert (result.restored, result.read_again, result.missing, result.is_exact) == (0, 14, 0, False)


@pytest.mark.parametrize("is_archived", [True, False])
def test_beyond_the_history_the_marked_cache_is_rebuilt_or_prefilled(is_archived: bool, chat_of: Make) -> None:
    chat, asked = chat_of(), list[Any]()
    turn = chat.start()
    chat.cache.history.oldest = 11
    built: Any = SimpleNamespace(runs=tuple(BEFORE))

    def rebuilt(mark: CacheMark, stop: int) -> Any:
        asked.append((mark, stop))
        return built if is_archived else None

    chat.undo.rebuilt = rebuilt
    assert turn.before is not None
    result = chat.undo.undo(turn)
    assert asked == [(turn.before.cache, 30)]
    assert (result.restored, result.read_again) == ((10, 0) if is_archived else (10, 24))
    assert chat.cache.calls == (["discard", "restore", ("crop", 30)] if is_archived else ["discard"])
    assert chat.cache.ledger.runs == BEFORE


@pytest.mark.parametrize("changed", ["", "base", "originals", "generation", "epoch"])
def test_without_history_the_turn_is_cropped_if_nothing_else_has_changed(changed: str, chat_of: Make) -> None:
    chat, asked = chat_of(), list[Any]()
    turn = chat.start(**({changed: 99} if changed else {}))
    chat.cache.ledger = Ledger([(0, 4), (10, 60)], 60)  # as if it had evicted nothing
    chat.cache.history.oldest = 11
    chat.undo.rebuilt = lambda *given: asked.append(given)
    result = chat.undo.undo(turn)
    assert len(asked) == (1 if changed else 0)
    assert chat.cache.calls == ["discard", ("crop", 30)]
    assert (chat.prefilled, chat.cache.ledger.runs, result.is_exact) == ([], BEFORE, not changed)


def test_layers_of_different_lengths_are_prefilled(chat_of: Make) -> None:
    """Memory ran out while one layer after the other evicted."""
    chat = chat_of()
    turn = chat.start()
    chat.cache.ledger = Ledger([(0, 4), (10, 60)], 60)
    chat.cache.unequal = [54, 44]
    chat.undo.rebuilt = never
    assert chat.undo.undo(turn).read_again == 24
    assert (chat.prefilled, chat.cache.calls) == ([(BEFORE, 30)], ["discard"])


def test_layers_of_a_cache_without_history_may_differ_in_length(chat_of: Make) -> None:
    chat = chat_of(FakeRecomputing)
    turn = chat.start()
    chat.undo._running_copy = None
    chat.cache.ledger = Ledger([(0, 4), (10, 60)], 60)
    chat.cache.unequal = [54, 44]
    assert chat.undo.undo(turn).read_again == 0
    assert chat.cache.calls == ["discard", ("crop", 30)]


# --- with copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("kind", [FakeRecomputing, FakeRecurrent])
def test_a_copy_from_before_the_first_change_is_restored(
    kind: type[FakeCache], is_finished: bool, chat_of: Make
) -> None:
    chat = chat_of(kind)
    chat.undo.before_evict()  # no turn is running
    assert chat.captured == 0
    turn = chat.start()
    assert chat.captured == 1
    if is_finished:
        chat.undo.end_turn()
        chat.undo.before_evict()
    result = chat.undo.undo(turn)
    assert (result.restored, result.read_again, chat.captured) == (10, 0, 1)
    cropped = [("crop", 30)] * (kind is FakeRecomputing)  # the copy may have the first tokens of the turn
    assert chat.cache.calls == ["discard", "restore", *cropped]
    assert (chat.cache.ledger.runs, chat.undo._marks) == (BEFORE, {})
    chat.undo.before_evict()
    assert (chat.captured, chat.undo._copy, chat.undo._running_copy) == (1, None, None)


def test_a_copy_of_other_tokens_than_those_that_fit_is_not_used(chat_of: Make) -> None:
    chat = chat_of(FakeRecurrent)
    turn = chat.start()
    chat.fitted = [(0, 4), (20, 30)]
    assert chat.undo.undo(turn).read_again == 14
    assert chat.cache.calls == ["discard"]


def test_a_recurrent_state_is_never_cropped(chat_of: Make) -> None:
    chat = chat_of(FakeRecurrent)
    turn = chat.start()
    chat.undo._running_copy = None
    chat.cache.ledger = Ledger([(0, 4), (10, 60)], 60)
    assert chat.undo.undo(turn).read_again == 24
    assert (chat.prefilled, chat.cache.calls) == ([(BEFORE, 30)], ["discard"])


def test_the_copy_of_an_earlier_turn_stays_and_that_of_a_later_one_is_dropped(chat_of: Make) -> None:
    chat = chat_of(FakeRecurrent)
    third = chat.start(3)
    chat.undo.end_turn()
    copy = chat.undo._copy
    assert copy is not None
    fourth = chat.start(4)
    assert chat.undo._copy is copy
    assert chat.undo._copy_of(fourth) is chat.undo._running_copy is not None
    assert chat.undo._copy_of(third) is copy  # and it is dropped
    assert (chat.undo._copy, chat.undo._copy_of(third)) == (None, None)
    chat.undo._copy, chat.undo._running_copy = copy, None
    assert chat.undo._copy_of(fourth) is None
    assert chat.undo._copy is copy
    assert chat.undo._copy_of(chat.log.turns[0]) is None
    assert chat.undo._copy is None  # turn 3 is undone as well
    chat.undo.end_turn()
    assert chat.undo._copy is None


def test_the_newer_copy_replaces_the_older_one_at_the_end_of_a_turn(chat_of: Make) -> None:
    chat = chat_of(FakeRecurrent)
    chat.start(3)
    chat.undo.end_turn()
    older = chat.undo._copy
    fourth = chat.start(4)
    newer = chat.undo._running_copy
    chat.undo.end_turn()
    assert chat.undo._copy is newer is not older
    assert newer is not None
    assert newer.turn is fourth
    chat.undo.end_turn()  # without a copy of its own
    assert chat.undo._copy is newer


def test_without_memory_for_a_copy_the_older_one_is_dropped_before_it_is_tried_again(
    chat_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    chat = chat_of(FakeRecurrent)
    chat.start(3)
    chat.undo.end_turn()
    chat.errors = [MemoryError()]
    chat.start(4)
    assert (chat.captured, chat.undo._copy) == (3, None)
    assert chat.undo._running_copy is not None
    assert not caplog.records
    chat.undo._running_copy = None
    chat.errors = [MemoryError()]
    chat.start(5)
    assert (chat.captured, chat.undo._running_copy) == (4, None)
    assert "not enough memory for a copy of the cache" in caplog.text
    chat.errors = [RuntimeError("a shape is wrong")]
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        chat.start(6)


# --- what is kept, and for how long -----------------------------------------------------------------------------------


def test_the_65th_turn_from_the_end_is_forgotten(chat_of: Make) -> None:
    chat = chat_of()
    chat.log.turns = [TurnRecord(number, number, number, before=TurnStart(CacheMark())) for number in range(1, 65)]
    chat.undo._marks = {number: 100 + number for number in range(1, 66)}
    chat.undo.end_turn()
    assert chat.log.turns[0].before is not None
    chat.log.turns.append(TurnRecord(65, 65, 65, before=TurnStart(CacheMark())))
    with chat.undo.hidden_turn():
        chat.undo.end_turn()
        assert chat.log.turns[0].before is not None
    chat.undo.end_turn()
    assert [turn.number for turn in chat.log.turns if turn.before is None] == [1]
    assert [*chat.undo._marks] == [*range(2, 66)]
    assert chat.cache.history.calls == [("forget", 102)]
    chat.undo._marks.clear()
    chat.undo.end_turn()
    assert chat.cache.history.calls[1:] == [("forget", 0)]


def test_a_hidden_turn_leaves_copy_and_archive(chat_of: Make) -> None:
    chat = chat_of()
    archive = chat.cache.history.on_evicted = never
    copy: Any = object()
    chat.undo._copy = copy

    def run(error: BaseException | None) -> None:
        with chat.undo.hidden_turn():
            assert (chat.undo._hidden, chat.cache.history.on_evicted) == (True, None)
            chat.undo._copy = None
            if error:
                raise error

    run(None)
    assert (chat.undo._hidden, chat.undo._copy, chat.cache.history.on_evicted) == (False, copy, archive)
    with pytest.raises(ValueError, match="stop here"):
        run(ValueError("stop here"))
    assert (chat.undo._hidden, chat.undo._copy, chat.cache.history.on_evicted) == (False, copy, archive)
    with chat_of(FakeRecurrent).undo.hidden_turn():
        pass


def test_clear_forgets_turns_copies_and_changes(chat_of: Make) -> None:
    chat = chat_of()
    chat.start()
    chat.undo.clear()
    assert (chat.undo._marks, chat.cache.history.calls) == ({}, ["begin", "clear"])
    chat = chat_of(FakeRecurrent)
    chat.start()
    chat.undo.end_turn()
    chat.start(4)
    chat.undo.clear()
    assert (chat.undo._copy, chat.undo._running_copy) == (None, None)
    chat = chat_of(FakeRecomputing)
    chat.undo.start_turn(TurnRecord(3, 30, 31), TurnStart(CacheMark()))
    chat.undo.clear()
    chat.undo.before_evict()
    assert chat.captured == 0


# --- pins -----------------------------------------------------------------------------------------------------------


def test_pins_of_older_turns_stay_unless_they_were_evicted_then_or_all_pins_are_undone(chat_of: Make) -> None:
    for held, of_then, pins in (
        (BEFORE, False, ((0, 4), (10, 20))),
        (BEFORE, True, ((0, 4), (20, 30))),
        ([(0, 4), (20, 30)], False, ((0, 4),)),  # turn 1 was paged in since
    ):
        chat = chat_of()
        turn = chat.start(held=tuple(held), pins=((0, 4), (20, 30)))
        chat.cache.pins = ((0, 4), (10, 20), (30, 60))
        chat.undo.undo(turn, pins_of_then=of_then)
        assert chat.cache.pins == pins
    chat = chat_of()
    turn = chat.start(pins=((0, 4),))
    chat.cache.pins = ((0, 4), (10, 20))
    chat.undo.undo(turn)
    assert chat.cache.pins == ((0, 4), (10, 20))


def test_sinks_of_a_turn_that_was_paged_in_are_no_trace_of_it(chat_of: Make) -> None:
    chat = chat_of()
    chat.log.turns[0] = TurnRecord(1, 2, 3, 5, 20)
    turn = chat.start(held=((0, 4), (20, 30)))
    chat.cache.pins = ((0, 20),)
    chat.undo.undo(turn)
    assert chat.cache.pins == ((0, 4),)


# --- prefill with little memory -------------------------------------------------------------------------------------


def test_a_prefill_without_memory_is_tried_with_less_and_less(chat_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Any] = []
    monkeypatch.setattr(module, "release_memory", released.append)
    smaller = CacheSelection([(0, 4), (20, 30)], [], ())
    monkeypatch.setattr(module, "half_of", lambda fitted, *_: smaller if fitted is not smaller else None)
    for failures, prefilled, missing in ((1, 14, 10), (2, 4, 20)):
        chat = chat_of(FakeRecurrent)
        turn = chat.start()
        chat.undo._running_copy = None
        chat.cache.ledger = Ledger([(0, 4), (30, 60)], 60)
        chat.errors = [MemoryError()] * failures
        monkeypatch.setattr(chat.cache, "discard_partial_forward", lambda cache=chat.cache: cache.ledger.evict(4, 30))
        result = chat.undo.undo(turn)
        assert (result.read_again, result.missing) == (prefilled, missing)
        assert [runs for runs, _ in chat.prefilled] == [BEFORE, smaller.runs]
    assert released == ["a device"] * 3
    chat = chat_of(FakeRecurrent)
    turn = chat.start()
    chat.undo._running_copy = None
    chat.errors = [RuntimeError("a shape is wrong")]
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        chat.undo.undo(turn)
