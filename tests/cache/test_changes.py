"""Changes of a cache without a model: what is recorded, reported, undone, paged in, and rebuilt, to the bit."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from streamchat.base.errors import CacheError
from streamchat.cache.checkpoint import CacheCheckpoint, capture, restore
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.eviction.policy import Cut, Run
from streamchat.cache.form import LARGEST, Form, new_form
from streamchat.cache.history import CacheHistory, CutStep, RebaseStep, evicted_by
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.layers.slots import CopiedStates
from streamchat.cache.paging import InsertStep, can_page_in, missing_runs, page_in
from streamchat.cache.past import PastState, rebuild
from streamchat.cache.positions.rotation import TensorRotation
from streamchat.cache.streaming import StreamingCache
from tests.support.bare_cache import Fed, bare_cache, fed, fit_of, rotary_source
from tests.support.tiny import kv_of

CPU = torch.device("cpu")
TURN = TensorRotation(rotary_source(), 0, False)
ROTATIONS = {
    "keys": LayerRotation(TURN),
    "both": LayerRotation(TURN, TURN),
    "none": LayerRotation(),
}


def history_of(cache: StreamingCache) -> CacheHistory:
    assert cache.history is not None
    return cache.history


def cut(it: Fed, first: int, stop: int) -> None:
    """Evict the cached tokens with these log indices."""
    it.cache._cut(Cut(it.cache.ledger.slot_from(first), stop - first))
    it.base += stop - first


def evicted(it: Fed) -> list[EvictedTokens]:
    return [tokens for step in history_of(it.cache).since(0) if (tokens := evicted_by(step)) is not None]


def same(found: CacheCheckpoint, expected: CacheCheckpoint, *, apart_from: tuple[str, ...] = ()) -> None:
    """To the bit, with the bookkeeping apart from some fields."""
    others = {name: getattr(found, name) for name in ("tensors", *apart_from)}
    assert found == replace(expected, **others)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


# --- what is recorded -----------------------------------------------------------------------------------------


def test_an_eviction_is_recorded_with_its_slots_and_undone() -> None:
    it = fed(16, 2, 16)
    history, before = history_of(it.cache), capture(it.cache)
    mark = history.mark
    it.cache.make_room(3)
    (step,) = history.since(mark)
    assert isinstance(step, CutStep)
    assert (step.at, step.dropped, step.kept, step.count, step.form) == (2, ((2, 5),), 3, 3, it.cache.form)
    assert (step.before.base, step.before.written, step.before.known) == (0, 0, 0)
    assert {name: stack.shape for name, _, stack in step.before.slots.stacks} == {
        "keys": (2, 1, 2, 3, 8),
        "values": (2, 1, 2, 3, 8),
    }
    assert {stack.shape[3] for _, _, stack in step.before.moved.stacks} == {2}
    assert step.nbytes == step.before.nbytes == 2 * 2 * 2 * (3 + 2) * 8 * 4 == history.nbytes
    assert (history.mark, history.reaches(mark), history.reaches(mark + 1), history.reaches(mark + 2)) == (
        mark + 1, True, True, False
    )  # fmt: skip
    tokens = evicted_by(step)
    assert tokens is not None
    assert (tokens.runs, tokens.position, tokens.part, tokens.form, tokens.moved) == (
        ((2, 5),), 2, "evicted", it.cache.form, 0
    )  # fmt: skip
    assert (tokens.count, tokens.nbytes, tokens.is_exact) == (3, step.before.slots.nbytes, True)
    for layer in range(2):
        assert torch.equal(tokens.slots.of(layer)["values"], it.values[layer][..., 2:5, :])
    history.undo_to(mark, 16)
    same(capture(it.cache), before, apart_from=("compressions",))
    assert (history.mark, history.nbytes, list(history.since(0))) == (mark, 0, [])


def test_a_rebase_is_recorded_and_undone() -> None:
    it = fed(16, 2, 20)
    history, before, form = history_of(it.cache), capture(it.cache), it.cache.form
    mark = history.mark
    history.begin_turn()
    it.cache.rebase_positions()
    (step,) = history.since(mark)
    assert isinstance(step, RebaseStep)
    assert (step.form, evicted_by(step)) == (form, None)
    assert it.cache.form.epoch != form.epoch
    assert step.before.base == 4
    assert {name for name, _, _ in step.before.moved.stacks} == {"keys"}  # values have no positions
    assert step.nbytes == 2 * 2 * 14 * 8 * 4
    history.undo_to(mark, 20)
    same(capture(it.cache), before)
    assert it.cache.form == form


def test_tokens_of_the_running_turn_are_not_recorded() -> None:
    it = fed(8, 2, 8)
    history, before = history_of(it.cache), capture(it.cache)
    mark = history.mark
    history.begin_turn()
    it.feed(4)
    it.feed(5)
    first, second = history.since(mark)
    assert isinstance(first, CutStep)
    assert isinstance(second, CutStep)
    assert (first.dropped, first.kept, second.dropped, second.kept) == (((2, 6),), 4, ((6, 11),), 2)
    assert evicted_by(second) is not None
    assert evicted_by(second).runs == ((6, 8),)  # type: ignore[union-attr]
    it.feed(6)
    third = list(history.since(mark))[2]
    assert isinstance(third, CutStep)
    assert (third.kept, evicted_by(third)) == (0, None)
    assert it.cache.crop_from(8) == 6
    history.undo_to(mark, 8)
    same(capture(it.cache), before, apart_from=("compressions",))


def test_an_eviction_is_undone_up_to_an_earlier_token() -> None:
    it = fed(8, 2, 8)
    history, mark = history_of(it.cache), history_of(it.cache).mark
    it.feed(6)
    assert it.cache.ledger.runs == [(0, 2), (8, 14)]
    it.cache.crop_from(5)
    history.undo_to(mark, 5)
    it.base = 0
    assert it.cache.ledger.runs == [(0, 5)]
    it.check()


def test_the_oldest_changes_are_dropped_beyond_the_limit_but_never_the_newest() -> None:
    it = fed(16, 2, 16)
    history = history_of(it.cache)
    size = 2 * 2 * 2 * (1 + 2) * 8 * 4
    it.feed(1)
    assert history.nbytes == size
    later = 2 * 2 * 2 * 1 * 8 * 4 * 1
    it.feed(1)
    total = history.nbytes
    assert total > size
    history.limit_bytes = total
    assert [step.count for step in history.since(0) if isinstance(step, CutStep)] == [1, 1]
    history.limit_bytes = total - size + later
    it.feed(1)
    assert not history.reaches(0)
    assert history.mark == 3
    history.limit_bytes = 0
    it.feed(1)
    assert len(list(history.since(0))) == 1
    assert (history.mark, history.reaches(3), history.reaches(2)) == (4, True, False)
    assert history.nbytes == next(history.since(0)).nbytes
    history.forget_before(3)
    assert history.nbytes
    history.forget_before(4)
    assert (history.nbytes, history.mark, list(history.since(0))) == (0, 4, [])
    history.forget_before(9)
    assert history.mark == 4


def test_a_history_may_use_64_mib_and_begins_at_0() -> None:
    history = history_of(bare_cache())
    assert (history.limit_bytes, history.mark, history.nbytes, history.reaches(0)) == (64 * 1024 * 1024, 0, 0, True)
    history.clear()
    assert (history.mark, history.reaches(0), history.reaches(1)) == (1, False, True)


def test_changes_are_yielded_from_a_mark_on() -> None:
    it = fed(16, 2, 19)
    steps = list(history_of(it.cache).since(0))
    assert len(steps) == 3
    assert list(history_of(it.cache).since(1)) == steps[1:]
    assert list(history_of(it.cache).since(3)) == []


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_without_memory_nothing_earlier_can_be_restored(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: Any) -> Any:
        raise error("no memory")

    it = fed(16, 2, 18)
    history, mark = history_of(it.cache), history_of(it.cache).mark
    monkeypatch.setattr("streamchat.cache.history.save_cut", scarce)
    monkeypatch.setattr("streamchat.cache.history.save_rebase", scarce)
    it.feed(1)
    it.check()
    assert not history.reaches(mark)
    assert (history.reaches(history.mark), history.nbytes) == (True, 0)
    mark = history.mark
    it.cache.rebase_positions()
    it.base = 0
    it.check()
    assert not history.reaches(mark)


# --- what is reported -----------------------------------------------------------------------------------------


def test_what_an_eviction_and_a_rebase_change_is_reported_once() -> None:
    it, reported = fed(8, 2, 8), list[EvictedTokens]()
    history, form = history_of(it.cache), it.cache.form
    history.on_evicted = reported.append

    def last(*found: tuple[Any, ...]) -> None:
        assert [(each.part, each.runs, each.position, each.moved, each.form) for each in reported] == list(found)
        for each in reported:
            for layer in range(2):
                indices = [i for first, stop in each.runs for i in range(first, stop)]
                if each.part != "rebased":
                    assert torch.equal(each.slots.of(layer)["values"], it.values[layer][..., indices, :])
                assert each.slots.of(layer)["keys"].shape[2] == len(indices)
        reported.clear()

    it.feed(1)
    last(("evicted", ((2, 3),), 2, 0, form), ("moved", ((0, 2),), 0, 0, form))
    it.feed(2)
    last(("evicted", ((3, 5),), 3, 0, form))
    it.cache.pin(7, 9)
    it.feed(3)
    last(("evicted", ((5, 7),), 5, 0, form), ("evicted", ((9, 10),), 9, 0, form), ("moved", ((7, 9),), 7, 0, form))
    it.cache.unpin(7, 9)
    it.feed(1)
    last(("evicted", ((7, 8),), 8, 1, form))
    history.begin_turn()
    it.feed(3)
    last(("evicted", ((8, 9), (10, 12)), 9, 1, form))
    it.feed(4)
    last(("evicted", ((12, 15),), 12, 0, form), ("evicted", ((15, 16),), 15, 0, form))
    it.cache.rebase_positions()
    last()
    history.begin_turn()
    form = it.cache.form
    it.cache.rebase_positions(5)
    last(("rebased", tuple(it.cache.ledger.runs)[1:], 2, 0, form))


def test_tokens_of_the_running_turn_are_reported_apart_from_older_ones() -> None:
    it, reported = fed(8, 2, 6), list[EvictedTokens]()
    history = history_of(it.cache)
    history.on_evicted = reported.append
    history.begin_turn()
    it.feed(2)
    it.feed(5)
    assert [(each.runs, each.position, each.part) for each in reported] == [
        (((2, 6),), 2, "evicted"), (((6, 7),), 6, "evicted"), (((0, 2),), 0, "moved")
    ]  # fmt: skip
    assert torch.equal(reported[1].slots.of(1)["values"], it.values[1][..., 6:7, :])
    reported.clear()
    it.feed(4)
    assert [(each.runs, each.position, each.moved) for each in reported] == [(((7, 11),), 7, 0)]
    it.cache.pin(11, 12)
    it.feed(2)
    it.cache.unpin(11, 12)
    reported.clear()
    it.feed(2)
    assert [(each.runs, each.moved, each.originals.of(0)["original_values"].shape[2]) for each in reported] == [
        (((11, 12), (14, 15)), 1, 1)
    ]


# --- undo, restore, and rebuild, after random changes ---------------------------------------------------------


@dataclass
class Moment:
    mark: int
    stop: int
    saved: CacheCheckpoint
    past: PastState


class Changed:
    """A cache that random turns, pins, page-ins, and rebases change, with each turn's start."""

    def __init__(self, seed: int, rotation: str, dtype: Any, policy: str = "oldest-tokens") -> None:
        fit = fit_of(rotation=ROTATIONS[rotation], position_limit=33)
        self.it = fed(16, 2, fit=fit, dtype=dtype, options=EvictionOptions(policy=policy))
        self.cache, self.random = self.it.cache, random.Random(seed)
        self.history, self.archived, self.moments = history_of(self.cache), list[EvictedTokens](), list[Moment]()
        self.history.on_evicted = self.archived.append

    def turn(self) -> None:
        cache, first = self.cache, self.cache.streaming_layers[0]
        past = PastState(
            tuple(cache.ledger.runs), cache.ledger.next_index, first.base, first.num_originals, cache.form, cache.pins,
            tuple(cache.turn_starts), cache.compression_count,
        )  # fmt: skip
        self.moments.append(Moment(self.history.mark, cache.ledger.next_index, capture(cache), past))
        self.history.begin_turn()
        cache.begin_turn(self.random.randint(1, 6), self.random.randint(0, 4))
        for _ in range(self.random.randint(1, 4)):
            self.it.feed(self.random.randint(1, 4))
        if self.random.random() < 0.3 and cache.length > 8:
            chosen = self.random.choice(list(cache.ledger)[2:-4])
            cache.pins = ()
            cache.pin(chosen, chosen + 3)
        if self.random.random() < 0.4:
            self.page_in()

    def page_in(self) -> None:
        kept = evicted(self.it)
        missing = missing_runs(self.cache, [run for tokens in kept for run in tokens.runs])
        if missing:
            first, stop = self.random.choice(missing)
            stop = min(stop, first + self.random.randint(1, 4))
            self.cache.pins = ()
            self.cache.make_room(stop - first)
            assert page_in(self.cache, kept, [(first, stop)]) == stop - first


CHANGES = [
    (0, "keys", None),
    (1, "both", None),
    (2, "none", None),
    (3, "keys", torch.int8),
    (4, "keys", torch.bfloat16),
]


@pytest.mark.parametrize(("seed", "rotation", "dtype"), CHANGES)
def test_every_turn_is_rebuilt_and_undone_to_the_bit(seed: int, rotation: str, dtype: Any) -> None:
    it = Changed(seed, rotation, dtype, "oldest-turns" if seed % 2 else "oldest-tokens")
    for _ in range(18):
        it.turn()
    assert it.cache.compression_count > 10
    now = capture(it.cache)
    for moment in it.moments[1:]:
        built = rebuild(it.cache, moment.past, it.archived)
        assert built is not None
        same(built, moment.saved)
        assert built.form == moment.saved.form == moment.past.form
    same(capture(it.cache), now)
    other = Changed(seed, rotation, dtype).cache
    restore(other, now)
    same(capture(other), now)
    while len(it.moments) > 1:
        back = it.random.choice([1, 1, 2, 3])
        moment = it.moments[-min(back, len(it.moments) - 1)]
        del it.moments[it.moments.index(moment) :]
        it.cache.crop_from(moment.stop)
        it.history.undo_to(moment.mark, moment.stop)
        same(capture(it.cache), moment.saved, apart_from=("pins", "turn_starts", "compressions"))
        assert it.cache.form == moment.saved.form


def test_what_is_missing_unknown_or_rounded_is_not_rebuilt() -> None:
    it = Changed(5, "keys", None)
    for _ in range(12):
        it.turn()
    past = it.moments[6].past
    assert rebuild(it.cache, past, it.archived) is not None
    assert rebuild(it.cache, past, []) is None
    assert rebuild(it.cache, replace(past, form=Form()), it.archived) is None
    assert rebuild(it.cache, replace(past, form=new_form()), it.archived) is None
    assert rebuild(it.cache, past, [replace(each, is_exact=False) for each in it.archived]) is None
    assert rebuild(it.cache, replace(past, runs=((0, 17),)), it.archived) is None
    empty = bare_cache()
    assert rebuild(empty, replace(past, form=empty.form), it.archived) is None
    it.cache.croppable = False
    assert rebuild(it.cache, past, it.archived) is None
    it.cache.croppable = True
    for form in (Form(past.form.generation, 1), Form(past.form.generation + 1, past.form.epoch)):
        assert rebuild(it.cache, past, [replace(each, form=form) for each in it.archived]) is None


def test_the_present_is_rebuilt_from_the_cache_alone() -> None:
    it = fed(16, 2, 16)
    first = it.cache.streaming_layers[0]

    def present() -> PastState:
        return PastState(
            tuple(it.cache.ledger.runs), it.cache.ledger.next_index, first.base, first.num_originals, it.cache.form
        )

    for count in (0, 3, 1):
        if count:
            it.feed(count)
        built = rebuild(it.cache, present(), [])
        assert built is not None
        same(built, replace(capture(it.cache), compressions=0))
    assert present().length == 16
    # a forward that failed half way
    it.feed(1, layers=1)
    assert rebuild(it.cache, present(), []) is None


# --- paging in ------------------------------------------------------------------------------------------------


def test_missing_runs_are_those_that_are_not_cached() -> None:
    it = fed(16, 2, 20)
    assert missing_runs(it.cache, [(0, 20)]) == [(2, 6)]
    assert missing_runs(it.cache, [(3, 4), (4, 8), (1, 2)]) == [(3, 6)]
    assert missing_runs(it.cache, [(6, 20), (0, 2)]) == missing_runs(it.cache, []) == []
    cut(it, 10, 12)
    assert missing_runs(it.cache, [(0, 3), (5, 11), (18, 24)]) == [(2, 3), (5, 6), (10, 11), (20, 24)]


def paged(runs: list[Run], wanted: list[Run]) -> Fed:
    it = fed(16, 2, 16)
    for run in runs:
        cut(it, *run)
    count = page_in(it.cache, evicted(it), wanted)
    it.base -= count
    it.check()
    return it


@pytest.mark.parametrize(
    ("runs", "wanted", "cached"),
    [
        ([(4, 8)], [(4, 8)], [(0, 16)]),
        ([(4, 8)], [(0, 16)], [(0, 16)]),
        ([(4, 8)], [(5, 7)], [(0, 4), (5, 7), (8, 16)]),
        ([(4, 6), (8, 10)], [(4, 10)], [(0, 16)]),
        ([(4, 6), (8, 10)], [(5, 9)], [(0, 4), (5, 9), (10, 16)]),
        ([(6, 8), (4, 6), (8, 10)], [(5, 9)], [(0, 4), (5, 9), (10, 16)]),
        ([(2, 9)], [(2, 3), (4, 5), (8, 9)], [(0, 3), (4, 5), (8, 16)]),
        # the second eviction is of 4, 5, 7, and 8: two that the first one moved, and two that it did not
        ([(6, 7), (4, 8)], [(4, 9)], [(0, 16)]),
        ([(6, 7), (4, 8)], [(5, 8)], [(0, 4), (5, 8), (9, 16)]),
    ],
)
def test_tokens_are_paged_in_at_their_places(runs: list[Run], wanted: list[Run], cached: list[Run]) -> None:
    it = paged(runs, wanted)
    assert it.cache.ledger.runs == cached
    steps = [step for step in history_of(it.cache).since(0) if isinstance(step, InsertStep)]
    assert sum(stop - first for step in steps for first, stop in step.runs) == sum(
        stop - first for first, stop in cached
    ) - 16 + sum(stop - first for first, stop in runs)
    assert all(step.nbytes == step.before.nbytes for step in steps)
    it.feed(2)
    it.check()


def test_pieces_without_cached_tokens_between_them_are_one_insertion() -> None:
    it = paged([(6, 8), (4, 6), (10, 12)], [(4, 12)])
    steps = [step for step in history_of(it.cache).since(0) if isinstance(step, InsertStep)]
    assert [(step.at, step.runs) for step in steps] == [(6, ((10, 12),)), (4, ((4, 8),))]


def test_the_last_copy_of_a_token_is_used() -> None:
    it = fed(16, 2, 16)
    cut(it, 4, 8)
    (tokens,) = evicted(it)
    other = replace(
        tokens, slots=CopiedStates(tuple((n, i, x + 1 if n == "values" else x) for n, i, x in tokens.slots.stacks))
    )
    page_in(it.cache, [other, tokens], [(4, 6)])
    page_in(it.cache, [tokens, other], [(6, 8)])
    values = kv_of(it.cache.streaming_layers[1])[1]
    assert torch.equal(values[:, :, 4:6], it.values[1][..., 4:6, :])
    assert torch.equal(values[:, :, 6:8], it.values[1][..., 6:8, :] + 1)


def test_rounded_tokens_give_the_cache_another_form() -> None:
    for exact, wanted, changes in ((True, (4, 6), False), (False, (4, 6), True), (False, (2, 4), False)):
        it = fed(16, 2, 16)
        cut(it, 4, 8)
        form = it.cache.form
        assert page_in(it.cache, [replace(each, is_exact=exact) for each in evicted(it)], [wanted]) == (
            2 if wanted == (4, 6) else 0
        )
        assert (it.cache.form != form) == changes


def test_a_page_in_is_refused_without_room_or_tokens_and_changes_nothing() -> None:
    it = fed(16, 2, 16)
    cut(it, 4, 8)
    tokens, mark = evicted(it), history_of(it.cache).mark
    it.feed(2)
    before = capture(it.cache)
    with pytest.raises(CacheError, match="3 tokens do not fit into the 2 free ones of the cache"):
        page_in(it.cache, tokens, [(4, 7)])
    with pytest.raises(CacheError, match="the keys and values of the tokens 20 to 20 are not kept"):
        page_in(it.cache, tokens, [(4, 5), (20, 21)])
    with pytest.raises(CacheError, match="the keys and values of the tokens 4 to 5 are not kept"):
        page_in(it.cache, [], [(4, 6)])
    same(capture(it.cache), before)
    assert history_of(it.cache).mark == mark
    assert page_in(it.cache, tokens, [(4, 6)]) == 2
    assert it.cache.length == 16


def test_positions_move_only_if_too_few_are_before_the_first_slot() -> None:
    for base, moves in ((3, False), (2, True)):
        it = fed(16, 2, 16)
        cut(it, 4, 7)
        it.cache.rebase_positions(base)
        form = it.cache.form
        page_in(it.cache, evicted(it), [(4, 7)])
        assert (it.cache.form != form) == moves
        it.base = 0
        it.check()
    it = fed(16, 2, 16)
    cut(it, 4, 7)
    it.cache.rebase_positions(0)
    form = it.cache.form
    assert page_in(it.cache, evicted(it), [(0, 4)]) == 0
    assert it.cache.form == form


def test_a_page_in_is_undone_up_to_an_earlier_token() -> None:
    for stop, runs in ((16, [(0, 4), (9, 16)]), (7, [(0, 4)]), (2, [(0, 2)])):
        it = fed(16, 2, 16)
        cut(it, 4, 9)
        history = history_of(it.cache)
        mark, form, before = history.mark, it.cache.form, capture(it.cache)
        it.cache.rebase_positions(1)
        page_in(it.cache, evicted(it), [(4, 9)])
        assert it.cache.form != form
        it.cache.crop_from(stop)
        history.undo_to(mark, stop)
        it.base = 5
        assert it.cache.ledger.runs == runs
        assert it.cache.form == form
        it.check()
        if stop == 16:
            same(capture(it.cache), before)


def test_a_page_in_reports_the_slots_that_it_moves_for_the_first_time() -> None:
    it, reported = fed(16, 2, 16), list[EvictedTokens]()
    cut(it, 4, 8)
    tokens = evicted(it)
    history_of(it.cache).on_evicted = reported.append
    cut(it, 10, 12)
    reported.clear()
    page_in(it.cache, tokens, [(4, 6)])
    page_in(it.cache, evicted(it), [(10, 12)])
    assert [(each.part, each.runs, each.position) for each in reported] == []
    history_of(it.cache).on_evicted = None
    again = fed(16, 2, 16)
    cut(again, 4, 8)
    history_of(again.cache).on_evicted = reported.append
    restored = capture(again.cache)
    restore(again.cache, replace(restored, tensors={n: x for n, x in restored.tensors.items() if "original" not in n}))
    page_in(again.cache, tokens, [(4, 6)])
    assert [(each.part, each.runs, each.position) for each in reported] == [("moved", ((0, 4),), 4)]
    again.base -= 2
    again.check()
    again.cache.history = None
    page_in(again.cache, tokens, [(6, 8)])
    assert again.cache.ledger.runs == [(0, 16)]
    again.base -= 2
    again.check()


def test_only_caches_of_keys_that_can_be_moved_page_in() -> None:
    cache = bare_cache()
    assert can_page_in(cache)
    cache.croppable = False
    assert not can_page_in(cache)


# --- checkpoints and forms ------------------------------------------------------------------------------------


def test_a_checkpoint_has_copies_and_the_bookkeeping() -> None:
    it = fed(16, 2, 20)
    it.cache.pin(8, 9)
    it.cache.turn_starts = [3, 8]
    saved = capture(it.cache)
    names = ("keys", "values", "original_keys", "original_values")
    assert saved.tensors.keys() == {f"{layer}.{name}" for layer in range(2) for name in names}
    assert (saved.bases, saved.runs, saved.next_index, saved.pins) == ((4, 4), ((0, 2), (6, 20)), 20, ((8, 9),))
    assert (saved.turn_starts, saved.compressions, saved.plain, saved.stale) == ((3, 8), 4, {}, False)
    assert (saved.form, saved.length) == (it.cache.form, 16)
    assert saved.nbytes == sum(x.numel() * x.element_size() for x in saved.tensors.values()) == 2 * 2 * 2 * 8 * 4 * 18
    before = {name: x.clone() for name, x in saved.tensors.items()}
    assert all(x.is_contiguous() for x in saved.tensors.values())
    other = Fed(bare_cache(24, 4), seed=3)
    other.feed(7)
    assert other.cache.fed_tokens is not None
    restore(other.cache, saved)
    same(capture(other.cache), saved)
    assert other.cache.form == saved.form
    assert len(other.cache.fed_tokens) == 7  # the record of ids stays, up to the next index
    for cache in (it.cache, other.cache):
        for layer in cache.streaming_layers:
            for x in (*kv_of(layer), layer.originals(0)):
                x.zero_()
    assert all(torch.equal(saved.tensors[name], x) for name, x in before.items())
    other.cache.fed_tokens.append(torch.zeros(1, 20))
    restore(other.cache, saved)
    assert len(other.cache.fed_tokens) == 20
    other.cache.fed_tokens = None
    form = new_form()
    other.cache.form = form
    restore(other.cache, replace(saved, form=None))
    assert other.cache.form not in (form, saved.form)


def test_a_checkpoint_discards_a_partial_forward() -> None:
    it = fed(16, 2, 10)
    it.feed(1, layers=1)
    assert capture(it.cache).tensors["0.keys"].shape[2] == 10


def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_an_empty_cache() -> None:
    saved = capture(fed(16, 2, 10).cache)
    restore(bare_cache(10), saved)
    small = fed(9, 2, 5)
    with pytest.raises(CacheError, match="a checkpoint of 10 tokens in 2 layers does not fit into a cache of 9 in 2"):
        restore(small.cache, saved)
    assert (small.cache.length, small.cache.lengths) == (0, [0, 0])
    assert small.cache.fed_tokens is not None
    assert len(small.cache.fed_tokens) == 5
    with pytest.raises(CacheError, match="a checkpoint of 10 tokens in 2 layers does not fit into a cache of 16 in 3"):
        restore(bare_cache(16, 2, 3), saved)
    wrong = replace(saved, tensors={name: x[:, :, :9] if name[0] == "1" else x for name, x in saved.tensors.items()})
    other = bare_cache(16)
    with pytest.raises(CacheError, match="layer 1 of the checkpoint has 9 tokens, not 10"):
        restore(other, wrong)
    assert (other.length, other.lengths) == (0, [0, 0])


def test_forms_are_drawn_at_random() -> None:
    assert Form() == Form(0, 0)
    forms = [new_form() for _ in range(50)]
    numbers = [number for form in forms for number in dataclasses.astuple(form)]
    assert len(set(numbers)) > 90
    assert all(1 <= number <= LARGEST == 2**31 - 1 for number in numbers)
    form = forms[0].rebased()
    assert form.generation == forms[0].generation
    assert form.epoch not in (0, forms[0].epoch)


def test_the_smallest_and_the_largest_number_of_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn, number in ((0, 1), (LARGEST - 1, LARGEST)):
        monkeypatch.setattr("streamchat.cache.form.secrets.randbelow", lambda limit, drawn=drawn: min(drawn, limit - 1))
        assert new_form() == Form(number, number)
