"""The parts of the measurement of positions, on small modules whose answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig, cache_utils
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.kinds import device_of, kind_of, refuse_unknown_layers
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions import absolute, fit, probe, selfcheck
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.plain import fit_from_plain, fit_to_plain
from streamchat.cache.positions.rotation import PROBE_POSITIONS, RotarySource, TensorRotation
from tests.support.bare_cache import HEADS, WIDTH, bare_config, rotary_source, rotated
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
POSITIONS = torch.tensor(PROBE_POSITIONS)


# --- which rotation fits --------------------------------------------------------------------------------------


def at_positions(x: Tensor, *, interleaved: bool, reverse: bool, offset: int) -> Tensor:
    """(positions, heads, 1, dim): the row of each position is `x` rotated to it in 8 dimensions from `offset` on."""
    rows = []
    for position in PROBE_POSITIONS:
        part = x[..., offset : offset + 8]
        halves = torch.cat([part[..., ::2], part[..., 1::2]], dim=-1) if interleaved else part
        moved = rotated(halves, -position if reverse else position).float()
        if interleaved:
            moved = torch.stack([moved[..., :4], moved[..., 4:]], dim=-1).flatten(-2)
        rows.append(torch.cat([x[..., :offset], moved, x[..., offset + 8 :]], dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("width", "offset"), [(8, 0), (12, 0), (12, 4)])
def test_the_rotation_of_a_tensor_is_found(interleaved: bool, reverse: bool, width: int, offset: int) -> None:
    source = rotary_source()
    x = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0))
    rows = at_positions(x, interleaved=interleaved, reverse=reverse, offset=offset)
    found, error = fit._best_rotation(rows, [source], POSITIONS, 2e-4)
    assert found == TensorRotation(source, offset, interleaved, reverse)
    assert error < 1e-5


def test_a_tensor_without_positions_has_no_rotation() -> None:
    same = torch.randn(1, 2, 1, 8).expand(6, -1, -1, -1)
    assert fit._best_rotation(same, [rotary_source()], POSITIONS, 2e-4) == (None, 0.0)
    assert fit._best_rotation(same[..., :0], [rotary_source()], POSITIONS, 2e-4) == (None, 0.0)
    assert fit._best_rotation(same[..., :6], [rotary_source()], POSITIONS, 2e-4) == (None, 0.0)  # narrower
    other = torch.arange(6.0)[:, None, None, None].expand(-1, 1, 1, 8) - 2.0
    rotation, error = fit._best_rotation(other, [], POSITIONS, 2e-4)
    assert rotation is None
    assert error == pytest.approx(5 / 3)  # of the largest value
    assert fit._best_rotation(torch.zeros(6, 1, 1, 8), [rotary_source()], POSITIONS, 2e-4) == (None, 0.0)


def test_a_deviation_is_a_share_of_the_maximum() -> None:
    x = torch.tensor([1.0, -4.0, 2.0])
    assert fit._deviation(x, x) == 0
    assert fit._deviation(x, torch.tensor([1.0, -3.0, 2.5])) == 0.25
    assert fit._deviation(torch.zeros(2), torch.zeros(2)) == 0


def test_recurrent_layers_have_no_rotation() -> None:
    source, x = rotary_source(), torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    layers_of: Any = cache_utils  # their constructors have no types
    full = layers_of.DynamicLayer()
    full.update(at_positions(x, interleaved=False, reverse=False, offset=0), torch.ones(6, 2, 1, 8))
    cache = SimpleNamespace(layers=[layers_of.LinearAttentionLayer(), full])
    layers, error = fit._fit_layers(cache, [source], POSITIONS, 2e-4)
    assert layers == [LayerRotation(), LayerRotation(TensorRotation(source, 0, False))]
    assert error < 1e-5


def test_a_source_that_is_too_wide_is_skipped() -> None:
    narrow, wide = rotary_source(), RotarySource(LlamaRotaryEmbedding(wide_config()), *rotary_source().call[1:])
    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    rows = at_positions(x, interleaved=False, reverse=False, offset=0)
    assert fit._best_rotation(rows, [wide, narrow], POSITIONS, 2e-4)[0] == TensorRotation(narrow, 0, False)


def test_a_small_part_that_is_rotated_counts() -> None:
    source, x = rotary_source(), torch.ones(2, 1, 12)
    x[..., 4:] = 4e-4
    rows = at_positions(x, interleaved=False, reverse=False, offset=4)
    assert 5e-4 < (rows - rows[:1]).abs().max() < 1.1e-3
    assert fit._best_rotation(rows, [source], POSITIONS, 2e-4)[0] == TensorRotation(source, 4, False)


def wide_config() -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=2)


# --- a model whose answer is known ----------------------------------------------------------------------------


class Model(nn.Module):
    """One layer without attention: keys and values are a token's embedding, in whatever way they depend on positions.

    Args:
        rotates: Rotate the keys.
        key_noise: Add so much to the keys at the last position of the probe, as a share of their maximum.
        drift: Add so much to the logits there, in units of their spread.
        by_index: What counts the tokens itself if no positions are given: "input", "keys", or "values".
    """

    def __init__(
        self, *, rotates: bool = True, key_noise: float = 0, drift: float = 0, by_index: str = "", dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = bare_config(1)
        self.rotates, self.key_noise, self.drift, self.by_index = rotates, key_noise, drift, by_index
        self.dtype = dtype or torch.float32
        self.embeddings = nn.Embedding(300, HEADS * WIDTH)
        self.some_rotary = LlamaRotaryEmbedding(self.config)
        self.blocks = nn.ModuleList([nn.Identity()])
        generator = torch.Generator().manual_seed(0)
        self.embeddings.weight.data = torch.randn(300, HEADS * WIDTH, generator=generator)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool, position_ids: Any = None) -> Any:
        x = self.embeddings(input_ids)
        count = torch.arange(x.shape[1]).expand(len(x), -1)
        positions = count if position_ids is None else position_ids
        far = (positions == max(PROBE_POSITIONS)).float()[..., None] if position_ids is not None else 0.0
        late = (count >= 20).float()[..., None] if position_ids is None else 0.0
        x = self.blocks[0](x + late * (self.by_index == "input"))
        keys, values = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for _ in range(2))
        if self.rotates:
            cos, sin = (each[:, None] for each in self.some_rotary(x, positions))
            half = torch.cat([-keys[..., WIDTH // 2 :], keys[..., : WIDTH // 2]], dim=-1)
            keys = keys * cos + half * sin
        noise = self.key_noise * keys.abs().max() * (far if isinstance(far, float) else far[:, None])
        keys = keys + noise + (late if isinstance(late, float) else late[:, None]) * (self.by_index == "keys")
        values = values + (late if isinstance(late, float) else late[:, None]) * (self.by_index == "values")
        past_key_values.update(keys, values, 0)
        logits = x @ self.embeddings.weight.T
        return SimpleNamespace(logits=logits + far * self.drift * logits.std())


def test_the_fit_of_a_model_that_rotates_and_of_one_without_positions() -> None:
    found = fit.fit_positions(Model())
    assert (found.method, found.position_limit, found.devices, found.single_steps) == ("rotation", None, (CPU,), False)
    assert (found.scales_queries, found.layers[0].values) == (False, None)
    assert found.error < 1e-5
    keys = found.layers[0].keys
    assert keys is not None
    assert (keys.offset, keys.interleaved, keys.reverse) == (0, False, False)
    found = fit.fit_positions(Model(rotates=False))
    assert (found.method, found.position_limit, found.layers) == ("no positions", 2048, (LayerRotation(),))
    assert found.rotates is False


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float32, 2e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float64, 3e-2)],
)
def test_misfits_are_allowed_as_far_as_the_dtype_rounds(dtype: torch.dtype, allowed: float) -> None:
    found = fit.fit_positions(Model(key_noise=0.9 * allowed, dtype=dtype))
    assert found.error == pytest.approx(0.9 * allowed, rel=0.1)
    with pytest.raises(UnsupportedModelError, match=r"tensors are not rotated by position \(misfit \d.*, allowed"):
        fit.fit_positions(Model(key_noise=1.2 * allowed, dtype=dtype))


def test_logits_that_depend_on_the_absolute_position_are_refused() -> None:
    fit.fit_positions(Model(drift=0.009))
    with pytest.raises(UnsupportedModelError, match=r"depends on the absolute position \(by 0.012 of the logits"):
        fit.fit_positions(Model(drift=0.012))


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("what", ["input", "keys", "values"])
def test_a_model_that_counts_positions_itself_is_refused(what: str, rotates: bool) -> None:
    with pytest.raises(UnsupportedModelError, match=r"counts positions itself \(misfit [\d.]+, allowed 0.0002\)"):
        fit.fit_positions(Model(by_index=what, rotates=rotates))


class Chunks:
    """Stands in for `plain_forward` of a model with a recurrent state, whose chunks are off by some distance."""

    def __init__(self, off: float, spread: float = 1.0) -> None:
        self.off, self.spread, self.calls = off, spread, list[tuple[Any, ...]]()

    def __call__(self, model: Any, ids: Tensor, positions: Tensor | None, cache: Any = None) -> tuple[Any, Tensor]:
        known = [] if cache is None else cache
        known = known if known else [len(self.calls)]
        self.calls.append((ids[0].tolist(), None if positions is None else positions.tolist(), known[0]))
        logits = self.spread * torch.linspace(-1, 1, 101).expand(1, ids.shape[1], -1).clone()
        if positions is not None and ids.shape[1] > 1:
            logits[:, -1, 3] += self.off * logits.std()
        return known, logits


@pytest.mark.parametrize("spread", [1.0, 20.0])
@pytest.mark.parametrize(
    ("dtype", "off", "expected"),
    [
        (torch.float32, 0.009, False),
        (torch.float32, 0.012, True),
        (torch.bfloat16, 1.4, False),
        (torch.bfloat16, 1.7, True),
        (torch.float64, 1.4, False),
        (torch.float64, 1.7, True),
    ],
)
def test_chunks_on_a_recurrent_state_are_compared_with_single_steps(
    dtype: torch.dtype, off: float, expected: bool, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = Chunks(off, spread)
    monkeypatch.setattr(fit, "plain_forward", chunks)
    model = Model(dtype=dtype)
    kinds = ["linear_attention", "full_attention"]
    cache = DynamicCache(config=Qwen3NextConfig(num_hidden_layers=2, layer_types=kinds))
    assert fit._needs_single_steps(model, cache) is expected
    first, rest = list(range(7, 15)), list(range(15, 19))
    assert chunks.calls == [
        (first, None, 0),
        (first, None, 1),
        (rest, [[8, 9, 10, 11]], 0),
        *((rest[i : i + 1], [[8 + i]], 1) for i in range(4)),
    ]
    assert fit._needs_single_steps(model, DynamicCache(config=bare_config())) is False
    assert len(chunks.calls) == 7


# --- the limit of positions -----------------------------------------------------------------------------------


class FakeRotary(nn.Module):
    def __init__(self, kind: Any = None, parameters: Any = None, table: Any = None, most: int = 0) -> None:
        super().__init__()
        self.rope_type = kind
        self.config = SimpleNamespace(rope_parameters=parameters)
        self.embed_positions, self.original_max_seq_len = table, most


KEY = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("modules", "limit"),
    [
        ([], None),
        ([FakeRotary("default", most=9)], None),
        ([FakeRotary("dynamic", most=77)], 77),
        ([FakeRotary("linear_dynamic", most=77)], 77),
        ([FakeRotary("longrope", {KEY: 50, "factor": 2.0})], 50),
        ([FakeRotary("longrope", {"full": {KEY: 60}, "sliding": {KEY: 40}, "more": {"factor": 2.0}})], 40),
        ([FakeRotary("default", {KEY: 50})], None),
        ([FakeRotary(table=torch.zeros(33, 4))], 33),
        ([FakeRotary(table="no tensor")], None),
        ([FakeRotary({"full": "default", "sliding": "dynamic"}, most=12)], 12),
        ([FakeRotary("dynamic", most=77), FakeRotary(table=torch.zeros(99, 4))], 77),
    ],
)
def test_the_first_position_that_is_treated_differently(modules: list[nn.Module], limit: int | None) -> None:
    assert fit._position_limit(nn.ModuleList(modules)) == limit
    assert fit._position_limit(nn.ModuleList([nn.Linear(2, 2)])) is None


def test_a_fit_says_what_it_is_limited_by() -> None:
    plain = PositionFit((), (), None, 0.0)
    assert (plain.method, plain.rotates, plain.single_steps, plain.scales_queries) == ("rotation", True, False, False)
    assert plain.limit_reason == ""
    assert "absolute position" in PositionFit((), (), 5, 0.0, scales_queries=True).limit_reason
    assert not PositionFit((), (), 5, 0.0, "no positions").rotates


def test_the_row_that_differs_has_bounds() -> None:
    starts = [0, 2, 4, 8]
    assert absolute._bounds(starts, [True] * 4) == (8, None)
    assert absolute._bounds(starts, [True, True, False, True]) == (2, 4)
    assert absolute._bounds(starts, [True, True, True, False]) == (4, 8)


class Scales(nn.Module):
    """A causal LM whose logits change at a position; it notes the positions that it is called with."""

    def __init__(self, limit: int | None, length: int = 512, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=50, max_position_embeddings=length, layer_types=None)
        self.config: Any = SimpleNamespace(get_text_config=lambda **_: text, num_hidden_layers=0)
        self.limit, self.dtype, self.asked = limit, dtype, list[list[int]]()
        self.embeddings = nn.Embedding(50, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        self.asked.append(position_ids[:, 0].tolist())
        assert torch.equal(position_ids - position_ids[:, :1], torch.arange(8).expand_as(position_ids))
        logits = torch.linspace(0, 1, 50).expand(*input_ids.shape, -1).clone()
        if self.limit is not None:
            logits[position_ids >= self.limit] *= 1.5
        return SimpleNamespace(logits=logits)


def measured(model: Scales, limit: int | None = None, monkeypatch: Any = None) -> int | None:
    monkeypatch.setattr(
        absolute, "plain_forward", lambda model, ids, positions: (None, model(ids, positions, None, True).logits)
    )
    return absolute.absolute_limit(model, PositionFit((), (), limit, 0.0))


@pytest.mark.parametrize("at", [8, 9, 64, 65, 100, 1000, 2047, None])
def test_the_limit_is_found_to_the_position(at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scales(at)
    assert measured(model, monkeypatch=monkeypatch) == at
    assert model.asked[0] == [0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2040]
    assert len(model.asked) <= 4


@pytest.mark.parametrize(("limit", "starts"), [(40, [0, 2, 4, 8, 16, 32, 32]), (8, [0]), (9, [0, 1]), (10, [0, 2, 2])])
def test_positions_that_do_not_exist_are_not_measured(
    limit: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scales(None)
    assert measured(model, limit, monkeypatch) is None
    assert model.asked == [starts]


def test_without_a_context_length_positions_are_measured_up_to_a_million(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scales(None, 0)
    assert measured(model, None, monkeypatch) is None
    assert model.asked[0][-2:] == [1 << 19, (1 << 20) - 8]


def test_rotary_modules_get_small_positions_only_meanwhile() -> None:
    class TestRotary(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            return args, kwargs

    model = nn.ModuleList([TestRotary(), nn.Identity()])
    small = torch.arange(3)
    states, positions, other = torch.ones(2, 3), torch.full((2, 3), 90), torch.full((2, 4), 90)
    with absolute._small_rotary_positions(model, small):
        args, kwargs = model[0](states, positions, more=positions.int(), other=other, note="text")
        assert args[0] is states
        assert args[1].tolist() == kwargs["more"].tolist() == [[0, 1, 2]] * 2
        assert (args[1].dtype, kwargs["more"].dtype) == (torch.long, torch.int32)
        assert kwargs["other"] is other
        assert kwargs["note"] == "text"
        assert model[1](positions) is positions
    assert model[0](positions)[0][0] is positions


# --- probes ---------------------------------------------------------------------------------------------------


def test_rotary_modules_are_found_by_their_names() -> None:
    class MyRotaryThing(nn.Module):
        pass

    module = MyRotaryThing()
    assert probe.rotary_modules(nn.ModuleList([nn.Linear(1, 1), module])) == [module]


def test_the_input_of_the_first_block_is_recorded() -> None:
    class Model(nn.Module):
        def __init__(self, by_name: bool) -> None:
            super().__init__()
            self.by_name = by_name
            self.few, self.blocks = nn.ModuleList([nn.Identity()]), nn.ModuleList([Block(), Block()])
            self.none = nn.ModuleList()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(hidden_states=x) if self.by_name else block(x)
            return x

    class Block(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states + 1

    for by_name in (False, True):
        model, x = Model(by_name), torch.ones(1, 2, 3, dtype=torch.float64)
        with probe.recorded_block_input(model) as inputs:
            model(x)
            model(x[0])  # not (batch, n, hidden)
        (found,) = inputs
        assert torch.equal(found, x.float())
        assert found.dtype == torch.float32
        model(x)
        assert len(inputs) == 1
    with probe.recorded_block_input(nn.Linear(2, 2)) as inputs:
        pass
    assert inputs == []


def test_a_plain_forward_begins_or_continues_a_cache() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        cache, logits = probe.plain_forward(model, ids, None)
        assert cache.get_seq_length() == 3
        assert (logits.shape, logits.dtype) == ((1, 3, 160), torch.float32)
        shifted, moved = probe.plain_forward(model, ids, torch.tensor([[0, 9, 30]]))
        assert (moved - logits).abs().max() > 1e-3
        assert torch.equal(shifted.layers[0].values, cache.layers[0].values)
        again, _ = probe.plain_forward(model, ids, None, cache)
    assert again is cache
    assert cache.get_seq_length() == 6


# --- kinds of layers ------------------------------------------------------------------------------------------


def test_layers_that_cannot_be_evicted_from_are_refused_with_their_place() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        cache, _ = probe.plain_forward(model, torch.tensor([[5]]), None)
    refuse_unknown_layers(cache)
    assert [kind_of(layer) for layer in cache.layers] == ["full"] * 3
    assert device_of(cache.layers[0]) == CPU
    empty = DynamicCache(config=model.config)
    empty.layers[:1] = cache.layers[:1]
    with pytest.raises(UnsupportedModelError, match="layer 1 of the model's cache stays empty"):
        refuse_unknown_layers(empty)
    values = SimpleNamespace(layers=[cache.layers[0], cache.layers[1]])
    values.layers[1].values = None
    with pytest.raises(UnsupportedModelError, match="layer 1 of the model's cache stays empty"):
        refuse_unknown_layers(values)
    with pytest.raises(UnsupportedModelError, match="layer 1 uses a SimpleNamespace, which does not support eviction"):
        refuse_unknown_layers(SimpleNamespace(layers=[cache.layers[0], SimpleNamespace()]))
    with pytest.raises(UnsupportedModelError, match="no keys and values, so there is nothing to evict"):
        refuse_unknown_layers(SimpleNamespace(layers=[]))


# --- a fit as data --------------------------------------------------------------------------------------------


def test_a_fit_is_the_same_after_it_was_written() -> None:
    model: Any = tiny_model("llama")
    with probe.recorded_rotary_calls(model) as calls, torch.inference_mode():
        probe.plain_forward(model, torch.tensor([[5]]), None)
    one, two = (RotarySource(*call) for call in (calls[0], calls[0]))
    layers = (
        LayerRotation(TensorRotation(one, 0, False), TensorRotation(two, 3, True, True)),
        LayerRotation(TensorRotation(two, 1, True), None),
        LayerRotation(),
    )
    given = PositionFit(layers, (CPU,) * 3, 99, 0.5, "rotation", True, True)
    plain = fit_to_plain(model, given)
    assert plain is not None
    assert [len(plain["sources"]), plain["layers"]] == [
        2, [[[0, 0, False, False], [1, 3, True, True]], [[1, 1, True, False], None], [None, None]]
    ]  # fmt: skip
    assert plain["sources"][0]["module"] == "model.rotary_emb"
    found = fit_from_plain(model, json.loads(json.dumps(plain)))
    assert found is not None
    rest = ("devices", "position_limit", "error", "method", "single_steps", "scales_queries")
    assert all(getattr(found, name) == getattr(given, name) for name in rest)
    for mine, theirs in zip(found.layers, layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.offset, a.interleaved, a.reverse) == (b.offset, b.interleaved, b.reverse)
                assert all(
                    torch.equal(x, y)
                    for x, y in zip(a.source.angles(POSITIONS), b.source.angles(POSITIONS), strict=True)
                )
    assert found.layers[0].values is not None
    assert found.layers[1].keys is not None
    assert found.layers[0].values.source is found.layers[1].keys.source
    unlimited = fit_to_plain(model, PositionFit(layers, (CPU,) * 3, None, 0.0, "no positions"))
    assert unlimited is not None
    again = fit_from_plain(model, unlimited)
    assert again is not None
    assert (again.position_limit, again.single_steps, again.scales_queries, again.method) == (
        None,
        False,
        False,
        "no positions",
    )
    # what cannot be written, or was damaged
    assert fit_to_plain(model, PositionFit(layers, (CPU,) * 3, None, 0.0, "recompute")) is None
    assert fit_to_plain(model, PositionFit(layers, (CPU, torch.device("meta")), None, 0.0)) is None
    assert fit_to_plain(tiny_model("llama"), given) is None  # modules of another model
    damaged: list[dict[str, Any]] = [
        {}, plain | {"layers": []}, plain | {"method": "recompute"},
        plain | {"position_limit": "many"},
        plain | {"error": None},
        plain | {"layers": [[[7, 0, False, False], None]]}, plain | {"layers": [[[0], None]]},
        plain | {"sources": [{"module": "model.nothing", "args": [], "options": {}}]},
        {name: each for name, each in plain.items() if name != "single_steps"},
    ]  # fmt: skip
    assert [fit_from_plain(model, each) for each in damaged] == [None] * len(damaged)
    assert fit_from_plain(model, None) is None


def test_arguments_that_are_no_plain_values_cannot_be_written() -> None:
    model: Any = tiny_model("llama")
    rotary = model.model.rotary_emb
    states, positions = torch.zeros(1, 1, 1), torch.zeros(1, 1).long()

    class Wide(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor, more: Any = None, other: Any = None) -> Any:
            return rotary.to(x.device).forward(x, position_ids)

    model.wide_rotary = Wide()
    for args, options, written in (
        ((states, positions), {}, True),
        ((states, positions, "text"), {"other": 2.5}, True),
        ((states, positions, [1]), {}, False),
        ((states, positions), {"other": (1,)}, False),
    ):
        source = RotarySource(model.wide_rotary, args, options)
        plain = fit_to_plain(model, PositionFit((LayerRotation(TensorRotation(source, 0, False)),), (CPU,), None, 0.0))
        assert (plain is not None) == written
        if plain is not None:
            found = fit_from_plain(model, plain)
            assert found is not None
            assert found.layers[0].keys is not None
            module, again, named = found.layers[0].keys.source.call
            assert module is model.wide_rotary
            assert (again[0].dtype, again[1].dtype, again[0].shape) == (torch.float32, torch.long, (1, 1))
            assert (again[2:], named) == (args[2:], options)


# --- the self-check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distances", "exact", "rotates", "ok"),
    [
        # moved by the model, by our rotation, not moved, misfit of tensors
        ((5e-5, 5e-5, 1.0, 0.1), True, True, True),
        ((1e-4, 1e-4, 1.0, 0.1), True, True, False),
        ((2e-4, 2e-4, 1.0, 0.1), True, True, False),
        ((2e-4, 2e-4, 1.0, 0.1), False, True, True),
        ((1e-5, 3.9e-5, 1.0, 0.1), True, True, True),
        ((1e-5, 4.1e-5, 1.0, 0.1), True, True, False),
        ((1e-2, 2.9e-2, 1.0, 0.1), False, True, True),
        ((1e-2, 3.1e-2, 1.0, 0.1), False, True, False),
        ((2e-5, 6e-5, 2.1e-4, 0.1), True, True, True),
        ((2e-5, 6e-5, 1.9e-4, 0.1), True, True, False),
        ((6e-5, 2e-5, 1.9e-4, 0.1), True, True, False),
        ((2e-5, 6e-5, 1.9e-4, 0.1), False, True, True),
        ((0.0, 0.0, 1.0, 0.3), True, True, True),
        ((0.0, 0.0, 1.0, 0.31), True, True, False),
        ((0.0, 0.0, 1.0, 0.31), False, True, False),
        ((0.0, 0.0, 0.0, 0.0), True, True, True),
        ((9e-6, 9e-6, 0.0, 0.0), True, False, True),
        ((1e-5, 1e-5, 0.0, 0.0), True, False, False),
        ((5e-5, 5e-5, 0.0, 0.0), True, False, False),
        ((5e-5, 5e-5, 0.0, 0.0), False, False, True),
    ],
)
def test_the_distances_of_a_right_fit(
    distances: tuple[float, float, float, float], exact: bool, rotates: bool, ok: bool
) -> None:
    assert selfcheck._is_ok(*distances, exact=exact, rotates=rotates) is ok


def test_a_model_that_takes_no_positions_must_not_rotate() -> None:
    class Bare(nn.Module):
        def forward(self, input_ids: Tensor) -> None:
            pytest.fail("ran")

    for method, ok in (("no positions", True), ("rotation", False)):
        found = selfcheck.self_check(Bare(), PositionFit((), (), None, 0.0, method))  # type: ignore[arg-type]
        assert found == selfcheck.SelfCheck(0.0, 0.0, 0.0, 0.0, ok)


def test_the_tensors_of_the_self_check_are_compared_as_a_share_of_the_distance_moved() -> None:
    turn = TensorRotation(rotary_source(), 0, False)
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    values = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    given = PositionFit((LayerRotation(turn),), (CPU,), None, 0.0)

    def cache(keys: Tensor, values: Tensor) -> Any:
        found = DynamicCache()
        found.update(keys.clone(), values.clone(), 0)
        return found

    plain, moved, ours = cache(rotated(x, 0).float(), values), cache(rotated(x, 17).float(), values), None
    ours = cache(rotated(x, 0).float(), values)
    selfcheck._rotate(ours, given, 17)
    assert selfcheck._tensor_error(given, plain, moved, ours) < 1e-5
    torch.testing.assert_close(ours.layers[0].keys.double(), rotated(x, 17), atol=1e-5, rtol=0)
    assert torch.equal(ours.layers[0].values, values)
    assert selfcheck._tensor_error(given, plain, moved, plain) == pytest.approx(1.0)  # not moved at all
    half = cache((rotated(x, 0) + rotated(x, 17)).float() / 2, values)
    assert selfcheck._tensor_error(given, plain, moved, half) == pytest.approx(0.5)
    other = cache(rotated(x, 17).float(), 1.25 * values)
    assert selfcheck._tensor_error(given, plain, moved, other) == pytest.approx(0.25)  # of its norm


def test_the_self_check_accepts_the_fit_and_no_other() -> None:
    model = tiny_model("llama")
    right = fit.fit_positions(model)
    found = selfcheck.self_check(model, right)
    assert found.ok
    assert 0 <= found.floor < 1e-4
    assert found.rotated <= 3 * found.floor + 1e-5
    assert found.control > 0.1
    assert found.tensors < 1e-3
    layer = right.layers[0]
    assert layer.keys is not None
    for keys in (None, TensorRotation(layer.keys.source, layer.keys.offset, not layer.keys.interleaved)):
        for place in (0, 2):
            layers = tuple(LayerRotation(keys) if i == place else each for i, each in enumerate(right.layers))
            wrong = PositionFit(layers, right.devices, None, 0.0)
            assert not selfcheck.self_check(model, wrong).ok
            with pytest.raises(
                UnsupportedModelError, match=r"the numeric self-check .* failed .* moved by the model: \d"
            ):
                selfcheck.require_self_check(model, wrong)
    assert selfcheck.require_self_check(model, right) == found
