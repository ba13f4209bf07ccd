"""The dtype in which the caches of a model store keys and values."""

from __future__ import annotations

from typing import Any

import torch

from streamchat.cache.layers.codes import BITS

_ATTRIBUTE = "_streamchat_cache_dtype"


def set_cache_dtype(model: Any, dtype: torch.dtype) -> None:
    """Store keys and values of `model` in `dtype`, in caches for which no dtype is given.

    `torch.int8` and `torch.int4` store codes with scales.
    """
    setattr(model, _ATTRIBUTE, dtype)


def cache_dtype(model: Any) -> torch.dtype:
    """Return the dtype that `set_cache_dtype` chose for `model`, else the model's own."""
    dtype: torch.dtype = getattr(model, _ATTRIBUTE, None) or model.dtype
    return dtype


def bytes_per_number(dtype: torch.dtype) -> float:
    """Return the bytes of a cached number in `dtype`, without the scales of codes."""
    return BITS[dtype] / 8 if dtype in BITS else float(dtype.itemsize)
