"""The short path of every supported family gives the logits and the cache of the plain forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.families.registry import READERS
from streamchat.decode.install import install, is_compiled
from streamchat.kernels.library import load_kernels
from streamchat.quantization.linear import always_quantized
from streamchat.quantization.replace import groups, quantize_group, replace
from tests.support.families import FAMILIES, build, text

EAGER = ("gemma2",)
"""Families without sdpa."""
NAMES = [
    "arcee",
    "cohere",
    "cohere2_window_16",
    "cohere2_window_64",
    "ernie4_5",
    "exaone4_window_16",
    "falcon",
    "falcon_new",
    "gemma",
    "gemma2_window_16",
    "gemma2_window_64",
    "gemma3_window_16",
    "gemma3_window_64",
    "glm",
    "glm4",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "llama",
    "llama_dynamic",
    "llama_linear",
    "llama_llama3",
    "llama_yarn",
    "ministral3",
    "mistral",
    "mistral_window_16",
    "mistral_window_64",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3_window_16",
    "phi",
    "phi3",
    "phi3_longrope",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]
SIZES = [40, *[1] * 45, 3, 8, 2, 7, *[1] * 5]
"""Tokens of each forward, on a budget of 48."""
needs_kernels = pytest.mark.skipif(load_kernels("auto") is None, reason="needs compiled kernels")


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(name, "eager" if name.startswith(EAGER) else "sdpa").to(dtype)


def new_cache(model: Any) -> StreamingCache:
    # Ministral 3 scales queries from a position on, below which the whole fit stays
    fit = choose_fit(model) if type(model).__name__ == "Ministral3ForCausalLM" else fit_positions(model)
    return StreamingCache(model.config, fit, cache_size=48, num_sink_tokens=4)


def stream(model: Any, cache: StreamingCache) -> Tensor:
    """(tokens, vocabulary) float32 logits of a text fed as `SIZES` says."""
    keyword = cache_keyword(model)
    pieces = torch.split(text(sum(SIZES)), SIZES, dim=1)
    with torch.inference_mode(), StreamingHook(model, cache):
        found = [model(input_ids=piece, use_cache=True, **{keyword: cache}).logits[0] for piece in pieces]
    return torch.cat(found).float()


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference, in units of the spread of `b`."""
    return float((a - b).square().mean().sqrt() / b.std())


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_cache_are_those_of_the_plain_forward(name: str) -> None:
    model = make(name)
    expected_cache, cache = new_cache(model), new_cache(model)
    expected = stream(model, expected_cache)
    assert install(model, load_kernels("auto"))
    assert is_compiled(model)
    torch.testing.assert_close(stream(model, cache), expected, rtol=0, atol=1e-4)
    assert cache.compression_count == expected_cache.compression_count > 20
    for ours, theirs in zip(cache.streaming_layers, expected_cache.streaming_layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_a_step_is_no_farther_from_float32_than_the_plain_forward(name: str, dtype: torch.dtype) -> None:
    exact, model = make(name), make(name, dtype)
    expected = stream(exact, new_cache(exact))
    plain = rms(stream(model, new_cache(model)), expected)
    assert install(model, load_kernels("auto"))
    assert rms(stream(model, new_cache(model)), expected) < 1.25 * plain + 0.002


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_quantized_layers_give_what_they_give_in_the_plain_forward(name: str, kind: Any) -> None:
    model, kernels = make(name), load_kernels("auto")
    replace(model, {group: quantize_group(model, group, its, kernels) for group, its in groups(model, kind).items()})
    with always_quantized(model):
        expected = stream(model, new_cache(model))
    assert install(model, kernels)
    assert rms(stream(model, new_cache(model)), expected) < 0.01


def test_every_reader_has_a_family_here() -> None:
    assert set(READERS) == {type(make(name)).__name__ for name in NAMES}
    assert set(NAMES) <= set(FAMILIES)
