"""The attention in use is run at load on a cache that evicts; limits of positions and failures have their reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from streamchat import StreamingPress
from streamchat.base.errors import ConfigError, UnsupportedModelError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction import check
from streamchat.cache.positions.absolute import absolute_limit
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.streaming import StreamingCache
from streamchat.models import checked_fit
from streamchat.models.checked_fit import choose_checked_fit
from tests.support.families import build
from tests.support.reference import Reference
from tests.support.tiny import random_ids, tiny_model


def right(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    """sdpa under another name."""
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def without_offset(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    """A kernel that takes keys from the start of their buffer, not from where the view begins."""
    start = key.as_strided(key.shape, key.stride(), 0) if key.storage_offset() < key.untyped_storage().size() else key
    return sdpa_attention_forward(module, query, start, value, mask, **more)


def wrong_when_full(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    """A kernel that leaves out the newest keys once the cache holds more than 28 tokens."""
    if key.shape[-2] > 28:
        value = torch.cat([value[..., :28, :], torch.zeros_like(value[..., 28:, :])], dim=-2)
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def failing(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    raise RuntimeError("no kernel for this device\nat frame 7")


@pytest.fixture
def attention(request: pytest.FixtureRequest) -> str:
    """The name under which a function is registered."""
    name = f"test_{request.param.__name__}"
    AttentionInterface.register(name, request.param)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def rounding_model(attention: str, dtype: torch.dtype) -> Any:
    """A model whose logits have an error of a twentieth of their spread, another one in each forward."""
    model = tiny_model("llama", attention).to(dtype)
    generator = torch.Generator().manual_seed(0)

    def rounded(module: Any, given: Any, logits: Tensor) -> Tensor:
        noise = torch.randn(logits.shape, generator=generator)
        return (logits.float() + 0.05 * logits.float().std() * noise).to(dtype)

    model.get_output_embeddings().register_forward_hook(rounded)
    return model


def check_evictions(model: Any) -> None:
    fit = fit_positions(tiny_model("llama"))

    def new_cache(size: int, sinks: int) -> StreamingCache:
        return StreamingCache(model.config, fit, cache_size=size, num_sink_tokens=sinks)

    check.require_eviction_check(model, new_cache)


@pytest.mark.parametrize("attention", [without_offset, wrong_when_full], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_rounding_of_the_model_itself_is_allowed(attention: str, dtype: torch.dtype) -> None:
    """As of Gemma 3 in bfloat16; a wrong attention shows nevertheless."""
    check_evictions(rounding_model("sdpa", dtype))
    for wrong in (rounding_model(attention, dtype), rounding_model("sdpa", torch.float32)):
        with pytest.raises(UnsupportedModelError, match="gives wrong logits"):
            check_evictions(wrong)


@pytest.mark.parametrize("attention", [without_offset, wrong_when_full], indirect=True)
def test_an_attention_that_is_wrong_on_a_cache_that_evicts_is_refused_with_figures(attention: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        choose_fit(tiny_model("llama", attention))
    words = str(caught.value)
    assert f"the model's attention ({attention}) gives wrong logits on a cache that grows and evicts: off by " in words
    assert 'such as attn_implementation="sdpa"' in words


@pytest.mark.parametrize("attention", [right], indirect=True)
def test_any_other_registered_attention_streams(attention: str) -> None:
    model = tiny_model("llama", attention)
    press = StreamingPress(model, cache_size=32, num_sink_tokens=4)
    assert press.method == "rotation"
    assert model.config._attn_implementation == attention  # the check puts it back
    ids, reference = random_ids(50), Reference(model, 32, 4)
    with press, torch.inference_mode():
        for piece in torch.split(ids, [20] + [1] * 30, dim=1):
            logits = model(input_ids=piece, **{cache_keyword(model): press.cache}).logits[0]
            assert (logits.double() - reference.feed(piece[0])).abs().max() < 2e-5


@pytest.mark.parametrize("attention", [failing], indirect=True)
def test_an_error_of_the_model_is_told_in_one_sentence(attention: str) -> None:
    sentence = r"a forward of LlamaForCausalLM to measure its positions failed \(RuntimeError: no kernel .*\)$"
    with pytest.raises(UnsupportedModelError, match=sentence):
        choose_fit(tiny_model("llama", attention))


# --- queries that are scaled by the absolute position -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [64, 1000, 16384])
def test_the_limit_of_positions_is_measured(limit: int, dtype: torch.dtype) -> None:
    rope = dict(build("ministral3").config.rope_parameters, original_max_position_embeddings=limit)
    model = build("ministral3", rope_parameters=rope, max_position_embeddings=4 * limit).to(dtype)
    assert absolute_limit(model, fit_positions(model)) == limit


@pytest.mark.parametrize("name", ["llama", "llama_dynamic", "gptj", "gemma3_window_16", "llama4", "deepseek_v3"])
def test_other_models_have_no_such_limit(name: str) -> None:
    model = build(name)
    assert absolute_limit(model, fit_positions(model)) is None


def test_a_budget_above_the_limit_is_refused_with_the_reason() -> None:
    model = build("ministral3")
    assert StreamingPress(model, cache_size=64).fit.position_limit == 64
    sentence = "cache_size = 65 is too large: .* 64 positions .* scales attention by the absolute position.* at most 64"
    with pytest.raises(ConfigError, match=sentence):
        StreamingPress(model, cache_size=65)


def test_a_limit_that_leaves_no_room_is_served_by_reading_again() -> None:
    rope = dict(build("ministral3").config.rope_parameters, original_max_position_embeddings=24)
    assert choose_fit(build("ministral3", rope_parameters=rope)).method == "recompute"


def test_the_limit_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("ministral3")
    first = choose_checked_fit(model)
    monkeypatch.setattr("streamchat.cache.positions.strategy.absolute_limit", lambda *_: pytest.fail("measured again"))
    assert choose_checked_fit(model).position_limit == first.position_limit == 64
    monkeypatch.setattr(checked_fit, "code_digest", lambda package: "other code")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        choose_checked_fit(model)
