"""The short path of every supported family gives the logits and the cache of the plain forward."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.families.registry import model_spec
from streamchat.decode.install import install, install_captured, record_used, tokens_at_once
from streamchat.decode.native_step import CompiledStep
from streamchat.decode.static import static_step
from streamchat.decode.static_prompt import prompt_step
from streamchat.kernels.library import Kernels, load_kernels
from streamchat.quantization.experts import quantized_experts
from streamchat.quantization.linear import always_quantized
from streamchat.quantization.replace import groups, quantize_group, replace
from tests.support.captured_prompts import assert_same, feed, recorded
from tests.support.decode_models import counted
from tests.support.families import FAMILIES, build, text
from tests.support.recorded_graphs import RecordedGraphs
from tests.support.short_path_families import AVAILABLE, WITHOUT_RECORDED

SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, one norm": ("falcon_new", {"num_ln_in_parallel_attn": 1}),
    "falcon, old": ("falcon", {"multi_query": False}),
    "falcon, one after the other": ("falcon", {"parallel_attn": False, "bias": True}),
    "gemma2, soft caps that matter": (
        "gemma2_window_16",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    ),
    "gemma3, soft cap of the logits": ("gemma3_window_16", {"final_logit_softcapping": 1.5}),
    "gemma3, bases far apart": (
        "gemma3_window_16",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.8}),
    "cohere, scaled": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    "granite, scaled": ("granite", {"logits_scaling": 8.0}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "stablelm, norms of each head": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "phi, norms of heads": ("phi", {"qk_layernorm": True}),
    "phi3, window": ("phi3", {"sliding_window": 12}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 12, "use_bias": True}),
    "qwen2, window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3, window in some layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "smollm3, window": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "exaone4, no window": ("exaone4_window_16", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "nemotron, biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "glm, biases": ("glm", {"attention_bias": True}),
    "arcee, biases": ("arcee", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss, biases": ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    "mixtral, window": ("mixtral", {"sliding_window": 12}),
    "mixtral, one expert per token": ("mixtral", {"num_experts_per_tok": 1}),
    "mixtral, all experts": ("mixtral", {"num_experts_per_tok": 4}),
    "qwen2_moe, normalized": ("qwen2_moe", {"norm_topk_prob": True}),
    "qwen2_moe, a layer without experts": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe, normalized": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe, three of seven experts": ("qwen3_moe", {"num_experts": 7, "num_experts_per_tok": 3}),
    "olmoe, normalized": ("olmoe", {"norm_topk_prob": True}),
    "gptj, wide heads": ("gptj", {"n_head": 2, "rotary_dim": 16}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in AVAILABLE} | {
    case: (name, changes) for case, (name, changes) in VARIANTS.items() if name in AVAILABLE
}
SIZES = [20, *[1] * 18, 7, 3, 8, *[1] * 4]
"""A prompt, single tokens of which 6 evict, chunks that evict, single tokens."""


PROMPTS = [5, 16, 2, 23, 40, 3, 16, 31, 1, 60]
"""Each length but that of one token is used again after it was recorded."""


@pytest.fixture(scope="module", params=["auto", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels | None:
    """The compiled kernels if there are any, and PyTorch's."""
    return load_kernels(request.param)


def _model(case: str) -> Any:
    name, changes = CASES[case]
    return build(name, FAMILIES[name].attentions[0], **changes)


def _stream(model: Any, fit: PositionFit) -> tuple[Tensor, StreamingCache]:
    """Return the (tokens, vocabulary) logits of a text and the cache at its end."""
    cache = make_cache(model, fit, cache_size=32, num_sink_tokens=4)
    name, logits = cache_keyword(model), []
    with torch.inference_mode(), StreamingHook(model, cache):
        for ids in torch.split(text(sum(SIZES)), SIZES, dim=1):
            logits.append(model(input_ids=ids, use_cache=True, **{name: cache}).logits[0].float())
    return torch.cat(logits), cache


@functools.cache
def _plain(case: str) -> tuple[Tensor, StreamingCache, PositionFit]:
    """What the plain forward gives, for all tests of this case."""
    return *_stream(_model(case), _fit(case)), _fit(case)


@functools.cache
def _fit(case: str) -> PositionFit:
    return choose_fit(_model(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_and_cache_of_every_family_are_those_of_the_plain_forward(
    kernels: Kernels | None, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(case)
    expected, expected_cache, fit = _plain(case)
    plain = counted(model, monkeypatch)
    assert install(model, kernels)
    found, cache = _stream(model, fit)
    if kernels is None:
        assert 1 not in plain[plain.index(SIZES[0]) :]  # all single tokens took the short path
    else:
        assert isinstance(model.forward.step, CompiledStep)
        assert tokens_at_once(model) >= max(SIZES[1:])
        assert plain[-1] == SIZES[0]  # all later calls took the short path
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert cache.lengths == expected_cache.lengths
    assert cache.compression_count == expected_cache.compression_count > 0
    for ours, theirs in zip(cache.streaming_layers, expected_cache.streaming_layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_of_every_family_gives_the_logits_of_the_plain_forward(case: str) -> None:
    model, graphs = _model(case), RecordedGraphs()
    expected, _, fit = _plain(case)
    changing = static_step(model) is None
    assert changing == (case in WITHOUT_RECORDED)
    if changing:
        return
    assert install_captured(model, graphs.record)
    found, _ = _stream(model, fit)
    assert model.forward.step.failed == ""
    assert graphs.replays > 10
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_recorded_prompts_of_every_family_are_those_of_the_plain_forward(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(case)
    spec = model_spec(model)
    assert spec is not None
    supported = not spec.experts and case not in WITHOUT_RECORDED
    assert (prompt_step(model) is not None) == supported
    if not supported:
        return
    fit = _fit(case)
    size = 64 if case == "ministral3" else 100  # its positions are limited
    prompts = torch.split(text(sum(PROMPTS)), PROMPTS, dim=1)
    plain, cache = (make_cache(model, fit, cache_size=size, num_sink_tokens=4) for _ in range(2))
    with StreamingHook(model, plain):
        expected = [feed(model, plain, ids) for ids in prompts]
    fed = counted(model, monkeypatch)
    with recorded(model, cache) as graphs:
        found = []
        for ids in prompts:
            found.append(feed(model, cache, ids))
            record_used(model, cache)
    assert model.forward.step.failed == ""
    if size == 100:
        assert fed == [5, 16, 23, 40, 1]  # the first allocates the buffers; those after it are the checks
        assert graphs.recordings == 2  # of 16 and 32 tokens; 64 free slots are not left behind the other prompts
    assert graphs.replays > 0
    assert cache.compression_count > 0
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=0, atol=1e-4)
    assert_same(cache, plain)


@functools.cache
def _rounded(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, PositionFit]:
    """Logits of the plain forward with weights of `dtype`: in float32, and in `dtype`."""
    model = _model(name).to(dtype)
    whole = copy.deepcopy(model).float()
    fit = choose_fit(whole)
    return _stream(whole, fit)[0], _stream(model, fit)[0], fit


@pytest.mark.slow
@pytest.mark.parametrize("name", AVAILABLE)
def test_sixteen_bits_differ_from_float32_no_more_than_the_plain_forward_does(
    kernels: Kernels | None, name: str
) -> None:
    """One type with the compiled kernels, and the other with PyTorch's: by turns, as many families have."""
    is_first = (AVAILABLE.index(name) + (kernels is None)) % 2 == 0
    dtype = torch.bfloat16 if is_first else torch.float16
    exact, plain, fit = _rounded(name, dtype)
    model = _model(name).to(dtype)
    assert install(model, kernels)
    found, _ = _stream(model, fit)
    assert _error(found, exact) < 1.5 * _error(plain, exact) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_quantized_weights_give_what_their_values_give(kernels: Kernels | None, name: str, kind: Any) -> None:
    if kernels is None:
        pytest.skip("no compiled kernels")
    model, fit = _model(name), _fit(name)
    replace(model, {group: quantize_group(model, group, its, kernels) for group, its in groups(model, kind).items()})
    if name.startswith("granitemoe") and not quantized_experts(model):
        pytest.skip("this version of transformers keeps Granite's experts in another form, which stays native")
    with always_quantized(model):
        expected, _ = _stream(model, fit)
    assert install(model, kernels)
    found, _ = _stream(model, fit)
    assert _error(found, expected) < 0.01


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon_alibi", "nanochat", "llama4", "gpt2", "bloom"])
def test_what_no_description_covers_is_left_to_transformers(name: str) -> None:
    assert model_spec(build(name, FAMILIES[name].attentions[0])) is None


def test_soft_caps_that_sdpa_does_not_apply_are_not_described() -> None:
    model = build("gemma2_window_16", "eager")
    assert model_spec(model) is not None
    model.config._attn_implementation = "sdpa"
    assert model_spec(model) is None
