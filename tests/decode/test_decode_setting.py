"""The setting `decode` chooses the step for new tokens; every front end names the step that runs, and why."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Decode, Settings
from streamchat.conversation.assemble import assemble
from streamchat.decode import install as decode_install
from streamchat.decode.check import StepCheck
from streamchat.decode.install import install, install_captured
from streamchat.decode.report import step_report
from streamchat.decode.steps import COMPILED, FUSED, GRAPH, OPERATIONS, PLAIN, expected_step
from streamchat.frontend.presenter import present
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import status_table
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.models import checked_step
from streamchat.models.load import load_model
from tests.support.decode_models import cache_of, make, stream
from tests.support.families import text
from tests.support.models_help import save, tiny_llama
from tests.support.recorded_graphs import RecordedGraphs
from tests.support.scripted_engine import ScriptedEngine

CHOICES: tuple[Decode, ...] = ("auto", "fused", "graph", "plain")
needs_kernels = pytest.mark.skipif(load_kernels("auto") is None, reason=why_unavailable("auto"))
INFO = ScriptedEngine()._info()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save(tiny_llama(hidden_size=64, max_position_embeddings=1024), tmp_path / "model")


@needs_kernels
def test_the_setting_chooses_the_step_of_a_cpu_and_the_tokens_are_the_same(folder: Path) -> None:
    found, written = {}, {}
    for decode in CHOICES:
        loaded = load_model(str(folder), device="cpu", dtype="float32", decode=decode)
        assert loaded.step is not None
        assert loaded.step == step_report(loaded.model, decode)
        assert loaded.notes == ()
        found[decode] = loaded.step.text
        written[decode] = stream(loaded.model, cache_of(loaded.model, 48), text(90), 30)
    assert found == {
        "auto": COMPILED,
        "fused": COMPILED,
        "graph": f"{OPERATIONS}: decode = graph",
        "plain": f"{PLAIN}: decode = plain",
    }
    for decode in CHOICES:
        torch.testing.assert_close(written[decode], written["plain"], rtol=0, atol=1e-3)


def test_a_step_that_is_missing_is_replaced_by_the_next_one_and_the_user_is_told(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32", kernels="torch", decode="fused")
    [note] = loaded.notes
    assert note == (
        "decode = fused is not available here (kernels = 'torch' was chosen), so new tokens are computed by "
        "PyTorch operations."
    )
    assert load_model(str(folder), device="cpu", dtype="float32", kernels="torch").notes == ()


def test_a_model_without_a_step_says_why() -> None:
    model: Any = make("llama")
    model.__class__ = type("OtherForCausalLM", (type(model),), {})
    assert not install(model, None)
    assert step_report(model).text == f"{PLAIN}: there is no step for OtherForCausalLM"
    assert step_report(model, "fused").note("fused").startswith("decode = fused is not available here (there is no")


def test_a_step_that_fails_its_check_is_not_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_step, "check_step", lambda model: StepCheck(1.0, 0.1))
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    assert loaded.step is not None
    assert loaded.step.text == f"{PLAIN}: a check of the step failed"
    [note] = loaded.notes
    assert "gives other logits" in note


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Have the parameters of a model say that they are on CUDA, and record operations instead of graphs."""

    def on_the_cpu(model: Any, record: Any, decode: Decode) -> bool:
        del model.parameters
        return install_captured(model, RecordedGraphs().record, decode)

    def pretend(model: Any) -> None:
        device = torch.device("cuda", 0)
        parameters = [type("Weights", (), {"device": device})()]
        model.parameters = lambda: parameters
        monkeypatch.setattr(decode_install, "input_device", lambda _: device)
        monkeypatch.setattr(decode_install, "install_captured", on_the_cpu)

    return pretend


@pytest.mark.parametrize(
    ("decode", "expected"), [("auto", GRAPH), ("fused", GRAPH), ("graph", GRAPH), ("plain", PLAIN)]
)
def test_the_setting_chooses_the_step_of_a_gpu(
    decode: Decode, expected: str, on_cuda: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama")
    on_cuda(model)
    with caplog.at_level(logging.WARNING):
        assert install(model, None, decode=decode) is (expected != PLAIN)
    assert step_report(model, decode).name == expected
    assert hasattr(model.forward, "without_plans")  # also the plain forward keeps no plan for every length
    logged = [line for line in caplog.messages if "decoding without fused kernels" in line]
    assert len(logged) == (decode == "fused")


def test_the_reason_on_a_gpu_is_the_setting_or_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_install, "unavailable", lambda device: "Triton is not installed")
    found: dict[Decode, str] = {}
    for decode in ("graph", "auto"):
        model = make("llama")
        install_captured(model, RecordedGraphs().record, decode)
        found[decode] = step_report(model, decode).text
    assert found == {"graph": f"{GRAPH}: decode = graph", "auto": f"{GRAPH}: Triton is not installed"}


class BrokenKernels:
    """Fused kernels that compile and cannot be launched."""

    def compile(self) -> None:
        pass

    def run(self, inputs: Any, buffers: Any) -> Any:
        raise RuntimeError("out of shared memory")


@pytest.mark.parametrize("records", [True, False])
def test_a_step_that_is_given_up_during_a_chat_is_shown(
    records: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32", decode="plain")

    def fail(run: Any) -> Any:
        raise RuntimeError("out of graphs")

    monkeypatch.setattr(decode_install, "unavailable", lambda device: "")
    monkeypatch.setattr(decode_install, "fused_step", lambda model, device: BrokenKernels())
    install_captured(loaded.model, RecordedGraphs().record if records else fail)
    loaded = replace(loaded, step=step_report(loaded.model))
    settings = Settings(temperature=0, cache_size=64, max_new_tokens=20)
    with torch.inference_mode():
        made = assemble(Configuration(settings, {"cache_size": "test"}), loaded, lambda _: None, lambda *_: None)
    chat, board = made.conversation, StatusBoard()
    board.apply(ev.ModelReady(made.info, 1.0))
    assert step_of(board) == FUSED
    for turn in range(4):
        chat.run_turn(f"hello {turn}", lambda: False)
    step = chat.recorded_step
    assert step is not None
    board.apply(ev.StatusSampled(chat.state(), ev.MemoryState(1), decode_step=step.name, decode_reason=step.reason))
    expected = f"{GRAPH}: RuntimeError: out of shared memory" if records else f"{PLAIN}: RuntimeError: out of graphs"
    assert step_of(board) == expected
    board.apply(ev.StatusSampled(chat.state(), ev.MemoryState(1)))
    assert step_of(board) == expected


def step_of(board: StatusBoard) -> str:
    """The row of the status panel."""
    return {row.label: row.value for row in status_table(board)["model"]}["decode step"]


# --- what names the step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "decode", "no_kernels", "expected"),
    [
        ("cpu", "auto", "", COMPILED),
        ("cpu", "auto", "no compiler", f"{OPERATIONS}: no compiler"),
        ("cpu", "graph", "no compiler", f"{OPERATIONS}: decode = graph"),
        ("cpu", "plain", "", f"{PLAIN}: decode = plain"),
        ("cuda:1", "graph", "", f"{GRAPH}: decode = graph"),
        ("cuda:0,1", "auto", "", f"{PLAIN}: the layers are on several devices"),
        ("mps", "fused", "", f"{PLAIN}: there is no step for mps"),
    ],
)
def test_what_a_model_is_expected_to_get(device: str, decode: Decode, no_kernels: str, expected: str) -> None:
    assert expected_step(device, decode, no_kernels).text == expected


def test_the_line_of_a_loaded_model_names_the_step_only_if_there_is_a_faster_one() -> None:
    def line(**changes: str) -> str:
        found = present(ev.ModelReady(replace(INFO, **changes), 2.1))  # type: ignore[arg-type]
        assert found is not None
        return found.text

    assert "compiled" not in line(decode_step=COMPILED)
    slow = line(decode_step=GRAPH, decode_reason="Triton is not installed")
    assert " · captured graph: Triton is not installed · ready in" in slow


def test_doctor_names_the_step_and_where_the_choice_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--device", "cpu", "--decode", "graph"])
    out = capsys.readouterr().out
    assert f"{OPERATIONS}: decode = graph (from --decode)" in out


COMMANDS = {
    "verify": ["verify", "--cache-size", "32"],
    "replay": ["replay", "a.txt", "--out", "run", "--max-turns", "1", "--max-new-tokens", "4", "--cache-size", "64"],
    "pipe": ["--plain", "--max-new-tokens", "4", "--cache-size", "64"],
    "bench": ["bench", "--resume", "--cache-size", "64", "--rounds", "1"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_obeys_the_setting(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(model: Any, kernels: Any, decode: Decode) -> bool:
        asked.append(decode)
        return False

    (folder.parent / "a.txt").write_text("The miller had a mill by the river. " * 4)
    monkeypatch.setattr(checked_step, "install", noted)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    flags = ["--decode", "plain"]
    if name == "bench":  # its flag --decode is another one
        monkeypatch.setenv("STREAMCHAT_DECODE", "plain")
        flags = []
    assert cli.main([*COMMANDS[name], "--model", "model", "--device", "cpu", *flags]) == 0
    assert set(asked) == {"plain"}
