"""Samples the next token. The vocabulary is never sorted: filters work on the top candidates only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamchat.config.settings import Settings
from streamchat.conversation.dry import DryPenalty
from streamchat.decode import one_thread

# llama.cpp's default: a longer window penalizes words that every text needs.
REPETITION_WINDOW = 64
FIRST_CANDIDATES = 64
"""Number of candidates to start with; multiplied by 8 while the filters drop none of them."""


TokenSampler = Callable[[Tensor, Sequence[int]], int]
"""(logits (vocab_size,), ids of the last `REPETITION_WINDOW` tokens without control tokens) -> the next token id."""
SamplerFactory = Callable[[Settings, torch.device, torch.Generator, DryPenalty | None], TokenSampler]
"""(current settings, device of the logits, random generator shared by all turns, DRY penalties if they are on) -> the
sampler of one reply."""


class Sampler:
    """Repetition penalty, DRY, temperature, top-k, top-p and min-p. Greedy at temperature 0.

    All but DRY have the meaning and the order of transformers' logits processors.

    Args:
        settings: The current generation settings.
        device: Device of the logits.
        generator: Random generator, shared by all turns. One number is drawn per token.
        dry: The DRY penalties of the reply; None if they are off.
    """

    def __init__(
        self, settings: Settings, device: torch.device, generator: torch.Generator, dry: DryPenalty | None = None
    ) -> None:
        self._settings, self._generator, self._device, self._dry = settings, generator, device, dry
        self._greedy = settings.temperature == 0
        self._penalty = settings.repetition_penalty
        self._filters = bool(settings.top_k or settings.top_p < 1.0 or settings.min_p)
        # MPS has no float64
        self._exact = torch.float32 if device.type == "mps" else torch.float64

    def __call__(self, logits: Tensor, recent: Sequence[int]) -> int:
        """Return the next token id, from logits (vocab_size,) and the ids of recent text without control tokens."""
        scores = one_thread.copy(logits)
        if self._penalty != 1.0 and recent:
            ids = torch.tensor(recent, dtype=torch.long, device=self._device)
            seen = scores[ids]
            scores[ids] = torch.where(seen < 0, seen * self._penalty, seen / self._penalty)
        if self._dry is not None and (amounts := self._dry.penalties()):
            ids = torch.tensor(list(amounts), dtype=torch.long, device=self._device)
            scores[ids] -= torch.tensor(list(amounts.values()), dtype=scores.dtype, device=self._device)
        if self._greedy:
            return one_thread.argmax(scores)
        one_thread.divide(scores, self._settings.temperature)
        if not self._filters:
            return self._draw(scores)
        values, ids = self._candidates(scores)
        return int(ids[self._draw(values)])

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and ids of the tokens that pass the filters, most likely first."""
        total = one_thread.logsumexp(scores)
        count = max(FIRST_CANDIDATES, self._settings.top_k + 1)
        while True:
            count = min(count, len(scores))
            values, ids = one_thread.top_scores(scores, count)
            kept = self._kept(values, total)
            # a filter that drops one token drops all less likely ones
            if kept < count or count == len(scores):
                return values[:kept], ids[:kept]
            count *= 8

    def _kept(self, values: Tensor, total: Tensor) -> int:
        """Return how many of the most likely tokens pass the filters.

        Args:
            values: Scores of the candidates, in descending order.
            total: Logsumexp of all scores.
        """
        settings, kept = self._settings, len(values)
        if settings.top_k and settings.top_k < kept:
            kept = int((values >= values[settings.top_k - 1]).sum())  # ties are kept
            total = values[:kept].logsumexp(-1)
        if settings.top_p < 1.0:
            shares = (values[:kept] - total).exp()
            # the token that reaches top_p is kept, and always the most likely one
            kept = max(1, int((shares.cumsum(-1) - shares < settings.top_p).sum()))
        if settings.min_p:
            kept = min(kept, int((values >= values[0] + math.log(settings.min_p)).sum()))
        return kept

    def _draw(self, scores: Tensor) -> int:
        """Draw an index from the softmax distribution: one uniform number, looked up in the cumulative sum."""
        sums = one_thread.copy(scores, self._exact).softmax(-1).cumsum(-1)
        point = torch.rand(1, generator=self._generator, device=self._device, dtype=self._exact) * sums[-1]
        return min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)


def new_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a random generator for `seed`; -1 seeds it at random."""
    generator = torch.Generator(device=device)
    if seed < 0:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
