"""`StreamingCache` without a model: sizes, bookkeeping, and contents, against a reference that rotates each key anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from streamchat.base.errors import CacheError, CacheFullError, ChunkTooLargeError, ConfigError
from streamchat.cache.eviction.options import Eviction, EvictionOptions
from streamchat.cache.eviction.policies import load_policy
from streamchat.cache.streaming import StreamingCache
from tests.support.bare_cache import HEADS, WIDTH, Fed, bare_cache, bare_config, fed, fit_of


def new(size: int, sinks: int = 0, limit: int | None = None, **fit: Any) -> StreamingCache:
    return StreamingCache(bare_config(), fit_of(position_limit=limit, **fit), cache_size=size, num_sink_tokens=sinks)


# --- sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [(16, None, 4096), (2048, None, 4096), (2049, None, 4098), (5000, None, 10000), (16, 5000, 4096), (16, 40, 40)],
)
def test_positions_are_limited_by_the_model_and_by_float32(size: int, limit: int | None, expected: int) -> None:
    assert new(size, limit=limit).position_limit == expected


@pytest.mark.parametrize(("size", "sinks"), [(8, 0), (8, 7), (1, 0)])
def test_possible_sizes(size: int, sinks: int) -> None:
    cache = new(size, sinks)
    assert (cache.cache_size, cache.num_sink_tokens) == (size, sinks)


def test_impossible_sizes_are_refused_with_the_values() -> None:
    with pytest.raises(ConfigError, match="num_sink_tokens = 8 does not fit into cache_size = 8; .* between 0 and 7$"):
        new(8, 8)
    assert new(40, limit=40).cache_size == 40
    with pytest.raises(ConfigError, match="cache_size = 41 is too large: this model can use 40 positions; .* at most 40"):
        new(41, limit=40)
    with pytest.raises(CacheError, match=r"the fit has 3 layers, but this model's cache has 2; measure .* choose_fit"):
        StreamingCache(bare_config(), fit_of(3), cache_size=8)


def test_four_sinks_and_the_rolling_window_are_the_default() -> None:
    cache = StreamingCache(bare_config(), fit_of(), cache_size=8)
    assert cache.num_sink_tokens == 4
    assert cache.policy is load_policy("oldest-tokens")
    options = EvictionOptions()
    assert (options.policy, options.on_full, options.block) == ("oldest-tokens", "evict", 1)


def test_a_new_cache_is_empty() -> None:
    cache = new(8, 4)
    assert (cache.length, cache.lengths, cache.tokens_evicted, cache.next_position) == (0, [0, 0], 0, 0)
    assert (cache.compression_count, cache.pins, cache.recalled, cache.turn_starts) == (0, (), (), [])
    assert (cache.kv_bytes, cache.token_bytes, cache.get_seq_length()) == (0, 0, 0)
    assert (cache.prefix, cache.num_retained) == (0, 0)
    assert cache.croppable
    assert not cache.reports_stream_length
    assert cache.history is None
    assert cache.fed_tokens is None
    assert cache.form.generation
    assert new(8).form != cache.form


def test_a_policy_of_ones_own_is_used_as_it_is() -> None:
    policy = load_policy("oldest-turns")
    cache = StreamingCache(bare_config(), fit_of(), cache_size=8, options=EvictionOptions(policy=policy))
    assert cache.policy is policy


@pytest.mark.parametrize(
    ("dtype", "per_token"), [(None, 4 * WIDTH * 2), (torch.bfloat16, 2 * WIDTH * 2), (torch.int8, 2 * (WIDTH + 2))]
)
def test_bytes_are_those_of_the_buffers(dtype: Any, per_token: int) -> None:
    it = fed(20, count=1, layers=3, dtype=dtype)
    assert it.cache.token_bytes == 3 * HEADS * per_token
    assert it.cache.kv_bytes == 36 * it.cache.token_bytes  # 16 slots more than the budget
    assert fed(100, count=1).cache.streaming_layers[0].slots == 125
    assert fed(64, count=1).cache.streaming_layers[0].slots == 80
    for _ in range(60):
        it.feed(1)
    assert it.cache.kv_bytes == 36 * it.cache.token_bytes


# --- a stream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 33])
@pytest.mark.parametrize("sinks", [0, 3])
def test_every_token_has_the_keys_of_its_position(sinks: int, limit: int | None) -> None:
    it, chooser = fed(16, sinks, fit=fit_of(position_limit=limit)), random.Random(sinks)
    rebases, form = 0, it.cache.form
    for _ in range(60):
        it.feed(chooser.randint(1, 5))
        if it.cache.form != form:
            assert it.cache.form.generation == form.generation
            rebases, form, it.base = rebases + 1, it.cache.form, 0
        it.check()
        assert it.cache.next_position == it.base + it.cache.length <= (limit or 4096)
    assert (rebases > 3) == (limit is not None)
    assert list(it.cache.ledger)[:sinks] == list(range(sinks))
    assert it.cache.length == 16
    assert it.cache.tokens_evicted == it.cache.ledger.next_index - 16 > 100
    assert it.cache.compression_count > 40


def test_a_rebase_waits_for_the_first_position_that_does_not_exist() -> None:
    it = fed(16, 2, 16, fit=fit_of(position_limit=20))
    form = it.cache.form
    for _ in range(4):
        it.feed(1)
    assert (it.cache.next_position, it.cache.form) == (20, form)
    it.feed(1)
    assert it.cache.form != form
    assert (it.cache.next_position, it.cache.streaming_layers[0].base) == (16, 0)
    it.cache.rebase_positions(7)
    it.base = 7
    it.check()
    assert it.cache.next_position == 23


def test_pinned_tokens_in_the_middle_stay() -> None:
    it = fed(16, 2, 12)
    it.cache.pin(6, 9)
    it.cache.pin(9, 11)
    assert it.cache.pins == ((6, 11),)
    assert (it.cache.prefix, it.cache.num_retained) == (2, 7)
    for _ in range(20):
        it.feed(1)
        it.check()
    assert list(it.cache.ledger) == [0, 1, *range(6, 11), *range(23, 32)]
    assert (it.cache.prefix, it.cache.num_retained) == (7, 7)
    it.cache.unpin(8, 9)
    assert it.cache.pins == ((6, 8), (9, 11))
    it.feed(2)
    it.check()
    assert list(it.cache.ledger) == [0, 1, 6, 7, 9, 10, *range(24, 34)]


def test_recalled_tokens_are_retained_like_pinned_ones() -> None:
    it = fed(16, 2, 12)
    it.cache.pin(4, 6)
    it.cache.recalled = ((6, 8),)
    assert it.cache.retention.pins == ((4, 8),)
    assert it.cache.num_retained == 6
    it.cache.recalled = ()
    assert it.cache.retention.pins == it.cache.pins == ((4, 6),)


def test_a_pin_that_leaves_no_window_is_refused_and_changes_nothing() -> None:
    it = fed(8, 2, 8)
    it.cache.pin(2, 4)
    with pytest.raises(ConfigError, match="8 sink and pinned tokens leave no room .* cache_size = 8; .* at least 9$"):
        it.cache.pin(4, 8)
    assert it.cache.pins == ((2, 4),)
    it.cache.pin(4, 7)
    assert it.cache.num_retained == 7
    with pytest.raises(ChunkTooLargeError, match="2 new tokens .* 7 sink and pinned tokens .* at most 1$"):
        it.feed(2)
    it.feed(1)
    it.check()


# --- evictions and their events -------------------------------------------------------------------------------


def recorded(size: int = 16, sinks: int = 2, **options: Any) -> tuple[Fed, list[Eviction], list[int]]:
    """A cache with the events of its evictions, and its lengths right before them."""
    events, lengths = list[Eviction](), list[int]()
    evictions = EvictionOptions(
        on_evict=events.append, before_evict=lambda: lengths.append(it.cache.length), **{"policy": "oldest-turns"} | options
    )
    it = fed(size, sinks, options=evictions)
    return it, events, lengths


def test_an_eviction_is_emitted_with_its_runs_lengths_and_trigger() -> None:
    it, events, lengths = recorded()
    it.feed(16)
    it.feed(1)
    it.feed(3)
    it.cache.make_room(2, "page_in")
    assert events == [
        Eviction(((2, 3),), 16, 15, "decode"),
        Eviction(((3, 6),), 16, 13, "prefill"),
        Eviction(((6, 8),), 16, 14, "page_in"),
    ]
    assert lengths == [16, 16, 16]
    assert [event.count for event in events] == [1, 3, 2]
    assert it.cache.compression_count == 3


def test_a_turn_evicts_whole_turns_for_its_prompt_and_reserve() -> None:
    it, events, _ = recorded()
    for count in (6, 4, 4):
        it.cache.begin_turn(count, 0)
        it.feed(count)
    assert (it.cache.turn_starts, events) == ([0, 6, 10], [])
    it.cache.begin_turn(4, 5)
    assert it.cache.turn_starts == [0, 6, 10, 14]
    it.feed(2)  # a first chunk: there is room for it, but not for the prompt and the reserve
    assert events == [Eviction(((2, 10),), 14, 6, "between_turns")]
    assert it.cache.turn_starts == [10, 14]
    it.feed(2)
    it.feed(6)
    assert len(events) == 1  # the plan was for the first chunk only
    it.feed(1)
    assert events[1:] == [Eviction(((10, 14),), 16, 12, "decode")]
    it.check()


def test_a_reserve_that_fits_evicts_nothing() -> None:
    it, events, _ = recorded()
    it.cache.begin_turn(6)
    it.feed(6)
    it.cache.begin_turn(6, 4)
    it.feed(6)
    assert events == []
    it.cache.begin_turn(2, 3)
    it.feed(2)
    assert events == [Eviction(((2, 6),), 12, 8, "between_turns")]


def test_a_prompt_longer_than_the_cache_is_planned_as_far_as_it_fits() -> None:
    it, events, _ = recorded()
    it.cache.begin_turn(8, 0)
    it.feed(8)
    it.cache.begin_turn(100, 50)
    it.feed(3)
    assert events == [Eviction(((2, 8),), 8, 2, "between_turns")]
    assert it.cache.turn_starts == [8]


def test_blocks_take_a_quarter_of_the_room_at_most() -> None:
    it, events, _ = recorded(block=3)
    it.feed(16)
    it.feed(1)
    assert events[-1].dropped == ((2, 5),)
    it, events, _ = recorded(block=100)
    it.feed(16)
    it.feed(1)
    assert events[-1].dropped == ((2, 5),)  # (16 - 2) // 4
    it.cache.pin(5, 11)
    it.feed(3)
    assert events[-1].dropped == ((11, 13),)  # (16 - 8) // 4


def test_a_full_cache_that_must_not_evict_raises_and_stays() -> None:
    it, events, lengths = recorded(on_full="stop")
    it.feed(16)
    with pytest.raises(CacheFullError, match="1 new tokens do not fit next to the 16 cached ones in a cache of 16"):
        it.feed(1)
    assert (events, lengths, it.cache.compression_count, it.cache.length) == ([], [], 0, 16)


def test_clean_cuts_reach_the_policy() -> None:
    it, events, _ = recorded(clean_cut=lambda index: -(-index // 4) * 4)
    it.feed(16)
    it.feed(1)
    assert events[-1].dropped == ((2, 4),)


def test_key_diversity_gets_unrotated_keys() -> None:
    it, events, _ = recorded(policy="key-diversity", sinks=0)
    for _ in range(4):
        it.cache.begin_turn(4)
        it.feed(4)
    for number, keys in enumerate(it.cache.unrotated_keys(3, 7)):
        torch.testing.assert_close(keys, it.keys[number][..., 3:7, :], atol=1e-5, rtol=0)
    it.feed(1)
    assert events[-1].count == 4
    assert events[-1].dropped != ((12, 16),)


def test_a_simulated_eviction_is_what_an_eviction_leaves() -> None:
    for policy in ("oldest-tokens", "oldest-turns", "keep-first-turn"):
        it, _, _ = recorded(policy=policy)
        for _ in range(4):
            it.cache.begin_turn(4)
            it.feed(4)
        it.cache.pin(6, 8)
        before = (list(it.cache.ledger.runs), list(it.cache.turn_starts), it.cache.compression_count)
        runs, starts = it.cache.simulate_eviction(
            [(0, 16)], 16, budget=11, pins=[(6, 8)], turn_starts=it.cache.turn_starts
        )
        assert (it.cache.ledger.runs, it.cache.turn_starts, it.cache.compression_count) == before
        it.cache.make_room(5)
        assert (runs, starts) == (it.cache.ledger.runs, it.cache.turn_starts)
        same = it.cache.simulate_eviction([(0, 3), (5, 13)], 20, budget=11, pins=(), turn_starts=[2, 4, 5, 12, 13, 20])
        assert same == ([(0, 3), (5, 13)], [2, 5, 12])


# --- crops, failures, and resets ------------------------------------------------------------------------------


def test_crop_from_removes_tokens_pins_turns_and_the_plan() -> None:
    it, events, _ = recorded()
    for _ in range(4):
        it.cache.begin_turn(4)
        it.feed(4)
    it.cache.pin(4, 6)
    it.cache.pin(9, 14)
    it.cache.begin_turn(3, 3)
    assert it.cache.crop_from(10) == 6
    assert (it.cache.ledger.runs, it.cache.ledger.next_index) == ([(0, 10)], 10)
    assert (it.cache.turn_starts, it.cache.pins) == ([0, 4, 8], ((4, 6), (9, 10)))
    assert it.cache.fed_tokens is not None
    assert len(it.cache.fed_tokens) == 10
    it.check()
    it.feed(6)
    it.feed(1)
    assert events[-1].trigger == "decode"  # not the plan of the turn that was removed
    it.check()


def test_crop_from_an_evicted_token_empties_the_window_and_sets_the_index_back() -> None:
    it = fed(16, 2, 40)
    assert it.cache.crop_from(20) == 14
    assert (list(it.cache.ledger), it.cache.ledger.next_index) == ([0, 1], 20)
    assert it.cache.fed_tokens is not None
    assert len(it.cache.fed_tokens) == 20
    it.check()
    it.feed(3)
    assert list(it.cache.ledger) == [0, 1, 20, 21, 22]
    it.check()
    assert it.cache.crop_from(23) == 0
    it.cache.fed_tokens = None
    assert it.cache.crop_from(0) == 5
    assert (it.cache.length, it.cache.next_position) == (0, 0)


@pytest.mark.parametrize(("argument", "left"), [(-1, 9), (-10, 0), (-12, 0), (0, 10), (4, 4), (10, 10), (30, 10)])
def test_crop_counts_from_either_end(argument: int, left: int) -> None:
    it = fed(16, 2, 10)
    it.cache.crop(argument)
    assert (it.cache.lengths, it.cache.ledger.runs) == ([left] * 2, [(0, left)] if left else [])
    assert it.cache.ledger.next_index == left
    assert it.cache.fed_tokens is not None
    assert len(it.cache.fed_tokens) == left
    layer = fed(16, 2, 10).cache.streaming_layers[0]
    layer.crop(argument)
    assert (layer.length, layer.get_seq_length()) == (left, left)


def test_no_tokens_to_remove_change_nothing() -> None:
    it = fed(16, 2, 5)
    it.cache.croppable = False
    it.cache.crop_newest(0)
    it.cache.crop_newest(-1)
    assert it.cache.length == 5
    with pytest.raises(CacheError, match="the newest 1 tokens cannot be removed"):
        it.cache.crop_newest(1)
    assert it.cache.length == 5


def test_a_forward_that_failed_half_way_is_discarded() -> None:
    it = fed(16, 2, 20)
    it.feed(1, layers=1)
    assert it.cache.lengths == [16, 15]
    assert it.cache.get_seq_length(0) == 16
    assert it.cache.get_seq_length(1) == 15
    it.cache.discard_partial_forward()
    assert it.cache.lengths == [15, 15]
    it.check()
    it.feed(3)
    it.check()
    assert it.cache.ledger.next_index == 23


def test_the_length_of_the_stream_is_reported_on_request() -> None:
    it = fed(16, 2, 20)
    assert it.cache.get_seq_length() == 16
    it.cache.reports_stream_length = True
    assert it.cache.get_seq_length() == 20


def test_tokens_that_are_unknown_are_noted() -> None:
    it = fed(16, 2, 2)
    assert it.cache.fed_tokens is not None
    it.feed(1)
    assert it.cache.fed_tokens.known
    assert it.cache.fed_tokens.gather([(0, 3)]).tolist() == [[0, 1, 2]]
    it.cache.advance(1)  # without ids: the pending ones were used up
    assert not it.cache.fed_tokens.known
    assert (len(it.cache.fed_tokens), it.cache.ledger.next_index) == (3, 4)


def test_numbers_that_are_not_finite_become_0() -> None:
    it = fed(16, 2, 4)
    for layer in it.cache.streaming_layers:
        assert layer.storage is not None
        for part in layer.storage.parts:
            part[:, 0, 5], part[:, 0, 6], part[:, 0, 7] = float("nan"), float("inf"), -float("inf")
    it.cache.replace_not_finite()
    for layer in it.cache.streaming_layers:
        assert layer.storage is not None
        assert all(not part[:, :, 5:8].any() for part in layer.storage.parts)
    it.check()
    bare_cache().replace_not_finite()  # nothing is allocated


def test_rows_are_reordered_repeated_and_selected_with_their_ids() -> None:
    it = fed(16, 2, 20, rows=3)
    keys = [[row.clone() for row in layer.keys] for layer in it.cache.streaming_layers if layer.keys is not None]
    assert it.cache.fed_tokens is not None
    it.cache.fed_tokens._ids[:, 0] = torch.tensor([5, 6, 7])

    def rows_are(*rows: int) -> None:
        for layer, before in zip(it.cache.streaming_layers, keys, strict=True):
            assert layer.keys is not None
            assert torch.equal(layer.keys, torch.stack([before[row] for row in rows]))
            assert layer._originals is not None
            for part in layer._originals:
                assert part.shape[0] == len(rows)
        assert it.cache.fed_tokens is not None
        assert it.cache.fed_tokens.gather([(0, 1)])[:, 0].tolist() == [5 + row for row in rows]

    it.cache.reorder_cache(torch.tensor([2, 0, 1]))
    rows_are(2, 0, 1)
    it.cache.batch_repeat_interleave(2)
    rows_are(2, 2, 0, 0, 1, 1)
    it.cache.batch_select_indices(torch.tensor([5, 0]))
    rows_are(1, 2)
    # without a record of ids, and with nothing in the cache
    it.cache.fed_tokens = None
    it.cache.reorder_cache(torch.tensor([1, 0]))
    it.cache.batch_repeat_interleave(2)
    it.cache.batch_select_indices(torch.tensor([0]))
    assert it.cache.streaming_layers[0].keys is not None
    assert torch.equal(it.cache.streaming_layers[0].keys, keys[0][2][None])
    bare_cache().batch_select_indices(torch.tensor([0]))


def test_a_reset_cache_is_like_a_new_one_with_the_same_buffers() -> None:
    it = fed(16, 2, 20)
    cache = it.cache
    buffers, form = cache.streaming_layers[0].buffers, cache.form
    cache.pin(8, 9)
    cache.recalled = ((9, 10),)
    cache.begin_turn(9, 9)
    mark = cache.history.mark if cache.history else 0
    cache.reset()
    assert (cache.length, cache.lengths, cache.tokens_evicted, cache.next_position) == (0, [0, 0], 0, 0)
    assert (cache.compression_count, cache.pins, cache.recalled, cache.turn_starts) == (0, (), (), [])
    assert cache.form != form
    assert cache.fed_tokens is not None
    assert len(cache.fed_tokens) == 0
    assert cache.history is not None
    assert not cache.history.reaches(mark)
    assert [layer.num_originals for layer in cache.streaming_layers] == [0, 0]
    assert cache.streaming_layers[0].buffers is not None
    assert buffers is not None
    assert cache.streaming_layers[0].buffers[0] is buffers[0]
    again = Fed(cache, seed=1)
    events = list[Eviction]()
    cache.options.on_evict = events.append
    again.feed(16)
    again.check()
    again.feed(1)
    again.check()
    assert [event.trigger for event in events] == ["decode"]
    cache.history = cache.fed_tokens = None
    cache.reset()
    cache.rebase_positions()
    assert cache.length == 0
