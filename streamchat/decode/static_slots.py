"""The slots of a layer as captured steps read and write them: numbers, or codes with scales.

Codes are of turned heads, see `streamchat.cache.layers.codes`. Attention turns the queries and its result instead of
turning all keys and values back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamchat.cache.layers.codes import rounded, turned, unpacked

Buffers = tuple[Tensor, ...]
"""Keys and values of a layer, (1, num_kv_heads, slots, head_dim) each. If they are codes, (..., head_dim) int8 or
(..., head_dim / 2) uint8, their scales follow, (1, num_kv_heads, slots) bfloat16 each."""


def has_codes(buffers: Buffers) -> bool:
    """Return whether keys and values are codes."""
    return len(buffers) > 2


def bits_of(dtype: torch.dtype) -> int:
    """Return the bits of the codes in a tensor of that dtype; 0 for numbers."""
    return {torch.int8: 8, torch.uint8: 4}.get(dtype, 0)


def stored(buffers: Buffers, keys: Tensor, values: Tensor) -> Buffers:
    """Return what to write to some slots of `buffers` for these states, (1, num_kv_heads, slots, head_dim) each.

    As `quantize` would, but with a matrix product, which is fewer kernels: only the order of its sums may differ.
    """
    if not has_codes(buffers):
        return keys, values
    pairs = zip((keys, values), buffers, strict=False)
    (key_codes, key_scales), (value_codes, value_scales) = (
        rounded(turned(states.float()), bits_of(buffer.dtype)) for states, buffer in pairs
    )
    return key_codes, value_codes, key_scales, value_scales


def states_for(buffers: Buffers, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values for attention over all slots, in the dtype of the queries.

    If keys and values are codes, all three are turned; so is what attention returns, see `unturned`.
    """
    if not has_codes(buffers):
        return queries, buffers[0], buffers[1]
    keys, values = (
        (unpacked(codes).float() * scales.float()[..., None]).to(queries.dtype)
        for codes, scales in zip(buffers[:2], buffers[2:], strict=True)
    )
    return turned(queries.float()).to(queries.dtype), keys, values


def unturned(buffers: Buffers, attended: Tensor) -> Tensor:
    """Return the result of attention, (..., head_dim), turned back if keys and values are codes."""
    return turned(attended.float()).to(attended.dtype) if has_codes(buffers) else attended
