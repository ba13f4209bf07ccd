"""Choosing how a model is served: by moving keys, without moving anything, by reading again, or not at all."""

from __future__ import annotations

from typing import Any

from streamchat.cache.fit import PositionFit, fit_positions
from streamchat.cache.recompute import RecomputingCache, fit_recompute
from streamchat.cache.selfcheck import require_self_check
from streamchat.cache.streaming import EvictionOptions, StreamingCache
from streamchat.cache.wrappers import refuse_training_mode
from streamchat.errors import UnsupportedModelError


def choose_fit(model: Any, *, checked: bool = False) -> PositionFit:
    """Measure how `model`, a causal LM in eval mode, carries positions, and check it numerically.

    Args:
        model: Not changed; some 150 tokens of forward run.
        checked: The self-check is known to pass (a remembered verdict) and is left out.

    Raises:
        UnsupportedModelError: An endless cache would be wrong with this model; the reason is in the text.
    """
    refuse_training_mode(model)
    try:
        fit = fit_positions(model)
        if not checked:
            require_self_check(model, fit)
        return fit
    except UnsupportedModelError as error:
        refusal = error
    try:
        return fit_recompute(model, str(refusal))
    except UnsupportedModelError:
        raise
    except Exception:
        raise refusal from None


def make_cache(
    model: Any, fit: PositionFit, *, cache_size: int, num_sink_tokens: int, options: EvictionOptions | None = None
) -> StreamingCache:
    """The cache that serves `model`; arguments and errors as of `StreamingCache`."""
    kind = RecomputingCache if fit.method == "recompute" else StreamingCache
    return kind(model.config, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens, options=options)
