"""The compiled kernels in models: which they serve, and that a step gives the logits of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.families.registry import model_spec
from streamchat.decode.install import install, uninstall
from streamchat.decode.native_step import MAX_PROGRAMS, CompiledStep, kernels_support
from streamchat.kernels.library import load_kernels
from streamchat.models.load import load_model
from streamchat.quantization.linear import quantized_layers
from streamchat.quantization.replace import groups, quantize_group, replace
from streamchat.quantization.weights import Kind
from tests.support.decode_models import cache_of, counted_calls, make, stream
from tests.support.families import text
from tests.support.kernels import needs_kernels
from tests.support.models_help import save, tiny_llama
from tests.support.tiny import fresh_model


@needs_kernels
def test_the_setting_chooses_between_them_and_pytorchs(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path / "model")
    for choice, expected in (("auto", True), ("torch", False), ("auto", True)):
        loaded = load_model(str(tmp_path / "model"), device="cpu", weights="int8", kernels=choice)
        assert isinstance(loaded.model.forward.step, CompiledStep) == expected  # type: ignore[attr-defined]
        found = {layer.quantized.kernels for layer in quantized_layers(loaded.model).values()} | {loaded.kernels}
        assert found == {load_kernels(choice)}
        assert (None in found) != expected


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"hidden_act": "gelu"}, True),
        ({"hidden_act": "gelu_pytorch_tanh"}, True),
        ({"hidden_act": "gelu_new"}, True),
        ({"hidden_act": "relu"}, True),
        ({"hidden_act": "relu2"}, True),
        ({"hidden_act": "mish"}, False),
        ({"head_dim": 512}, False),
        ({"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 4}, True),
    ],
)
def test_models_that_they_do_not_serve_are_known(change: dict[str, Any], served: bool) -> None:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    model = fresh_model(LlamaConfig(**(sizes | {"num_attention_heads": 4} | change)))
    described = model_spec(model)
    assert (described is not None and kernels_support(described)) == served
    if described is None:  # its activation is not known
        return
    half = model_spec(model.to(torch.float16))
    assert half is not None
    assert kernels_support(half) == served


@pytest.mark.slow
@needs_kernels
def test_the_number_of_threads_may_change_between_tokens() -> None:
    model = make("llama, three heads of queries to one of keys")
    ids, before = text(40), torch.get_num_threads()
    expected = stream(model, cache_of(model, 24), ids, 10)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    pieces = [stream(model, cache, ids[:, :10], 10)]
    try:
        for i in range(10, 40):
            torch.set_num_threads(1 + i % 3)
            pieces.append(stream(model, cache, ids[:, i : i + 1], 1))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=1e-4)


@needs_kernels
def test_a_step_that_was_built_in_inference_mode_serves_outside_of_it() -> None:
    from streamchat.cache.arguments import cache_keyword
    from streamchat.cache.hook import StreamingHook

    model, ids = make("llama"), text(14)
    expected = stream(model, cache_of(model, 24), ids, 10)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :12], 10)
    with torch.no_grad(), StreamingHook(model, cache):
        for i in (12, 13):
            found = model(input_ids=ids[:, i : i + 1], use_cache=True, **{cache_keyword(model): cache}).logits
    torch.testing.assert_close(found[0], expected[13:], rtol=0, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3", "gpt_neox", "gpt_neox, one after the other"])
def test_a_few_tokens_at_once_are_what_they_are_one_by_one_and_in_the_plain_forward(name: str) -> None:
    model, ids = make(name), text(90)
    pieces = [12, 3, 8, 1, 2, 7, 5, 8, 4, 1, 1, 6, 8, 8, 8, 8]
    assert sum(pieces) == 90
    expected_cache, cache = cache_of(model, 48), cache_of(model, 48)
    expected = []
    at = 0
    for size in pieces:
        expected.append(stream(model, expected_cache, ids[:, at : at + size], size))
        at += size
    install(model, load_kernels("auto"))
    seen = counted_calls(model)
    at = 0
    for size, wanted in zip(pieces, expected, strict=True):
        found = stream(model, cache, ids[:, at : at + size], size)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        at += size
    assert seen == pieces[1:]  # the first one is too long for a model that is not packed
    assert cache.lengths == expected_cache.lengths
    for ours, theirs in zip(cache.streaming_layers, expected_cache.streaming_layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(("kind", "dtype", "at_once"), [("int4", torch.float32, 256), ("int8", torch.float32, 256)])
def test_a_prompt_is_computed_with_the_weights_that_decode(kind: Kind, dtype: torch.dtype, at_once: int) -> None:
    """A chunk of a prompt gives what its tokens give one by one; both round a vector in the same way."""
    compiled, ids = load_kernels("auto"), text(120)
    model = make("llama").to(dtype)
    replace(model, {group: quantize_group(model, group, its, compiled) for group, its in groups(model, kind).items()})
    install(model, compiled)
    assert model.forward.step.max_tokens == at_once
    expected = stream(model, cache_of(model, 160), ids, 1)
    seen = counted_calls(model)
    found = stream(model, cache_of(model, 160), ids, 118)
    assert seen == [118, 1, 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # a step of 16 bits may go the other way


@needs_kernels
def test_chunks_that_pytorch_multiplies_faster_are_left_to_it() -> None:
    compiled, sizes = load_kernels("auto"), dict[str, int]()
    for kind in ("int4", "int8", None):
        model = make("llama").to(torch.bfloat16)
        if kind is not None:
            replace(
                model,
                {group: quantize_group(model, group, its, compiled) for group, its in groups(model, kind).items()},
            )
        install(model, compiled)
        sizes[str(kind)] = model.forward.step.max_tokens
    assert sizes == {"int4": 256, "int8": 256, "None": 8}


@needs_kernels
def test_programs_of_many_lengths_are_not_all_kept() -> None:
    compiled, ids = load_kernels("auto"), text(80)
    model = make("llama")
    replace(model, {group: quantize_group(model, group, its, compiled) for group, its in groups(model, "int8").items()})
    install(model, compiled)
    for size in range(1, 81):
        stream(model, cache_of(model, 96), ids[:, :size], size)
    assert len(model.forward.step._programs) == MAX_PROGRAMS < 80


@needs_kernels
def test_logits_are_given_for_the_tokens_that_are_asked_for() -> None:
    from streamchat.cache.arguments import cache_keyword
    from streamchat.cache.hook import StreamingHook

    model, ids = make("llama"), text(7)
    expected = stream(model, cache_of(model, 24), ids, 7)
    install(model, load_kernels("auto"))
    for keep, count in ((0, 7), (1, 1), (3, 3), (None, 7)):
        cache = cache_of(model, 24)
        with torch.inference_mode(), StreamingHook(model, cache):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=keep, **{cache_keyword(model): cache})
        torch.testing.assert_close(out.logits[0], expected[-count:], rtol=0, atol=1e-4)
        assert cache.length == 7


@needs_kernels
def test_memory_does_not_grow_with_the_lengths_that_are_met() -> None:
    model = make("llama")
    install(model, load_kernels("auto"))
    step = model.forward.step
    cache, ids = cache_of(model, 48), text(36)
    for size in (8, 1, 2, 3, 4, 5, 6, 7):
        stream(model, cache, ids[:, :size], size)
    total = sum(buffer.numel() for buffer in step._workspace._buffers.values())
    assert len(step._programs) == 8
    # one set for a single token, one for up to eight
    widest = max(buffer.numel() for buffer in step._workspace._buffers.values())
    assert total < 8 * widest


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_a_cache_may_have_16_bits_while_the_model_has_32(dtype: torch.dtype, tolerance: float) -> None:
    model, ids = make("llama"), text(34)
    expected = stream(model, cache_of(model, 24), ids, 10)[10:]
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :10], 10)
    convert(cache, dtype)
    found = stream(model, cache, ids[:, 10:], 1)
    assert cache.streaming_layers[0].keys is not None
    assert cache.streaming_layers[0].keys.dtype == dtype
    assert 0 < (found - expected).abs().max() < tolerance * expected.std()


def convert(cache: Any, dtype: torch.dtype) -> None:
    """Changes the format of the keys and values."""
    for layer in cache.streaming_layers:
        layer.storage.select(lambda buffer: buffer.to(dtype))


@needs_kernels
def test_a_cache_in_float64_is_left_to_the_plain_forward() -> None:
    model, ids = make("llama"), text(34)
    cache, expected_cache = (
        StreamingCache(model.config, fit_positions(model), cache_size=24, num_sink_tokens=4, dtype=torch.float64)
        for _ in range(2)
    )
    expected = stream(model, expected_cache, ids, 10)
    install(model, load_kernels("auto"))
    assert isinstance(model.forward.step, CompiledStep)
    seen = counted_calls(model)
    torch.testing.assert_close(stream(model, cache, ids, 10), expected, rtol=0, atol=0)
    assert seen == []
    stream(model, cache_of(model, 24), ids[:, :11], 10)
    assert seen == [1]


@needs_kernels
def test_buffers_of_another_number_format_are_refused() -> None:
    from streamchat.base.errors import CacheError

    model, ids = make("llama"), text(14)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :10], 10)
    convert(cache, torch.float64)
    with pytest.raises(CacheError, match="float64"):
        stream(model, cache, ids[:, 10:11], 1)


@needs_kernels
def test_a_cache_of_other_heads_is_refused() -> None:
    """The kernels would read beyond its end."""
    from streamchat.base.errors import CacheError

    model, ids = make("llama"), text(14)
    install(model, load_kernels("auto"))
    cache = cache_of(model, 24)
    stream(model, cache, ids[:, :10], 10)
    for layer in cache.streaming_layers:
        assert layer.storage is not None
        layer.storage.select(lambda buffer: buffer[:, :1])
    with pytest.raises(CacheError, match="1 key heads of 32"):
        stream(model, cache, ids[:, 10:11], 1)


@needs_kernels
def test_a_step_in_bfloat16_is_nearer_to_float32_than_the_plain_forward(default_model_home: None) -> None:
    whole = load_model("default", device="cpu", dtype="float32")
    half = load_model("default", device="cpu", dtype="bfloat16")
    text = "The river ran past the mill, and the wheel turned. In the evening the men sat down by the fire. " * 4
    ids = whole.tokenizer(text, return_tensors="pt")["input_ids"]
    exact = stream(whole.model, cache_of(whole.model, 256), ids, 16)[16:]

    def error() -> float:
        logits = stream(half.model, cache_of(half.model, 256), ids, 16)[16:].float()
        return float(((logits - exact).square().mean(-1).sqrt() / exact.std(-1)).median())

    step = error()
    uninstall(half.model)
    assert step < 0.02
    assert step < 0.8 * error()
