"""The storage of a layer's slots, the mover of slots, and codes, against exact values and plain references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache.dtype import dtype_named
from streamchat.cache.layers.codes import (
    INT4,
    K8V4,
    QUANTIZED,
    SHARES,
    dequantize,
    quantize,
    rounded,
    states_of,
    turned,
    unpacked,
)
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.cache.layers.mover import TORCH, Move
from streamchat.cache.layers.slots import copied, read_slots, states_in
from streamchat.cache.layers.storage import LayerStorage, NumberStorage, new_storage, parts_of, states_like
from streamchat.cache.positions.rotation import TensorRotation
from tests.support.bare_cache import rotary_source, rotated

FORMATS: dict[str, Any] = {"float32": torch.float32, "int8": torch.int8, "k8v4": K8V4, "int4": INT4}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- codes ----------------------------------------------------------------------------------------------------


def whole_heads(largest: int, width: int) -> Tensor:
    """Heads of whole numbers from -largest to largest, with both, which the scale 1 stores exactly."""
    heads = torch.randint(-largest, largest + 1, (2, 3, width), generator=torch.Generator().manual_seed(0)).float()
    heads[..., 0], heads[..., -1] = largest, -largest
    return heads


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("width", [4, 16, 20])
def test_whole_numbers_up_to_the_largest_code_are_exact(bits: int, largest: int, width: int) -> None:
    heads = whole_heads(largest, width)
    for codes, scales in (quantize(turned(heads), bits), rounded(heads, bits)):
        assert torch.equal(scales, torch.ones(2, 3, dtype=torch.bfloat16))
        assert torch.equal(unpacked(codes), heads.to(torch.int8))
        assert torch.equal(dequantize(codes, scales), turned(heads))
        assert codes.is_contiguous()
    if bits == 4:  # the low 4 bits belong to the first half of the head; code 0 is 8
        whole = heads.int() + 8
        assert torch.equal(codes.int(), whole[..., : width // 2] + 16 * whole[..., width // 2 :])


@pytest.mark.parametrize("width", [1, 2, 4, 12, 40])
def test_heads_are_turned_by_a_hadamard_matrix(width: int) -> None:
    """Row i, column j of the matrix has the sign of the parity of i & j (Sylvester's construction)."""
    size = width & -width
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    matrix = torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)
    x = random(3, 5, width)
    expected = torch.cat([part @ matrix for part in torch.split(x.double(), size, dim=-1)], dim=-1)
    torch.testing.assert_close(turned(x).double(), expected, atol=1e-5, rtol=0)
    codes, scales = quantize(x, 8)
    torch.testing.assert_close(codes * scales.float()[..., None], expected.float(), atol=0.03, rtol=0)


def plain_codes(heads: Tensor, largest: int, *, searches: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of turned heads (n, width) in float32, one head after the other."""
    rows, scales = [], []
    for head in heads:
        found = []
        for share in SHARES if searches else (1.0,):
            exact = head.abs().max() * share / largest
            scale = exact.bfloat16()
            if scale < exact:  # the next larger bfloat16
                scale = (scale.view(torch.int16) + 1).view(torch.bfloat16)
            codes = (head / scale.float()).round().clamp(-largest - 1, largest)
            found.append(((codes * scale.float() - head).square().sum().item(), codes, scale))
        _, codes, scale = min(found, key=lambda each: each[0])
        rows.append(codes)
        scales.append(scale)
    return torch.stack(rows), torch.stack(scales)


@pytest.mark.parametrize(("bits", "largest", "searches"), [(8, 127, False), (4, 7, False), (4, 7, True)])
def test_codes_and_scales_are_those_of_a_plain_search(bits: int, largest: int, searches: bool) -> None:
    heads = random(300, 16) * torch.logspace(-3, 3, 300)[:, None]
    heads[:100] = heads[:100] ** 3  # with large numbers, smaller scales are worse
    codes, scales = quantize(turned(heads), bits, searches=searches)
    expected, expected_scales = plain_codes(heads, largest, searches=searches)
    # turning twice rounds, which moves a few numbers and scales over an edge
    same = (unpacked(codes) == expected.to(torch.int8)).all(dim=1) & (scales == expected_scales)
    assert same.float().mean() > 0.9
    steps = (scales.float() / expected_scales.float()).log() / math.log(1.1)
    assert (steps.abs() < 0.2).float().mean() > 0.98


def test_heads_without_a_scale_are_zeros() -> None:
    heads = torch.zeros(4, 4)
    heads[1, 0], heads[2, 0], heads[3, 0] = 0.9e-30, 1.1e-30, 1e-25
    codes, scales = quantize(turned(heads), 8)
    assert codes.any(dim=1).tolist() == [False, False, True, True]
    assert scales.bool().tolist() == [False, False, True, True]
    codes, scales = quantize(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]), 8)
    assert not scales.isfinite().any()
    assert not codes.any()


def test_formats_have_names() -> None:
    assert {name: dtype_named(name) for name in FORMATS} == FORMATS == {"float32": torch.float32, **QUANTIZED}
    assert states_of({"": torch.ones(2)}).tolist() == [1, 1]


# --- storage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_slots_of_every_format_are_stored_in_every_other(name: str, other: str) -> None:
    keys, values = random(2, 3, 4, 6), random(2, 3, 4, 10, seed=1)
    source, target = (new_storage(keys, values, 9, FORMATS[each]) for each in (name, other))
    source.write(3, keys, values)
    raw = source.raw(3, 4)
    assert target.write_raw(5, raw) == 4
    for mine, theirs, x in zip(target.both, source.both, (keys, values), strict=True):
        assert mine.shape == (2, 3, x.shape[-1])
        exact = theirs.read(3, 4)
        if mine.dtype == theirs.dtype:
            assert all(torch.equal(part, theirs.raw(3, 4)[each]) for each, part in mine.raw(5, 4).items())
        else:
            limit = {torch.int8: 0.05, INT4: 0.7}.get(mine.dtype, 0.0)
            assert (mine.read(5, 4).float() - exact.float()).abs().max() <= limit
        assert not mine.read(0, 5).any()
    empty = states_like(raw)
    assert [each.shape for each in empty] == [(2, 3, 0, 6), (2, 3, 0, 10)]


def test_only_4_bit_values_next_to_8_bit_keys_search_for_a_scale() -> None:
    x = random(1, 1, 1, 4)
    for name, searches in (("float32", (0, 0)), ("int8", (0, 0)), ("k8v4", (0, 1)), ("int4", (0, 0))):
        assert tuple(each.searches for each in new_storage(x, x, 3, FORMATS[name]).both) == searches
    x = random(1, 2, 50, 16)
    plain, best = (quantize(x, 4, searches=searches) for searches in (False, True))
    for name, (codes, scales) in (("int4", plain), ("k8v4", best)):
        storage = new_storage(x, x, 50, FORMATS[name]).values
        storage.write(0, x)
        assert torch.equal(storage.parts[""], codes)
        assert torch.equal(storage.parts["scales"], scales)
    assert not torch.equal(plain[1], best[1])


def test_the_parts_of_keys_and_values_are_told_apart() -> None:
    x = random(1, 2, 4, 6)
    storage = new_storage(x, x, 4, (torch.float32, torch.int8))
    raw = storage.raw(0, 4)
    assert list(parts_of("key", raw)) == [""]
    assert list(parts_of("value", raw)) == ["", "scales"]
    assert parts_of("value", raw)["scales"] is raw["value_scales"]
    assert storage.token_bytes == 2 * (6 * 4 + 6 + 2)


@pytest.mark.parametrize(("start", "count"), [(8, 2), (9, 1), (4, 6), (3, 7), (5, 5)])
def test_slots_at_the_end_of_the_buffers_move_to_the_front(start: int, count: int) -> None:
    x = torch.arange(10.0)[None, None, :, None]
    storage = LayerStorage(*(NumberStorage(x, 10, torch.float32) for _ in range(2)))
    storage.write(0, x, x)
    storage.move_to_front(start, count)
    for each in storage.both:
        moved = each.read(0, 10).flatten().tolist()
        assert moved == [*range(start, 10), *range(count, 10)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_becomes_0(value: float) -> None:
    x = torch.ones(1, 1, 3, 4)
    x[:, :, 1, 2] = value
    storage = new_storage(x, x, 5, (torch.int8, torch.float32))
    storage.write(0, x, x)
    storage.replace_not_finite()
    assert storage.keys.parts["scales"].bool().flatten().tolist() == [True, False, True, False, False]
    expected = torch.ones(3, 4)
    expected[1, 2] = 0.0
    assert torch.equal(storage.values.read(0, 3)[0, 0], expected)


def test_stacks_of_codes_are_dequantized() -> None:
    """Layers whose heads differ in size have stacks of their own; their scales may share one."""
    layers, expected = [], []
    for i, (width, dtype) in enumerate(((4, K8V4), (8, K8V4), (4, K8V4), (4, torch.float32))):
        layer = StreamingLayer(8, LayerRotation(), dtype)
        layer.update(random(1, 2, 3, width, seed=i), random(1, 2, 3, 2 * width, seed=9 + i))
        assert layer.storage is not None
        layers.append(layer)
        expected.append(
            {name: each.read(0, 3) for name, each in zip(("keys", "values"), layer.storage.both, strict=True)}
        )
    found = states_in(copied([read_slots(layer, 0, 3) for layer in layers]))
    assert sorted((name, i) for name, indices, _ in found for i in indices) == [
        (name, i) for name in ("keys", "values") for i in range(4)
    ]
    for name, indices, stack in found:
        for i, states in zip(indices, stack, strict=True):
            assert torch.equal(states, expected[i][name])


# --- the mover ------------------------------------------------------------------------------------------------

TURN = TensorRotation(rotary_source(), 0, False)


def moves_of(count: int, how: TensorRotation | None, dtype: Any, tokens: int = 3) -> list[Move]:
    """Moves of slots at different positions, in pairs of equal ones."""
    made = []
    for i in range(count):
        storage = new_storage(random(1, 2, 0, 8), random(1, 2, 0, 8), tokens, dtype).keys
        made.append(Move(storage.raw(0, tokens), random(1, 2, tokens, 8, seed=i), how, 10 * (i // 2)))
    return made


def written(move: Move) -> Tensor:
    return dequantize(move.slots[""], move.slots["scales"]) if "scales" in move.slots else move.slots[""].float()


@pytest.mark.parametrize("how", [None, TURN])
@pytest.mark.parametrize("name", ["float32", "int8", "int4"])
def test_each_move_gets_its_own_tokens_at_its_own_positions(name: str, how: TensorRotation | None) -> None:
    moves = moves_of(5, how, FORMATS[name])
    before = [move.originals.clone() for move in moves]
    TORCH.write_slots(moves)
    for move, x in zip(moves, before, strict=True):
        assert torch.equal(move.originals, x)
        x = x if how is None else rotated(x, move.position).float()
        if name == "float32":
            torch.testing.assert_close(written(move), x, atol=1e-5, rtol=0)
        else:
            expected = dequantize(*quantize(x, 8 if name == "int8" else 4))
            assert ((written(move) - expected).abs() > 1e-4).float().mean() < 0.05  # halfway between two codes
    stored = [written(move) for move in moves]
    TORCH.read_slots(moves)
    for move, x in zip(moves, stored, strict=True):
        again = move.originals.double() if how is None else rotated(move.originals, move.position)
        torch.testing.assert_close(again, x.double(), atol=1e-5, rtol=0)


def test_large_moves_are_done_one_by_one() -> None:
    tokens = 1 + (1 << 20) // 16
    moves = moves_of(2, None, torch.float32, tokens)
    moves = [Move(move.slots, move.originals, None, 0) for move in moves]
    TORCH.write_slots(moves)
    assert all(torch.equal(move.slots[""], move.originals) for move in moves)
