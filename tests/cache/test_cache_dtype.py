"""A cache in bfloat16 for a model that computes in float32: every path stores the same, in half the memory."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base.events.model import ModelInfo
from streamchat.benchmarks.loading import about, heading
from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.dtype import cache_dtype, set_cache_dtype
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.press import StreamingPress
from streamchat.cache.streaming import StreamingCache
from streamchat.cli.main import main
from streamchat.decode.install import install, install_captured
from streamchat.kernels import build
from streamchat.kernels.build import KernelsUnavailableError
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.models import device as devices
from streamchat.models.load import load_model
from tests.support.decode_models import make, stream
from tests.support.families import text
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import tiny_loaded
from tests.support.recorded_graphs import RecordedGraphs

needs_kernels = pytest.mark.skipif(bool(why_unavailable("auto")), reason="no compiled kernels here")
HALF = torch.bfloat16


def cache_in(model: Any, dtype: torch.dtype, size: int = 24, **options: Any) -> StreamingCache:
    fit = fit_positions(model)
    return make_cache(
        model, fit, cache_size=size, num_sink_tokens=4, dtype=dtype, options=EvictionOptions(block=4, **options)
    )


def stored(cache: StreamingCache) -> list[Tensor]:
    return [tensor for layer in cache.streaming_layers for tensor in layer.state().values()]


def equal(one: StreamingCache, other: StreamingCache) -> bool:
    return all(torch.equal(a, b) for a, b in zip(stored(one), stored(other), strict=True))


def buffer_dtypes(cache: StreamingCache) -> set[torch.dtype]:
    return {buffer.dtype for layer in cache.streaming_layers for buffer in layer.buffers or ()}


def fed_in_pieces(model: Any, ids: Tensor, sizes: list[int]) -> StreamingCache:
    cache, name = cache_in(model, HALF), cache_keyword(model)
    with torch.inference_mode(), StreamingHook(model, cache):
        for piece in torch.split(ids, sizes, dim=1):
            model(input_ids=piece, use_cache=True, **{name: cache})
    return cache


def close(one: Tensor, other: Tensor) -> bool:
    """Within what rounding keys and values to 8 bits of mantissa can change, and not equal to the bit."""
    error = (one - other).square().mean().sqrt() / other.std()
    return bool(0 < error < 0.02)


def test_keys_and_values_take_half_the_memory_and_the_logits_stay_close() -> None:
    model, ids = make("llama"), text(60)
    half, full = cache_in(model, HALF), cache_in(model, torch.float32)
    logits, exact = stream(model, half, ids, 10), stream(model, full, ids, 10)
    assert half.compression_count > 5
    assert buffer_dtypes(half) == {HALF}
    assert (2 * half.kv_bytes, 2 * half.token_bytes) == (full.kv_bytes, full.token_bytes)
    assert logits.dtype == torch.float32
    assert close(logits, exact)


@needs_kernels
def test_compiled_kernels_read_and_write_16_bits() -> None:
    model, ids = make("llama"), text(60)
    plain = cache_in(model, HALF)
    expected = stream(model, plain, ids, 10)
    assert install(model, load_kernels("auto"))
    compiled = cache_in(model, HALF)
    logits = stream(model, compiled, ids, 10)
    assert buffer_dtypes(compiled) == {HALF}
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()
    # the first layer does not depend on attention: its bits are the same but for sums that end in another order
    first, other = (cache.streaming_layers[0].keys for cache in (plain, compiled))
    assert first is not None
    assert other is not None
    assert (first == other).float().mean() > 0.98
    assert torch.allclose(first.float(), other.float(), rtol=2**-6, atol=1e-3)


def test_the_short_path_of_torch_attends_to_16_bits() -> None:
    model, ids = make("llama"), text(60)
    expected = stream(model, cache_in(model, HALF), ids, 10)
    assert install(model, None)
    short = cache_in(model, HALF)
    logits = stream(model, short, ids, 10)
    assert buffer_dtypes(short) == {HALF}
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()


@pytest.mark.parametrize("path", ["plain", "torch", pytest.param("kernels", marks=needs_kernels)])
def test_chunks_store_the_bits_of_single_tokens(path: str) -> None:
    """The tokens of a chunk attend to each other's rounded keys and values, as they would one by one."""
    model, ids = make("llama"), text(20)
    if path != "plain":
        assert install(model, load_kernels("auto") if path == "kernels" else None)
    single = fed_in_pieces(model, ids, [1] * 20)
    for sizes in ([20], [7, 1, 12]):
        for one, other in zip(stored(single), stored(fed_in_pieces(model, ids, sizes)), strict=True):
            assert one.dtype == HALF
            # sums that end in another order change the last bit of a number now and then
            assert (one == other).float().mean() > 0.99
            assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-3)


def test_a_captured_step_leaves_a_cache_of_another_dtype_to_the_plain_forward() -> None:
    model, ids = make("llama"), text(40)
    expected = stream(model, cache_in(model, HALF), ids, 10)
    graphs = RecordedGraphs()
    assert install_captured(model, graphs.record)
    assert torch.equal(stream(model, cache_in(model, HALF), ids, 10), expected)
    assert graphs.recordings == graphs.replays == 0
    stream(model, cache_in(model, torch.float32), ids, 10)
    assert graphs.replays


def test_sinks_do_not_drift_and_a_rebase_keeps_the_dtype() -> None:
    model, ids = make("llama"), text(120)
    cache = cache_in(model, HALF)
    stream(model, cache, ids[:, :20], 20)
    layer = cache.streaming_layers[0]
    before = layer.unrotated_keys(0, 4).clone()
    stream(model, cache, ids[:, 20:], 1)
    cache.rebase_positions()
    after = layer.unrotated_keys(0, 4)
    assert after.dtype == torch.float32
    assert layer._originals is not None
    assert layer._originals[0].dtype == torch.float32
    assert (after - before).abs().max() <= 3 * 2**-8 * before.abs().max()
    assert layer.keys is not None
    assert layer.keys.dtype == HALF


@pytest.mark.parametrize(("source", "target"), [(HALF, HALF), (torch.float32, HALF), (HALF, torch.float32)])
def test_a_checkpoint_is_converted_to_the_dtype_of_the_cache(source: torch.dtype, target: torch.dtype) -> None:
    model, ids = make("llama"), text(60)
    cache, other = cache_in(model, source), cache_in(model, target)
    stream(model, cache, ids[:, :50], 10)
    saved = checkpoint.capture(cache)
    assert {tensor.dtype for name, tensor in saved.tensors.items() if name.endswith(".keys")} == {source}
    checkpoint.restore(other, saved)
    for one, two in zip(cache.streaming_layers, other.streaming_layers, strict=True):
        assert two.keys is not None
        assert one.keys is not None
        assert two.keys.dtype == target
        assert torch.equal(two.keys, one.keys.to(target))
    stream(model, other, ids[:, 50:], 1)


def test_copies_pins_cuts_and_beams_keep_the_dtype() -> None:
    model, ids = make("llama"), text(60)
    cache = cache_in(model, HALF)
    stream(model, cache, ids[:, :20], 20)
    cache.pin(6, 9)
    twin = copy.deepcopy(cache)
    logits, again = (stream(model, each, ids[:, 20:50], 1) for each in (cache, twin))
    assert torch.equal(logits, again)
    assert equal(cache, twin)
    cache.crop_newest(3)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert {tensor.dtype for tensor in stored(cache)} == {HALF, torch.float32}  # float32: the originals
    cache.reset()
    with torch.inference_mode():
        stream(model, cache, ids[:, :12], 12)
    assert cache.streaming_layers[0].keys is not None
    assert cache.streaming_layers[0].keys.dtype == HALF


def test_key_diversity_evicts_the_same_turns_with_16_bits() -> None:
    model, ids = make("llama"), text(60)
    cached = []
    for dtype in (HALF, torch.float32):
        cache = cache_in(model, dtype, policy="key-diversity")
        for first in range(0, 60, 6):
            cache.begin_turn(6)
            stream(model, cache, ids[:, first : first + 6], 6)
        assert cache.compression_count > 3
        assert {keys.dtype for keys in cache.unrotated_keys(0, 5)} == {torch.float32}
        cached.append(cache.ledger.runs)
    assert cached[0] == cached[1]
    assert len(cached[0]) > 2  # turns in the middle were evicted: the choice was not the oldest


def test_a_press_keeps_the_dtype_of_the_model_unless_asked() -> None:
    model, ids = make("llama"), text(40)
    set_cache_dtype(model, HALF)
    for asked, expected in ((None, torch.float32), (HALF, HALF)):
        press = StreamingPress(model, cache_size=24, dtype=asked)
        with torch.inference_mode(), press:
            model(input_ids=ids[:, :20], use_cache=True, **{cache_keyword(model): press.cache})
        assert press.cache.streaming_layers[0].dtype == expected


@needs_kernels
@pytest.mark.parametrize(
    ("asked", "fast", "kernels", "expected"),
    [
        ("auto", False, "auto", ("float32", "bfloat16")),
        ("auto", False, "torch", ("float32", "float32")),
        ("float32", False, "auto", ("float32", "float32")),
        ("auto", True, "auto", ("bfloat16", "bfloat16")),
    ],
)
def test_float32_keys_only_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, fast: bool, kernels: str, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: fast)
    folder = save(tiny_llama(), tmp_path)
    loaded = load_model(str(folder), device="cpu", dtype=asked, kernels=kernels)
    assert (loaded.dtype, loaded.cache_dtype) == expected
    assert str(cache_dtype(loaded.model)) == f"torch.{expected[1]}"


def doctor_rows(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    main(["doctor", "--json", "--device", "cpu", "--model", "pythia-410m", *flags])
    rows: dict[str, Any] = json.loads(capsys.readouterr().out)["chat"]
    return rows


@pytest.mark.parametrize(
    ("flags", "fast", "compiler", "expected"),
    [
        (
            (),
            False,
            True,
            "int8 if it is as good and as fast here, else bfloat16 if compiled kernels decode, else float32",
        ),
        (("--kv-dtype", "native"), False, True, "bfloat16 if compiled kernels decode, else float32"),
        (("--kv-dtype", "int4"), False, False, "int4"),
        ((), False, False, "float32"),
        (("--kernels", "torch"), False, True, "float32"),
        (("--dtype", "float32"), False, True, "float32"),
        ((), True, True, "int8 if it is as good and as fast here, else bfloat16"),
    ],
)
def test_doctor_names_the_dtype_of_cached_keys(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    fast: bool,
    compiler: bool,
    expected: str,
) -> None:
    def library_path() -> Path:
        if compiler:
            return Path("kernels.so")
        raise KernelsUnavailableError("no C compiler was found")

    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: fast)
    monkeypatch.setattr(build, "library_path", library_path)
    monkeypatch.setattr(build, "find_compiler", lambda: ["gcc"])
    assert doctor_rows(capsys, *flags)["cached keys"] == expected


@pytest.mark.parametrize(
    ("weights", "cache", "expected"),
    [
        ("native", "", "float32"),
        ("native", "float32", "float32"),
        ("native", "bfloat16", "float32, bfloat16 cache"),
        ("int4", "float32", "float32, int4 weights"),
        ("int4", "bfloat16", "float32, int4 weights, bfloat16 cache"),
    ],
)
def test_the_panel_and_the_pages_of_benchmarks_name_the_dtype_of_the_cache(
    weights: str, cache: str, expected: str
) -> None:
    loaded = replace(tiny_loaded(), weights=weights, cache_dtype=cache)
    sizes = (1, 4, 64, 64, 4, 0)
    info = ModelInfo("m", "m", "cpu", "float32", *sizes, "sdpa", "plain", weights=weights, cache_dtype=cache)
    assert info.precision == expected
    assert ("bfloat16 cache" in heading(loaded)[0]) == ("cache" in expected)
    assert about("ppl", loaded)["cache_dtype"] == (cache or "float32")
