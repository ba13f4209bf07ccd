"""Weights quantised by torchao, as on a GPU; its int8 product runs on a CPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.errors import ConfigError
from streamchat.base.progress import silent
from streamchat.decode.install import install_captured
from streamchat.models.fingerprint import model_fingerprint
from streamchat.models.load import load_model
from streamchat.models.quantize import gpu
from streamchat.models.quantize.cpu import use_weights
from streamchat.models.quantize.gpu import quantize_on_gpu
from streamchat.models.quantize.weight_storage import stored_bytes, stored_tensors
from tests.gpu.conftest import NEEDS_CUDA
from tests.support.decode_models import cache_of, make, stream
from tests.support.families import text
from tests.support.models_help import make_tokenizer, tiny_llama
from tests.support.recorded_graphs import RecordedGraphs

pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def int8(model: Any, tokenizer: Any) -> tuple[str, ...]:
    return quantize_on_gpu(model, tokenizer, "int8", name="m", progress=silent, decode="graph")


def test_all_linear_layers_but_the_output_are_int8_and_predictions_stay() -> None:
    model, tokenizer = tiny_llama(**LLAMA), make_tokenizer()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    said = model_fingerprint(model)
    assert int8(model, tokenizer) == ()
    for name, weight in model.named_parameters():
        parts = stored_tensors(weight)
        if "_proj" not in name:
            assert torch.equal(weight, before[name])
            continue
        codes, scales = parts[0], parts[1]
        assert codes.dtype == torch.int8
        meant = codes.float() * scales.float().view(-1, 1)
        step = before[name].abs().amax(1, keepdim=True) / 127
        assert ((meant - before[name]).abs() <= 0.6 * step).all()
    assert model_fingerprint(model) != said


def test_bytes_are_those_of_codes_and_scales() -> None:
    model = tiny_llama(**LLAMA)
    plain = sum(weight.nbytes for weight in model.parameters())
    assert stored_bytes(model) == plain
    linear = sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name)
    int8(model, make_tokenizer())
    assert plain - 4 * linear + linear < stored_bytes(model) < plain - 4 * linear + 1.2 * linear


def test_a_loss_of_quality_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "AUTO_LIMIT", 1e-9)
    notes = int8(tiny_llama(**LLAMA), make_tokenizer())
    assert len(notes) == 1
    assert "loses quality with int8 weights: KL divergence" in notes[0]


@pytest.mark.parametrize("has_cuda", [False, True])
def test_int4_on_a_cpu_is_refused_in_one_sentence(has_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU, where torchao's own sentence is another one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    expected = (
        r"^weights = 'int4' cannot be used: its kernels need a GPU with CUDA, and the model is on cpu; "
        r"choose weights = native$"
    )
    with pytest.raises(ConfigError, match=expected):
        quantize_on_gpu(tiny_llama(**LLAMA), make_tokenizer(), "int4", name="m", progress=silent)


@pytest.mark.gpu
@NEEDS_CUDA
def test_int4_of_another_dtype_is_refused_in_one_sentence() -> None:
    model: Any = tiny_llama(**LLAMA)
    with pytest.raises(ConfigError, match="its kernels need dtype = bfloat16, and the model has float32; choose"):
        quantize_on_gpu(model.to("cuda"), make_tokenizer(), "int4", name="m", progress=silent, decode="graph")


def test_what_torchao_cannot_do_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr("torchao.quantization.quantize_", fail)
    with pytest.raises(
        ConfigError, match=r"'int8' cannot be used: torchao reported .*no kernel.*weights = native"
    ) as error:
        int8(tiny_llama(**LLAMA), make_tokenizer())
    assert "\n" not in str(error.value)


def test_it_is_what_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def quantised(model: object, tokenizer: object, weights: str, **_: object) -> tuple[str, ...]:
        asked.append(weights)
        return ("a note",)

    monkeypatch.setattr("streamchat.models.quantize.cpu.quantize_on_gpu", quantised)
    model = tiny_llama(**LLAMA)
    for device in ("cuda", "cuda:1"):
        assert use_weights(model, None, "int8", device=device, name="m", kernels="auto", progress=silent) == (
            "int8",
            ("a note",),
        )
        assert use_weights(model, None, "auto", device=device, name="m", kernels="auto", progress=silent) == (
            "native",
            (),
        )
    assert asked == ["int8", "int8"]


@pytest.mark.parametrize("name", ["llama", "llama, biases", "gpt_neox"])
def test_a_quantised_model_is_recorded_and_replayed_as_its_forward_computes(name: str) -> None:
    model = make(name)
    native = stream(model, cache_of(model, 48), text(80), 20)
    int8(model, lambda words, **_: {"input_ids": [ord(letter) % 160 for letter in words]})
    expected = stream(model, cache_of(model, 48), text(80), 20)
    assert (expected - native).abs().max() > 0
    graphs = RecordedGraphs()
    assert install_captured(model, graphs.record)
    torch.testing.assert_close(stream(model, cache_of(model, 48), text(80), 20), expected, rtol=0, atol=1e-3)
    assert graphs.replays > 40


def test_the_default_model_loses_less_than_1_percent_of_perplexity(default_model_home: Path) -> None:
    loaded = load_model("default", device="cpu", dtype="bfloat16")
    before = stored_bytes(loaded.model)
    assert int8(loaded.model, loaded.tokenizer) == ()
    assert stored_bytes(loaded.model) < 0.65 * before
