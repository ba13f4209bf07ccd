"""`streamchat bench --memory`: the figures are those of real processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from streamchat.base import child_processes
from streamchat.base.errors import ExitCode, StreamchatError
from streamchat.benchmarks import peak_memory
from streamchat.cli import main as cli
from tests.support.models_help import save, tiny_llama

FILL = "import sys; sys.stdin.read(); data = bytearray(200_000_000); data[::4096] = b'1' * len(data[::4096]); del data"


def test_memory_that_a_process_frees_again_is_seen() -> None:
    before = peak_memory.peak_megabytes(child_processes.python("-c", "pass"))
    found = peak_memory.peak_megabytes(child_processes.python("-c", FILL + "; import time; time.sleep(0.2)"))
    assert 0 < before < 100
    assert found - before == pytest.approx(200, abs=20) or not sys.platform.startswith("linux")


def test_a_process_that_fails_or_hangs_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StreamchatError, match="exit code 3"):
        peak_memory.peak_megabytes(child_processes.python("-c", "raise SystemExit(3)"))
    monkeypatch.setattr(peak_memory, "TIMEOUT_S", 0.3)
    with pytest.raises(StreamchatError, match="took longer"):
        peak_memory.peak_megabytes(child_processes.python("-c", "import time; time.sleep(60)"))


def test_a_process_that_ends_before_it_reads_says_why() -> None:
    code = "import sys; print('streamchat: the model is gone', file=sys.stderr); sys.exit(3)"
    with pytest.raises(StreamchatError, match=r"\(exit code 3\): the model is gone$"):
        peak_memory.peak_megabytes(child_processes.python("-c", code), b"x" * 1_000_000)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_a_chat_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    arguments = ["--model", str(model), "--dtype", "float32", "--cache-size", "256", "--rounds", "1", "--json"]
    assert cli.main(["bench", "--memory", "--new-tokens", "4", *arguments]) == ExitCode.OK
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    figures = json.loads(last)
    torch, chat = (figures[name]["median_mb"] for name in ("import torch", "a chat in a pipe"))
    assert 50 < torch < chat < 3000
    assert "Peak memory" in text
