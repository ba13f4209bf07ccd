"""The program that checks and measures a GPU in one go, with the stand-in and short commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from streamchat.models.load import load_model
from tests.support.gpus import stand_in
from tests.support.models_help import save, tiny_llama
from tools import gpu_check


def test_a_chat_is_measured(tmp_path: Path) -> None:
    folder = save(tiny_llama(max_position_embeddings=4096), tmp_path / "tiny")
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    stand_in().install(loaded.model)
    found = json.loads(json.dumps(gpu_check.measure_chat(loaded, 8)))
    assert found["disabled_steps"] == ""
    assert found["ttft_ms"]["first quarter"] > 0
    assert found["ttft_ms"]["later"] > 0
    assert found["decode_tps"] > 0
    assert list(found["prefill_tps"]) == ["256", "512", "1024"]
    assert len(found["first_chunks_ms"]) == 2048 // 256  # of a CPU


def test_all_steps_run_and_the_summary_names_those_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    steps = {
        "fine": (60, command("print('all is well')")),
        "broken": (60, command("import sys; print('no'); sys.exit(3)")),
        "slow": (1, command("import time; print('begun', flush=True); time.sleep(60)")),
        "last": (60, command("print('the end')")),
    }
    assert gpu_check.run_steps(steps, tmp_path / "out") == 1
    summary = capsys.readouterr().out.rpartition("==> summary\n")[2].splitlines()
    assert [line.rsplit(maxsplit=2)[0].split(maxsplit=1) for line in summary] == [
        ["fine", "ok"],
        ["broken", "exit code 3"],
        ["slow", "stopped after 1 s"],
        ["last", "ok"],
    ]
    assert (tmp_path / "out" / "broken.txt").read_text() == "no\n"
    assert gpu_check.run_steps({"fine": steps["fine"]}, tmp_path / "out") == 0


def test_everything_fits_into_ten_minutes() -> None:
    assert sum(limit for limit, _ in gpu_check.steps("default", "cuda", 200).values()) <= 600
