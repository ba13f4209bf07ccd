"""`streamchat bench --decode`: which path runs on which weights, and what the command accepts and prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.errors import ExitCode
from streamchat.benchmarks import decode
from streamchat.benchmarks.decode import EndlessReply, compare_ends, measure_step
from streamchat.benchmarks.decode_profile import compiled_step, measure_parts, profile_token
from streamchat.cli import main as cli
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.models.load import LoadedModel, load_model
from tests.support.models_help import save, tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(**SIZES, max_position_embeddings=2048), tmp_path / "llama")


def bench(folder: Path, *arguments: str) -> int:
    """Run `streamchat bench --decode` on the model of `folder`."""
    sizes = ["--cache-size", "64", "--rounds", "2", "--new-tokens", "3", "--kv-dtype", "native"]
    return cli.main(["bench", "--decode", "--model", str(folder), "--dtype", "bfloat16", *sizes, *arguments])


def test_four_configurations_are_timed_on_a_full_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[decode.EndlessReply] = []

    def load(weights: str) -> LoadedModel:
        return load_model(str(folder), device="cpu", dtype="bfloat16", weights=weights)

    class Watched(decode.EndlessReply):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            streams.append(self)

    monkeypatch.setattr(decode, "EndlessReply", Watched)
    figures = measure_step(load("int8"), load("native"), cache_size=64, tokens=20, rounds=2)
    assert (figures.weights, figures.cached, figures.tokens) == ("int8", 64, 20)
    assert min(figures.engine_ms, figures.native_ms, figures.plain_ms, figures.plain_native_ms) > 0
    assert figures.prefill_tps > 0
    assert [stream.short_path for stream in streams] == [True, False, True, False]
    for stream in streams:
        assert stream.cache.ledger.next_index == 64 + decode.WARM_UP + 20
        assert stream.cache.compression_count >= 1


def test_a_long_stream_is_timed_token_by_token(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    times = EndlessReply(loaded, 32).decode(50)
    assert len(times) == 50
    assert min(times) > 0


@pytest.mark.skipif(load_kernels("auto") is None, reason=why_unavailable("auto"))
def test_the_parts_of_a_token_are_timed_by_kind(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="bfloat16", weights="int8")
    stream = EndlessReply(loaded, 32)
    step = compiled_step(loaded.model)
    assert step is not None
    found = measure_parts(stream, step, 3)
    layers = loaded.model.config.num_hidden_layers
    names = {"kernels, all": 5 * layers + 1, "attention": layers}
    # queries, keys and values are one product, gate and up another
    names["products, int8"] = 4 * layers + 1
    assert set(found) == {"token", *(f"{name} ({count})" for name, count in names.items())}
    assert min(found.values()) > 0


def test_without_native_kernels_the_operations_of_pytorch_are_listed(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="bfloat16", kernels="torch")
    found = profile_token(EndlessReply(loaded, 32), 3)
    assert len(found) > 5
    assert any(name.startswith("aten::") for name in found)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_ends_of_a_long_reply_are_compared() -> None:
    seconds = [9.0] * 2000 + [0.002] * 1000 + [9.0] * 1000 + [0.003] * 1000
    figures = compare_ends(seconds)
    assert asdict(figures) == pytest.approx({"tokens": 5000, "early_ms": 2.0, "late_ms": 3.0, "ratio": 1.5})


def test_the_command_prints_a_table_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--weights", "int8", "--json") == ExitCode.OK
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.strip().split("  ")[0] for line in lines if "tok/s" not in line and " x" in line] == [
        "engine, int8 weights",
        "engine, native weights",
        "transformers' forward pass, int8 weights",
        "transformers' forward pass, native weights",
    ]
    figures = json.loads(last)
    assert (figures["weights"], figures["cached"], figures["tokens"]) == ("int8", 64, 6)


def test_one_long_reply_is_decoded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "EARLY", slice(4, 8))
    monkeypatch.setattr(decode, "LATE", slice(-4, None))
    monkeypatch.setattr(decode, "MIN_FLAT", 12)
    assert bench(folder, "--flat", "20", "--json") == ExitCode.OK
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith(" 4 to 8 ") for line in lines)
    assert json.loads(last)["tokens"] == 20
    assert bench(folder, "--flat", "11") == ExitCode.USAGE
    assert capsys.readouterr().err.endswith("--flat 11 must be at least 12\n")


def test_threads_and_clock_are_those_of_the_flags(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []

    def thread_time() -> float:
        ticks.append(torch.get_num_threads())
        return float(len(ticks))

    monkeypatch.setattr("time.thread_time", thread_time)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert bench(folder, "--profile", "--threads", "1", "--weights", "native") == ExitCode.OK
        assert ticks == []
        assert bench(folder, "--threads", "1", "--cpu-time", "--weights", "native") == ExitCode.OK
        assert set(ticks) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile"], "--profile needs --decode"),
        (["--flat", "5000"], "--flat needs --decode"),
        (["--threads", "1"], "--threads needs --decode or --speculative"),
        (["--gpu", "--cpu-time"], "--cpu-time needs --decode or --speculative"),
        (["--decode", "--threads", "0"], "--threads 0 must be at least 1"),
        (["--decode", "--threads", "1025"], "--threads 1025 must be at most 1024"),
        (["--speculative", "--threads", "9" * 20], f"--threads {'9' * 20} must be at most 1024"),
        (["--decode", "--new-tokens", "1"], "--new-tokens 1 must be at least 2"),
        (["--decode", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--decode", "--cpu-time"], "--cpu-time counts the time of one thread; add --threads 1"),
        (["--decode", "--cpu-time", "--threads", "1", "--profile"], "--cpu-time does not work with --profile"),
        (["--decode", "--profile", "--flat", "5000"], "--flat/--tokens: not allowed with argument --profile"),
        (["--decode", "--gpu"], "--gpu: not allowed with argument --decode"),
        (["--decode", "--device", "cuda"], "--decode measures the CPU and device = cuda; add --device cpu"),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert cli.main(["bench", *arguments]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
