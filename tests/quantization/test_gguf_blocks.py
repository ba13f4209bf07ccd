"""Blocks of GGUF files as tiles: the same weights, bit for bit, and the same products."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from streamchat.kernels.library import load_kernels
from streamchat.quantization.gguf_blocks import SERVED, tiles_of_gguf
from tests.support.kernels import needs_kernels, noise

HALVES = {
    Type.Q4_0: [0],
    Type.Q4_1: [0, 2],
    Type.Q5_0: [0],
    Type.Q5_1: [0, 2],
    Type.Q8_0: [0],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.Q6_K: [208],
}
"""Where the blocks have float16 numbers; all other bytes may have any value."""
EXTREME = np.array([0, 2**-24, -(2**-24), 3e-5, -3e-5, 1, -1, 8188, -8188, 65504, -65504], np.float16)
COLUMNS, ROWS = 512, 37  # the last tile is not full
TYPES = [pytest.param(kind, id=kind.name) for kind in SERVED]

Bytes = NDArray[np.uint8]


def random_blocks(kind: Type, numbers: Any, rows: int = ROWS) -> Bytes:
    """Random (rows, bytes) data of a type; `numbers(random, shape)` returns its float16 numbers."""
    random = np.random.default_rng(0)
    each, size = GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (rows, COLUMNS // each, size), dtype=np.uint8)
    for at in HALVES[kind]:
        data[..., at : at + 2] = numbers(random, data.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def usual(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return 0.02 * random.standard_normal(shape)


def extreme(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float16]:
    return random.choice(EXTREME, shape)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("numbers", [usual, extreme])
@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_those_of_the_file(kind: Type, numbers: Any, kernels: str) -> None:
    data = random_blocks(kind, numbers)
    expected = gguf.dequantize(data, kind)
    weight = tiles_of_gguf(data, kind, None, load_kernels(kernels))
    assert (weight.rows, weight.columns) == (ROWS, COLUMNS)
    assert weight.data.dtype == torch.uint8
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_weights_that_gguf_quantized_are_the_same(kind: Type) -> None:
    data = gguf.quantize(noise(ROWS, COLUMNS).numpy(), kind)
    found = tiles_of_gguf(data, kind, None, load_kernels("auto")).dequantize(torch.float32)
    assert np.array_equal(found.numpy(), gguf.dequantize(data, kind))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_those_of_the_matrix_in_any_order(kind: Type, kernels: str) -> None:
    data = random_blocks(kind, usual)
    order = np.random.default_rng(1).permutation(ROWS)
    expected = torch.from_numpy(gguf.dequantize(data, kind)[order])
    weight = tiles_of_gguf(data, kind, order, load_kernels(kernels))
    assert torch.equal(weight.dequantize(torch.float32), expected)
    ids = torch.tensor([36, 0, 17, 17])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(weight.rows_at(ids, dtype), expected[ids].to(dtype))
    assert weight.rows_at(ids[:0], torch.float32).shape == (0, COLUMNS)
    for bad in (-1, 37):
        with pytest.raises(IndexError):
            weight.rows_at(torch.tensor([0, bad]), torch.float32)


@needs_kernels
@pytest.mark.parametrize("count", [1, 5, 61])
@pytest.mark.parametrize("kind", TYPES)
def test_products_are_exact_but_for_the_rounding_of_the_vector(kind: Type, count: int) -> None:
    data, x = random_blocks(kind, usual), noise(count, COLUMNS, seed=2)
    weights = torch.from_numpy(gguf.dequantize(data, kind)).double()
    steps = (x.view(count, -1, 32).abs().amax(-1) / 32767).repeat_interleave(32, 1)
    allowed = 0.51 * steps.double() @ weights.abs().T
    found = tiles_of_gguf(data, kind, None, load_kernels("auto")).multiply(x)
    assert ((found - x.double() @ weights.T).abs() <= allowed + 1e-5 * weights.abs().sum(1).max()).all()


@pytest.mark.parametrize("kind", TYPES)
def test_parts_are_the_same_rows(kind: Type) -> None:
    data = random_blocks(kind, usual, rows=144)
    weight, expected = tiles_of_gguf(data, kind, None, None), torch.from_numpy(gguf.dequantize(data, kind))
    assert torch.equal(weight.part(64, 144).dequantize(torch.float32), expected[64:])
    assert torch.equal(weight.part(64, 128).dequantize(torch.float32), expected[64:128])


@pytest.mark.parametrize("kind", TYPES)
def test_data_that_is_read_only_and_not_aligned_is_served(kind: Type) -> None:
    """As in a mapped file."""
    data = random_blocks(kind, usual)
    moved = np.empty(data.size + 1, np.uint8)[1:].reshape(data.shape)
    moved[:] = data
    moved.flags.writeable = False
    found = tiles_of_gguf(moved, kind, None, load_kernels("auto")).dequantize(torch.float32)
    assert np.array_equal(found.numpy(), gguf.dequantize(data, kind))
