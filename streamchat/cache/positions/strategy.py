"""Selects the position-handling strategy: rotate keys, none needed, recompute, or unsupported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamchat.base.errors import UnsupportedModelError, describe_unexpected
from streamchat.cache.dtype import cache_dtype
from streamchat.cache.eviction.check import require_eviction_check
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.mover import mover_of
from streamchat.cache.positions.absolute import absolute_limit
from streamchat.cache.positions.fit import PositionFit, fit_positions
from streamchat.cache.positions.selfcheck import require_self_check
from streamchat.cache.recompute import RecomputingCache, fit_recompute
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.wrappers import causal_lm, refuse_training_mode

# the self-check moves a text of 32 tokens by 17
MIN_POSITIONS = 49


@dataclass(frozen=True)
class Verdict:
    """Result of the checks of an earlier `choose_fit`, for a model under the same conditions."""

    absolute_limit: int | None
    """Result of `absolute_limit`."""


def choose_fit(model: Any, *, verdict: Verdict | None = None, check_eviction: bool = True) -> PositionFit:
    """Measure how `model`, a causal LM in eval mode, carries positions, and check it numerically.

    Args:
        model: The model or a wrapper around it. Not changed; its forwards take about 250 tokens.
        verdict: Result of checks that passed earlier; they are skipped.
        check_eviction: Also check the model's attention on a cache that evicts. `verify` does this more thoroughly.

    Raises:
        UnsupportedModelError: A streaming cache would give wrong output with this model; the message says why.
    """
    model = causal_lm(model)
    refuse_training_mode(model)
    try:
        fit = _rotation_fit(model, verdict)
    except UnsupportedModelError as refusal:
        fit = _recompute_fit(model, refusal)
    if verdict is None and check_eviction:
        with _model_errors_as_unsupported(model):
            _check_eviction(model, fit)
    return fit


def _rotation_fit(model: Any, verdict: Verdict | None) -> PositionFit:
    """Return a checked fit that rotates keys.

    Raises:
        UnsupportedModelError: A check or a forward of the model failed.
    """
    with _model_errors_as_unsupported(model):
        fit = fit_positions(model)
        limit = absolute_limit(model, fit) if verdict is None else verdict.absolute_limit
        if limit is not None:
            fit = replace(fit, position_limit=limit, scales_queries=True)
        if verdict is None:
            if limit is not None and limit < MIN_POSITIONS:
                raise UnsupportedModelError(
                    f"from position {limit} on, the model scales attention by the absolute position; moving keys needs "
                    f"at least {MIN_POSITIONS} positions below that"
                )
            require_self_check(model, fit)
        return fit


def _recompute_fit(model: Any, refusal: UnsupportedModelError) -> PositionFit:
    """Return a fit that prefills again after evictions; raises its own reason or `refusal` if that fails too."""
    try:
        return fit_recompute(model, str(refusal))
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:
        raise refusal from None


@contextmanager
def _model_errors_as_unsupported(model: Any) -> Iterator[None]:
    """Context manager: turn any error of the model except lack of memory into UnsupportedModelError."""
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a forward of {type(model).__name__} to measure its positions failed ({describe_unexpected(error)})"
        ) from error


def _check_eviction(model: Any, fit: PositionFit) -> None:
    require_eviction_check(
        model, lambda size, sinks: make_cache(model, fit, cache_size=size, num_sink_tokens=sinks, dtype=model.dtype)
    )


def make_cache(
    model: Any,
    fit: PositionFit,
    *,
    cache_size: int,
    num_sink_tokens: int,
    options: EvictionOptions | None = None,
    dtype: CacheDtype | None = None,
) -> StreamingCache:
    """Return a streaming cache for `model`; see `StreamingCache` for arguments and errors.

    Args:
        dtype: None for the `cache_dtype` of the model.
    """
    kind = RecomputingCache if fit.method == "recompute" else StreamingCache
    sizes = {"cache_size": cache_size, "num_sink_tokens": num_sink_tokens}
    cache = kind(model.config, fit, **sizes, options=options, dtype=dtype or cache_dtype(model))
    for layer in cache.streaming_layers:
        layer.mover = mover_of(model)
    return cache
