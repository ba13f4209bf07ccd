"""What the hook and the press make of the arguments of a call, without a forward of the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base.errors import CacheError, CacheNotSeenError, ChunkTooLargeError, ConfigError
from streamchat.cache import press
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.fed_tokens import FedTokens
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.recompute import RecomputingCache
from streamchat.cache.streaming import StreamingCache
from tests.support.bare_cache import Fed, bare_cache, bare_config, fed, fit_of
from tests.support.tiny import tiny_model

MODEL = tiny_model("llama", num_hidden_layers=1, hidden_size=16)


def ids(count: int, rows: int = 1) -> Tensor:
    return torch.arange(count).expand(rows, -1)


def hooked(cache: StreamingCache) -> tuple[StreamingHook, list[dict[str, Any]]]:
    """A hook whose model records the forwards of first chunks instead of running them."""
    hook, calls = StreamingHook(MODEL, cache), list[dict[str, Any]]()

    def forward(**kwargs: Any) -> None:
        calls.append(kwargs)
        cache.make_room(next(iter(kwargs.values())).shape[1])

    forward.forward = MODEL.forward  # type: ignore[attr-defined]
    hook.model = forward
    return hook, calls


def call(hook: StreamingHook, tokens: Tensor, **more: Any) -> dict[str, Any]:
    name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
    args, kwargs = hook._before_forward(MODEL, (), {name: tokens, "past_key_values": hook.cache, **more})
    assert args == ()
    return kwargs


def test_positions_continue_those_of_the_cache() -> None:
    it = fed(16, 2, 20, rows=2)
    it.cache.rebase_positions(3)
    hook, _ = hooked(it.cache)
    kwargs = call(hook, ids(3, 2), attention_mask=torch.ones(2, 23), other=5)
    assert kwargs["position_ids"].tolist() == [[19, 20, 21]] * 2
    assert (kwargs["attention_mask"], kwargs["other"]) == (None, 5)
    assert it.cache.length == 13  # there is room now
    assert it.cache._pending is not None
    assert it.cache._pending.tolist() == ids(3, 2).tolist()
    kwargs = call(hook, torch.zeros(2, 1, 16))
    assert kwargs["position_ids"].tolist() == [[19]] * 2
    assert it.cache._pending is None


@pytest.mark.parametrize("start", [20, 16, 19])
def test_given_positions_must_continue_the_text_the_cache_or_its_positions(start: int) -> None:
    it = fed(16, 2, 20)
    it.cache.rebase_positions(3)
    hook, _ = hooked(it.cache)
    given = torch.arange(start, start + 2)
    assert call(hook, ids(2), position_ids=given)["position_ids"].tolist() == [[19, 20]]


@pytest.mark.parametrize("given", [torch.tensor([[18, 19]]), torch.tensor([[20, 22]]), torch.tensor([[20]]), [20, 21]])
def test_other_positions_are_refused_with_the_values(given: Any) -> None:
    it = fed(16, 2, 20)
    hook, _ = hooked(it.cache)
    first = given.flatten().tolist() if isinstance(given, Tensor) else given
    words = rf"position_ids start with \[{', '.join(map(str, first))}\], but the next 2 tokens .* at 20 to 21; "
    with pytest.raises(CacheError, match=words):
        call(hook, ids(2), position_ids=given)
    assert it.cache.length == 16
    with pytest.raises(CacheError, match=r"start with \[50, 51, 52, 53\], but the next 9 tokens"):
        call(hook, ids(9), position_ids=torch.arange(50, 59))


@pytest.mark.parametrize("mask", [torch.tensor([[0, 1, 1]]), torch.ones(1, 1, 3, 3), "causal", torch.zeros(1, 3)])
def test_masks_with_zeros_or_other_shapes_are_refused(mask: Any) -> None:
    hook, _ = hooked(bare_cache())
    with pytest.raises(CacheError, match="padded or custom attention masks cannot be used"):
        call(hook, ids(3), attention_mask=mask)


def test_a_call_needs_new_tokens_and_the_cache_of_the_hook() -> None:
    hook, _ = hooked(bare_cache())
    with pytest.raises(CacheError, match="called without new tokens"):
        call(hook, ids(0))
    for other, found in ((None, "no cache"), (bare_cache(), "a StreamingCache")):
        with pytest.raises(CacheNotSeenError, match=f"LlamaForCausalLM under the streaming hook was given {found} in"):
            call(hook, ids(2), past_key_values=other)


@pytest.mark.parametrize(
    ("cached", "count", "chunks"),
    [
        (0, 16, []),
        (0, 17, [3] * 5),
        (0, 18, [3] * 5),
        (0, 19, [3] * 6),
        (10, 14, []),
        (10, 15, [3] * 4),
        (1, 15, [3] * 4),
        (10, 40, [3] * 13),
    ],
)
def test_an_input_that_does_not_fit_is_fed_in_quarters_of_the_room(cached: int, count: int, chunks: list[int]) -> None:
    for width in (0, 16):
        hook, calls = hooked(fed(16, 2, cached).cache)
        tokens = torch.arange(float(count))[None, :, None].expand(1, -1, width) if width else ids(count)
        name = "inputs_embeds" if width else "input_ids"
        kwargs = call(hook, tokens, logits_to_keep=1)
        assert [each[name].shape[1] for each in calls] == chunks
        assert torch.equal(torch.cat([*(each[name] for each in calls), kwargs[name]], dim=1), tokens)
        assert kwargs["position_ids"].shape == (1, count - sum(chunks))
        others = {cache_keyword(MODEL): hook.cache, "use_cache": True, "logits_to_keep": 1}
        assert [{key: value for key, value in each.items() if key != name} for each in calls] == [others] * len(chunks)


def test_all_logits_of_an_input_that_does_not_fit_are_refused() -> None:
    hook, calls = hooked(fed(16, 2, 10).cache)
    for more in ({}, {"logits_to_keep": 0}, {"logits_to_keep": 2}):
        with pytest.raises(ChunkTooLargeError, match=r"15 new tokens .* chunks of at most 14"):
            call(hook, ids(15), **more)
    assert calls == []


def test_pinned_tokens_leave_smaller_chunks() -> None:
    it = fed(16, 2, 10)
    it.cache.pin(4, 8)
    hook, calls = hooked(it.cache)
    call(hook, ids(10), logits_to_keep=1)
    assert calls == []
    call(hook, ids(11), logits_to_keep=1)
    assert [each["input_ids"].shape[1] for each in calls] == [2] * 5


def test_models_whose_chunks_are_wrong_get_single_tokens() -> None:
    fit = fit_of(single_steps=True)
    hook, calls = hooked(bare_cache(fit=fit))
    call(hook, ids(5))  # the cache is empty
    assert calls == []
    hook, calls = hooked(fed(16, 2, 1, fit=fit).cache)
    call(hook, ids(1))
    with pytest.raises(ChunkTooLargeError, match="computes wrong logits for 2 new tokens in one forward"):
        call(hook, ids(2))
    assert calls == []
    assert call(hook, ids(4), logits_to_keep=1)["input_ids"].tolist() == [[3]]
    assert [each["input_ids"].tolist() for each in calls] == [[[0]], [[1]], [[2]]]


def test_a_hook_is_attached_once_and_to_one_cache() -> None:
    hook = StreamingHook(MODEL, bare_cache())
    states = [hook.attached]
    with hook as same:
        assert same is hook
        states.append(hook.attached)
        hook.attach()
        assert (len(MODEL._forward_pre_hooks), len(MODEL._forward_hooks)) == (1, 0)
        with pytest.raises(CacheError, match="this LlamaForCausalLM already streams into another cache"):
            StreamingHook(MODEL, bare_cache()).attach()
    assert [*states, hook.attached] == [False, True, False]
    hook.remove()
    assert len(MODEL._forward_pre_hooks) == 0


# --- learned positions ----------------------------------------------------------------------------------------


def recomputing(size: int = 16, sinks: int = 2) -> RecomputingCache:
    fit = fit_of(rotation=LayerRotation(), method="recompute")
    return RecomputingCache(bare_config(), fit, cache_size=size, num_sink_tokens=sinks)


def test_remaining_tokens_are_fed_again_after_an_eviction() -> None:
    cache = recomputing()
    hook, _ = hooked(cache)
    it = Fed(cache)
    it.feed(16)
    assert (cache.stale, cache.fresh, cache.next_position, cache.get_seq_length()) == (False, 16, 16, 16)
    kwargs = call(hook, torch.tensor([[90, 91]]))
    left = [0, 1, *range(9, 16)]  # half of the window at once
    assert kwargs["input_ids"].tolist() == [[*left, 90, 91]]
    assert kwargs["position_ids"].tolist() == [list(range(11))]
    assert (cache.stale, cache._refill, cache.lengths) == (True, 9, [0, 0])
    has_keys = [cache._has_keys]
    for layer in range(2):
        cache.update(torch.ones(1, 2, 11, 8), torch.ones(1, 2, 11, 8), layer)
    assert (cache.stale, cache._refill, cache.fresh, cache.length, cache.lengths) == (False, 0, 2, 11, [11, 11])
    assert [*has_keys, cache._has_keys] == [False, True]
    assert (cache.ledger.next_index, list(cache.ledger)) == (18, [*left, 16, 17])
    assert cache.fed_tokens is not None
    assert cache.fed_tokens.gather([(14, 18)]).tolist() == [[14, 15, 90, 91]]
    output = SimpleNamespace(logits=torch.arange(11.0)[None, :, None])
    assert hook._after_forward(MODEL, (), output).logits.flatten().tolist() == [9, 10]
    assert hook._after_forward(MODEL, (), output).logits.flatten().tolist() == [9, 10]
    kwargs = call(hook, torch.tensor([[92]]))
    assert kwargs["input_ids"].tolist() == [[92]]
    assert kwargs["position_ids"].tolist() == [[11]]


def test_a_refill_needs_ids_and_survives_a_failure() -> None:
    cache = recomputing(8, 2)
    it = Fed(cache)
    it.feed(8)
    cache.make_room(1)
    assert (cache.stale, list(cache.ledger)) == (True, [0, 1, 5, 6, 7])
    assert cache.refill(torch.tensor([[50]])).tolist() == [[0, 1, 5, 6, 7, 50]]
    cache.update(torch.ones(1, 2, 6, 8), torch.ones(1, 2, 6, 8), 0)
    cache.discard_partial_forward()  # the second layer failed
    assert cache.stale
    assert cache.refill(torch.tensor([[51]])).tolist() == [[0, 1, 5, 6, 7, 51]]
    assert cache.fed_tokens is not None
    cache.fed_tokens.known = False
    with pytest.raises(CacheError, match="call it with input_ids, not with embeddings"):
        cache.refill(torch.tensor([[51]]))
    cache.reset()
    assert (cache.stale, cache._refill, cache.length) == (False, 0, 0)
    assert cache.refill(torch.tensor([[51]])).tolist() == [[51]]
    Fed(cache).feed(8)
    with pytest.raises(ConfigError, match="leave no room"):
        cache.pin(2, 8)
    cache.pin(2, 7)
    assert cache._block() == 1
    cache.unpin(2, 7)
    assert cache._block() == 3
    form = cache.form
    cache.position_limit = 4
    cache.rebase_positions()
    cache._rebase_if_needed(9)
    assert (cache.form, cache.next_position) == (form, 8)


def test_a_hook_on_learned_positions_also_cuts_logits() -> None:
    with StreamingHook(MODEL, recomputing()):
        assert (len(MODEL._forward_pre_hooks), len(MODEL._forward_hooks)) == (1, 1)
    assert (len(MODEL._forward_pre_hooks), len(MODEL._forward_hooks)) == (0, 0)


# --- the press ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "sinks", "size", "ratio", "budget"),
    [
        (None, 4, None, None, 1024),
        (4096, 4, None, None, 1024),
        (512, 4, None, None, 512),
        (512, 4, 0, None, 0),
        (512, 4, 600, None, 600),
        (512, 4, None, 0.0, 512),
        (512, 4, None, 0.75, 128),
        (512, 4, None, 0.99, 14),
    ],
)
def test_the_budget_of_a_press(context: Any, sinks: int, size: Any, ratio: Any, budget: int) -> None:
    assert press._budget(context, sinks, size, ratio) == budget


def test_budgets_that_are_refused() -> None:
    for ratio in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=f"compression_ratio = {ratio} must be at least 0 and below 1"):
            press._budget(512, 4, None, ratio)
    with pytest.raises(ConfigError, match="give only one of them"):
        press._budget(512, 4, 0, 0.5)
    with pytest.raises(ConfigError, match="needs a model with a known context length"):
        press._budget(None, 4, None, 0.5)


def test_generate_uses_the_cache_unless_the_caller_says_otherwise() -> None:
    assert press._with_use_cache({"a": 1}) == {"a": 1, "use_cache": True}
    assert press._with_use_cache({"use_cache": False}) == {"use_cache": False}
    for given, expected in ((None, True), (False, False), (True, True)):
        config = SimpleNamespace(use_cache=given, more=[1])
        found = press._with_use_cache({"generation_config": config, "a": 1})
        assert (found["generation_config"].use_cache, found["generation_config"].more, found["a"]) == (expected, [1], 1)
        assert config.use_cache is given
        assert "use_cache" not in found


@pytest.mark.parametrize("option", press.CANDIDATE_OPTIONS)
def test_candidates_are_refused_with_the_option(option: str) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace())
    press._refuse_candidates(model, {"generation_config": None, option: None})
    words = f"^{option} makes generate feed candidates"
    with pytest.raises(CacheError, match=words):
        press._refuse_candidates(model, {option: 3})
    with pytest.raises(CacheError, match=words):
        press._refuse_candidates(model, {"generation_config": SimpleNamespace(**{option: 3})})
    with pytest.raises(CacheError, match=words):
        press._refuse_candidates(SimpleNamespace(generation_config=SimpleNamespace(**{option: 3})), {})


def continued(inputs: Tensor, mask: Any = None) -> None:
    record = FedTokens()
    record.append(ids(10))
    press._check_continuation(SimpleNamespace(cache=SimpleNamespace(fed_tokens=record), tokens_seen=10), inputs, mask)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "columns"), [(ids(11), None), (ids(30), 30), (torch.tensor([[7]]), 11), (torch.tensor([[7] * 12]), 22)]
)
def test_a_continuation_is_the_whole_text_or_new_tokens_with_a_mask(inputs: Tensor, columns: int | None) -> None:
    continued(inputs, None if columns is None else torch.ones(1, columns))


@pytest.mark.parametrize(
    ("inputs", "columns", "words"),
    [
        (ids(11, 2), None, "the cache has a batch of 1 but generate was given 2"),
        (ids(11), 12, "attention_mask has 12 columns for 11 tokens on a cache that was fed 10"),
        (ids(10), None, "these 10 tokens are not more than the 10 that the cache was fed"),
        (ids(3), 3, "these 3 tokens are not more than the 10 that the cache was fed"),
        (ids(11) + 1, None, "these 11 tokens do not start with the 10 that the cache was fed"),
    ],
)
def test_other_continuations_are_refused_with_the_values(inputs: Tensor, columns: int | None, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        continued(inputs, None if columns is None else torch.ones(len(inputs), columns))
