"""Storage of a weight in memory: one tensor, or the codes and scales of a quantized one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """Return the plain tensors that `weight` consists of: itself, or the parts of a tensor subclass."""
    flatten: Any = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return [weight]
    return [part for name in flatten()[0] for part in stored_tensors(getattr(weight, name))]


def stored_bytes(model: Any) -> int:
    """Return the bytes of all weights of `model`; weights shared by several layers count once."""
    parts = [part for weight in model.parameters() for part in stored_tensors(weight)]
    return sum(part.nbytes for part in {part.data_ptr(): part for part in parts}.values())
