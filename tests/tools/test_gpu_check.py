"""The programs that check and measure a GPU in one go, with the stand-in and short commands."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamchat.benchmarks.gpu.worker import BROKEN
from streamchat.models.load import load_model
from tests.support.gpus import stand_in
from tests.support.models_help import save, tiny_llama
from tools import gpu_chat, gpu_check, gpu_steps
from tools.gpu_check import Outcome, Part
from tools.gpu_steps import Comparison


def test_a_chat_is_measured(tmp_path: Path) -> None:
    folder = save(tiny_llama(max_position_embeddings=4096), tmp_path / "tiny")
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    stand_in().install(loaded.model)
    found = json.loads(json.dumps(gpu_chat.measure_chat(loaded, 8)))
    assert found["disabled_steps"] == ""
    assert found["step"].startswith("captured graph")
    assert found["ttft_ms"]["first quarter"] > 0
    assert found["ttft_ms"]["later"] > 0
    assert found["decode_tps"] > 0
    assert list(found["prefill_tps"]) == ["256", "512", "1024"]
    assert len(found["first_chunks_ms"]) == 2048 // 256  # of a CPU


# --- the parts ----------------------------------------------------------------------------------------------------


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


PARTS = {
    "fine": Part(60, command("print('all is well')")),
    "broken": Part(60, command("import sys; print('no'); sys.exit(3)")),
    "killed": Part(60, command("import os; os.kill(os.getpid(), 11)")),
    "slow": Part(1, command("import time; print('started', flush=True); time.sleep(60)")),
    "missing": Part(60, ["/no/such/program"]),
    "last": Part(60, command("print('the end')")),
}


def summary(printed: str) -> list[list[str]]:
    lines = printed.rpartition("==> summary\n")[2].splitlines()
    return [line.rsplit(maxsplit=2)[0].split(maxsplit=1) for line in lines]


def test_all_parts_run_and_the_summary_names_those_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert gpu_check.run_parts(PARTS, out, 600) == 1
    assert summary(capsys.readouterr().out) == [
        ["fine", "ok"],
        ["broken", "exit code 3"],
        ["killed", "exit code -11"],
        ["slow", "stopped after 1 s"],
        ["missing", "not started: No such file or directory"],
        ["last", "ok"],
    ]
    assert (out / "broken.txt").read_text() == "no\n"
    assert (out / "slow.txt").read_text() == "started\n"  # what it printed until then
    assert gpu_check.run_parts({"fine": PARTS["fine"]}, out, 600) == 0
    done = gpu_check.read_outcomes(out)
    assert {name: outcome.result for name, outcome in done.items()} == {
        name: "ok" if name in ("fine", "last") else done[name].result for name in PARTS
    }


def test_a_part_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    found = gpu_check.run_part(Part(2, command(f"{code}; p.wait()")), tmp_path / "part.txt", 2)
    assert found.result == "stopped after 2 s"
    pid = int((tmp_path / "part.txt").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_starts_only_if_its_time_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"long": Part(100, command("print('no')")), "short": Part(20, command("print('yes')"))}
    assert gpu_check.run_parts(parts, tmp_path, 50) == 1
    assert summary(capsys.readouterr().out) == [["long", "needs 100 s; run again with --skip-done"], ["short", "ok"]]
    assert list(gpu_check.read_outcomes(tmp_path)) == ["short"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], list(PARTS)),
        (["--skip-done"], ["broken", "killed", "slow", "missing", "last"]),
        (["--only", "fine", "last"], ["fine", "last"]),
        (["--only", "fine", "last", "--skip-done"], ["last"]),
    ],
)
def test_a_second_call_continues(
    flags: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_check.write_outcomes(tmp_path, {"fine": Outcome("ok", 1.0), "broken": Outcome("exit code 3", 1.0)})
    started: list[str] = []

    def noted(parts: dict[str, Part], *_: Any) -> int:
        started.extend(parts)
        return 0

    monkeypatch.setattr(gpu_check, "parts_of", lambda *_: PARTS)
    monkeypatch.setattr(gpu_check, "run_parts", noted)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *flags])
    assert gpu_check.main() == 0
    assert started == expected


def test_an_unknown_part_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "speed"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == (
        "'speed' is not a part; choose from steps, bench, chat, flat, tests, verify, ppl, doctor\n"
    )


def test_a_damaged_file_of_outcomes_is_as_none(tmp_path: Path) -> None:
    for text in ("{", "[1]", '{"fine": {"other": 1}}', '{"fine": 3}'):
        (tmp_path / "done.json").write_text(text)
        assert gpu_check.read_outcomes(tmp_path) == {}


def test_everything_fits_into_fifteen_minutes_and_each_part_into_one_call(tmp_path: Path) -> None:
    parts = gpu_check.parts_of("default", "cuda", 200, tmp_path)
    assert sum(part.limit_s for part in parts.values()) <= 900
    assert max(part.limit_s for part in parts.values()) <= 570
    assert list(parts) == list(gpu_check.stand_in_parts("default", tmp_path))


# --- the comparison of steps ----------------------------------------------------------------------------------------


def lines_of(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_step_is_compared_with_the_forward(dtype: str) -> None:
    found = gpu_steps.compare(Comparison("llama", dtype, "graph"), "cpu", True)
    assert found.passed
    assert found.step.startswith("captured graph")
    assert found.distance is not None
    assert 0 < found.distance < 0.1


def test_a_wrong_step_and_one_that_is_missing_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = gpu_steps.compare(Comparison("llama", "float32", "fused"), "cpu", False)
    assert not missing.passed
    monkeypatch.setitem(gpu_steps.EXACT, "native", 1e-12)
    assert not gpu_steps.compare(Comparison("llama", "float32", "graph"), "cpu", True).passed


def test_an_error_is_a_line_and_one_of_the_device_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(wanted: Comparison, device: str, is_stand_in: bool) -> Comparison:
        raise RuntimeError("CUDA error: misaligned address" if wanted.model == "b" else "no kernel")

    monkeypatch.setattr(gpu_steps, "compare", fail)
    wanted = gpu_steps.comparisons(["fused"], ["bfloat16"], ["a", "b", "c"])
    assert gpu_steps.run_all(wanted, "cpu", False) == BROKEN
    assert [line["error"] for line in lines_of(capsys.readouterr().out)] == [
        "RuntimeError: no kernel",
        "RuntimeError: CUDA error: misaligned address",
    ]


CHILD = f"""
import json, os, sys
first, last = map(int, sys.argv[2].split(":"))
for number in range(first, last):
    if number == 1:
        os.kill(os.getpid(), 9)
    print(json.dumps({{"number": number}}), flush=True)
    if number == 2:
        sys.exit({BROKEN})
"""


def test_a_comparison_that_ends_the_process_costs_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    wanted = gpu_steps.comparisons(["fused"], ["bfloat16"], ["a", "b", "c", "d"])
    assert gpu_steps.supervise([sys.executable, "-c", CHILD], wanted) == 1
    lines = lines_of(capfd.readouterr().out)
    assert [line.get("number", line.get("error")) for line in lines] == [
        0,
        "the process ended with exit code -9",
        2,
        3,
    ]


def test_a_child_that_never_starts_is_not_repeated_for_ever(capfd: pytest.CaptureFixture[str]) -> None:
    wanted = gpu_steps.comparisons(["fused"], ["bfloat16"], ["a", "b"])
    assert gpu_steps.supervise([sys.executable, "-c", f"import sys; sys.exit({BROKEN})"], wanted) == 1
    assert capfd.readouterr().out == ""
