"""The fused kernels, in Triton's interpreter, against the step of torch operations and the plain forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import INT4
from streamchat.cache.layers.storage import new_storage
from streamchat.cache.logits import logit_distance
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import make_cache
from streamchat.decode.families.registry import model_spec
from streamchat.decode.fused.sizes import Sizes
from streamchat.decode.fused.step import FusedStep, fused_step, sizes_of
from streamchat.decode.install import install_captured, no_fused_kernels_for, uses_fused_kernels
from streamchat.decode.static import Inputs, bind, static_step
from streamchat.decode.static_slots import stored
from streamchat.quantization.layouts import LAYOUTS, LayoutName
from streamchat.quantization.linear import quantized_layers
from streamchat.quantization.replace import groups
from streamchat.quantization.replace import replace as replace_layers
from streamchat.quantization.weights import Kind, quantize
from tests.support.decode_models import GROUPED, cache_of, counted, make, stream
from tests.support.families import build, text
from tests.support.fused_families import FUSED, build_fused
from tests.support.interpreter import needs_interpreter, patch_once
from tests.support.recorded_launches import RecordedLaunches
from tests.support.tile_products import product_with_tiles
from tests.support.tiny import fresh_model

pytestmark = needs_interpreter
CPU = torch.device("cpu")
SLOTS = 24


@pytest.fixture(autouse=True, scope="module")
def _quick() -> None:
    patch_once()


class Both:
    """A fused step and the static step of a model, each with buffers of its own."""

    def __init__(
        self, model: Any, sizes: Sizes | None = None, slots: int = SLOTS, kv_dtype: torch.dtype | None = None
    ) -> None:
        spec, step = model_spec(model), static_step(model)
        assert spec is not None
        assert step is not None
        assert fused_step(model, CPU) is not None
        self.fused, self._static, self._dtype = FusedStep(spec, CPU, sizes), step, model.dtype
        self.inputs = Inputs(CPU)
        shapes = [(1, block.attention.num_kv_heads, 0, block.attention.head_dim) for block in spec.blocks]
        cache_dtype = kv_dtype or model.dtype
        self.ours, self.theirs = (
            [new_storage(torch.empty(shape), torch.empty(shape), slots, cache_dtype).buffers for shape in shapes]
            for _ in range(2)
        )
        # what no slot that is attended to may show
        for tensor in (tensor for buffers in self.ours for tensor in buffers):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 111)

    @torch.no_grad()
    def token(self, token: int, position: int, start: int, slot: int) -> tuple[Tensor, Tensor]:
        """Compute one token with both; returns the logits."""
        expected = self.static_token(token, position, start, slot)
        return self.fused.run(self.inputs, self.ours), expected

    @torch.no_grad()
    def static_token(self, token: int, position: int, start: int, slot: int) -> Tensor:
        """Compute one token with the static step only."""
        self.inputs.fill(torch.tensor([[token]]), torch.tensor([[position]]), start, slot)
        return bind(self._static, self.inputs, self.theirs, self._dtype)().float()

    def feed(self, count: int, atol: float = 2e-5) -> None:
        """Compare logits and keys and values of `count` tokens, with fewer live slots towards the end."""
        for slot, token in enumerate(text(count)[0].tolist()):
            found, expected = self.token(token, slot + 7, max(0, slot - 9), slot)
            assert logit_distance(found, expected) < atol
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine[:, :, :count], other[:, :, :count], rtol=0, atol=20 * atol)
                assert mine[:, :, count:].isnan().all()


@pytest.mark.parametrize("what", FUSED)
def test_logits_and_cached_tensors_are_those_of_the_static_step(what: str) -> None:
    Both(build_fused(what)).feed(7 if "sliding_window" in FUSED[what][1] else 3)


def odd_model(**changes: Any) -> Any:
    """A model of two layers, no size of which is a multiple of a block."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 163, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "head_dim": 20}
    config = transformers.LlamaConfig(**GROUPED | sizes | {"num_attention_heads": 6} | changes)
    return fresh_model(config, attn_implementation="sdpa", dtype=torch.float32).requires_grad_(False)


@pytest.mark.parametrize("sizes", ["many blocks", "one block"])
def test_sizes_that_are_no_multiples_of_blocks(sizes: str) -> None:
    small = Sizes(multiprocessors=4, max_rows=32, tile=1024, max_splits=2, attention_block=16, least_slots=16)
    Both(odd_model(attention_bias=True), small if sizes == "many blocks" else sizes_of(CPU)).feed(3)


@pytest.mark.parametrize("live", [1, 16, 17, 18, 33, 47])
def test_live_slots_are_divided_and_joined(live: int) -> None:
    """From one part with only the new token to as many as there are, the last one nearly empty."""
    sizes = replace(sizes_of(CPU), multiprocessors=4, waves=1.0, max_splits=8, attention_block=16, least_slots=16)
    both = Both(odd_model(num_hidden_layers=1), sizes, slots=64)
    start = 13
    torch.manual_seed(1)
    for ours, theirs in zip(both.ours, both.theirs, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            other[:, :, start : start + live - 1].normal_()
            mine[:, :, start : start + live - 1] = other[:, :, start : start + live - 1]
    for token in (5, 9):  # the arrivals are counted from 0 again
        found, expected = both.token(token, 90, start, start + live - 1)
        assert logit_distance(found, expected) < 1e-5


@pytest.mark.parametrize("kv_dtype", [torch.int8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("width", [64, 128, 20, 6])
def test_codes_are_stored_and_attended_to(width: int, kv_dtype: torch.dtype) -> None:
    """As by the static step, in turned heads and in several parts; free slots have scales of NaN."""
    sizes = replace(sizes_of(CPU), multiprocessors=4, waves=1.0, max_splits=4, attention_block=16, least_slots=16)
    both = Both(odd_model(num_hidden_layers=1, head_dim=width), sizes, slots=64, kv_dtype=kv_dtype)
    start, live = 13, 40
    old = slice(start, start + live - 1)
    torch.manual_seed(1)
    for ours, theirs in zip(both.ours, both.theirs, strict=True):
        filled = stored(theirs, *torch.randn(2, 1, 2, live - 1, width))
        for mine, other, part in zip(ours, theirs, filled, strict=True):
            mine[:, :, old] = other[:, :, old] = part
    new = start + live - 1
    for token in (5, 9):
        found, expected = both.token(token, 90, start, new)
        assert logit_distance(found, expected) < 2e-5
    for mine, other in zip(both.ours[0], both.theirs[0], strict=True):
        assert torch.equal(mine[:, :, start : new + 1], other[:, :, start : new + 1])
        free = mine[:, :, new + 1 :]
        assert free.isnan().all() if mine.is_floating_point() else (free == 111).all()


def test_keys_and_values_may_have_different_bits() -> None:
    both, other = (Both(odd_model(num_hidden_layers=1, head_dim=32), kv_dtype=each) for each in (torch.int8, INT4))
    both.ours = [(one[0], two[1], one[2], two[3]) for one, two in zip(both.ours, other.ours, strict=True)]
    both.theirs = [(one[0], two[1], one[2], two[3]) for one, two in zip(both.theirs, other.theirs, strict=True)]
    for slot in range(2):
        found, expected = both.token(7 + slot, slot, 0, slot)
        assert logit_distance(found, expected) < 2e-5


def test_a_conversation_in_codes_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over evictions, a rebase and moves of the cache, against transformers' forward pass on dequantized copies."""
    plain, model = odd_model(num_hidden_layers=1), odd_model(num_hidden_layers=1)
    caches = []
    for each in (plain, model):
        set_cache_dtype(each, torch.int8)
        caches.append(make_cache(each, fit_positions(each), cache_size=20, num_sink_tokens=4))
        caches[-1].position_limit = 32
    seen = counted(model, monkeypatch)
    graphs = RecordedLaunches()
    assert install_captured(model, graphs.record, "fused")
    assert no_fused_kernels_for(model, torch.int8) == ""
    ids = text(44)
    expected, found = (stream(each, cache, ids, 10) for each, cache in zip((plain, model), caches, strict=True))
    assert logit_distance(found, expected) < 0.01  # a number on the border of two codes may get either
    assert caches[1].streaming_layers[0].stored_dtype == torch.int8
    assert uses_fused_kernels(model)
    assert seen == [10, 1]  # the prompt, and the token by which the step was checked
    assert graphs.replays > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_as_close_to_float32_as_the_static_step(dtype: torch.dtype) -> None:
    exact, model = Both(make("llama")), make("llama").to(dtype)
    both = Both(model)
    ours, theirs = [], []
    for slot, token in enumerate(text(8)[0].tolist()):
        expected = exact.static_token(token, slot, 0, slot)
        found, static = both.token(token, slot, 0, slot)
        ours.append(logit_distance(found, expected))
        theirs.append(logit_distance(static, expected))
    assert sum(ours) < 1.2 * sum(theirs)
    assert max(ours) < 0.1
    for mine, other in zip(both.ours[0], both.theirs[0], strict=True):
        assert logit_distance(mine[:, :, :8], other[:, :, :8]) < torch.finfo(dtype).eps


def test_a_conversation_over_evictions_rebases_and_moves_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed: a launch that depends on Python between two tokens, or on a value read back, fails here."""
    plain, model = odd_model(), odd_model()
    caches = [cache_of(each, 24) for each in (plain, model)]
    for cache in caches:
        cache.position_limit = 40
    seen = counted(model, monkeypatch)
    graphs = RecordedLaunches()
    assert install_captured(model, graphs.record, "fused")
    ids = text(56)
    expected, found = (stream(each, cache, ids, 10) for each, cache in zip((plain, model), caches, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for ours, theirs in zip(caches[1].streaming_layers, caches[0].streaming_layers, strict=True):
        assert ours.next_position == theirs.next_position < 50
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)
    assert uses_fused_kernels(model)
    assert seen == [10, 1]  # the prompt, and the token by which the step was checked
    assert graphs.recordings == 1
    assert graphs.replays > 35
    assert graphs.launches == 1 + 2 * 5 + 1  # embedding, five for each layer, output layer


def test_a_recording_needs_kernels_whose_arguments_stay() -> None:
    """The stand-in itself: a value that Python read before the recording stays what it was."""
    both = Both(odd_model(num_hidden_layers=1))
    both.token(5, 0, 0, 0)
    graphs = RecordedLaunches()
    with torch.no_grad():
        replay = graphs.record(lambda: both.fused.run(both.inputs, both.ours))
        for slot, token in ((1, 9), (2, 40)):
            expected = both.token(token, slot, 0, slot)[1]
            assert logit_distance(replay(), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"), [("qwen3_moe", {}), ("llama_dynamic", {}), ("phi3_longrope", {}), ("gpt2", {})]
)
def test_models_that_the_kernels_do_not_compute_have_no_fused_step(name: str, changes: dict[str, Any]) -> None:
    assert fused_step(build(name, **changes), CPU) is None


def quantized_model(kind: Kind, **changes: Any) -> Any:
    """A model whose layers are quantized in tiles; siblings as one matrix, as for the compiled kernels."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "vocab_size": 163}
    model = odd_model(**sizes | changes)
    weights = {}
    for group, each in groups(model, kind).items():
        rows = torch.cat([model.get_submodule(name).weight for name in group])
        weights[group] = quantize(rows, each, None, tiled=True)
    replace_layers(model, weights)
    return model


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "biases"])
def test_quantized_weights_in_tiles(kind: Kind, family: str) -> None:
    """Against the static step on the same dequantized weights."""
    model = quantized_model(kind, attention_bias=family == "biases", mlp_bias=family == "biases")
    plain = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        same: Any = copy.deepcopy(layer.plain)
        same.weight = torch.nn.Parameter(layer.quantized.dequantize(torch.float32), requires_grad=False)
        plain.set_submodule(name, same)
    step, static = fused_step(model, CPU), static_step(plain)
    assert step is not None
    assert static is not None
    both = Both(plain)
    both.fused = step
    both.feed(3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_product_with_tiles_of_every_layout(name: LayoutName) -> None:
    found, expected = product_with_tiles(name, CPU, torch.float32)
    assert logit_distance(found, expected) < 1e-6
