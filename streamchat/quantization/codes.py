"""int8 and int4 codes of weights, and their scales, in groups of 32 along a row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from streamchat.kernels.operations import GROUP

INT8_LIMIT = 127
"""Largest int8 code."""
INT8_LARGEST = (INT8_LIMIT, 112)
"""Codes for the largest weight of a group; the one with the smallest error is used. The integers of GGUF's Q8_0 go up
to 127, those of Q5_0 and Q4_0 to 16 and 8, of which 112 is a multiple."""
INT4_LARGEST = (15, 14, 13, 12, 11, 10, 9, 8)
"""The same for int4. A group that was quantized to 4 bits before need not have all 16 values."""
SAMPLED_ROWS = 4
"""Rows that `is_grouped` samples: few enough for one thread of PyTorch, as every start samples all layers."""
GROUPED_LIMIT = 0.1
"""Largest residual, in steps, of weights that count as grouped: about 0.03 for Q4_1 and Q4_K, 0.2 for others."""


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (rows, columns / 32, 32) int8 from -127 to 127, and (rows, columns / 32) float16 scales.

    The scale of a group is the least-squares fit to its codes, and its codes are the nearest ones with that scale.
    """
    groups = _groups(weight)
    step = _best_step(groups, groups.abs().amax(-1, keepdim=True), INT8_LARGEST)
    codes = _rounded(groups / step)
    squares = codes.square().sum(-1, keepdim=True)
    scale = torch.where(squares > 0, (codes * groups).sum(-1, keepdim=True) / squares, step)
    # so that the largest weight does not exceed the largest code
    scale = _to_float16(scale, least=(1 - 2**-9) * groups.abs().amax(-1, keepdim=True) / INT8_LIMIT)
    codes = _rounded(groups / scale.float()).clamp_(-INT8_LIMIT, INT8_LIMIT)
    return codes.to(torch.int8), scale.squeeze(-1)


def int4_codes(weight: Tensor, largest: Iterable[int] = INT4_LARGEST) -> tuple[Tensor, Tensor]:
    """Return codes (rows, columns / 32, 32) int32 from 0 to 15, and (rows, columns / 32, 2) float16 scale and minimum.

    Scale and minimum of a group are the least-squares fit to its codes: `w = scale * code + minimum`.

    Args:
        weight: (rows, columns), float32.
        largest: Codes to try for the largest weight of a group.
    """
    return _fit_int4(weight, largest, torch.float16, 0)


def centered_int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for PyTorch's kernels: (rows, columns / 32, 2) bfloat16, `w = scale * (code - 8) + zero`."""
    return _fit_int4(weight, INT4_LARGEST, torch.bfloat16, 8)


def _fit_int4(weight: Tensor, largest: Iterable[int], dtype: torch.dtype, center: int) -> tuple[Tensor, Tensor]:
    groups = _groups(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # aminmax uses all threads
    step = _best_step(groups - low, high - low, largest)
    codes = _rounded((groups - low) / step).clamp_(0, 15)
    centered = codes - codes.mean(-1, keepdim=True)
    mean = groups.mean(-1, keepdim=True)
    variance = centered.square().sum(-1, keepdim=True)
    scale = torch.where(variance > 0, (centered * (groups - mean)).sum(-1, keepdim=True) / variance, step)
    most = torch.finfo(dtype).max
    scale = scale.clamp(max=most).to(dtype).float()
    zero = mean - scale * (codes.mean(-1, keepdim=True) - center)
    return codes.to(torch.int32), torch.cat([scale, zero.clamp(-most, most)], dim=-1).to(dtype)


def is_grouped(weight: Tensor) -> bool:
    """Return whether each group of a (rows, columns) matrix has at most 16 evenly spaced values, as in Q4_1 files.

    Samples a few rows.
    """
    sample = weight.detach()[:: max(1, weight.shape[0] // SAMPLED_ROWS)][:SAMPLED_ROWS].float()
    return any(_residual(sample, largest) <= GROUPED_LIMIT for largest in (INT4_LARGEST[:1], INT4_LARGEST))


def _residual(weight: Tensor, largest: Iterable[int]) -> float:
    """Return the root mean square distance from the nearest int4 values, in units of their step."""
    codes, scales = _fit_int4(weight, largest, torch.bfloat16, 8)
    step, zero = (part.float().unsqueeze(-1) for part in scales.unbind(-1))
    distance = (_groups(weight) - zero) / step - (codes - 8)
    return float(distance.square().mean().sqrt())


def _groups(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1, GROUP)


def _best_step(groups: Tensor, largest: Tensor, codes: Iterable[int]) -> Tensor:
    """Return the step whose multiples are nearest to the elements of a group; `largest` is one of `codes` steps."""
    best, least = None, None
    for code in codes:
        step = (largest / code).clamp_min(torch.finfo(torch.float32).tiny)
        exact = groups / step
        error = (exact - _rounded(exact)).square_().sum(-1, keepdim=True) * step.square()
        if best is None or least is None:
            best, least = step, error
        else:
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    assert best is not None
    return best


def _rounded(values: Tensor) -> Tensor:
    """Return the nearest integers of numbers below 2 ** 22, like `torch.round`, which always uses all threads."""
    return values.add(1.5 * 2**23).sub_(1.5 * 2**23)


def _to_float16(values: Tensor, least: Tensor) -> Tensor:
    """Round positive numbers to the nearest float16, or up if that is less than `least`; the result is not 0."""
    rounded = values.to(torch.float16)
    above = (rounded.view(torch.int16) + (rounded.float() < least)).view(torch.float16)
    return above.clamp_(2**-24, torch.finfo(torch.float16).max)
