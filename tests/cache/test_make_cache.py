"""Caches that are made for a model, and what a press does around calls of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.attention_backends import without_plans
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.eviction import check
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.layers.mover import TORCH, TorchMover, set_mover
from streamchat.cache.logits import logits_in_pieces
from streamchat.cache.positions import strategy
from streamchat.cache.positions.fit import PositionFit, fit_positions
from streamchat.cache.positions.selfcheck import self_check
from streamchat.cache.press import StreamingPress
from streamchat.cache.recompute import RecomputingCache
from streamchat.cache.streaming import StreamingCache
from tests.support.bare_cache import bare_config, fit_of
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")


def model_of(**more: Any) -> Any:
    return SimpleNamespace(config=bare_config(2), dtype=torch.bfloat16, **more)


def test_a_cache_has_the_sizes_the_options_and_the_mover_that_are_given() -> None:
    model, options, mover = model_of(), EvictionOptions(block=3), TorchMover()
    cache = strategy.make_cache(model, fit_of(2), cache_size=16, num_sink_tokens=2, options=options)
    assert (type(cache), cache.cache_size, cache.num_sink_tokens) == (StreamingCache, 16, 2)
    assert (cache.options, cache.dtype) == (options, torch.bfloat16)
    assert [layer.mover for layer in cache.streaming_layers] == [TORCH] * 2
    set_mover(model, mover)
    set_cache_dtype(model, torch.int8)
    cache = strategy.make_cache(model, fit_of(2), cache_size=16, num_sink_tokens=2)
    assert all(layer.mover is mover for layer in cache.streaming_layers)
    assert cache.dtype == torch.int8
    cache = strategy.make_cache(model, fit_of(2), cache_size=16, num_sink_tokens=2, dtype=torch.float16)
    assert cache.dtype == torch.float16
    fit = PositionFit((LayerRotation(),) * 2, (CPU,) * 2, None, 0.0, "recompute")
    assert type(strategy.make_cache(model, fit, cache_size=16, num_sink_tokens=2)) is RecomputingCache


def test_attention_is_checked_in_the_dtype_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes would be off by more than the check allows."""
    made: list[StreamingCache] = []
    monkeypatch.setattr(strategy, "require_eviction_check", lambda _, new_cache: made.append(new_cache(32, 4)))
    model = model_of()
    set_cache_dtype(model, torch.int8)
    strategy._check_eviction(model, fit_of(2))
    assert [(cache.cache_size, cache.num_sink_tokens, cache.dtype) for cache in made] == [(32, 4, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, [[3, 1]]), (torch.bfloat16, [[0, 1]])])
def test_experts_are_fixed_in_the_check_of_16_bits_only(
    dtype: torch.dtype, chosen: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class TopKRouter(nn.Module):
        top_k = 2

        def forward(self, output: Any) -> Any:
            return output

    model: Any = nn.ModuleList([TopKRouter()])
    model.dtype, seen = dtype, list[Any]()
    output = (torch.zeros(1, 4), torch.tensor([[0.75, 0.25]]), torch.tensor([[3, 1]]))
    monkeypatch.setattr(check, "_require", lambda model, _: seen.append(model[0](output)[2].tolist()))
    check.require_eviction_check(model, lambda *_: pytest.fail("the check is replaced"))
    assert seen == [chosen]


@torch.no_grad()
def test_a_press_streams_calls_of_forward_after_calls_of_the_model() -> None:
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=16)
    press = StreamingPress(model, fit=fit_positions(model), cache_size=8, num_sink_tokens=2)
    ids, more = torch.arange(3)[None], {cache_keyword(model): press.cache}
    with press:
        model(ids)
        out = model.forward(ids, **more)
        assert (out.logits.shape[:2], press.tokens_seen, press.lengths) == ((1, 3), 6, [6])
        model(ids, **more)
        with pytest.raises(IndexError):
            model(torch.tensor([[1_000_000]]), **more)
        assert press.cache.get_seq_length() == 9  # of the text, as `generate` counts
        model.forward(ids[:, :1], **more)
        assert (press.tokens_seen, press.lengths) == (10, [8])
    assert press.cache.get_seq_length() == press.cache.length == 8
    # an adapter of another kind may be added between two blocks
    model.peft_config = {"later": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(UnsupportedModelError, match="the adapter 'later'"):
        press.__enter__()
    assert not model._forward_pre_hooks


@torch.inference_mode()
def test_figures_of_the_self_check_do_not_depend_on_the_size_of_logits() -> None:
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=16)
    fit = fit_positions(model)
    before = self_check(model, fit)
    model.lm_head.weight.mul_(1e-3)
    after = self_check(model, fit)
    assert (before.ok, after.ok) == (True, True)
    assert after.control == pytest.approx(before.control, rel=1e-3)
    assert after.tensors == pytest.approx(before.tensors, rel=1e-3)


def test_pieces_of_a_text_are_read_one_after_the_other_with_one_cache() -> None:
    seen: list[Any] = []

    def forward(*, input_ids: Any, use_cache: bool, past_key_values: Any) -> Any:
        assert use_cache
        seen.append(past_key_values)
        return SimpleNamespace(logits=input_ids[..., None].bfloat16())

    model: Any = SimpleNamespace(config=bare_config(2), forward=forward)
    found = logits_in_pieces(model, forward, torch.arange(6)[None], [3, 1, 2])
    assert [each.flatten().tolist() for each in found] == [[0, 1, 2], [3], [4, 5]]
    assert {each.dtype for each in found} == {torch.float32}
    assert all(each is seen[0] for each in seen)


def test_calls_with_a_streaming_cache_use_backends_that_keep_no_plans() -> None:
    cuda: Any = torch.backends.cuda

    class Forward:
        """A forward that returns whether cuDNN may serve it, and whether others may."""

        def __call__(self, x: int, past_key_values: Any = None) -> tuple[int, bool, bool]:
            return x, cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()

    plain = Forward()
    limited: Any = without_plans(plain)
    cache = StreamingCache(bare_config(2), fit_of(2), cache_size=16, num_sink_tokens=2)
    for each in (limited, copy.deepcopy(limited)):
        assert each(3, past_key_values=cache) == (3, False, True)
        assert each(4) == plain(4) == each(4, past_key_values=object())
        assert without_plans(each) is each
    assert copy.deepcopy(limited)._forward is not plain
