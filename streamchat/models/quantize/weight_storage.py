"""What a weight really is in memory: one tensor, or the codes and scales of a quantised one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors that `weight` consists of: itself, unless a library's subclass stands for others."""
    flatten: Any = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return [weight]
    return [part for name in flatten()[0] for part in stored_tensors(getattr(weight, name))]


def stored_bytes(model: Any) -> int:
    """Bytes of all weights of `model`; those that several layers share count once."""
    parts = [part for weight in model.parameters() for part in stored_tensors(weight)]
    return sum(part.nbytes for part in {part.data_ptr(): part for part in parts}.values())
