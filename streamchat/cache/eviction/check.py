"""Checks, when a model loads, that its attention is correct on a cache that has evicted tokens and rebased positions.

Attention implementations differ in what they support: views into a buffer, lengths that do not grow, positions that
differ from slots. The model's implementation is compared with eager attention on separate tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.logits import logit_distance, logits_in_pieces
from streamchat.cache.routing import fixed_routing
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.token_ids import random_ids

SINKS = 4
SIZES = (32, 16)
"""Budgets to check with; the first that the model supports is used (some models attend in chunks)."""
# Root mean square, in units of the logits' spread, as in `streamchat verify`.
ALLOWED = {torch.float32: 1e-4}
ALLOWED_16_BIT = 5e-2
NOISE_FACTOR = 2.0
"""In 16 bits, the rounding of some models (Gemma 3) changes correct logits by more. They may then differ by this many
times the difference between two runs of the model: the text at once, and in pieces."""


@torch.inference_mode()
def require_eviction_check(model: Any, new_cache: Callable[[int, int], StreamingCache]) -> None:
    """Check the model's attention on a short text well over a small budget, fed in chunks and single tokens.

    In 16 bits, mixtures of experts choose the same experts for every token meanwhile.

    Args:
        model: A causal LM in eval mode; not changed. Runs about 20 forwards.
        new_cache: Returns an empty cache for a budget and a number of sinks.

    Raises:
        UnsupportedModelError: The model's attention gives other logits than eager attention.
    """
    with nullcontext() if model.dtype in ALLOWED else fixed_routing(model):
        _require(model, new_cache)


def _require(model: Any, new_cache: Callable[[int, int], StreamingCache]) -> None:
    ours = _stream(model, _first_supported(new_cache))
    allowed = ALLOWED.get(model.dtype, ALLOWED_16_BIT)
    name = str(model.config._attn_implementation)
    with _eager_attention(model):
        goal = _stream(model, _in_separate_tensors(_first_supported(new_cache)))
    distances = _distances(ours, goal)
    if max(distances) > allowed and model.dtype not in ALLOWED:
        with _eager_attention(model):
            allowed = max(allowed, NOISE_FACTOR * _rounding(model, _schedule(_first_supported(new_cache))))
    if distances[0] > allowed:
        # They differ without any eviction (Falcon's biases): use the model's own attention as the reference.
        distances = _distances(ours, _stream(model, _in_separate_tensors(_first_supported(new_cache))))
    worst = max(distances)
    if not worst <= allowed:
        step = next(i for i, distance in enumerate(distances) if not distance <= allowed)
        raise UnsupportedModelError(
            f"the model's attention ({name}) gives wrong logits on a cache that grows and evicts: off by {worst:.2g} "
            f"of their spread (allowed {allowed:.2g}), from forward {step + 1} of {len(distances)} on; load the model "
            'with another attention, such as attn_implementation="sdpa" or "eager"'
        )


def _first_supported(new_cache: Callable[[int, int], StreamingCache]) -> StreamingCache:
    try:
        return new_cache(SIZES[0], SINKS)
    except UnsupportedModelError:
        return new_cache(SIZES[1], SINKS)


def _schedule(cache: StreamingCache) -> list[int]:
    """Return the number of tokens of each forward: up to the budget, then over it."""
    steps = [cache.cache_size - 12, 1, 5, 1, 5, 1, 5, 1, 1, 1]
    if not cache.fit.single_steps:
        return steps
    return [steps[0], *[1] * sum(steps[1:])]


def _stream(model: Any, cache: StreamingCache) -> list[Tensor]:
    """Return the float32 logits (n, vocabulary) of each forward."""
    steps = _schedule(cache)
    ids = random_ids(model, sum(steps), seed=11)
    logits = []
    with StreamingHook(model, cache):
        for index, chunk in enumerate(torch.split(ids, steps, dim=1)):
            if index == len(steps) - 2:
                cache.rebase_positions()
            out = model(input_ids=chunk, use_cache=True, **{cache_keyword(model): cache})
            logits.append(out.logits[0].float())
    return logits


def _rounding(model: Any, steps: list[int]) -> float:
    """Return the largest distance of logits between a text at once and in pieces, without evictions."""
    ids = random_ids(model, sum(steps), seed=11)
    whole = model(input_ids=ids, use_cache=False).logits[0].split(steps)
    return max(_distances(logits_in_pieces(model, model, ids, steps), whole))


def _in_separate_tensors(cache: StreamingCache) -> StreamingCache:
    """Make `cache` return copies instead of views, and return it."""
    update = cache.update

    def copied(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(*args, **kwargs)
        return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)

    cache.update = copied  # type: ignore[method-assign]
    return cache


def _distances(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [logit_distance(a, b) for a, b in zip(found, expected, strict=True)]


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Context manager: use eager attention in all parts of the model."""
    candidates: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in candidates if hasattr(config, "_attn_implementation_internal")}
    names = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = names[key]
