"""Keys and values in 8 or 4 bits: an integer per number, and a scale per token and head.

The numbers of a head are first multiplied by a Hadamard matrix, which spreads the few large dimensions of keys over all
dimensions, as in QuaRot (arXiv:2404.00456). The scale is that of the largest number, rounded up to a bfloat16, so that
no number is clipped. With `k8v4`, the scale of values is the best of several smaller ones, which clip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 - torch's stubs lack it
BITS = {torch.int8: 8, INT4: 4}
"""Dtype of quantized keys or values -> bits per number."""
CacheDtype = torch.dtype | tuple[torch.dtype, torch.dtype]
"""How a cache stores keys and values: one dtype for both, or that of keys and that of values."""
K8V4: CacheDtype = (torch.int8, INT4)
QUANTIZED: dict[str, CacheDtype] = {"int8": torch.int8, "k8v4": K8V4, "int4": INT4}
"""Name of a quantized cache, as in the setting `kv_dtype` -> its dtype."""
LIMITS = {8: 127, 4: 7}
"""Largest code."""
SHARES = (1.0, 0.9, 0.8, 0.7)
"""Scales that are tried if the best one is chosen, as shares of the one that clips no number."""
ZERO = 8
"""The 4 bits of code 0."""
TINY = 1e-30
"""Heads whose largest number is smaller are stored as zeros."""


def key_and_value_dtype(dtype: CacheDtype) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of keys and that of values."""
    return dtype if isinstance(dtype, tuple) else (dtype, dtype)


@torch.no_grad()
def quantize(x: Tensor, bits: int, *, searches: bool = False) -> tuple[Tensor, Tensor]:
    """Return codes and scales of states (..., head_dim).

    Args:
        x: The states.
        bits: 8 or 4.
        searches: Choose the scale with the least squared error of several, for each head.

    Returns:
        int8 codes (..., head_dim), or uint8 (..., head_dim / 2) with two codes per byte: the low 4 bits belong to the
        first half of the head; and bfloat16 scales (...). A head with NaN or infinities has a scale of NaN or infinity.
        The codes of a head are the same to the bit, however many heads there are: undo writes slots in other numbers.
    """
    width = x.shape[-1]
    # not `contiguous`: it returns a single head itself, which would then be overwritten
    columns = x.float().reshape(-1, width).t().clone(memory_format=torch.contiguous_format)
    return _codes_of(_turned_columns(columns), bits, x.shape, searches=searches)


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales, as `quantize` does, of float32 states (..., head_dim) that are turned already."""
    return _codes_of(x.reshape(-1, x.shape[-1]).t(), bits, x.shape)


def _codes_of(columns: Tensor, bits: int, shape: torch.Size, *, searches: bool = False) -> tuple[Tensor, Tensor]:
    """Return codes and scales of turned columns (head_dim, heads), for states of that shape."""
    largest = columns.abs().amax(0)
    codes, scales = _rounded(columns, largest, bits)
    if searches:
        error = _squared_error(columns, codes, scales)
        for share in SHARES[1:]:
            others, other_scales = _rounded(columns, largest * share, bits)
            found = _squared_error(columns, others, other_scales)
            is_better = found < error  # false for NaN
            error = torch.where(is_better, found, error)
            codes, scales = torch.where(is_better, others, codes), torch.where(is_better, other_scales, scales)
    codes = codes.to(torch.int8)
    if bits == 4:
        low, high = (codes + ZERO).view(torch.uint8).chunk(2)
        codes = low | high << 4
    return codes.t().contiguous().view(*shape[:-1], len(codes)), scales.view(shape[:-1])


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 states (..., head_dim) of codes and scales."""
    return turned(unpacked(codes).float() * scales.float()[..., None])


def unpacked(codes: Tensor) -> Tensor:
    """Return codes (..., head_dim) as int8, of 8 or 4 bits."""
    if codes.dtype != torch.uint8:
        return codes
    return torch.cat([codes & 15, codes >> 4], dim=-1).view(torch.int8) - ZERO


def turned(x: Tensor) -> Tensor:
    """Multiply each head of `x` (..., head_dim) by a Hadamard matrix, which is its own inverse.

    The size of the matrix is the largest power of two that divides the head. Each part of that size is multiplied.
    """
    width = x.shape[-1]
    matrix = _hadamard(width & -width, x.device)
    return (x.reshape(*x.shape[:-1], width // len(matrix), len(matrix)) @ matrix).reshape(x.shape)


def _rounded(columns: Tensor, largest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes (head_dim, heads) in float32 and scales (heads) of turned columns, clipped at about `largest`."""
    most = LIMITS[bits]
    scales = _rounded_up(torch.where(largest < TINY, 0.0, largest / most))
    exact = scales.float()
    inverses = torch.where(exact > 0, 1 / exact, 0.0)  # finite: `TINY`; 0 for NaN and infinity
    return (columns * inverses).nan_to_num_().round_().clamp_(-most - 1, most), scales


def _squared_error(columns: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the squared error of each column; like `_turned_columns`, to the bit the same whatever the others are."""
    errors = (columns - codes * scales.float()).square_()
    while len(errors) > 1:
        half = len(errors) // 2
        errors = torch.cat([errors[:half] + errors[half : 2 * half], errors[2 * half :]])
    return errors[0]


def _turned_columns(x: Tensor) -> Tensor:
    """Return `turned` of columns (head_dim, heads), to the bit the same for a head whatever the others are.

    May overwrite `x`. A matrix product may add in another order if there are more heads. These sums cannot. A GPU would
    run them as dozens of kernels. There, the product is of float64: it adds exactly, unless two numbers of a head
    differ by a factor of more than four million, and even then the order hardly ever changes the float32.
    """
    width, heads = x.shape
    size = width & -width
    if x.device.type == "cuda":
        parts = _hadamard(size, x.device).double().sign() @ x.double().view(width // size, size, heads)
        return (parts / math.sqrt(size)).float().view(width, heads)
    other, half = torch.empty_like(x), size // 2
    while half:
        first, second = x.view(width // (2 * half), 2, half, heads).unbind(1)
        total, difference = other.view(width // (2 * half), 2, half, heads).unbind(1)
        torch.add(first, second, out=total)
        torch.sub(first, second, out=difference)
        x, other, half = other, x, half // 2
    return x.div_(math.sqrt(size))


@functools.cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """Return the orthogonal, symmetric Hadamard matrix of a power of two."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / math.sqrt(size)


def _rounded_up(x: Tensor) -> Tensor:
    """Round nonnegative float32 up to bfloat16; NaN and infinity stay."""
    up = ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), up, x).bfloat16()


def states_of(raw: Mapping[str, Tensor]) -> Tensor:
    """Return the states of the raw slots of keys or values. The parts are '', and 'scales' if these are codes."""
    return dequantize(raw[""], raw["scales"]) if "scales" in raw else raw[""]
