"""Choosing the next token with the logits processors of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streamchat.settings import Settings

# As llama.cpp's default: a longer memory punishes the words that every text needs.
REPETITION_WINDOW = 64


class Sampler:
    """Temperature, top-k, top-p, min-p and repetition penalty, in the order of `generate`. Greedy at temperature 0.

    Args:
        settings: The generation settings in force.
        device: Where the logits live.
        generator: The source of randomness; goes on from turn to turn.
    """

    def __init__(self, settings: Settings, device: torch.device, generator: torch.Generator) -> None:
        self._generator, self._device = generator, device
        self._greedy = settings.temperature == 0
        self._penalty = settings.repetition_penalty != 1.0
        processors: list[Any] = []
        if self._penalty:
            processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self._greedy:
            if settings.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                processors.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p:
                processors.append(MinPLogitsWarper(settings.min_p))
        self._processors = LogitsProcessorList(processors)

    @property
    def window(self) -> int:
        """How many of the latest tokens it wants to see; 0 = none."""
        return REPETITION_WINDOW if self._penalty else 0

    def __call__(self, logits: Tensor, recent: Sequence[int]) -> int:
        """The next token id, from logits (vocabulary,) and the ids of recent text (no control tokens)."""
        scores = logits[None].float()
        if self._processors:
            ids = torch.tensor([list(recent)], dtype=torch.long, device=self._device)
            scores = self._processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def new_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator for `seed`; -1 seeds it at random."""
    generator = torch.Generator(device=device)
    if seed < 0:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
