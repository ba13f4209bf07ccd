"""On a GPU: replayed steps are those of the plain forward, and quantised weights serve."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from streamchat.base.progress import silent
from streamchat.cache import checkpoint
from streamchat.cache.logits import logit_distance
from streamchat.decode.cuda_graph import STEADY
from streamchat.decode.install import uninstall, uses_fused_kernels
from streamchat.models.quantize.gpu import quantize_on_gpu
from streamchat.quantization.layouts import LAYOUTS, LayoutName
from tests.support.decode_models import KNOWN, cache_of, counted, make, stream
from tests.support.families import text
from tests.support.gpus import TestedGpu, allocated
from tests.support.tile_products import product_with_tiles


@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_cache_are_those_of_the_plain_forward(
    name: str, gpu: TestedGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = make(name).to(gpu.place), text(200).to(gpu.place)
    expected_cache, cache = cache_of(model, 64), cache_of(model, 64)
    expected = stream(model, expected_cache, ids, 40)
    seen = counted(model, monkeypatch)
    assert gpu.install(model)
    with caplog.at_level(logging.WARNING):
        found = stream(model, cache, ids, 40)
    assert "captured step" not in caplog.text
    assert "fused kernels" not in caplog.text
    assert uses_fused_kernels(model) == gpu.is_real  # the stand-in has no Triton
    assert seen == [40, 1]
    assert cache.compression_count > 50
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert cache.ledger == expected_cache.ledger
    for ours, theirs in zip(cache.streaming_layers, expected_cache.streaming_layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-3)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-3)


def test_cuts_clears_checkpoints_and_other_caches(gpu: TestedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Any) -> torch.Tensor:
        cache = cache_of(model, 48)
        cache.position_limit = 100
        found = [stream(model, cache, text(100).to(gpu.place), 30)]
        cache.crop_newest(7)
        kept = checkpoint.capture(cache)
        twin = copy.deepcopy(cache)
        found.append(stream(model, cache, text(60, seed=6).to(gpu.place), 12))
        cache.reset()
        found.append(stream(model, cache, text(30, seed=7).to(gpu.place), 4))
        checkpoint.restore(cache, kept)
        for seed in range(4):
            found.append(stream(model, cache, text(20, seed=seed).to(gpu.place), 1))
            found.append(stream(model, twin, text(20, seed=seed).to(gpu.place), 1))
        return torch.cat(found)

    model = make("llama").to(gpu.place)
    expected = run(model)
    seen = counted(model, monkeypatch)
    gpu.install(model)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-3)
    assert seen[-4:] == [30, 1, 12, 4]  # prompts, and the token by which the step was checked


def test_memory_stays_and_a_cache_that_is_gone_gives_its_memory_back(gpu: TestedGpu) -> None:
    model = make("llama").to(gpu.place)
    gpu.install(model)
    cache = cache_of(model, 256)
    stream(model, cache, text(400).to(gpu.place), 200)[-1].cpu()
    before = allocated()
    for seed in range(10):
        stream(model, cache, text(200, seed=seed).to(gpu.place), 1)[-1].cpu()
    assert allocated() <= before + 4096
    size = cache.kv_bytes
    del cache
    if gpu.is_real:  # operations recorded on a CPU keep their tensors
        assert allocated() <= before - size + 4096


def test_16_bits_stay_near_the_plain_forward(gpu: TestedGpu, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = make("llama").to(gpu.place, torch.bfloat16), text(200).to(gpu.place)
    expected = stream(model, cache_of(model, 64), ids, 40).float()
    gpu.install(model)
    with caplog.at_level(logging.WARNING):
        found = stream(model, cache_of(model, 64), ids, 40).float()
    assert "captured step" not in caplog.text
    assert (found - expected).square().mean().sqrt() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_are_replayed_too(kind: Any, gpu: TestedGpu, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    if kind == "int4" and not gpu.is_real:
        pytest.skip("torchao has int4 kernels for CUDA only")
    model, ids = make("llama").to(gpu.place, torch.bfloat16), text(40 + 3 * STEADY).to(gpu.place)
    native = stream(model, cache_of(model, 48), ids, 20).float()
    quantize_on_gpu(
        model,
        lambda words, **_: {"input_ids": [ord(letter) % 160 for letter in words]},
        kind,
        name="m",
        progress=silent,
        decode="graph",
    )
    expected = stream(model, cache_of(model, 48), ids, 20).float()
    error = (expected - native).square().mean().sqrt() / native.std()
    assert 0 < error < (0.1 if kind == "int8" else 0.5)
    gpu.install(model)
    with caplog.at_level(logging.WARNING):
        found = stream(model, cache_of(model, 48), ids, 20).float()
    uninstall(model)
    assert "captured step" not in caplog.text
    assert (found - expected).square().mean().sqrt() < 0.1 * expected.std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and torch finds none here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_kernels_multiply_with_tiles(name: LayoutName, dtype: torch.dtype) -> None:
    found, expected = product_with_tiles(name, torch.device("cuda"), dtype)
    assert logit_distance(found, expected) < 1e-5
