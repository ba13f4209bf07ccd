"""Finds the position from which on a model's attention depends on the absolute position.

Some models scale queries by the absolute position beyond a certain length; their keys can be moved only below it. To
find it, the rotary modules get small positions, whatever positions the model is called with. All rows of a batch then
give equal logits, unless something else depends on positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamchat.cache.arguments import parameter_names
from streamchat.cache.context import context_length
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.probe import plain_forward, rotary_modules
from streamchat.cache.token_ids import random_ids

TOKENS = 8
FURTHEST = 1 << 20
# Largest difference between equal rows, in units of the logits' spread: rounding depends on the row in the batch. A
# scale that grows by 7 % (Ministral 3's first step) causes 0.02 and more.
SAME = {torch.float32: 1e-4}
SAME_16_BIT = 1e-2


@torch.inference_mode()
def absolute_limit(model: Any, fit: PositionFit) -> int | None:
    """Return the position from which on attention depends on the absolute position; None if there is none.

    Positions from `fit.position_limit` on are not checked.

    Args:
        model: A causal LM in eval mode. Runs one forward of about 20 x 8 tokens, and a few more if there is a limit.
        fit: The fit of the model.
    """
    if "position_ids" not in parameter_names(model):
        return None  # it does not take positions, so it counts slots
    end = fit.position_limit or min(FURTHEST, 4 * (context_length(model.config) or FURTHEST))
    starts = [0]
    while 2 * max(1, starts[-1]) + TOKENS <= end:
        starts.append(2 * max(1, starts[-1]))
    if end > TOKENS:
        starts.append(end - TOKENS)
    below, above = _bounds(starts, _same(model, starts))
    if above is None:
        return None
    while above - below > 1:
        step = max(1, (above - below) // 16)
        starts = [0, *range(below + step, above, step)]
        same = _same(model, starts)
        low, high = _bounds(starts, same)
        below, above = max(below, low), above if high is None else high
    return below + TOKENS


def _bounds(starts: list[int], same: list[bool]) -> tuple[int, int | None]:
    """Return the last start before the first differing row, and that row's start (None if no row differs)."""
    for index, equal in enumerate(same):
        if not equal:
            return starts[index - 1], starts[index]
    return starts[-1], None


def _same(model: Any, starts: list[int]) -> list[bool]:
    """Return, for each start, whether the same tokens give the same logits there as at 0."""
    ids = random_ids(model, TOKENS, seed=5)
    small = torch.arange(TOKENS, device=ids.device)
    positions = torch.tensor(starts, device=ids.device)[:, None] + small
    with _small_rotary_positions(model, small):
        _, logits = plain_forward(model, ids.expand(len(starts), -1), positions)
    logits = logits.cpu()
    spread = logits[0].std().clamp_min(1e-9)
    tolerance = SAME.get(model.dtype, SAME_16_BIT)
    distance = (logits - logits[:1]).abs().amax(dim=(1, 2)) / spread
    return [value <= tolerance for value in distance.tolist()]


@contextmanager
def _small_rotary_positions(model: nn.Module, small: Tensor) -> Iterator[None]:
    """Context manager: rotary modules use `small` positions, whatever the model is called with."""

    def substitute(value: Any) -> Any:
        whole = isinstance(value, Tensor) and not value.is_floating_point() and value.shape[-1:] == small.shape
        return small.to(value.device, value.dtype).expand_as(value) if whole else value

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(substitute, args)), {name: substitute(value) for name, value in kwargs.items()}

    with ExitStack() as hooks:
        for module in rotary_modules(model):
            hooks.enter_context(module.register_forward_pre_hook(replace, with_kwargs=True, prepend=True))
        yield
