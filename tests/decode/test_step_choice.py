"""Which step decodes on a GPU: fused kernels, a captured step, or the plain forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.config.settings import Decode
from streamchat.decode import install as decode_install
from streamchat.decode.fused import step as fused
from streamchat.decode.install import install, install_captured, uninstall, uses_fused_kernels
from streamchat.decode.static import Inputs, bind, static_step
from streamchat.decode.static_slots import Buffers
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.quantization.weights import quantize
from tests.support.decode_models import cache_of, make, stream
from tests.support.families import text
from tests.support.recorded_graphs import RecordedGraphs


class StandIn:
    """A fused step that computes what the step of torch operations computes, or goes wrong."""

    def __init__(self, model: Any, wrong: str = "") -> None:
        self.step, self.dtype, self.wrong = static_step(model), model.dtype, wrong
        self.compiled = self.runs = 0

    def compile(self) -> None:
        self.compiled += 1
        if self.wrong == "compiler":
            raise RuntimeError("ptxas fatal")

    def run(self, inputs: Inputs, buffers: Sequence[Buffers]) -> Tensor:
        self.runs += 1
        if self.wrong == "launch":
            raise RuntimeError("out of resource: shared memory")
        assert self.step is not None
        logits = bind(self.step, inputs, buffers, self.dtype)()
        return logits.flip(-1) if self.wrong == "logits" else logits


@pytest.fixture
def with_stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Install a step with a stand-in for the fused one; returns the model and the stand-in."""

    def made(decode: Decode, wrong: str = "") -> Any:
        model = make("llama")
        stand_in = StandIn(model, wrong)
        monkeypatch.setattr(decode_install, "unavailable", lambda _: "")
        monkeypatch.setattr(decode_install, "fused_step", lambda *_: stand_in)
        graphs = RecordedGraphs()
        assert install_captured(model, graphs.record, decode)
        return model, stand_in, graphs

    return made


def logits_of(model: Any) -> Tensor:
    return stream(model, cache_of(model, 32), text(60), 10)


@pytest.mark.parametrize(("decode", "expected"), [("auto", True), ("fused", True), ("graph", False)])
def test_the_setting_chooses_the_step(with_stand_in: Callable[..., Any], decode: Decode, expected: bool) -> None:
    model, stand_in, graphs = with_stand_in(decode)
    assert uses_fused_kernels(model) is expected
    logits_of(model)
    assert bool(stand_in.runs) is expected
    assert stand_in.compiled == expected  # before the first token, which must not wait for a compiler
    assert graphs.recordings == 1


def test_plain_installs_no_step_and_keeps_the_limit_on_attention() -> None:
    model = make("llama")
    assert not install_captured(model, RecordedGraphs().record, "plain")
    assert not hasattr(model.forward, "step")
    assert hasattr(model.forward, "without_plans")
    cpu = make("llama")
    assert not install(cpu, None, "plain")
    assert install(cpu, None)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("compiler", "ptxas fatal"), ("launch", "out of resource"), ("logits", "those of the plain forward")],
)
def test_whatever_fails_is_logged_once_and_the_recorded_step_goes_on(
    with_stand_in: Callable[..., Any], wrong: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = logits_of(make("llama"))
    with caplog.at_level(logging.WARNING):
        model, _, graphs = with_stand_in("auto", wrong)
        found = logits_of(model)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    said = [record.getMessage() for record in caplog.records if "without" in record.getMessage()]
    assert len(said) == 1
    assert "without fused kernels" in said[0]
    assert reason in said[0]
    assert graphs.recordings == 1  # of the other step
    assert not uses_fused_kernels(model)


@pytest.mark.parametrize(("decode", "level"), [("auto", logging.INFO), ("fused", logging.WARNING)])
def test_missing_triton_is_a_warning_only_for_who_asked_for_it(
    decode: Decode, level: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    model = make("llama")
    with caplog.at_level(logging.INFO):
        assert install_captured(model, RecordedGraphs().record, decode)
    found = [(each.levelno, each.getMessage()) for each in caplog.records if each.name == decode_install.__name__]
    assert found == [(level, "decoding without fused kernels: Triton is not installed")]
    assert not uses_fused_kernels(model)
    uninstall(model)


def test_devices_without_the_needed_arithmetic_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(fused, "is_interpreted", lambda: False)
    assert fused.unavailable(torch.device("cpu")) == "they are for CUDA, not for cpu"
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert fused.unavailable(cuda) == "the GPU has compute capability 7.5; they need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert fused.unavailable(cuda) == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert fused.unavailable(cuda) == "they are for CUDA, not for ROCm"


def test_weights_that_are_no_matrix_in_memory_are_left_to_their_layers() -> None:
    """torchao, for example, gives a plain linear layer a weight of codes."""
    model = make("llama")
    assert fused.fused_step(model, torch.device("cpu")) is not None
    layer = model.model.layers[1].mlp.down_proj
    codes = quantize(layer.weight, "int8", None, tiled=True)
    layer.weight = torch.nn.Parameter(QuantizedMatrix(codes, torch.float32), requires_grad=False)
    assert type(layer) is torch.nn.Linear
    assert fused.fused_step(model, torch.device("cpu")) is None
