"""Choosing the next token. The vocabulary is never sorted: what the filters leave is found from the top down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streamchat.config.settings import Settings

# As llama.cpp's default: a longer memory punishes the words that every text needs.
REPETITION_WINDOW = 64
FIRST_LOOK = 64
"""Of the likeliest tokens; eight times as many each time that the filters would keep all of them."""


class Sampler:
    """Repetition penalty, temperature, top-k, top-p and min-p, with the meaning and in the order of transformers'
    logits processors. Greedy at temperature 0.

    Args:
        settings: The generation settings in force.
        device: Where the logits live.
        generator: The source of randomness; goes on from turn to turn. One number is drawn for a token.
    """

    def __init__(self, settings: Settings, device: torch.device, generator: torch.Generator) -> None:
        self._settings, self._generator, self._device = settings, generator, device
        self._greedy = settings.temperature == 0
        self._penalty = settings.repetition_penalty
        self._filters = bool(settings.top_k or settings.top_p < 1.0 or settings.min_p)
        # this device has no float64
        self._exact = torch.float32 if device.type == "mps" else torch.float64

    @property
    def window(self) -> int:
        """How many of the latest tokens it wants to see; 0 = none."""
        return REPETITION_WINDOW if self._penalty != 1.0 else 0

    def __call__(self, logits: Tensor, recent: Sequence[int]) -> int:
        """The next token id, from logits (vocabulary,) and the ids of recent text (no control tokens)."""
        scores = logits.to(torch.float32, copy=True)
        if self.window and recent:
            ids = torch.tensor(recent, dtype=torch.long, device=self._device)
            seen = scores[ids]
            scores[ids] = torch.where(seen < 0, seen * self._penalty, seen / self._penalty)
        if self._greedy:
            return int(scores.argmax())
        scores /= self._settings.temperature
        if not self._filters:
            return self._draw(scores)
        values, ids = self._candidates(scores)
        return int(ids[self._draw(values)])

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and ids of the tokens that pass the filters, likeliest first."""
        total = scores.logsumexp(-1)
        count = max(FIRST_LOOK, self._settings.top_k + 1)
        while True:
            count = min(count, len(scores))
            values, ids = scores.topk(count)
            kept = self._kept(values, total)
            # A filter that drops one token drops all that are less likely.
            if kept < count or count == len(scores):
                return values[:kept], ids[:kept]
            count *= 8

    def _kept(self, values: Tensor, total: Tensor) -> int:
        """How many of the likeliest tokens pass, from their scores in descending order.

        Args:
            values: All of them that were looked at.
            total: Log of the summed exponentials of all scores.
        """
        settings, kept = self._settings, len(values)
        if settings.top_k and settings.top_k < kept:
            kept = int((values >= values[settings.top_k - 1]).sum())  # equal ones stay together
            total = values[:kept].logsumexp(-1)
        if settings.top_p < 1.0:
            shares = (values[:kept] - total).exp()
            # the one that reaches top_p is kept, and the likeliest always
            kept = max(1, int((shares.cumsum(-1) - shares < settings.top_p).sum()))
        if settings.min_p:
            kept = min(kept, int((values >= values[0] + math.log(settings.min_p)).sum()))
        return kept

    def _draw(self, scores: Tensor) -> int:
        """An index, with the probabilities of the softmax: one uniform number, looked up in their running sum."""
        sums = scores.to(self._exact).softmax(-1).cumsum(-1)
        point = torch.rand(1, generator=self._generator, device=self._device, dtype=self._exact) * sums[-1]
        return min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)


def new_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator for `seed`; -1 seeds it at random."""
    generator = torch.Generator(device=device)
    if seed < 0:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
