"""A cache in 8 or 4 bits: what is stored, that evictions leave the window's codes alone, and that all paths agree."""

from __future__ import annotations

import copy
import json
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.dtype import bytes_per_number, set_cache_dtype
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import INT4, K8V4, SHARES, CacheDtype, dequantize, quantize, turned
from streamchat.cache.layers.storage import new_storage
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.install import install, install_captured
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.models import kv_choice, kv_on_gpu
from streamchat.models.kv_choice import choose_kv_dtype
from streamchat.sessions import snapshot
from streamchat.sessions.snapshot import Snapshot, SnapshotError
from streamchat.verify.run import verify
from tests.support.decode_models import make, stream
from tests.support.families import text
from tests.support.recorded_graphs import RecordedGraphs

needs_kernels = pytest.mark.skipif(bool(why_unavailable("auto")), reason="no compiled kernels here")
QUANTIZED: list[CacheDtype] = [torch.int8, K8V4, INT4]
NAMES = ["int8", "k8v4", "int4"]
CLOSE: dict[CacheDtype, float] = {torch.int8: 0.03, K8V4: 0.3, INT4: 0.5}
"""Largest root mean square difference of logits, in units of their spread."""
quantized = pytest.mark.parametrize("dtype", QUANTIZED, ids=NAMES)


def cache_in(model: Any, dtype: CacheDtype, size: int = 24, **options: Any) -> StreamingCache:
    fit = fit_positions(model)
    return make_cache(
        model, fit, cache_size=size, num_sink_tokens=4, dtype=dtype, options=EvictionOptions(block=4, **options)
    )


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).square().mean().sqrt() / other.std()).item()


def raw(cache: StreamingCache) -> list[Tensor]:
    return [tensor.clone() for layer in cache.streaming_layers for tensor in layer.state().values()]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [64, 80, 6, 2])
def test_numbers_are_off_by_half_a_code_at_most(bits: int, width: int) -> None:
    x = torch.randn(2, 3, 5, width) * torch.logspace(-6, 6, 5)[:, None]
    codes, scales = quantize(x, bits)
    assert (codes.dtype, codes.shape[-1]) == ((torch.int8, width) if bits == 8 else (torch.uint8, width // 2))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, x.shape[:-1])
    off = (turned(dequantize(codes, scales)) - turned(x)).abs()
    assert (off <= 0.501 * scales.float()[..., None]).all()
    # the scale is at most 1/128 larger than necessary
    assert (scales.float() <= 1.01 * turned(x).abs().amax(-1) / (127 if bits == 8 else 7)).all()


@pytest.mark.parametrize("width", [64, 80, 6])
def test_the_best_scale_has_the_least_error(width: int) -> None:
    x = torch.randn(3, 200, width, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0.0
    plain, best = (quantize(x, 4, searches=searches) for searches in (False, True))
    errors, fewer = ((dequantize(*each) - x).square().sum(-1) for each in (plain, best))
    assert (fewer <= errors + 1e-5).all()
    assert fewer.mean() < 0.95 * errors.mean()
    shares = best[1].float() / plain[1].float().clamp_min(1e-9)
    assert all((shares[1:] - share).abs().min() < 0.02 for share in SHARES[: 4 if width > 6 else 3])
    x[1, 1, 1], x[2, 2, 1] = float("nan"), float("inf")
    found = dequantize(*quantize(x, 4, searches=True))
    assert not found[1, 1].isfinite().any()
    assert not found[2, 2].isfinite().any()
    assert found[0].isfinite().all()


@pytest.mark.parametrize(("bits", "searches"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("width", [256, 128, 96, 32])
def test_codes_do_not_depend_on_how_many_tokens_are_stored_at_once(bits: int, searches: bool, width: int) -> None:
    # undo writes slots anew, fewer or more at once than before
    x = torch.randn(1, 8, 2000, width, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize(x, bits, searches=searches)
    for heads, count in ((8, 0), (1, 1), (8, 17), (8, 1001)):
        some = quantize(x[:, :heads, :count], bits, searches=searches)
        assert torch.equal(some[0], codes[:, :heads, :count])
        assert torch.equal(some[1], scales[:, :heads, :count])


@pytest.mark.parametrize("width", [128, 96, 10, 7])
def test_turning_twice_changes_nothing(width: int) -> None:
    x = torch.randn(3, width)
    torch.testing.assert_close(turned(turned(x)), x)
    torch.testing.assert_close(turned(x).norm(dim=-1), x.norm(dim=-1))


def test_zeros_and_numbers_that_are_not_finite_keep_to_their_head() -> None:
    x = torch.ones(5, 8)
    x[1] = 0.0
    x[2, 3], x[3, 3], x[4, 3] = float("nan"), float("inf"), 1e38
    found = dequantize(*quantize(x, 8))
    assert torch.equal(found[1], torch.zeros(8))
    assert not found[2:4].isfinite().any()
    assert found[4].isfinite().all()
    storage = new_storage(x[None, None], x[None, None], 5, torch.int8)
    storage.write(0, x[None, None], x[None, None])
    storage.replace_not_finite()
    assert storage.keys.read(0, 5).isfinite().all()
    assert torch.equal(storage.keys.read(0, 1)[0, 0], found[:1])


def test_a_token_takes_about_half_and_a_quarter_of_16_bits() -> None:
    states = torch.randn(1, 3, 0, 64)
    sixteen, eight, mixed, four = (new_storage(states, states, 10, each) for each in (torch.bfloat16, *QUANTIZED))
    assert mixed.nbytes == (eight.nbytes + four.nbytes) / 2
    assert eight.nbytes / sixteen.nbytes == eight.token_bytes / sixteen.token_bytes <= 0.53
    assert four.nbytes / sixteen.nbytes == four.token_bytes / sixteen.token_bytes <= 0.28
    assert [bytes_per_number(each) for each in (torch.bfloat16, *QUANTIZED)] == [2, 1, 0.75, 0.5]


@quantized
def test_an_eviction_does_not_touch_the_codes_of_the_window(dtype: CacheDtype) -> None:
    model, ids = make("llama"), text(60)
    cache = cache_in(model, dtype)
    stream(model, cache, ids[:, :24], 24)
    layer = cache.streaming_layers[0]
    before = {name: part.clone() for name, part in layer.state().items()}
    with torch.inference_mode():
        cache.make_room(4)
    after = layer.state()
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(after[name][:, :, 4:], before[name][:, :, 8:])  # 4 sinks; 4 tokens are gone
    # the sinks come from float32
    assert after["original_keys"].dtype == torch.float32
    assert not torch.equal(after["keys"][:, :, 1:4], before["keys"][:, :, 1:4])


@quantized
@pytest.mark.parametrize("path", ["plain", "torch", pytest.param("kernels", marks=needs_kernels)])
def test_every_path_is_close_to_float32(dtype: CacheDtype, path: str) -> None:
    model, ids = make("llama"), text(70)
    exact = stream(model, cache_in(model, torch.float32), ids, 10)
    if path != "plain":
        assert install(model, load_kernels("auto") if path == "kernels" else None)
    cache = cache_in(model, dtype)
    cache.position_limit = 40  # a rebase
    logits = stream(model, cache, ids, 10)
    assert cache.compression_count > 5
    assert cache.streaming_layers[0].base < 40
    assert 0 < distance(logits, exact) < CLOSE[dtype]


@needs_kernels
@quantized
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_kernels_store_the_codes_of_torch(dtype: CacheDtype, family: str) -> None:
    model, ids = make(family), text(20)
    name = cache_keyword(model)

    def fed(sizes: list[int]) -> StreamingCache:
        cache = cache_in(model, dtype)
        with torch.inference_mode(), StreamingHook(model, cache):
            for piece in torch.split(ids, sizes, dim=1):
                model(input_ids=piece, use_cache=True, **{name: cache})
        return cache

    plain = fed([20])
    assert install(model, load_kernels("auto"))
    for sizes in ([1] * 20, [7, 1, 12]):
        # the first layer does not depend on attention
        ours, theirs = (cache.streaming_layers[0].state() for cache in (fed(sizes), plain))
        for part, codes in ours.items():
            assert codes.dtype == theirs[part].dtype
            assert (codes == theirs[part]).float().mean() > 0.97  # sums that end in another order move a tie


@quantized
def test_a_checkpoint_is_restored_exactly_and_continues_the_same(dtype: CacheDtype, tmp_path: Path) -> None:
    model, ids = make("llama"), text(70)
    cache, other = cache_in(model, dtype), cache_in(model, dtype)
    stream(model, cache, ids[:, :50], 10)
    cache.pin(30, 33)
    saved = checkpoint.capture(cache)
    path = tmp_path / "snapshot"
    ids_cached = array("i", range(saved.length))
    snapshot.save(path, Snapshot("s", saved, ids_cached, torch.zeros(4, dtype=torch.uint8), "f", "int8 cache", {}))
    checkpoint.restore(other, snapshot.load(path).checkpoint)
    assert all(torch.equal(one, two) for one, two in zip(raw(cache), raw(other), strict=True))
    more, again = (stream(model, each, ids[:, 50:], 1) for each in (cache, other))
    assert torch.equal(more, again)
    assert all(torch.equal(one, two) for one, two in zip(raw(cache), raw(other), strict=True))


@pytest.mark.parametrize(
    ("source", "target"),
    [(torch.float32, torch.int8), (torch.int8, torch.bfloat16), (torch.int8, INT4), (torch.int8, K8V4)],
)
def test_a_checkpoint_of_another_dtype_is_converted(source: CacheDtype, target: CacheDtype) -> None:
    model, ids = make("llama"), text(60)
    cache, other = cache_in(model, source), cache_in(model, target)
    stream(model, cache, ids[:, :50], 10)
    checkpoint.restore(other, checkpoint.capture(cache))
    for one, two in zip(cache.streaming_layers, other.streaming_layers, strict=True):
        assert two.stored_dtype == target
        ours, theirs = (
            layer.storage.values.read(layer.start, layer.length).float() for layer in (two, one) if layer.storage
        )
        assert 0 < distance(ours, theirs) < (0.25 if target in (INT4, K8V4) else 0.02)
    stream(model, other, ids[:, 50:], 1)


def saved_snapshot(path: Path, dtype: CacheDtype) -> checkpoint.CacheCheckpoint:
    model = make("llama")
    cache = cache_in(model, dtype)
    stream(model, cache, text(50), 10)
    taken = checkpoint.capture(cache)
    state = torch.zeros(4, dtype=torch.uint8)
    snapshot.save(path, Snapshot("s", taken, array("i", range(taken.length)), state, "f", "d", {}))
    return taken


def test_only_files_with_codes_have_the_new_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier streamchat reads the others."""
    saved_snapshot(tmp_path / "codes", torch.int8)
    saved_snapshot(tmp_path / "numbers", torch.bfloat16)
    monkeypatch.setattr(snapshot, "QUANTIZED_FORMAT", 1)
    assert snapshot.load(tmp_path / "numbers").checkpoint.length
    with pytest.raises(SnapshotError, match="format 3"):
        snapshot.load(tmp_path / "codes")


@quantized
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("0.key_scales", lambda x: None),
        ("0.key_scales", lambda x: x[:, :, 1:]),
        ("0.value_scales", lambda x: x[..., None]),
        ("0.values", lambda x: x[:, :, 1:]),
        ("0.keys", lambda x: x.float()),
        ("0.original_keys", lambda x: x[..., 1:]),
    ],
)
def test_snapshots_with_wrong_parts_are_refused(tmp_path: Path, dtype: CacheDtype, part: str, change: Any) -> None:
    path = tmp_path / "snapshot"
    taken = saved_snapshot(path, dtype)
    assert snapshot.load(path).checkpoint.length == taken.length
    harmed = change(taken.tensors[part])
    tensors = {name: tensor for name, tensor in taken.tensors.items() if name != part}
    tensors |= {} if harmed is None else {part: harmed.contiguous()}
    damaged = checkpoint.CacheCheckpoint(tensors, taken.bases, taken.runs, taken.next_index)
    state = torch.zeros(4, dtype=torch.uint8)
    snapshot.save(path, Snapshot("s", damaged, array("i", range(taken.length)), state, "f", "d", {}))
    with pytest.raises(SnapshotError, match="damaged"):
        snapshot.load(path)


@quantized
def test_pins_copies_cuts_and_beams(dtype: CacheDtype) -> None:
    model, ids = make("llama"), text(60)
    cache = cache_in(model, dtype)
    stream(model, cache, ids[:, :20], 20)
    cache.pin(6, 9)
    twin = copy.deepcopy(cache)
    logits, again = (stream(model, each, ids[:, 20:50], 1) for each in (cache, twin))
    assert torch.equal(logits, again)
    assert list(cache.ledger)[4:7] == [6, 7, 8]
    cache.crop_newest(3)
    assert cache.lengths == [cache.length] * len(cache.streaming_layers)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    first = cache.streaming_layers[0].state()
    assert all(torch.equal(part[0], part[1]) for part in first.values())
    cache.reset()
    with torch.inference_mode():
        stream(model, cache, ids[:, :12], 12)
    assert cache.streaming_layers[0].stored_dtype == dtype


@quantized
def test_captured_steps_read_and_write_codes(dtype: torch.dtype) -> None:
    """New tokens, replayed over evictions, and a short prompt."""
    model, ids = make("llama"), text(42)

    def logits() -> tuple[Tensor, StreamingCache]:
        cache, name = cache_in(model, dtype), cache_keyword(model)
        found = stream(model, cache, ids[:, :30], 10)
        with torch.inference_mode(), StreamingHook(model, cache):
            last = model(input_ids=ids[:, 30:], use_cache=True, logits_to_keep=1, **{name: cache}).logits[0]
        return torch.cat([found, last]), cache

    expected, _ = logits()
    graphs = RecordedGraphs()
    assert install_captured(model, graphs.record, "graph")
    found, cache = logits()
    # a number on the border of two codes may get either
    assert distance(found, expected) < (0.01 if dtype == torch.int8 else 0.1)
    assert graphs.replays > 10
    assert cache.streaming_layers[0].stored_dtype == dtype


def test_keys_and_values_are_measured_on_a_gpu_too() -> None:
    """With the captured steps of a GPU, recorded on a CPU."""
    model, ids = make("llama"), text(40)
    assert kv_on_gpu.divergence_on_gpu(model, ids, torch.float32) < 1e-6
    eight, mixed, four = (kv_on_gpu.divergence_on_gpu(model, ids, dtype) for dtype in QUANTIZED)
    assert 0 < eight < four / 20
    assert eight < mixed < four
    assert install_captured(model, RecordedGraphs().record, "graph")
    assert kv_on_gpu.relative_speed_on_gpu(model, (torch.float32, torch.int8), 40, 1) > 0


@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.int8, 32), (K8V4, 16)], ids=["int8", "k8v4"])
def test_verify_holds_in_8_bits(dtype: CacheDtype, value_bytes: int) -> None:
    model = make("llama")
    set_cache_dtype(model, dtype)
    found = verify(model, text(20)[0].tolist(), cache_size=32, num_sink_tokens=4, new_tokens=60)
    assert [check.name for check in found.checks if not check.ok] == []
    manual = found.runs[1]
    assert manual.steps[-1].storage_bytes == 48 * manual.token_bytes  # with the scales
    assert found.runs[1].token_bytes == 3 * 2 * (32 + 2 + value_bytes + 2)  # layers, heads, codes and scales


TINY_TOKENS = list(range(3, 43))


class Tokenizer:
    """Gives the same tokens for every text."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": TINY_TOKENS}


@needs_kernels
def test_the_loss_of_8_bits_is_small_and_that_of_4_larger() -> None:
    model = make("llama")
    assert install(model, load_kernels("auto"))
    eight, mixed, four = (kv_choice.kv_divergence(model, Tokenizer(), dtype) for dtype in QUANTIZED)
    assert 0 < eight < four / 20
    assert eight < mixed < four
    assert kv_choice.kv_divergence(model, Tokenizer(), torch.float32) == 0


@needs_kernels
@pytest.mark.parametrize(
    ("divergence", "speed", "expected"),
    [(0.0009, 1.1, "int8"), (0.0011, 1.1, "bfloat16"), (0.0009, 0.9, "bfloat16"), (float("inf"), 2.0, "bfloat16")],
)
def test_auto_takes_8_bits_if_they_are_as_good_and_as_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, divergence: float, speed: float, expected: str
) -> None:
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path))
    model = make("llama")
    choose = partial(choose_kv_dtype, model, Tokenizer(), "auto", "bfloat16", weights="native", name="m")
    monkeypatch.setattr(kv_choice, "kv_divergence", lambda *_: divergence)
    monkeypatch.setattr(kv_choice, "_relative_speed", lambda *_: speed)
    assert choose() == ("bfloat16", ())  # no compiled kernels
    assert install(model, load_kernels("auto"))
    assert choose() == (expected, ())
    monkeypatch.setattr(kv_choice, "kv_divergence", lambda *_: pytest.fail("measured again"))
    if divergence < float("inf"):
        assert choose() == (expected, ())


@needs_kernels
def test_a_measurement_that_fails_leaves_the_native_dtype(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path))
    model = make("llama")
    assert install(model, load_kernels("auto"))

    def no_text(text: str, **options: Any) -> Any:
        raise ValueError("no")

    assert choose_kv_dtype(model, no_text, "auto", "float32", weights="native", name="m") == ("float32", ())


@needs_kernels
def test_auto_measures_and_remembers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path))
    model = make("llama")
    assert install(model, load_kernels("auto"))
    for _ in range(2):
        chosen, notes = choose_kv_dtype(model, Tokenizer(), "auto", "float32", weights="native", name="m")
        monkeypatch.setattr(kv_choice, "kv_divergence", lambda *_: pytest.fail("measured again"))
        monkeypatch.setattr(kv_choice, "_relative_speed", lambda *_: pytest.fail("measured again"))
    (file,) = (tmp_path / "cache" / "verdicts").iterdir()
    figures = json.loads(file.read_text())
    assert 0 < figures["divergence"] < 0.01
    assert chosen == ("int8" if figures["divergence"] <= kv_choice.LIMIT and figures["speed"] >= 1 else "float32")
    assert notes == ()


@needs_kernels
@pytest.mark.parametrize(("loss", "noted"), [(0.009, False), (0.011, True), (float("nan"), True)])
def test_a_loss_of_more_than_a_percent_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float, noted: bool
) -> None:
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path))
    model = make("llama")
    assert install(model, load_kernels("auto"))
    monkeypatch.setattr(kv_choice, "kv_divergence", lambda *_: loss)
    chosen, notes = choose_kv_dtype(model, Tokenizer(), "int4", "float32", weights="native", name="m")
    assert chosen == "int4"
    assert ("loses quality with keys and values in int4" in "".join(notes)) == noted


def test_a_choice_is_kept_and_its_price_is_said() -> None:
    model = make("llama")
    choose = partial(choose_kv_dtype, model, Tokenizer(), native="float32", weights="native", name="m")
    assert choose("native") == ("float32", ())
    asked: Any
    for asked in NAMES:
        chosen, notes = choose(asked)
        assert chosen == asked
        assert "there are no compiled kernels" in notes[0]
    model.config.head_dim = 15
    for asked in ("int4", "k8v4"):
        chosen, notes = choose(asked)
        assert chosen == "float32"
        assert "odd size" in notes[0]
