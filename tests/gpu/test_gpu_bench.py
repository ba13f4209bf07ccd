"""`streamchat bench --gpu`: what it counts and prints; the measurement itself runs here on a CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.errors import ExitCode
from streamchat.benchmarks import gpu
from streamchat.benchmarks.gpu import (
    PROMPT,
    REPLY,
    GpuFigures,
    MemoryReading,
    copy_bandwidth,
    measure,
    tables_of,
    weight_bytes_per_token,
)
from streamchat.cli import main as cli
from streamchat.models.load import LoadedModel, load_model
from tests.support.models_help import save, tiny_llama

FIGURES = GpuFigures(
    "Model X", 1024, 250.0, 100.0, 80.0, 9000.0, 8000.0, 1e12, 10**9,
    [MemoryReading(2048, 300_000_000, 320_000_000, 1, 4.0), MemoryReading(100_352, 300_000_000, 320_000_000, 1, 4.1)],
)  # fmt: skip


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--gpu"]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("--gpu measures a GPU and PyTorch finds none here; use --decode to measure the CPU\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "./missing"], ExitCode.MODEL, "There is no folder 'missing'"),
        (["--device", "cpu"], ExitCode.USAGE, "--gpu measures a GPU and device = cpu; add --device cuda"),
        (["--weights", "int8"], ExitCode.USAGE, "--gpu measures native weights and weights = int8"),
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
    assert cli.main(["bench", "--gpu", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


@pytest.mark.parametrize(("flags", "device"), [([], "cuda"), (["--device", "cuda:1"], "cuda:1")])
def test_the_command_prints_a_table_and_json(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    device: str,
) -> None:
    """On a CPU that stands in for the GPU of `device`."""
    folder = save(tiny_llama(max_position_embeddings=4096), tmp_path / "tiny")
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    asked: list[tuple[str, str]] = []

    def load(name: str, *, device: str, weights: str, **settings: Any) -> LoadedModel:
        asked.append((device, weights))
        return loaded

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("streamchat.models.load.load_model", load)
    monkeypatch.setattr(gpu, "COPIED", 1 << 16)
    sizes = ["--cache-size", "64", "--new-tokens", "2", "--rounds", "1", "--until", "600"]
    assert cli.main(["bench", "--gpu", *sizes, "--json", *flags]) == ExitCode.OK
    assert asked == [(device, "native")]
    *lines, last = capsys.readouterr().out.splitlines()
    assert "float32 on cpu" in lines[1]
    assert lines[1].endswith("budget 64 tokens")
    figures = json.loads(last)
    assert [reading["processed"] for reading in figures["readings"]] == [1024]
    assert figures["share_of_limit"] > 0


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


@pytest.mark.slow
def test_the_whole_measurement_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny_llama(max_position_embeddings=4096), tmp_path / "tiny")
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    monkeypatch.setattr(gpu, "EARLY", 600)
    found = measure(loaded, cache_size=64, tokens=4, rounds=1, until=2_000, copied=1 << 16)
    assert [each.processed for each in found.readings] == [2 * (PROMPT + REPLY), 4 * (PROMPT + REPLY)]
    assert len({each.kv_bytes for each in found.readings}) == 1
    assert all(each.allocated is None and each.token_ms > 0 for each in found.readings)
    kv_bytes_per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, float32
    assert found.token_bytes == weight_bytes_per_token(loaded.model) + 64 * kv_bytes_per_token
    assert min(found.engine_tps, found.generate_tps, found.generate_late_tps, found.prefill_tps) > 0
    line = json.loads(json.dumps(found.as_dict()))
    assert line["share_of_limit"] == pytest.approx(found.engine_tps * found.token_bytes / found.bandwidth)
    assert [row[1] for row in tables_of(found)[1].rows] == ["-", "-"]


def test_the_tables() -> None:
    speed, memory = tables_of(FIGURES)
    values = {row[0]: row[1] for row in speed.rows}
    assert values["engine"] == "250.0 tok/s, 2.50 x generate"
    assert values["limit of the bandwidth"] == "1000.0 tok/s, 25.0% of it reached"
    assert memory.rows[-1] == ("100,352", "300.00", "320.00", "4.10")
    on_cpu = replace(FIGURES, readings=[MemoryReading(1, None, None, 1, 1.0)])
    assert tables_of(on_cpu)[1].rows == [("1", "-", "-", "1.00")]
