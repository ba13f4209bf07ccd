"""`streamchat bench --startup`: the moments are those of a real start in a pseudo-terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streamchat.base.errors import ExitCode
from streamchat.base.events import FinishReason, TurnFinished, TurnStats
from streamchat.benchmarks import startup
from streamchat.benchmarks.attaching import can_attach
from streamchat.cli import front_ends
from streamchat.cli import main as cli
from streamchat.telemetry import trace
from tests.support.models_help import save, tiny_llama


def test_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace.mark("nobody asks")
    path = tmp_path / "trace"
    monkeypatch.setenv(trace.VARIABLE, str(path))
    for name in ("first paint", "first token", "first token"):
        trace.mark(name)
    with path.open("a") as stream:
        stream.write("123.4 half a li")
    found = trace.read_events(str(path))
    assert list(found) == ["first paint", "first token"]
    assert found["first paint"] <= found["first token"]
    assert trace.read_events(str(tmp_path / "none")) == {}
    monkeypatch.setenv(trace.VARIABLE, str(tmp_path))  # cannot be written: the chat goes on
    trace.mark("first paint")


@pytest.mark.parametrize(
    ("reason", "marked"), [("stop", ["first token"]), ("error", ["failed: no memory"])], ids=["empty", "failed"]
)
def test_a_reply_without_text_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: FinishReason, marked: list[str]
) -> None:
    """The first token of a reply may be the one that ends it."""
    monkeypatch.setenv(trace.VARIABLE, str(tmp_path / "trace"))
    stats = TurnStats(1, 3, 0, 10, 64, 0, 0, 0.1, None, 1, 1, None, reason)
    front_ends.mark_start(TurnFinished(stats, reason, "", "hello", reason == "error", "no memory"))
    assert list(trace.read_events(str(tmp_path / "trace"))) == marked


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.usefixtures("compiled_kernels")
def test_a_start_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    arguments = ["--model", str(model), "--dtype", "float32", "--cache-size", "256", "--rounds", "1", "--json"]
    assert cli.main(["bench", "--startup", *arguments]) == ExitCode.OK
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    stages = ["python", "--help", "a wrong flag", "first paint", "model ready", "first token"]
    stages += ["import torch", "first token in a pipe"]
    figures = {name: json.loads(last)[name]["median_s"] for name in stages}
    assert 0 < figures["python"] < figures["--help"]
    assert 0 < figures["first paint"] < figures["model ready"] < figures["first token"]
    assert "first paint of the app" in text
    assert figures["first token in a pipe"] > 0
    if can_attach():
        attached = {
            name: json.loads(last)[f"attached: {name}"]["median_s"] for name in ("paint", "token", "paint to token")
        }
        assert 0 < attached["paint"] < attached["token"]
        assert attached["paint to token"] == pytest.approx(attached["token"] - attached["paint"], rel=0.01)
        assert "streamchat attach: from first paint to first token" in text
    assert figures["import torch"] > 0
    ratio = json.loads(last)["first token in a pipe / import torch"]["median"]
    assert ratio == pytest.approx(figures["first token in a pipe"] / figures["import torch"], rel=0.01)
    parts = [json.loads(last)[f"part: {name}"]["median_s"] for name in startup.PARTS]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(figures["first token"], rel=0.01)
    assert "import transformers and the code of the model" in text


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_start_that_fails_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--startup", "--rounds", "1", "--cache-size", "1"]) == ExitCode.USAGE
    assert cli.main(["bench", "--startup", "--rounds", "1", "--device", "cuda:99"]) != ExitCode.OK
    out, err = capsys.readouterr()
    assert out == ""
    assert "cuda:99" in err
