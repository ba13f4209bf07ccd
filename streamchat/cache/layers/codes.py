"""Keys and values in 8 or 4 bits: an integer per number, and a scale per token and head.

The numbers of a head are first multiplied by a Hadamard matrix, which spreads the few large dimensions of keys over all
dimensions, as in QuaRot (arXiv:2404.00456). The scale is that of the largest number, rounded up to a bfloat16, so that
no number is clipped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 - torch's stubs lack it
BITS = {torch.int8: 8, INT4: 4}
"""Dtype of a quantized cache -> bits per number."""
LIMITS = {8: 127, 4: 7}
"""Largest code."""
ZERO = 8
"""The 4 bits of code 0."""
TINY = 1e-30
"""Heads whose largest number is smaller are stored as zeros."""


@torch.no_grad()
def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of states (..., head_dim).

    Returns:
        int8 codes (..., head_dim), or uint8 (..., head_dim / 2) with two codes per byte: the low 4 bits belong to the
        first half of the head; and bfloat16 scales (...). A head with NaN or infinities has a scale of NaN or infinity.
        The codes of a head are the same to the bit, however many heads there are: undo writes slots in other numbers.
    """
    return rounded(_turned_alone(x.float()), bits)


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales, as `quantize` does, of float32 states (..., head_dim) that are turned already."""
    largest = x.abs().amax(-1)
    scales = _rounded_up(torch.where(largest < TINY, 0.0, largest / LIMITS[bits]))
    exact = scales.float()
    inverses = torch.where(exact > 0, 1 / exact, 0.0).nan_to_num(0.0, 0.0, 0.0)
    codes = (x * inverses[..., None]).nan_to_num(0.0, 0.0, 0.0).round_().to(torch.int8)
    if bits == 8:
        return codes, scales
    low, high = (codes + ZERO).view(torch.uint8).chunk(2, dim=-1)
    return low | high << 4, scales


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


def _turned_alone(x: Tensor) -> Tensor:
    """Return `turned(x)`, to the bit the same for a head whatever the others are.

    A matrix product may add in another order if there are more rows. These sums and differences cannot, but are slower.
    A GPU would run them as dozens of kernels. There, the product is of float64: it adds exactly, unless two numbers of
    a head differ by a factor of more than four million, and even then the order hardly ever changes the float32.
    """
    width = x.shape[-1]
    size = width & -width
    if x.device.type == "cuda":
        parts = x.double().reshape(-1, size) @ _hadamard(size, x.device).double().sign()
        return (parts / math.sqrt(size)).float().reshape(x.shape)
    x, shape = x.reshape(-1, size).t().contiguous(), x.shape
    heads, half = x.shape[1], size // 2
    while half:
        first, second = x.view(size // (2 * half), 2, half, heads).unbind(1)
        x = torch.stack([first + second, first - second], 1)
        half //= 2
    return (x.view(size, heads).t() / math.sqrt(size)).reshape(shape)


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
