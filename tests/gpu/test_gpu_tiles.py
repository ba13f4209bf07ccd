"""int8 and int4 weights in tiles, as on a GPU with fused kernels, on a CPU that stands in for it."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.errors import ConfigError
from streamchat.base.progress import silent
from streamchat.benchmarks.gpu.bandwidth import weight_bytes_per_token
from streamchat.cache.logits import logit_distance
from streamchat.decode.fused import step as fused
from streamchat.decode.install import install, install_captured, uses_fused_kernels
from streamchat.models.fingerprint import model_fingerprint, set_contents_digest
from streamchat.models.quantize import gpu, served_copy
from streamchat.models.quantize.cpu import use_weights
from streamchat.models.quantize.gpu_tiles import quantize_to_tiles, why_not_tiles
from streamchat.models.quantize.weight_storage import stored_bytes
from streamchat.models.served import build_served
from streamchat.quantization import unpack
from streamchat.quantization.layouts import LAYOUTS, weights_of
from streamchat.quantization.linear import joined_bias, quantized_bytes, quantized_layers
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.quantization.weights import ON_A_GPU, Kind, QuantizedWeight, quantize
from tests.gpu.conftest import NEEDS_CUDA
from tests.support.decode_models import cache_of, make, stream
from tests.support.families import build, text
from tests.support.interpreter import needs_interpreter, patch_once
from tests.support.models_help import tiny_llama
from tests.support.recorded_graphs import RecordedGraphs
from tests.support.recorded_launches import RecordedLaunches
from tests.support.simulated_devices import simulated_devices
from tests.support.tile_products import random_tiles

LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: tuple[Kind, ...] = ("int8", "int4")
CPU = torch.device("cpu")


@pytest.fixture
def fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which fused kernels run."""
    monkeypatch.setattr(fused, "unavailable", lambda device: "")


def tokenize(words: str, **_: Any) -> Any:
    return {"input_ids": [ord(letter) % 160 for letter in words]}


def use(model: Any, kind: str, **more: Any) -> tuple[str, tuple[str, ...]]:
    return use_weights(model, tokenize, kind, device="cuda", name="m", kernels="auto", progress=silent, **more)


def tiled(model: Any, kind: Kind = "int8") -> Any:
    quantize_to_tiles(model, kind, "m", silent)
    return model


def dequantized(model: Any) -> Any:
    """The same model, with the dequantized weights as native ones."""
    plain = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        same = copy.deepcopy(layer.plain)
        whole = layer.quantized.dequantize(layer.weight.dtype)
        same.weight = torch.nn.Parameter(whole, requires_grad=False)
        plain.set_submodule(name, same)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_replace_the_weights_where_fused_kernels_run(kind: Kind, fused_kernels: None) -> None:
    model: Any = tiny_llama(**LLAMA)
    native = stored_bytes(model)
    linear = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
    used, _ = use(model, kind)
    assert used == kind
    layers = quantized_layers(model)
    assert {each.quantized.kind for name, each in layers.items() if name != "lm_head"} == {kind}
    assert layers["lm_head"].quantized.kind == "int8"
    per_weight = 1 + 2 / 32 if kind == "int8" else 0.5 + 4 / 32
    inner = sum(each.quantized.nbytes for name, each in layers.items() if name != "lm_head")
    assert inner == per_weight * linear
    assert all(isinstance(each.weight, QuantizedMatrix) for each in layers.values())
    output = layers["lm_head"].quantized
    assert stored_bytes(model) == native - 4 * (linear + output.rows * 64) + inner + output.nbytes
    assert quantized_bytes(model) == 0


def test_auto_stays_native(fused_kernels: None) -> None:
    model = tiny_llama(**LLAMA)
    assert use(model, "auto") == ("native", ())
    assert not quantized_layers(model)


def test_native_weights_are_freed_layer_by_layer(fused_kernels: None) -> None:
    model: Any = tiny_llama(**LLAMA)
    weights = [weakref.ref(each.weight) for name, each in model.named_modules() if name.endswith("_proj")]
    alive: list[int] = []

    def progress(stage: str, done: int = 0, total: int = 0, unit: str = "", /) -> None:
        assert stage == "Quantizing m to int4"
        alive.append(sum(each() is not None for each in weights))

    quantize_to_tiles(model, "int4", "m", progress)
    assert alive[0] == len(weights)
    assert all(0 < before - after <= 3 for before, after in itertools.pairwise(alive) if before)
    assert not any(each() is not None for each in weights)


def test_a_loss_of_quality_is_said(fused_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "AUTO_LIMIT", 1e-9)
    [note] = use(tiny_llama(**LLAMA), "int8")[1]
    assert "loses quality with int8 weights: KL divergence" in note


@pytest.mark.parametrize("decode", ["graph", "plain"])
def test_another_step_needs_torchao(decode: Any, fused_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expected = rf"fused kernels, which cannot be used here \(decode = {decode}\), or torchao, which is not installed; "
    with pytest.raises(ConfigError, match=expected):
        use(tiny_llama(**LLAMA), "int4", decode=decode)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "llama_dynamic"])
def test_a_model_that_the_kernels_do_not_compute_needs_torchao(name: str, fused_kernels: None) -> None:
    assert why_not_tiles(build(name), "int8", "auto") == fused.INCOMPLETE


def test_a_product_that_would_be_half_tiles_needs_torchao(fused_kernels: None) -> None:
    """One key head of 8 rows is less than a tile of int4; a width of 80 leaves a product native as a whole."""
    model = tiny_llama(**LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 1})
    assert why_not_tiles(model, "int4", "auto") == fused.INCOMPLETE
    assert why_not_tiles(model, "int8", "auto") == ""
    assert why_not_tiles(tiny_llama(**LLAMA | {"intermediate_size": 80}), "int4", "auto") == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "llama, biases", "gpt_neox"])
def test_every_forward_computes_with_the_dequantized_weights(name: str, kind: Kind) -> None:
    model = make(name)
    native = stream(model, cache_of(model, 48), text(80), 20)
    plain = dequantized(tiled(model, kind))
    expected = stream(plain, cache_of(plain, 48), text(80), 20)
    assert (expected - native).abs().max() > 1e-3
    found = stream(model, cache_of(model, 48), text(80), 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    graphs = RecordedGraphs()
    assert install_captured(model, graphs.record, "graph")
    found = stream(model, cache_of(model, 48), text(80), 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert graphs.replays > 40


def test_an_output_layer_that_is_the_embedding_gets_tiles_of_its_own() -> None:
    model = tiled(make("llama, tied"), "int4")
    head, table = model.lm_head, model.model.embed_tokens.weight
    assert head.weight is table
    assert not isinstance(table, QuantizedMatrix)
    assert quantized_bytes(model) == head.quantized.nbytes > 0
    assert weight_bytes_per_token(model) == stored_bytes(model) - table.nbytes + head.quantized.nbytes
    hidden = torch.randn(30, 128, generator=torch.Generator().manual_seed(0))
    expected = hidden @ head.quantized.dequantize(torch.float32).T  # for any number of tokens
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama, tied", "llama, biases", "gpt_neox"])
def test_the_fingerprint_is_that_of_the_served_copy_of_a_cpu(name: str, tmp_path: Path) -> None:
    """Same weights, same bytes: a session that was saved on the one opens on the other."""
    model = tiled(make(name), "int8")
    folder = tmp_path / "copy"
    folder.mkdir()
    served_copy._write(model, folder)
    model.config.save_pretrained(str(folder))
    built = build_served(folder, torch.float32, "sdpa", None)
    assert built is not None
    served, info = built
    assert not info["missing_keys"]
    assert model_fingerprint(served) == model_fingerprint(model)
    for each in (served, model):
        set_contents_digest(each, "a file")
    assert model_fingerprint(served) == model_fingerprint(model)
    assert model_fingerprint(tiled(make(name), "int4")) != model_fingerprint(model)


def test_the_state_of_a_model_is_dequantized() -> None:
    model = tiled(make("llama"), "int4")
    state = model.state_dict()
    name = "model.layers.0.mlp.up_proj"
    assert not isinstance(state[f"{name}.weight"], QuantizedMatrix)
    whole = quantized_layers(model)[name].quantized.dequantize(torch.float32)
    assert torch.equal(state[f"{name}.weight"], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_of_its_own_nothing_mixes(kind: Kind) -> None:
    """Quantized there, to the same tiles; every operation of a forward stays there."""
    near, ids = tiled(make("llama, biases"), kind), text(24)
    expected = stream(near, cache_of(near, 48), ids, 20)
    with simulated_devices(), torch.inference_mode(False), torch.no_grad():
        far = tiled(_moved(make("llama, biases"), "cpu:1"), kind)
        assert {str(weight.device) for weight in far.parameters()} == {"cpu:1"}
        found = stream(far, cache_of(far, 48), ids.to("cpu:1"), 20).cpu()
        whole = quantized_layers(far)["model.layers.0.mlp.up_proj"].quantized
        assert torch.equal(whole.dequantize(torch.bfloat16).cpu(), _up(near).dequantize(torch.bfloat16))
        assert torch.equal(whole.rows_at(torch.arange(5, device="cpu:1"), torch.float32).cpu(), _up_rows(near))
        biases = joined_bias([far.lm_head, far.model.layers[0].mlp.up_proj], torch.float32)
        assert biases is not None
        assert str(biases.device) == "cpu:1"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def _moved(model: Any, device: str) -> Any:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.to(device), requires_grad=False)
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items()})
    return model


def _up(model: Any) -> QuantizedWeight:
    return quantized_layers(model)["model.layers.0.mlp.up_proj"].quantized


def _up_rows(model: Any) -> torch.Tensor:
    return _up(model).rows_at(torch.arange(5), torch.float32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_and_lookups_of_every_layout(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a matrix is dequantized in several parts, and its last tile is not full."""
    monkeypatch.setattr(unpack, "WEIGHTS_TOGETHER", 256 * 32)
    weight = random_tiles(name, torch.device("cpu"))
    whole = weights_of(weight.tile_layout, weight.data).view(-1, 256)[:40]
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    assert logit_distance(weight.multiply(x), x @ whole.T) < 1e-6
    half = weight.multiply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, x.bfloat16() @ whole.bfloat16().T)
    ids = torch.tensor([39, 0, 17, 17])
    assert torch.equal(weight.rows_at(ids, torch.float32), whole[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_no_product_has_a_copy_of_a_large_matrix(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "WEIGHTS_TOGETHER", 64 * 32)
    weight = quantize(torch.randn(160, 64, generator=torch.Generator().manual_seed(0)), kind, None, tiled=True)
    parts = list(unpack.chunks(weight.tile_layout, weight.data, 160, 64, torch.float16))
    assert [tuple(part.shape) for part in parts] == [(32, 64)] * 5
    assert torch.equal(torch.cat(parts), weight.dequantize(torch.float16))


@needs_interpreter
@pytest.mark.parametrize(("name", "kind"), [("llama, tied", "int4"), ("gpt_neox", "int8")])
def test_fused_kernels_decode_with_the_tiles(
    name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the setting to the logits, over evictions: what a GPU does, in Triton's interpreter."""
    patch_once()
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else find(name))
    model = make(name)
    assert use(model, kind, decode="fused")[0] == kind
    plain = dequantized(model)
    expected = stream(plain, cache_of(plain, 16), text(19), 8)
    graphs = RecordedLaunches()
    assert install_captured(model, graphs.record, "fused")
    found = stream(model, cache_of(model, 16), text(19), 8)
    assert uses_fused_kernels(model)
    assert graphs.replays > 3
    assert not caplog.records
    assert logit_distance(found, expected) < 2e-5


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_decodes_with_tiles(kind: Kind, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """The fused kernels and the recorded prompts, against the plain forward of the dequantized weights."""
    model = make("llama").to("cuda", dtype)
    if reason := why_not_tiles(model, kind, "auto"):
        pytest.skip(f"no fused kernels here: {reason}")
    assert use(model, kind)[0] == kind
    plain, ids = dequantized(model), text(120).cuda()
    expected = stream(plain, cache_of(plain, 48), ids, 20).float()
    assert install(model, None, "fused")
    found = stream(model, cache_of(model, 48), ids, 20).float()
    assert uses_fused_kernels(model)
    assert "without" not in caplog.text
    assert logit_distance(found, expected) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_makes_the_tiles_of_a_cpu_and_needs_little_more_memory(kind: Kind) -> None:
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, near = quantize(weight, kind, None, tiled=True), weight.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = quantize(near, kind, None, tiled=True)
    assert torch.cuda.max_memory_allocated() - before < 2 * expected.nbytes + 16 * 4 * ON_A_GPU
    assert (found.data.cpu() != expected.data).float().mean() < 5e-3  # ties round either way
    whole = expected.dequantize(torch.bfloat16)
    torch.testing.assert_close(moved_to(expected, "cuda").dequantize(torch.bfloat16).cpu(), whole, rtol=0, atol=0)


def moved_to(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    return replace(weight, data=weight.data.to(device), scales=weight.scales.to(device))
