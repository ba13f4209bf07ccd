"""Choosing how a model is served: by moving keys, without moving anything, by reading again, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.eviction.check import require_eviction_check
from streamchat.cache.positions.absolute import absolute_limit
from streamchat.cache.positions.fit import PositionFit, fit_positions
from streamchat.cache.positions.selfcheck import require_self_check
from streamchat.cache.recompute import RecomputingCache, fit_recompute
from streamchat.cache.streaming import EvictionOptions, StreamingCache
from streamchat.cache.wrappers import causal_lm, refuse_training_mode

# The self-check moves a text of 32 tokens by 17.
LEAST_POSITIONS = 49


@dataclass(frozen=True)
class Verdict:
    """What the checks of an earlier `choose_fit` found, for a model under the same conditions."""

    absolute_limit: int | None
    """What `absolute_limit` found."""


def choose_fit(model: Any, *, verdict: Verdict | None = None, check_eviction: bool = True) -> PositionFit:
    """Measure how `model`, a causal LM in eval mode, carries positions, and check it numerically.

    Args:
        model: Or a wrapper around it. Not changed; some 250 tokens of forward run.
        verdict: Of checks that passed before; they are left out.
        check_eviction: Run the attention in use on a cache that evicts. `verify` does that at length.

    Raises:
        UnsupportedModelError: An endless cache would be wrong with this model; the reason is in the text.
    """
    model = causal_lm(model)
    refuse_training_mode(model)
    try:
        fit = _moving_fit(model, verdict)
    except UnsupportedModelError as refusal:
        fit = _recompute_fit(model, refusal)
    if verdict is None and check_eviction:
        with _failures_told(model):
            _check_eviction(model, fit)
    return fit


def _moving_fit(model: Any, verdict: Verdict | None) -> PositionFit:
    """The fit by moving keys, checked.

    Raises:
        UnsupportedModelError: A check failed, or the model itself did.
    """
    with _failures_told(model):
        fit = fit_positions(model)
        limit = absolute_limit(model, fit) if verdict is None else verdict.absolute_limit
        if limit is not None:
            fit = replace(fit, position_limit=limit, scales_queries=True)
        if verdict is None:
            if limit is not None and limit < LEAST_POSITIONS:
                raise UnsupportedModelError(
                    f"from position {limit} on the model scales attention by the absolute position, which leaves too "
                    f"few (under {LEAST_POSITIONS}) to move keys within"
                )
            require_self_check(model, fit)
        return fit


def _recompute_fit(model: Any, refusal: UnsupportedModelError) -> PositionFit:
    """The fit by reading again; raises `refusal`, or its own reason, when that is wrong too."""
    try:
        return fit_recompute(model, str(refusal))
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:
        raise refusal from None


@contextmanager
def _failures_told(model: Any) -> Iterator[None]:
    """Make an UnsupportedModelError of whatever the model raises inside the block, but for a lack of memory."""
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:200]
        raise UnsupportedModelError(
            f"a small forward of {type(model).__name__} failed while its positions were measured "
            f"({type(error).__name__}: {first})"
        ) from error


def _check_eviction(model: Any, fit: PositionFit) -> None:
    require_eviction_check(model, lambda size, sinks: make_cache(model, fit, cache_size=size, num_sink_tokens=sinks))


def make_cache(
    model: Any, fit: PositionFit, *, cache_size: int, num_sink_tokens: int, options: EvictionOptions | None = None
) -> StreamingCache:
    """The cache that serves `model`; arguments and errors as of `StreamingCache`."""
    kind = RecomputingCache if fit.method == "recompute" else StreamingCache
    return kind(model.config, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens, options=options)
