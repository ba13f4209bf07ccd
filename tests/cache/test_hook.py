"""The pre-hook: it makes room, hands out positions, refuses what would be silently wrong, and always goes away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from streamchat.base.errors import CacheError, CacheFullError, CacheNotSeenError, ConfigError, UnsupportedModelError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.options import Eviction, EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from tests.support.reference import Reference
from tests.support.tiny import kv_of, random_ids, tiny_model

pytestmark = pytest.mark.smoke


def make(size: int = 32, sinks: int = 4, **options: Any) -> tuple[Any, StreamingCache]:
    model = tiny_model("llama")
    return model, StreamingCache(
        model.config, fit_positions(model), cache_size=size, num_sink_tokens=sinks, options=EvictionOptions(**options)
    )


def feed(model: Any, cache: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, **{cache_keyword(model): cache}, **more).logits
    return logits


def hooks_of(model: Any) -> int:
    return len(model._forward_pre_hooks)


@pytest.mark.parametrize(("cache", "found"), [(None, "no cache"), (DynamicCache(), "a DynamicCache")])
def test_a_forward_without_the_cache_raises_instead_of_streaming_nothing(cache: Any, found: str) -> None:
    model, right = make()
    with StreamingHook(model, right), pytest.raises(CacheNotSeenError, match=f"was given {found} instead"):
        feed(model, cache, random_ids(4))


def test_without_the_hook_the_cache_refuses_to_grow_past_its_budget() -> None:
    model, cache = make()
    feed(model, cache, random_ids(32))
    with pytest.raises(CacheError, match="under a StreamingHook"):
        feed(model, cache, random_ids(1))
    assert cache.length == 32


def test_the_hook_is_gone_after_the_block_also_after_an_error() -> None:
    model, cache = make()
    hook = StreamingHook(model, cache)
    with hook:
        hook.attach()  # a second time changes nothing
        assert hooks_of(model) == 1
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError, match="boom"), hook:
        raise RuntimeError("boom")
    assert hooks_of(model) == 0
    hook.remove()


def test_a_mask_of_ones_is_dropped_and_any_other_refused() -> None:
    model, cache = make()
    _, other = make()
    ids = random_ids(20)
    with StreamingHook(model, cache):
        masked = feed(model, cache, ids, attention_mask=torch.ones(1, 20))
        holes = torch.ones(1, 24)
        holes[0, 0] = 0
        for wrong in (holes, torch.ones(1, 1, 4, 24)):
            with pytest.raises(CacheError, match="padded or custom attention masks"):
                feed(model, cache, random_ids(4), attention_mask=wrong)
    assert cache.length == 20
    with StreamingHook(model, other):
        assert torch.equal(masked, feed(model, other, ids))


@pytest.mark.parametrize("how", ["positional", "embeddings", "positions of the text", "positions of slots"])
def test_every_way_to_call_the_model_gives_the_same(how: str) -> None:
    model, cache = make()
    ids = random_ids(60)
    reference = Reference(model, 32, 4)
    for start in range(0, 60, 10):
        piece = ids[:, start : start + 10]
        with StreamingHook(model, cache), torch.inference_mode():
            name = {cache_keyword(model): cache}
            if how == "positional":
                logits = model(piece, **name).logits
            elif how == "embeddings":
                logits = model(inputs_embeds=model.get_input_embeddings()(piece), **name).logits
            else:
                start_at = start if how == "positions of the text" else cache.length
                logits = model(input_ids=piece, position_ids=torch.arange(10)[None] + start_at, **name).logits
        expected = reference.feed(piece[0])
        assert (logits[0].double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("positions", [torch.arange(4)[None] + 500, torch.tensor([[20, 21, 23, 24]]), torch.arange(5)])
def test_positions_that_do_not_count_on_are_refused(positions: torch.Tensor) -> None:
    model, cache = make()
    with StreamingHook(model, cache):
        feed(model, cache, random_ids(20), position_ids=torch.arange(20)[None])
        with pytest.raises(CacheError, match=r"the next 4 tokens of this text are at 20 to 23; .* omit position_ids"):
            feed(model, cache, random_ids(4), position_ids=positions)
        assert cache.lengths == [20] * 3
        feed(model, cache, random_ids(4), position_ids=torch.arange(20, 24)[None])


def test_a_second_hook_on_the_model_is_refused() -> None:
    model, cache = make()
    _, other = make()
    with StreamingHook(model, cache):
        with pytest.raises(CacheError, match="this LlamaForCausalLM already streams into another cache"):
            StreamingHook(model, other).attach()
        assert hooks_of(model) == 1
    with StreamingHook(model, other):
        feed(model, other, random_ids(4))


def test_a_batch_of_equal_lengths_streams_row_by_row() -> None:
    model, cache = make()
    ids = torch.cat([random_ids(80, seed=1), random_ids(80, seed=2)])
    with StreamingHook(model, cache):
        for start in range(0, 80, 5):
            logits = feed(model, cache, ids[:, start : start + 5])
    for row in range(2):
        reference = Reference(model, 32, 4)
        for start in range(0, 80, 5):
            expected = reference.feed(ids[row, start : start + 5])
        assert (logits[row].double() - expected).abs().max() < 2e-5


def test_a_forward_that_fails_half_way_leaves_no_layer_ahead() -> None:
    model, cache = make()
    ids = random_ids(40)
    reference = Reference(model, 32, 4)
    reference.feed(ids[0, :20])
    expected = reference.feed(ids[0, 20:30])

    def fail(*args: Any) -> None:
        raise RuntimeError("half-way")

    with StreamingHook(model, cache):
        feed(model, cache, ids[:, :20])
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="half-way"):
            feed(model, cache, ids[:, 20:30])
        handle.remove()
        assert cache.lengths == [30, 30, 20]
        logits = feed(model, cache, ids[:, 20:30])
    assert cache.lengths == [30] * 3
    assert (logits[0].double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("keep", [28, 5, 2])
def test_going_on_after_a_crop_is_as_if_the_cropped_tokens_never_came(keep: int) -> None:
    """Also where the crop reaches into the sinks."""
    model, cache = make()
    ids = random_ids(200)
    reference = Reference(model, 32, 4)
    sizes = [10] * 6
    with StreamingHook(model, cache):
        at = 0
        for cropped in (False, True):
            if cropped:  # other tokens than those that are gone
                ids = random_ids(200, seed=1)
            for size in sizes:
                logits = feed(model, cache, ids[:, at : at + size])
                expected = reference.feed(ids[0, at : at + size])
                assert (logits[0].double() - expected).abs().max() < 2e-5
                at += size
            if not cropped:
                reference.drop(keep, 32 - keep)
                cache.crop_newest(cache.length - keep)
                assert list(cache.ledger) == reference.kept
                assert cache.lengths == [keep] * 3
                at = reference.seen = cache.ledger.next_index
    assert list(cache.ledger) == reference.kept
    assert cache.tokens_evicted == at - 32


def test_crop_takes_both_of_transformers_spellings() -> None:
    model, cache = make()
    with StreamingHook(model, cache):
        feed(model, cache, random_ids(20))
    cache.crop(-3)
    assert cache.lengths == [17] * 3
    cache.crop(10)
    assert cache.lengths == [10] * 3
    cache.crop(50)
    assert cache.get_seq_length() == 10
    cache.streaming_layers[0].crop(-2)
    assert cache.lengths == [8, 10, 10]


def test_memory_is_allocated_once() -> None:
    model, cache = make()
    with StreamingHook(model, cache):
        feed(model, cache, random_ids(32))
        before = [(kv_of(layer)[0].untyped_storage().data_ptr(), cache.kv_bytes) for layer in cache.streaming_layers]
        for _ in range(200):
            feed(model, cache, random_ids(1))
        after = [(kv_of(layer)[0].untyped_storage().data_ptr(), cache.kv_bytes) for layer in cache.streaming_layers]
    assert before == after
    assert cache.compression_count == cache.tokens_evicted == 200
    # 3 layers x keys and values x 2 heads x 16 dims x 4 bytes
    assert cache.token_bytes == 3 * 2 * 2 * 16 * 4
    assert cache.kv_bytes == cache.token_bytes * 48


@pytest.mark.slow
def test_sinks_in_bfloat16_do_not_drift() -> None:
    """Rotated from their originals every time: after a thousand evictions as right as after one."""
    model, cache = make()
    model = model.to(torch.bfloat16)
    with StreamingHook(model, cache):
        feed(model, cache, random_ids(32))
        layer = cache.streaming_layers[0]
        at_first = kv_of(layer)[0][:, :, :4].float()
        rotation = layer.rotation.keys
        assert rotation is not None
        origin = rotation.apply(at_first, rotation.source.angles_range(0, 4, layer.device), undo=True)
        for _ in range(1000):
            feed(model, cache, random_ids(1))
    expected = rotation.apply(origin, rotation.source.angles_range(layer.base, 4, layer.device))
    error = (kv_of(layer)[0][:, :, :4].float() - expected).norm() / expected.norm()
    assert layer.base == 1000
    assert error < 0.01


def test_pinned_tokens_stay_and_are_part_of_the_prefix() -> None:
    model, cache = make()
    ids = random_ids(100)
    with StreamingHook(model, cache):
        feed(model, cache, ids[:, :12])
        cache.pin(0, 12)
        for i in range(12, 100):
            feed(model, cache, ids[:, i : i + 1])
    assert list(cache.ledger) == [*range(12), *range(80, 100)]
    with pytest.raises(ConfigError, match=r"32 sink and pinned tokens .* cache_size to at least 33"):
        cache.pin(0, 100)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_pins_in_the_middle_stay_and_their_positions_close_up(family: str) -> None:
    """Two pinned passages, taken back one after the other; logits and kept tokens are the reference's all the way."""
    model = tiny_model(family)
    cache = StreamingCache(model.config, fit_positions(model), cache_size=32)
    reference = Reference(model, 32, 4)
    ids = random_ids(240)
    steps = {30: ("pin", 20, 25), 60: ("pin", 50, 53), 61: ("pin", 2, 6), 140: ("unpin", 21, 24), 170: ("unpin", 0, 99)}
    pinned: set[int] = set()
    with StreamingHook(model, cache):
        for i in range(240):
            if i in steps:
                kind, first, stop = steps[i]
                getattr(cache, kind)(first, stop)
                pinned = pinned | {*range(first, stop)} if kind == "pin" else pinned - {*range(first, stop)}
            if len(reference.kept) == 32:
                oldest = next(slot for slot, index in enumerate(reference.kept) if index >= 4 and index not in pinned)
                reference.drop(oldest, 1)
            logits = feed(model, cache, ids[:, i : i + 1])
            expected = reference.feed(ids[0, i : i + 1])
            assert list(cache.ledger) == reference.kept
            assert (logits[0].double() - expected).abs().max() < 2e-5
    assert cache.pins == ()
    assert cache.lengths == [32] * 3


def test_a_budget_that_must_not_evict_says_so() -> None:
    model, cache = make(on_full="stop")
    with StreamingHook(model, cache):
        feed(model, cache, random_ids(30))
        with pytest.raises(CacheFullError, match="3 new tokens do not fit next to the 30 cached ones in a cache of 32"):
            feed(model, cache, random_ids(3))
        feed(model, cache, random_ids(2))
    assert cache.lengths == [32] * 3
    assert cache.compression_count == 0


def test_whole_turns_leave_first_and_are_told() -> None:
    told: list[Eviction] = []
    model, cache = make(64, 4, policy="oldest-turns", on_evict=told.append)
    with StreamingHook(model, cache):
        for size in (20, 20, 20):
            cache.begin_turn(size)
            feed(model, cache, random_ids(size))
        cache.begin_turn(10, reserve=20)
        feed(model, cache, random_ids(10))
    # sinks 0..3 stay; turns 1 and 2 go, so that 10 + 20 fit
    assert list(cache.ledger) == [*range(4), *range(40, 70)]
    assert [(e.dropped, e.length_before, e.length_after, e.trigger) for e in told] == [
        (((4, 40),), 60, 24, "between_turns")
    ]


@pytest.mark.parametrize(("size", "sinks"), [(4, 4), (4, 5), (8, -1)])
def test_impossible_sizes_are_refused(size: int, sinks: int) -> None:
    with pytest.raises(ConfigError, match=f"num_sink_tokens = {sinks} .* between 0 and {size - 1}"):
        make(size, sinks)


def test_learned_positions_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="position"):
        fit_positions(tiny_model("gpt2"))
