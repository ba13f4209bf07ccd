"""The check of evictions at load, its schedule and its limits, with logits that are chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.arguments import by_keyword, cache_keyword, given_cache, given_tokens
from streamchat.cache.eviction import check
from streamchat.cache.logits import logit_distance, logits_in_pieces
from streamchat.cache.positions.strategy import MIN_POSITIONS, Verdict, choose_fit
from streamchat.cache.routing import fixed_routing, routers
from tests.support.bare_cache import bare_cache, fed, fit_of
from tests.support.tiny import tiny_model

STEPS = 10


def logits(*off: float) -> list[Tensor]:
    """Those of each forward, off by so much of their spread."""
    return [torch.tensor([[-1.0, 1.0]]) / 2**0.5 + (off[step] if step < len(off) else 0.0) for step in range(STEPS)]


def run(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *streams: list[Tensor], rounding: float = 0.0
) -> list[bool]:
    """Check with these logits of the streams; returns which of them ran with separate tensors."""
    separate, left = list[bool](), list(streams)

    def stream(model: Any, cache: Any) -> list[Tensor]:
        separate.append("update" in vars(cache))
        return left.pop(0)

    monkeypatch.setattr(check, "_stream", stream)
    monkeypatch.setattr(check, "_rounding", lambda model, steps: rounding)
    model: Any = nn.Module()
    model.dtype, model.config = dtype, SimpleNamespace(_attn_implementation="fast")
    check.require_eviction_check(model, lambda size, sinks: bare_cache(size, sinks))
    assert not left
    return separate


@pytest.mark.parametrize(
    ("dtype", "off", "rounding"),
    [
        (torch.float32, 9e-5, 1.0),
        (torch.bfloat16, 0.049, 0.0),
        (torch.bfloat16, 0.19, 0.1),
        (torch.float16, 0.049, 0.0),
    ],
)
def test_distances_within_the_limit_are_accepted(
    dtype: torch.dtype, off: float, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, dtype, logits(), logits(0, off), rounding=rounding) == [False, True]


@pytest.mark.parametrize(
    ("dtype", "off", "rounding", "words"),
    [
        (torch.float32, 2e-4, 1.0, r"\(fast\) gives wrong logits .*: off by 0.0002 of their spread \(allowed 0.0001\)"),
        (torch.bfloat16, 0.06, 0.02, r"off by 0.06 of their spread \(allowed 0.05\)"),
        (torch.bfloat16, 0.21, 0.1, r"off by 0.21 of their spread \(allowed 0.2\)"),
        (torch.float32, float("nan"), 0.0, r"off by inf of their spread \(allowed 0.0001\)"),
    ],
)
def test_larger_distances_are_refused_with_the_forward(
    dtype: torch.dtype, off: float, rounding: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match=words + ", from forward 4 of 10 on"):
        run(monkeypatch, dtype, logits(), logits(0, 0, 0, off, off / 2), rounding=rounding)


def test_an_attention_that_differs_without_evictions_is_its_own_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, torch.float32, logits(), logits(1e-3), logits()) == [False, True, True]
    with pytest.raises(UnsupportedModelError, match=r"off by 0.001 of their spread .* from forward 2 of 10 on"):
        run(monkeypatch, torch.float32, logits(), logits(1e-3), logits(0, 1e-3))


def test_the_schedule_fills_the_cache_and_evicts() -> None:
    cache = bare_cache(32, 4)
    assert check._schedule(cache) == [20, 1, 5, 1, 5, 1, 5, 1, 1, 1]
    assert check._schedule(bare_cache(16, 4)) == [4, 1, 5, 1, 5, 1, 5, 1, 1, 1]
    assert check._schedule(bare_cache(32, 4, fit=fit_of(single_steps=True))) == [20, *[1] * 21]


def test_the_budget_is_the_larger_one_that_the_model_supports() -> None:
    def up_to(limit: int) -> Any:
        def new_cache(size: int, sinks: int) -> Any:
            if size > limit:
                raise UnsupportedModelError("chunks")
            return size, sinks

        return new_cache

    found: list[Any] = [check._first_supported(up_to(limit)) for limit in (32, 31, 16)]
    assert found == [(32, 4), (16, 4), (16, 4)]
    with pytest.raises(UnsupportedModelError, match="chunks"):
        check._first_supported(up_to(15))


def test_separate_tensors_are_contiguous_copies() -> None:
    it = fed(8, 2, 3)
    check._in_separate_tensors(it.cache)
    keys, values = it.cache.update(torch.ones(1, 2, 1, 8), -torch.ones(1, 2, 1, 8), 0)
    layer = it.cache.streaming_layers[0]
    assert layer.keys is not None
    assert layer.values is not None
    assert torch.equal(keys, layer.keys)
    assert torch.equal(values, layer.values)
    for copy, view in ((keys, layer.keys), (values, layer.values)):
        assert copy.is_contiguous()
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_eager_attention_is_used_in_all_parts_and_put_back() -> None:
    model = tiny_model("llama")
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}

    def names() -> set[str]:
        return {config._attn_implementation for config in configs.values()}

    assert names() == {"sdpa"}

    def fails() -> None:
        with check._eager_attention(model):
            assert names() == {"eager"}
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert names() == {"sdpa"}


def test_a_stream_rebases_before_the_last_but_one_forward() -> None:
    model, rebased = tiny_model("llama"), list[int]()
    cache = choose_cache(model)
    rebase = cache.rebase_positions

    def counted() -> None:
        rebased.append(cache.ledger.next_index)
        rebase()

    cache.rebase_positions = counted
    with torch.inference_mode():
        found = check._stream(model, cache)
    assert [len(each) for each in found] == check._schedule(cache)
    assert {each.dtype for each in found} == {torch.float32}
    assert rebased == [sum(check._schedule(cache)) - 2]
    assert cache.ledger.next_index == sum(check._schedule(cache)) == 41
    with torch.inference_mode():
        assert 0 < check._rounding(model, [3, 2, 1]) < 1e-4
        assert [len(each) for each in logits_in_pieces(model, model, torch.tensor([[5, 6, 7, 8]]), [1, 3])] == [1, 3]


def choose_cache(model: Any) -> Any:
    from streamchat.cache.positions.strategy import make_cache

    fit = choose_fit(model, verdict=Verdict(None))
    assert (fit.position_limit, fit.scales_queries) == (None, False)
    limited = choose_fit(model, verdict=Verdict(77))
    assert (limited.position_limit, limited.scales_queries) == (77, True)
    cache = make_cache(model, fit, cache_size=32, num_sink_tokens=4)
    assert (cache.cache_size, cache.num_sink_tokens, cache.dtype) == (32, 4, torch.float32)
    assert make_cache(model, fit, cache_size=32, num_sink_tokens=0, dtype=torch.int8).dtype == torch.int8
    return cache


@pytest.mark.parametrize("limit", [MIN_POSITIONS, MIN_POSITIONS - 1])
def test_queries_that_are_scaled_too_early_leave_no_positions(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MIN_POSITIONS == 24 + 8 + 17
    monkeypatch.setattr("streamchat.cache.positions.strategy.absolute_limit", lambda *_: limit)
    fit = choose_fit(tiny_model("llama"), check_eviction=False)
    assert fit.method == ("rotation" if limit == MIN_POSITIONS else "recompute")
    if fit.method == "rotation":
        assert (fit.position_limit, fit.scales_queries) == (limit, True)


# --- logits, arguments, routing -------------------------------------------------------------------------------


def test_a_logit_distance_is_a_share_of_the_spread() -> None:
    expected = torch.tensor([[-2.0, 0.0, 2.0]])  # a spread of 2
    assert logit_distance(expected, expected) == 0
    assert logit_distance(expected + 1, expected) == pytest.approx(0.5)
    assert logit_distance(torch.tensor([[-2.0, 0.0, 4.0]]), expected) == pytest.approx((4 / 3) ** 0.5 / 2)
    assert logit_distance(torch.ones(1, 2), torch.ones(1, 2)) == 0
    for value in (float("nan"), float("inf")):
        assert logit_distance(torch.full((1, 3), value), expected) == float("inf")
        assert logit_distance(expected, torch.full((1, 3), value)) == float("inf")
    assert logit_distance(expected.bfloat16() + 1, expected.bfloat16()) == pytest.approx(0.5)


def test_arguments_are_found_by_their_names() -> None:
    class New(nn.Module):
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    class Old(nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class Neither(nn.Module):
        def forward(self, input_ids: Any) -> None: ...

    assert [cache_keyword(model()) for model in (New, Old, Neither)] == ["cache", "past_key_values", "past_key_values"]
    assert by_keyword(["a", "b", "c"], (1, 2), {"c": 3, "d": 4}) == {"a": 1, "b": 2, "c": 3, "d": 4}
    cache = object()
    assert given_cache({"cache": cache}) is given_cache({"past_key_values": cache, "cache": None}) is cache
    assert given_cache({"other": cache}) is None
    ids, states = torch.ones(1, 2), torch.ones(1, 2, 3)
    assert given_tokens({"input_ids": ids, "inputs_embeds": states}) is ids
    assert given_tokens({"input_ids": None, "inputs_embeds": states}) is states
    for wrong in ({}, {"input_ids": [1, 2]}):
        with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
            given_tokens(wrong)


def test_experts_are_the_first_ones_with_equal_weights_meanwhile() -> None:
    class TopKRouter(nn.Module):
        top_k = 2

        def forward(self, output: Any) -> Any:
            return output

    class PlainRouter(nn.Module):
        def forward(self, output: Any) -> Any:
            return output

    model = nn.ModuleList([TopKRouter(), PlainRouter(), nn.Identity()])
    assert routers(model) == [model[0]]
    scores, weights = torch.randn(3, 4), torch.rand(3, 2)
    chosen = torch.tensor([[3, 1], [2, 0], [1, 3]])
    with fixed_routing(model):
        found = model[0]((scores, weights, chosen))
        assert found[0] is scores
        assert found[1].tolist() == [[0.5, 0.5]] * 3
        assert found[2].tolist() == [[0, 1]] * 3
        assert (found[2].dtype, found[2].is_contiguous()) == (torch.long, True)
        for other in (
            weights,
            (scores, weights),
            (scores, weights, weights),
            (scores, weights, chosen[:, :1]),
            [1, 2, 3],
        ):
            assert model[0](other) is other
        assert model[1]((scores, weights, chosen))[2] is chosen
    assert model[0]((scores, weights, chosen))[2] is chosen
