"""Chunks, padding, and prefills of a feeder, with a model and a cache that only count."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamchat.base.errors import CacheError
from streamchat.cache.eviction.ledger import Ledger
from streamchat.conversation import feeder as module
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog


class FakeCache:
    """A ledger, and what was done to it."""

    length = property(lambda self: len(self.ledger))

    def __init__(self, *, croppable: bool = True, cache_size: int = 40) -> None:
        self.croppable, self.cache_size, self.ledger = croppable, cache_size, Ledger()
        self.fit, self.turn_starts, self.compression_count = SimpleNamespace(single_steps=False), list[int](), 0
        self.fed_tokens: Any = None
        self.pins: tuple[tuple[int, int], ...] = ()
        self.calls: list[Any] = []

    def reset(self) -> None:
        self.calls.append("reset")
        self.ledger, self.turn_starts, self.pins, self.compression_count = Ledger(), [], (), 0

    def discard_partial_forward(self) -> None:
        self.calls.append("discard")

    def crop_newest(self, count: int) -> None:
        self.calls.append(("crop newest", count))
        self.ledger.crop(count)

    def crop_from(self, stop: int) -> None:
        self.calls.append(("crop", stop))

    def make_room(self, count: int) -> None:
        self.calls.append(("room", count))


class Run:
    """A feeder in chunks of at most 4; `fed` has the ids of each forward."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at_once: int = 0, dtype: torch.dtype = torch.float32, **cache: Any
    ) -> None:
        monkeypatch.setattr(module, "cache_keyword", lambda model: "the_cache")
        monkeypatch.setattr(module, "input_device", lambda model: torch.device("cpu"))
        monkeypatch.setattr(module, "tokens_at_once", lambda model: at_once)
        self.dtype, self.cache, self.log = dtype, FakeCache(**cache), TokenLog()
        self.fed, self.asked, self.noted, self.fails_at = list[Any](), list[Any](), list[float](), -1
        self.feeder = Feeder(self, self.cache, self.log)  # type: ignore[arg-type]
        assert self.feeder.chunk_size.largest == 256
        sizes: Any = SimpleNamespace(of=self.of, is_measured=lambda count: count == 4, note=self.noted.append)
        self.feeder.chunk_size = sizes

    def of(self, cache: Any, prompt: int, left: int) -> int:
        assert cache is self.cache
        self.asked.append((prompt, left))
        return 4

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int, the_cache: Any) -> Any:
        """The model: the logits after a token are its number in the stream, and those of all tokens are returned."""
        assert (the_cache, use_cache, input_ids.dtype) == (self.cache, True, torch.long)
        assert 0 < logits_to_keep <= input_ids.shape[1]
        if len(self.fed) == self.fails_at:
            raise MemoryError
        self.fed.append(input_ids[0].tolist())
        first = self.cache.ledger.next_index
        self.cache.ledger.append(input_ids.shape[1])
        rows = torch.arange(first, self.cache.ledger.next_index)[None, :, None].expand(-1, -1, 2)
        return SimpleNamespace(logits=torch.cat([rows, rows + 1000]))


Make = Callable[..., Run]


@pytest.fixture
def run_of(monkeypatch: pytest.MonkeyPatch) -> Make:
    return lambda *given, **more: Run(monkeypatch, *given, **more)


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_fed_in_chunks_of_which_only_some_are_timed(run_of: Make) -> None:
    run, done = run_of(), list[int]()
    logits = run.feeder.feed([*range(10)], done.append)
    assert run.fed == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (logits.tolist(), done) == ([9, 9], [0, 4, 8, 10])
    assert run.asked == [(10, 10), (10, 6), (10, 2)]
    assert (run.log.ids.tolist(), len(run.noted)) == ([*range(10)], 2)
    assert all(0 <= seconds < 1000 for seconds in run.noted)
    assert run.feeder.feed([20, 21, 22, 23]).tolist() == [13, 13]
    assert len(run.noted) == 2  # it was the only chunk of its prompt
    assert run.feeder.feed([], done.append).numel() == 0
    assert done[4:] == [0]


@pytest.mark.parametrize("is_single", [True, False])
def test_some_models_take_one_token_at_a_time_once_anything_is_cached(is_single: bool, run_of: Make) -> None:
    run = run_of()
    run.cache.fit.single_steps = is_single
    run.feeder.feed([*range(6)])
    assert run.fed == ([[0, 1, 2, 3], [4], [5]] if is_single else [[0, 1, 2, 3], [4, 5]])
    run.feeder.feed([6, 7])
    assert run.fed[-1] == ([7] if is_single else [6, 7])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_is_waited_for(device: str, run_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run, waited = run_of(), list[Any]()
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(run.feeder, "forward", lambda ids: f"logits of {len(ids)}")
    run.feeder.device = torch.device(device)
    assert run.feeder._forward_timed([1, 2, 3]) == "logits of 3"
    assert waited == [torch.device(device)] * (device == "cuda")
    assert run.noted == []


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "croppable", "padded_to"),
    [(torch.float32, True, 1), (torch.bfloat16, True, 16), (torch.float16, False, 1)],
)
def test_16_bit_models_are_padded_if_the_padding_can_be_cropped(
    dtype: torch.dtype, croppable: bool, padded_to: int, run_of: Make
) -> None:
    assert run_of(dtype=dtype, croppable=croppable).feeder.padded_to == padded_to


def test_a_chunk_is_padded_with_its_last_token_which_is_cropped_again(run_of: Make) -> None:
    run = run_of()
    run.feeder.padded_to = 8
    assert run.feeder.forward([1, 2, 3, 4, 5]).tolist() == [4, 4]
    assert (run.fed, run.log.ids.tolist()) == ([[1, 2, 3, 4, 5, 5, 5, 5]], [1, 2, 3, 4, 5])
    assert run.cache.calls == [("room", 5), ("crop newest", 3)]
    run.cache.calls.clear()
    assert run.feeder.forward([*range(16)]).tolist() == [20, 20]
    assert (len(run.fed[-1]), run.cache.calls) == (16, [])


@pytest.mark.parametrize(("at_once", "count", "width"), [(4, 4, 4), (4, 5, 8), (1, 1, 1), (0, 1, 1), (0, 2, 8)])
def test_lengths_with_a_program_of_their_own_are_not_padded(at_once: int, count: int, width: int, run_of: Make) -> None:
    run = run_of(at_once)
    run.feeder.padded_to = 8
    run.feeder.forward([7] * count)
    assert (len(run.fed[0]), run.cache.length) == (width, count)


@pytest.mark.parametrize("cached", [24, 25])
def test_without_room_for_padding_whole_multiples_are_fed_first(cached: int, run_of: Make) -> None:
    run = run_of()
    run.cache.ledger.append(cached)
    run.feeder.padded_to = 8
    logits = run.feeder.forward([*range(10)])  # padded, it has 16 tokens
    assert logits.tolist() == [cached + 9] * 2
    assert run.log.ids.tolist() == [*range(10)]
    if cached == 24:
        assert run.fed == [[*range(10), *[9] * 6]]
    else:
        assert run.fed == [[*range(8)], [8, 9]]
    run = run_of()
    run.cache.ledger.append(40 - 3)
    run.feeder.padded_to = 8
    run.feeder.forward([1, 2, 3])
    assert run.fed == [[1, 2, 3]]


# --- proposals ------------------------------------------------------------------------------------------------------


def test_rejected_proposals_are_cropped(run_of: Make) -> None:
    run = run_of()
    run.feeder.forward([1])
    logits = run.feeder.forward_proposals(2, [3, 4])
    assert (logits.tolist(), run.fed[-1], run.log.ids.tolist()) == ([[1, 1], [2, 2], [3, 3]], [2, 3, 4], [1, 2])
    run.feeder.accept(3)
    run.feeder.drop_rejected()
    assert (run.log.ids.tolist(), run.cache.calls, run.cache.length) == ([1, 2, 3], [("crop newest", 1)], 3)


# --- prefills -------------------------------------------------------------------------------------------------------


def filled(run: Run, count: int = 12) -> Run:
    """A run with so many tokens in log and cache, of which 4 to 5 are evicted."""
    run.log.append(range(100, 100 + count))
    run.cache.ledger = Ledger([(0, 4), (6, count)], count)
    run.cache.turn_starts, run.cache.pins, run.cache.compression_count = [4, 6, 9], ((0, 4),), 7
    return run


def test_a_cut_crops_or_prefills_what_is_left(run_of: Make) -> None:
    run = filled(run_of())
    run.feeder.cut(8)
    assert (run.cache.calls, run.log.ids.tolist(), run.fed) == ([("crop", 8)], [*range(100, 108)], [])
    for stop, runs in ((8, [(0, 4), (6, 8)]), (6, [(0, 4)]), (3, [(0, 3)])):
        run = filled(run_of(croppable=False))
        run.feeder.cut(stop)
        assert (run.cache.ledger.runs, len(run.log)) == (runs, stop)
        assert [token for ids in run.fed for token in ids] == [
            100 + index for first, last in runs for index in range(first, last)
        ]


def test_a_prefill_replaces_the_contents_and_nothing_else(run_of: Make) -> None:
    run = filled(run_of(cache_size=7))
    given: list[Any] = []
    run.cache.fed_tokens = SimpleNamespace(clear=lambda: given.append("clear"), append=given.append)
    log, runs = run.log, [(0, 3), (5, 9)]
    assert run.feeder.prefill_runs(runs, 9) == 7
    assert run.fed == [[100, 101, 102, 105], [106, 107, 108]]
    assert (run.cache.ledger.runs, run.cache.ledger.next_index) == (runs, 9)
    assert (run.cache.turn_starts, run.cache.pins, run.cache.compression_count) == ([4, 6], ((0, 4),), 7)
    assert (run.feeder.log is log, len(log), run.cache.calls) == (True, 12, ["reset", "discard"])
    assert (given[0], given[1].tolist(), given[1].dtype) == ("clear", [[*range(100, 109)]], torch.int32)
    with pytest.raises(CacheError, match="8 tokens to prefill do not fit into a cache of 7 tokens"):
        run.feeder.prefill_runs([(0, 8)], 9)
    assert run.cache.ledger.runs == runs


@pytest.mark.parametrize("croppable", [True, False])
def test_a_prefill_that_fails_leaves_the_first_chunks_or_nothing(croppable: bool, run_of: Make) -> None:
    run = filled(run_of(croppable=croppable))
    log, run.fails_at = run.log, 1
    with pytest.raises(MemoryError):
        run.feeder.prefill_runs([(0, 3), (5, 9)], 9)
    assert run.cache.ledger.runs == ([(0, 3), (5, 6)] if croppable else [])
    assert run.cache.ledger.next_index == 9
    assert run.feeder.log is log
    assert run.cache.calls == ["reset", "discard", *["reset"] * (not croppable)]
    assert (run.cache.turn_starts, run.cache.pins) == ([4, 6], ((0, 4),))
    whole = filled(run_of(croppable=croppable))
    whole.feeder.prefill_runs([(0, 3), (5, 9)], 9)
    assert whole.cache.calls == ["reset", "discard"]
