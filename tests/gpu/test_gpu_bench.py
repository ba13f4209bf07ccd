"""`streamchat bench --gpu`: what it measures and prints, on the stand-in for a GPU."""

from __future__ import annotations

import functools
import json
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from streamchat.base.errors import ConfigError, ExitCode, StreamchatError
from streamchat.benchmarks.gpu import command, measure, shapes, supervisor, worker
from streamchat.benchmarks.gpu.bandwidth import copy_bandwidth, count_kernels, kernels_of, weight_bytes_per_token
from streamchat.benchmarks.gpu.cases import KINDS, SHAPES, Case, Row, Tenth, cases_of, parse_names
from streamchat.benchmarks.gpu.measure import Sizes
from streamchat.benchmarks.gpu.page import tables_of
from streamchat.benchmarks.gpu.supervisor import Results, Supervisor
from streamchat.benchmarks.gpu.worker import BROKEN, Bench, Job, is_device_error
from streamchat.cli import main as cli
from streamchat.decode.install import install_captured
from tests.support.models_help import save, tiny_llama
from tests.support.stand_in_program import WORKER, install_here, tiny_config

SMALL = Sizes(cache_size=64, new_tokens=4, rounds=2)


# --- the command --------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--gpu"]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("--gpu measures a GPU and PyTorch finds none here; use --decode to measure the CPU\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpu", "--model", "./missing"], ExitCode.MODEL, "There is no folder 'missing'"),
        (["--gpu", "--device", "cpu"], ExitCode.USAGE, "--gpu measures a GPU and device = cpu; add --device cuda"),
        (["--gpu", "--device", "cuda:0,1"], ExitCode.USAGE, "--gpu measures one GPU and device = cuda:0,1"),
        (["--gpu", "--weights", "int8"], ExitCode.USAGE, "--gpu measures native weights and weights = int8"),
        (["--gpu", "--shapes", "8B,9B"], ExitCode.USAGE, "--shapes: '9B' is not known; choose from model, 135M, 410M"),
        (["--gpu", "--kinds", "quick"], ExitCode.USAGE, "--kinds: 'quick' is not known; choose from fused, graph,"),
        (["--gpu", "--kinds", ","], ExitCode.USAGE, "--kinds is empty; choose from fused"),
        (["--gpu", "--time-limit", "0"], ExitCode.USAGE, "--time-limit 0 must be above 0"),
        (["--gpu", "--time-limit", "nan"], ExitCode.USAGE, "--time-limit nan must be above 0"),
        (["--gpu", "--tokens", "99"], ExitCode.USAGE, "--flat 99 must be at least 100"),
        (["--shapes", "8B"], ExitCode.USAGE, "--shapes needs --gpu"),
        (["--decode", "--time-limit", "9"], ExitCode.USAGE, "--time-limit needs --gpu"),
        (["--flat", "500"], ExitCode.USAGE, "--flat needs --decode or --gpu"),
    ],
)
def test_an_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: ExitCode,
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


@pytest.mark.parametrize(("device", "expected"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_the_device_is_the_first_gpu_or_the_one_that_is_named(
    device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.cuda_device(device) == expected


def test_one_command_prints_a_page_and_json_and_writes_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it, with a process that measures."""
    folder = save(tiny_llama(hidden_size=64, max_position_embeddings=4096), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "cuda_device", lambda device: "cpu")
    monkeypatch.setattr(command, "WORKER", WORKER)
    sizes = ["--cache-size", "64", "--new-tokens", "4", "--rounds", "2", "--dtype", "float32"]
    what = ["--model", "./tiny", "--shapes", "model,410M", "--out", "found"]
    assert cli.main(["bench", "--gpu", *what, *sizes, "--json", "--no-charts"]) == ExitCode.OK
    assert folder.is_dir()
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    rows = {(row["shape"], row["kind"]): row for row in figures["rows"]}
    assert list(rows) == [
        *((shape, kind) for shape in ("model", "410M") for kind in ("fused", "graph", "generate", "plain")),
        ("model", "static"),
        ("410M", "static"),
    ]
    for (_, kind), row in rows.items():
        if kind == "fused":
            assert row["tps"] is None
            assert row["error"].startswith("not available: ")
            continue
        assert row["error"] == ""
        assert row["share"] == pytest.approx(row["tps"] * row["token_bytes"] / figures["bandwidth"])
        assert row["timed"] == 6
        assert min(row["first_token_ms"], row["prefill_tps"], row["mean_tps"]) > 0
        assert row["kernels"] is None  # of a device only
    written = [json.loads(line) for line in (tmp_path / "found" / command.ROWS).read_text().splitlines()]
    assert [line["row"]["tps"] for line in written if "row" in line] == [row["tps"] for row in figures["rows"]]
    text = "\n".join(lines)
    for words in ("tiny 410M", "the best of 10 copies of 1 GiB", "not available: "):
        assert words in text


def test_nothing_that_could_be_measured_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "cuda_device", lambda device: "cpu")
    monkeypatch.setattr(command, "WORKER", ("-c", "import sys; sys.exit('no driver')"))
    assert cli.main(["bench", "--gpu", "--shapes", "8B"]) == ExitCode.FAILURE
    assert "nothing could be measured; 8B, fused: the process ended with exit code 1: no driver" in (
        capsys.readouterr().err
    )


# --- the order ----------------------------------------------------------------------------------------------------


def test_what_compiles_comes_last_and_8b_has_int4_too() -> None:
    cases = cases_of(SHAPES, KINDS)
    assert [case.kind for case in cases[-5:]] == ["static"] * 5
    assert {case.kind for case in cases[:-5]} == set(KINDS) - {"static"}
    assert [(case.shape, case.kind) for case in cases if case.weights == "int4"] == [("8B", "fused"), ("8B", "graph")]
    assert [case.name for case in cases_of(["8B"], ["plain"])] == ["8B, plain"]
    assert cases_of(["8B"], ["fused"])[1].name == "8B int4, fused"
    names = [case.name for case in cases_of(["8B"], ["fused"])]
    assert names[2:] == ["8B, fused, keys in int8", "8B, fused, keys in int4"]
    assert [case.kv_dtype for case in cases_of(["8B"], ["fused", "generate"], "int4")] == ["int4", "native", "int4"]


def test_names_have_the_order_of_the_table() -> None:
    assert parse_names(" 8B, model ,8B", SHAPES, "--shapes") == ("model", "8B")
    with pytest.raises(ConfigError):
        parse_names("", SHAPES, "--shapes")


# --- the process that measures, in this one -------------------------------------------------------------------------


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shapes.SHAPES:
        monkeypatch.setitem(shapes.SHAPES, name, (f"tiny {name}", functools.partial(tiny_config, name)))
    monkeypatch.setattr(measure, "install", install_here)
    monkeypatch.setattr(worker, "COPIED", 1 << 16)


def job(*cases: Case, **changes: Any) -> Job:
    return Job({"dtype": "float32"}, "cpu", list(cases), **{"first": 0, "sizes": SMALL, "seconds": 60.0, **changes})


def run(wanted: Job) -> tuple[int, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    code = Bench(Job.of(wanted.as_json()), lines.append).run()
    return code, json.loads(json.dumps(lines))


GRAPH, PLAIN = Case("135M", "native", "graph"), Case("135M", "native", "plain")


def test_a_kind_that_fails_is_a_row_and_the_next_one_is_measured(
    standing_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMCHAT_TEST_FAULT", "graph=error")
    code, lines = run(job(GRAPH, PLAIN))
    assert code == 0
    failed, plain = (line["row"] for line in lines if "row" in line)
    assert (failed["error"], failed["tps"]) == ("RuntimeError: a bad kernel", None)
    assert plain["tps"] > 0


def test_an_error_of_the_device_ends_the_process_after_its_row(
    standing_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMCHAT_TEST_FAULT", "graph=device")
    code, lines = run(job(GRAPH, PLAIN))
    assert code == BROKEN
    [row] = [line["row"] for line in lines if "row" in line]
    assert "illegal memory access" in row["error"]


def test_a_step_that_is_given_up_while_it_runs_is_no_figure(standing_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Any) -> Any:
        raise RuntimeError("out of graphs")

    def install_broken(model: Any, kernels: Any, decode: str) -> bool:
        return install_captured(model, broken, "graph")

    monkeypatch.setattr(measure, "install", install_broken)
    _, lines = run(job(GRAPH))
    [row] = [line["row"] for line in lines if "row" in line]
    assert row["error"] == "given up while it ran: RuntimeError: out of graphs"
    assert row["tps"] is None


def test_after_the_time_no_case_is_started(standing_in: None) -> None:
    code, lines = run(job(GRAPH, seconds=-1.0, bandwidth=1e12))
    assert (code, lines) == (0, [{"bandwidth": 1e12, "gpu": "cpu"}])


def test_int4_without_its_library_is_one_sentence_of_its_row(
    standing_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, lines = run(job(Case("8B", "int4", "graph")))
    assert "needs fused kernels, which cannot be used here (decode = graph), or torchao" in lines[-1]["row"]["error"]


def test_the_tenths_of_a_long_reply(standing_in: None) -> None:
    code, lines = run(job(bandwidth=1e12, tokens=105, flat_shape="410M"))
    assert code == 0
    tenths = [line for line in lines if "tenth" in line]
    assert [line["tenth"]["tokens"] for line in tenths] == list(range(10, 101, 10))
    assert all(line["tenth"]["tps"] > 0 and line["model"] == "tiny 410M" for line in tenths)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("device-side assert triggered"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (StreamchatError("not available"), False),
    ],
)
def test_errors_that_spoil_the_device(error: Exception, expected: bool) -> None:
    assert is_device_error(error) is expected
    wrapped = ValueError("while compiling")
    wrapped.__cause__ = error
    assert is_device_error(wrapped) is expected


# --- the supervisor, with other processes ---------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
def send(line): print(json.dumps(line), flush=True)
send({"bandwidth": 2e12, "gpu": "Fake"})
for number, case in enumerate(job["cases"], job["first"]):
    send({"started": number})
    if case["kind"] == "graph":
        BREAK
    send({"row": {"case": case, "tps": 100.0 + number}})
if job["tokens"]:
    send({"tenth": {"tokens": 10, "tps": 5.0, "allocated": 7}, "model": "m"})
    TENTHS
"""


def supervise(tmp_path: Path, breaks: str = "pass", tenths: str = "pass", **changes: Any) -> Results:
    cases = [Case("135M", "native", kind) for kind in ("fused", "graph", "plain")]
    code = FAKE.replace("BREAK", breaks).replace("TENTHS", tenths)
    wanted = job(*cases, **changes)
    file = tmp_path / "rows.jsonl"
    found = Supervisor(wanted, [sys.executable, "-c", code], file, lambda name: None).run()
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"]["error"] for line in written if "row" in line] == [row.error for row in found.rows]
    assert [row.case for row in found.rows] == cases
    return found


@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        ("sys.exit('no driver')", "the process ended with exit code 1: no driver"),
        ("os.kill(os.getpid(), 9)", "the process ended with exit code -9"),
        ("time.sleep(60)", "stopped after 1 s"),
        (f"send({{'row': {{'case': case, 'error': 'bad'}}}}); sys.exit({BROKEN})", "bad"),
    ],
)
def test_a_case_that_ends_the_process_costs_no_other_row(
    breaks: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "CASE_LIMIT_S", 1.0)
    found = supervise(tmp_path, breaks)
    assert [(row.tps, row.error) for row in found.rows] == [(100.0, ""), (None, error), (102.0, "")]
    assert (found.gpu, found.bandwidth) == ("Fake", 2e12)


def test_what_there_was_no_time_for_is_named(tmp_path: Path) -> None:
    found = supervise(tmp_path, "sys.exit(0)", seconds=0.001)
    assert {row.error for row in found.rows} >= {"skipped: the 0.001 s of --time-limit were over"}


@pytest.mark.parametrize(("tenths", "error"), [("pass", ""), ("sys.exit('gone')", "gone")])
def test_tenths_of_a_long_reply_are_kept_if_it_is_cut(tenths: str, error: str, tmp_path: Path) -> None:
    found = supervise(tmp_path, tenths=tenths, tokens=100)
    assert found.tenths == [Tenth(10, 5.0, 7)]
    assert found.flat_error.endswith(error)
    assert bool(found.flat_error) == bool(error)


# --- what is counted ----------------------------------------------------------------------------------------------


def test_weights_that_a_token_reads() -> None:
    untied, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    table_bytes = 4 * 300 * 32
    assert weight_bytes_per_token(untied) == 4 * sum(p.numel() for p in untied.parameters()) - table_bytes
    # tied: the table is the output layer, and is read as a whole
    assert weight_bytes_per_token(tied) == weight_bytes_per_token(untied)
    assert weight_bytes_per_token(tiny_llama().bfloat16()) == weight_bytes_per_token(untied) // 2


def test_a_copy_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(step=0.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert copy_bandwidth("cpu", size=1000, rounds=2) == 2 * 1000 / 0.5


def event(name: str, device: Any, microseconds: int = 10, is_user_annotation: bool = False) -> FunctionEvent:
    return FunctionEvent(  # type: ignore[no-untyped-call]
        0, name, 0, 0, microseconds, device_type=device, is_user_annotation=is_user_annotation, use_device="cuda"
    )


def test_kernels_are_what_the_device_runs_but_copies() -> None:
    cuda = DeviceType.CUDA
    events = [
        event("gemv", cuda, 30),
        event("gemv", cuda, 20),
        event("Memcpy HtoD", cuda, 5),
        event("Memset (Device)", cuda, 5),
        event("a range", cuda, 60, is_user_annotation=True),
        event("aten::mm", DeviceType.CPU, 9),
    ]
    assert count_kernels(events) == (2, 0.05)
    assert count_kernels(events[2:]) is None
    assert kernels_of(lambda: None, "cpu") is None


# --- random weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("135M", 134.5), ("410M", 405.3), ("1.7B", 1711.4), ("8B", 8030.3)])
def test_shapes_have_the_sizes_of_the_published_models(name: str, millions: float) -> None:
    config = shapes.SHAPES[name][1]()
    assert shapes.parameter_count(config) / 1e6 == pytest.approx(millions, abs=0.06)


def test_random_weights_are_made_on_the_device(standing_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "free_memory", lambda device: 1 << 40)
    model = shapes.random_model("135M", "meta", torch.bfloat16)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["135M", "410M"])
def test_random_weights_give_finite_logits_that_differ(name: str, standing_in: None) -> None:
    model = shapes.random_model(name, "cpu", torch.float32)
    assert not model.training
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(20)[None]).logits[0]
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    assert rotary.inv_freq[0] == 1  # the angles are computed, not whatever was in memory


def test_a_shape_that_does_not_fit_is_skipped_and_named(standing_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "free_memory", lambda device: 100_000)
    code, lines = run(job(Case("8B", "native", "graph"), bandwidth=1e12))
    assert code == 0
    assert lines[-1]["row"]["error"].startswith("skipped: tiny 8B needs ")
    assert lines[-1]["row"]["error"].endswith("cpu has 100 kB free")


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_tables() -> None:
    full = Row(GRAPH, "m", 361.0, 350.0, 10, 10**9, 0.0361, 742, 2.25, 8.04, 46_000.0, 10**9, 1.0)
    failed = Row(PLAIN, error="out of memory")
    results = Results([full, failed], [Tenth(10, 90.0, 5_000_000), Tenth(100, 89.5, None)], "Card", 2.96e12, "m")
    rows, memory, flat = tables_of(results, 1024, 100)
    assert rows.rows[0] == ("m", "native", "native", "graph", "361.0", "3.6%", "742", "2.25", "8.0", "46,000", "")
    assert rows.rows[1] == ("135M", "native", "native", "plain", *["-"] * 6, "out of memory")
    assert memory.rows[0][1].startswith("2,960.0 GB/s (the best of 10 copies")
    assert flat.rows == [("first tenth", "10", "90.0", "5.00"), ("latest tenth", "100", "89.5", "-")]
    assert len(tables_of(results, 1024, 0)) == 2
    assert tables_of(Results(), 1024, 100)[2].rows == []
