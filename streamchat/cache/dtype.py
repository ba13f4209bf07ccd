"""The dtype in which the caches of a model store keys and values."""

from __future__ import annotations

from typing import Any

import torch

from streamchat.cache.layers.codes import BITS, QUANTIZED, CacheDtype, key_and_value_dtype

_ATTRIBUTE = "_streamchat_cache_dtype"


def set_cache_dtype(model: Any, dtype: CacheDtype) -> None:
    """Store keys and values of `model` in `dtype`, in caches for which no dtype is given.

    `torch.int8` and `torch.int4` store codes with scales. A pair is for keys and for values.
    """
    setattr(model, _ATTRIBUTE, dtype)


def cache_dtype(model: Any) -> CacheDtype:
    """Return the dtype that `set_cache_dtype` chose for `model`, else the model's own."""
    dtype: CacheDtype = getattr(model, _ATTRIBUTE, None) or model.dtype
    return dtype


def bytes_per_number(dtype: CacheDtype) -> float:
    """Return the mean bytes of a cached number in `dtype`, without the scales of codes."""
    return sum(BITS[each] / 8 if each in BITS else each.itemsize for each in key_and_value_dtype(dtype)) / 2


def dtype_named(name: str) -> CacheDtype:
    """Return the dtype of a cache from its name: `bfloat16`, `int8`, `k8v4`, ..."""
    dtype: CacheDtype = QUANTIZED[name] if name in QUANTIZED else getattr(torch, name)
    return dtype
