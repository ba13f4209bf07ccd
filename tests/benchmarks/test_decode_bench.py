"""The measurement itself: what it runs on which path, and that it leaves a model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamchat.kernels.library import kernels, why_unavailable
from streamchat.models.load import LoadedModel, load_model
from tests.support.models_help import save, tiny_llama
from tools import decode_bench
from tools.decode_bench import compiled_step, full_stream, measure_decode, measure_flat, measure_parts

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(**SIZES, max_position_embeddings=2048), tmp_path / "llama")


def test_four_ways_are_timed_on_a_full_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    streams: list[decode_bench.Stream] = []

    def load(weights: str) -> LoadedModel:
        asked.append(weights)
        return load_model(str(folder), device="cpu", dtype="bfloat16", weights=weights)

    class Stream(decode_bench.Stream):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            streams.append(self)

    monkeypatch.setattr(decode_bench, "Stream", Stream)
    figures = measure_decode(load, weights="int8", cache_size=64, tokens=20, rounds=2)
    assert asked == ["int8", "native"]
    assert (figures.weights, figures.cached, figures.tokens) == ("int8", 64, 20)
    assert min(figures.engine_ms, figures.native_ms, figures.plain_ms, figures.plain_native_ms) > 0
    assert figures.as_dict()["prefill_tps"] > 0
    assert [stream.short_path for stream in streams] == [True, False, True, False]
    for stream in streams:
        assert stream.cache.ledger.next_index == 64 + decode_bench.WARM_UP + 20
        assert stream.cache.compression_count >= 1


def test_a_long_stream_is_timed_token_by_token(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    times = measure_flat(loaded, cache_size=32, tokens=50)
    assert len(times) == 50
    assert min(times) > 0


@pytest.mark.skipif(kernels() is None, reason=why_unavailable())
def test_the_parts_of_a_token_are_timed_by_kind(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="bfloat16", weights="int8")
    stream = full_stream(loaded, cache_size=32)
    step = compiled_step(loaded.model)
    assert step is not None
    found = measure_parts(stream, step, 3)
    layers = loaded.model.config.num_hidden_layers
    names = {"kernels, all": 8 * layers + 2, "attention": layers, "norms": 2 * layers + 1, "activations": layers}
    # queries, keys and values are one product, gate and up another
    names["products, int8"] = 4 * layers + 1
    assert set(found) == {"token", *(f"{name} ({count})" for name, count in names.items())}
    assert min(found.values()) > 0
