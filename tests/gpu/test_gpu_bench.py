"""What `tools.gpu_bench` counts and prints; the measurement itself runs here on a CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from streamchat.models.load import load_model
from tests.support.models_help import save, tiny_llama
from tools import gpu_bench
from tools.gpu_bench import PROMPT, REPLY, Figures, Look, copy_bandwidth, main, measure, table, weight_bytes_per_token

FIGURES = Figures(
    "m", "cuda", "Model X", "bfloat16", 1024, 250.0, 100.0, 80.0, 9000.0, 8000.0, 1e12, 10**9,
    [Look(2048, 300_000_000, 320_000_000, 1, 4.0), Look(100_352, 300_000_000, 320_000_000, 1, 4.1)],
)  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "This measures a GPU, and torch finds none here; tools.decode_speed measures the CPU's decode step\n"


def test_an_error_of_the_model_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["--model", "./missing", "--device", "cpu"]) == 3
    assert capsys.readouterr().err.startswith("There is no folder 'missing'")


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
    monkeypatch.setattr(gpu_bench, "EARLY", 600)
    found = measure(loaded, cache_size=64, tokens=4, rounds=1, until=2_000, copied=1 << 16)
    assert [look.said for look in found.looks] == [2 * (PROMPT + REPLY), 4 * (PROMPT + REPLY)]
    assert len({look.kv_bytes for look in found.looks}) == 1
    assert all(look.allocated is None and look.token_ms > 0 for look in found.looks)
    kv_bytes_per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, float32
    assert found.token_bytes == weight_bytes_per_token(loaded.model) + 64 * kv_bytes_per_token
    assert min(found.engine_tps, found.generate_tps, found.generate_late_tps, found.prefill_tps) > 0
    line = json.loads(json.dumps(found.as_dict()))
    assert line["share_of_limit"] == pytest.approx(found.engine_tps * found.token_bytes / found.bandwidth)
    assert "n/a (on CPU)" in table(found)


def test_the_table() -> None:
    lines = table(FIGURES).splitlines()
    assert lines[0] == "m, bfloat16 on Model X, budget 1,024 tokens"
    assert "250.0 tok/s    2.50 x generate" in lines[1]
    assert "1000.0 tok/s   25.0% of it reached" in lines[4]
    assert lines[-1].endswith("300.00 MB allocated, 320.0 MB reserved; 4.10 ms a token")
    assert "n/a (on CPU)" in table(replace(FIGURES, looks=[Look(1, None, None, 1, 1.0)]))
