"""`streamchat bench --busy`: each run decodes while the loops run, runs take turns, and what is shown."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamchat.base import child_processes
from streamchat.base.errors import ExitCode
from streamchat.benchmarks import busy
from streamchat.benchmarks.busy_loops import busy_loops
from streamchat.benchmarks.methods import llama_cpp as peers
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from tests.support.fake_llama import FakeLlama
from tests.support.models_help import save, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(max_position_embeddings=2048), tmp_path / "llama")


def configuration(folder: Path) -> Configuration:
    return Configuration(Settings(model=str(folder), dtype="float32", cache_size=64), {"cache_size": "--cache-size"})


def run_of(mean_ms: float, gguf: Path | None = None) -> busy.Run:
    return busy.Run(mean_ms, list(range(48)), 4, gguf, ["a model"], ["a note"], {"threads": 1})


def children() -> set[int]:
    """Ids of the processes that this one has started."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def spent(pid: int) -> float:
    """Processor seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_all_loops_compute_when_the_block_begins_and_end_with_it() -> None:
    before = children()
    with busy_loops(2):
        loops = children() - before
        started = {pid: spent(pid) for pid in loops}
        assert len(loops) == 2
        assert min(started.values()) >= 0.09
        deadline = time.monotonic() + 60
        while not all(spent(pid) > started[pid] for pid in loops):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert children() == before


def test_no_loops_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    with busy_loops(0):
        pass


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened: the loops, and the tokens timed. The clock advances by 2 ms per reading while loops run."""
    events: list[str] = []
    seconds = [0.0, 0.001]

    @contextmanager
    def watched(count: int) -> Iterator[None]:
        events.append(f"{count} loops")
        seconds[1] = 0.002
        yield
        events.append("over")

    def clock() -> float:
        seconds[0] += seconds[1]
        return seconds[0]

    monkeypatch.setattr(busy, "busy_loops", watched)
    monkeypatch.setattr("streamchat.benchmarks.methods.stream.time.perf_counter", clock)
    return events


@pytest.mark.usefixtures("compiled_kernels")
def test_a_run_of_streamchat_decodes_on_a_full_cache_while_the_loops_run(folder: Path, loops: list[str]) -> None:
    run = busy.measure_streamchat(configuration(folder), 5, 3)
    assert loops == ["3 loops", "over"]
    assert run.mean_ms == pytest.approx(2.0)
    assert (len(run.ids), run.sinks, run.gguf) == (64, 4, None)
    assert (run.about["cache_size"], run.about["device"]) == (64, "cpu")
    assert "64 cached tokens" in run.lines[0]


def test_a_run_of_llama_cpp_is_measured_the_same_way(monkeypatch: pytest.MonkeyPatch, loops: list[str]) -> None:
    made: list[tuple[FakeLlama, dict[str, Any]]] = []

    def make(**arguments: Any) -> FakeLlama:
        made.append((FakeLlama(**arguments), arguments))
        return made[-1][0]

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=make))
    monkeypatch.setattr(peers, "version", lambda name: "0.3")
    assert busy.measure_llama_cpp(run_of(1.0, Path("m.gguf")), 5, 3) == pytest.approx(2.0)
    assert loops == ["3 loops", "over"]
    [(llama, arguments)] = made
    assert llama.read == 48 + busy.WARM_UP + 5
    assert (arguments["n_ctx"], arguments["n_threads"], arguments["n_threads_batch"]) == (48, 1, 1)


def test_runs_take_turns_and_the_first_one_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    @contextmanager
    def here() -> Iterator[Any]:
        def call(function: Any, _: Any, tokens: int, loops: int) -> Any:
            assert tokens == 7
            calls.append((function.__name__.removeprefix("measure_"), loops))
            ms = float(len(calls))
            return run_of(ms, Path("m.gguf")) if function is busy.measure_streamchat else ms

        yield call

    monkeypatch.setattr(busy, "_new_process", here)
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "version", lambda name: "0.3")
    args = argparse.Namespace(busy="4, 0,4", rounds=2, new_tokens=7)
    page = busy.run(args, Configuration(), lambda *_: None)
    turn = [("streamchat", 4), ("llama_cpp", 4), ("streamchat", 0), ("llama_cpp", 0)]
    assert calls == [("streamchat", 0), *turn, *turn]
    assert page.data["busy"]["4"]["streamchat"] == {
        "mean_ms": [2.0, 6.0],
        "median_ms": 4.0,
        "worst_to_our_median": 1.5,
        "time_to_llama_cpp": pytest.approx((2 / 3 + 6 / 7) / 2),
    }
    assert page.data["busy"]["0"]["llama.cpp"]["worst_to_our_median"] == 9 / 6
    assert page.tables[0].rows[0] == ("4 busy loops", "streamchat", "4.0 (2.0-6.0)", "1.50 x", "0.76 x")
    assert page.lines[1].startswith("llama.cpp: llama-cpp-python 0.3, m.gguf")
    assert page.notes == ["a note"]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--cache-size", "64", "--rounds", "1", "--new-tokens", "2", "--dtype", "float32"]
    assert cli.main(["bench", "--busy", "1", "--model", str(folder), *sizes, "--json"]) == ExitCode.OK
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    data = json.loads(last)
    assert list(data["busy"]) == ["1"]
    assert data["busy"]["1"]["streamchat"]["median_ms"] > 0
    assert "1 busy loop " in text
    assert "llama.cpp was skipped" in text


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--busy", "--model", "./nowhere"]) == ExitCode.MODEL
    out, err = capsys.readouterr()
    assert out == ""
    assert "There is no folder 'nowhere'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--busy", "x"], "--busy: x is not a number of busy loops (0 to 64)"),
        (["--busy", "0,-1"], "--busy: -1 is not a number of busy loops (0 to 64)"),
        (["--busy", "٣"], "--busy: ٣ is not a number of busy loops (0 to 64)"),
        (["--rounds", "٣"], "--rounds: invalid int value: '٣'"),
        (["--busy", "65"], "--busy: 65 is not a number of busy loops (0 to 64)"),
        (["--busy", "1.5"], "--busy: 1.5 is not a number of busy loops (0 to 64)"),
        (["--busy", ""], "--busy is empty; give a comma-separated list"),
        (["--busy", "9" * 5000], "is not a number of busy loops (0 to 64)"),
        (["--busy", "--device", "cuda"], "--busy measures the CPU and device = cuda; add --device cpu"),
        (["--busy", "--peers"], "--peers belongs to the comparison of methods; leave it or --busy out"),
        (["--busy", "2", "--decode"], "--decode: not allowed with argument --busy"),
        (["--busy", "2", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--busy", "2", "--threads", "1"], "--threads needs --decode"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert cli.main(["bench", *arguments]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


PARENT = """
import os, time
from streamchat.benchmarks import busy

if __name__ == "__main__":
    with busy._new_process() as call:
        print(call(os.getpid), flush=True)
        call(time.sleep, 60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_run_ends_with_the_program_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    command = child_processes.python(str(script))
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_processes.environment(), text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker went on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
