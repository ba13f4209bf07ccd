"""`StreamingCache` without a model: sizes, bookkeeping, and contents, against a reference that rotates every key."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig

from streamchat.base.errors import CacheError, CacheFullError, ChunkTooLargeError, ConfigError
from streamchat.cache.checkpoint import capture, restore
from streamchat.cache.eviction.options import Eviction, EvictionOptions
from streamchat.cache.eviction.policies import load_policy
from streamchat.cache.eviction.policy import CacheView, Cut, cuts_of
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.select import is_mixed
from streamchat.cache.streaming import StreamingCache
from tests.support.bare_cache import HEADS, WIDTH, Fed, bare_cache, bare_config, fed, fit_of
from tests.support.tiny import config_of


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
    with pytest.raises(ConfigError, match=r"num_sink_tokens = 8 does not fit into cache_size = 8; .* between 0 and 7$"):
        new(8, 8)
    assert new(40, limit=40).cache_size == 40
    with pytest.raises(
        ConfigError, match=r"cache_size = 41 is too large: this model can use 40 positions; .* at most 40"
    ):
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
    assert (cache.kv_bytes, cache.token_bytes, cache.get_seq_length(), cache.dtype) == (0, 0, 0, None)
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
    for _ in range(10):
        it.feed(3)
    assert it.cache.kv_bytes == 36 * it.cache.token_bytes


# --- a stream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 33])
@pytest.mark.parametrize("sinks", [0, 3])
def test_every_token_has_the_keys_of_its_position(sinks: int, limit: int | None) -> None:
    it, chooser = fed(16, sinks, fit=fit_of(position_limit=limit)), random.Random(sinks)
    rebases, form = 0, it.cache.form
    for _ in range(40):
        it.feed(chooser.randint(1, 5))
        if it.cache.form != form:
            assert it.cache.form.generation == form.generation
            rebases, form, it.base = rebases + 1, it.cache.form, 0
        it.check()
        assert it.cache.next_position == it.base + it.cache.length <= (limit or 4096)
    assert (rebases > 3) == (limit is not None)
    assert list(it.cache.ledger)[:sinks] == list(range(sinks))
    assert it.cache.length == 16
    assert it.cache.tokens_evicted == it.cache.ledger.next_index - 16 > 70
    assert it.cache.compression_count > 25


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
    assert list(it.cache.pins) == [(6, 11)]
    assert (it.cache.prefix, it.cache.num_retained) == (2, 7)
    for _ in range(20):
        it.feed(1)
        it.check()
    assert list(it.cache.ledger) == [0, 1, *range(6, 11), *range(23, 32)]
    assert (it.cache.prefix, it.cache.num_retained) == (7, 7)
    it.cache.unpin(8, 9)
    assert list(it.cache.pins) == [(6, 8), (9, 11)]
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
    with pytest.raises(ConfigError, match=r"8 sink and pinned tokens leave no room .* cache_size = 8; .* at least 9$"):
        it.cache.pin(4, 8)
    assert it.cache.pins == ((2, 4),)
    it.cache.pin(4, 7)
    assert it.cache.num_retained == 7
    with pytest.raises(ChunkTooLargeError, match=r"2 new tokens .* 7 sink and pinned tokens .* at most 1$"):
        it.feed(2)
    it.feed(1)
    it.check()


# --- evictions and their events -------------------------------------------------------------------------------


def recorded(size: int = 16, sinks: int = 2, **options: Any) -> tuple[Fed, list[Eviction], list[int]]:
    """A cache with the events of its evictions, and its lengths right before them."""
    events, lengths = list[Eviction](), list[int]()
    evictions = EvictionOptions(
        on_evict=events.append,
        before_evict=lambda: lengths.append(it.cache.length),
        **{"policy": "oldest-turns"} | options,
    )
    it = fed(size, sinks, options=evictions)
    return it, events, lengths


def test_an_eviction_is_emitted_with_its_runs_lengths_and_trigger() -> None:
    it, events, lengths = recorded()
    it.feed(16)
    it.feed(1)
    it.feed(2)
    it.feed(3)
    it.cache.make_room(2, "page_in")
    assert events == [
        Eviction(((2, 3),), 16, 15, "decode"),
        Eviction(((3, 5),), 16, 14, "prefill"),
        Eviction(((5, 8),), 16, 13, "prefill"),
        Eviction(((8, 10),), 16, 14, "page_in"),
    ]
    assert lengths == [16, 16, 16, 16]
    assert [event.count for event in events] == [1, 2, 3, 2]
    assert it.cache.compression_count == 4


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


def similarities_of(it: Fed, length: int) -> int:
    """The turn, but not the newest, whose mean keys are most like those of the others."""
    turns = it.keys[:, 0].view(*it.keys.shape[0:3:2], -1, length, WIDTH).mean(dim=-2)  # (layers, HEADS, turns, WIDTH)
    units = turns / turns.norm(dim=-1, keepdim=True)
    alike = (units @ units.transpose(-1, -2)).mean(dim=(0, 1))
    return int((alike.sum(-1) - alike.diagonal())[:-1].argmax())


def test_key_diversity_gets_unrotated_keys() -> None:
    it, events, _ = recorded(policy="key-diversity", sinks=0)
    it.generator.manual_seed(2)
    for _ in range(4):
        it.cache.begin_turn(4)
        it.feed(4)
    for number, keys in enumerate(it.cache.unrotated_keys(3, 7)):
        torch.testing.assert_close(keys, it.keys[number][..., 3:7, :], atol=1e-5, rtol=0)
    it.cache.make_room(1)
    alike = similarities_of(it, 4)
    assert events[-1].dropped == ((4 * alike, 4 * alike + 4),)
    assert alike != 0  # the oldest turn, which is evicted without keys


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


class Shown:
    """Evicts the oldest tokens, and records what it is shown."""

    name = "shown"

    def __init__(self) -> None:
        self.views = list[CacheView]()

    def plan(self, view: CacheView) -> list[Cut]:
        self.views.append(view)
        return cuts_of(view.oldest(view.must_evict))


def test_a_policy_is_shown_the_room_that_is_needed() -> None:
    policy = Shown()
    it, events, _ = recorded(policy=policy, block=3)
    it.feed(12)
    it.cache.pin(4, 6)
    it.feed(4)  # just fits
    assert policy.views == []
    it.feed(1)
    (view,) = policy.views
    assert (view.ledger.runs, view.retained, view.cache_size) == ([(0, 16)], ((0, 2), (4, 6)), 16)
    assert (view.incoming, view.reserve, view.turn_starts, view.block) == (1, 0, (), 3)
    assert view.fetch_keys == it.cache.unrotated_keys
    it.cache.begin_turn(3, 50)
    it.feed(2)
    view = policy.views[1]
    assert (view.incoming, view.reserve, view.turn_starts) == (3, 9, (17,))  # no more than there is room for
    it.cache.begin_turn(30, 50)
    it.feed(2)
    assert (policy.views[2].incoming, policy.views[2].reserve) == (12, 0)
    it.feed(10)
    it.cache.begin_turn(1, 0)
    it.feed(4)
    assert (policy.views[3].incoming, policy.views[3].reserve) == (4, 0)
    assert events[-1].trigger == "between_turns"
    simulated = it.cache.simulate_eviction([(0, 16)], 16, budget=12, pins=[(4, 6)], turn_starts=[7])
    view = policy.views[-1]
    assert (view.cache_size, view.retained, view.turn_starts) == (12, ((0, 2), (4, 6)), (7,))
    assert (view.fetch_keys, view.incoming, view.block) == (None, 0, 1)
    assert simulated == ([(0, 2), (4, 6), (8, 16)], [])


def test_a_policy_is_shown_the_keys_of_a_single_token() -> None:
    policy = Shown()
    it, _, _ = recorded(2, 0, policy=policy)
    it.feed(1)
    it.feed(2)
    (view,) = policy.views
    assert view.fetch_keys is not None


def test_a_plan_does_not_outlive_the_contents() -> None:
    it, events, _ = recorded()
    it.feed(16)
    saved = capture(it.cache)
    it.cache.begin_turn(9, 9)
    restore(it.cache, saved)
    it.feed(1)
    assert events == [Eviction(((2, 3),), 16, 15, "decode")]


def test_copies_that_a_rebase_makes_can_be_used_after_inference_mode() -> None:
    it = fed(16, 2, 16)
    with torch.inference_mode():
        it.feed(2)
        it.cache.rebase_positions()
    for layer in it.cache.streaming_layers:
        assert layer.num_originals == 2
        assert not layer.originals(0).is_inference()
        assert layer.buffers is not None
        assert not any(buffer.is_inference() for buffer in layer.buffers)


# --- layers with a recurrent state ----------------------------------------------------------------------------


def test_layers_with_a_state_have_no_tokens_and_cannot_be_rewound() -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    config = Qwen3NextConfig(num_hidden_layers=4, layer_types=kinds)
    cache = StreamingCache(config, fit_of(4), cache_size=8, num_sink_tokens=2)
    assert [type(layer) is StreamingLayer for layer in cache.layers] == [False, True, True, False]
    assert cache.streaming_layers == [cache.layers[1], cache.layers[2]]
    assert not cache.croppable
    states = torch.ones(1, HEADS, 3, WIDTH)
    cache.update(states, states, 1)
    assert (cache.lengths, cache.length, cache.get_seq_length(0), cache.get_seq_length(2)) == ([3, 0], 0, 3, 0)
    cache.update(states, states, 2)
    assert (cache.lengths, cache.length, cache.next_position) == ([3, 3], 3, 3)
    with pytest.raises(CacheError, match="the newest 1 tokens cannot be removed"):
        cache.crop_newest(1)
    state: Any = cache.layers[0]
    with torch.inference_mode():
        state.update_conv_state(torch.ones(1, 4, 3))
    cache.reset()  # in place
    assert not state.conv_states[0].any() if isinstance(state.conv_states, dict) else not state.conv_states.any()
    mixed = StreamingCache(config_of("falcon_h1"), fit_of(3), cache_size=8, num_sink_tokens=2)
    assert len(mixed.streaming_layers) == 3
    assert all(is_mixed(layer) for layer in mixed.layers)
    assert not mixed.croppable
    assert not is_mixed(cache.layers[0])
    assert not is_mixed(cache.layers[1])


# --- crops, failures, and resets ------------------------------------------------------------------------------


def test_crop_from_removes_tokens_pins_turns_and_the_plan() -> None:
    it, events, _ = recorded()
    for _ in range(4):
        it.cache.begin_turn(4)
        it.feed(4)
    it.cache.pin(4, 6)
    it.cache.pin(9, 14)
    it.cache.begin_turn(3, 3)
    assert it.cache.crop_from(12) == 4
    assert it.cache.turn_starts == [0, 4, 8]
    it.cache.begin_turn(3, 3)
    assert it.cache.crop_from(10) == 2
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


@pytest.mark.parametrize(
    ("argument", "left"), [(-1, 9), (-10, 0), (-12, 0), (0, 10), (1, 1), (4, 4), (10, 10), (30, 10)]
)
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
    assert it.cache.get_seq_length() == it.cache.get_seq_length(0) == 16
    assert it.cache.get_seq_length(1) == 15
    assert it.cache.next_position == 21
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
    known = bool(it.cache.fed_tokens.known)
    assert (known, len(it.cache.fed_tokens), it.cache.ledger.next_index) == (False, 3, 4)


def test_numbers_that_are_not_finite_become_0() -> None:
    it = fed(16, 2, 4)
    with torch.inference_mode():
        it.cache.replace_not_finite()
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
    assert (cache.compression_count, len(cache.pins), len(cache.recalled), len(cache.turn_starts)) == (0, 0, 0, 0)
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
    again.feed(2)  # a plan would be carried out now
    again.feed(14)
    again.check()
    again.feed(1)
    again.check()
    assert [event.trigger for event in events] == ["decode"]
    cache.history = cache.fed_tokens = None
    with torch.inference_mode():
        cache.reset()
    cache.rebase_positions()
    assert cache.length == 0
