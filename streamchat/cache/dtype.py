"""The dtype in which the caches of a model store keys and values."""

from __future__ import annotations

from typing import Any

import torch

_ATTRIBUTE = "_streamchat_cache_dtype"


def set_cache_dtype(model: Any, dtype: torch.dtype) -> None:
    """Store keys and values of `model` in `dtype`, in caches for which no dtype is given."""
    setattr(model, _ATTRIBUTE, dtype)


def cache_dtype(model: Any) -> torch.dtype:
    """Return the dtype that `set_cache_dtype` chose for `model`, else the model's own."""
    dtype: torch.dtype = getattr(model, _ATTRIBUTE, None) or model.dtype
    return dtype
