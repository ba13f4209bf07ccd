"""What the method does not do: a fact is asked for after more and more text in between."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.methods.stream import open_stream
from streamchat.benchmarks.score import score

BUDGET = 256
DISTANCES = (16, 64, 128, 192, 224, 240, 256, 272, 320, 384, 512, 768)
"""Tokens between the fact and the question."""
TRIALS = 12
POLICIES = (Method("dense"), Method("sinks", BUDGET, 4))
OPENING = "Notes of a traveller.\n\n"
FACT = "Remember this: the number of the locker is {number}.\n\n"
QUESTION = "\n\nRemember this: the number of the locker is"


@dataclass(frozen=True)
class Asked:
    """How well the answer was foreseen at one distance."""

    policy: Method
    distance: int
    loss: float
    """Mean nats per token of the answer, over trials; guessing a digit at random costs 2.3."""
    known: float
    """Share of trials in which every digit had more than half of the probability."""


def ask(
    model: Any,
    tokenizer: Any,
    fit: Any,
    filler: str,
    tick: Any,
    *,
    policies: Sequence[Method] = POLICIES,
    distances: Sequence[int] = DISTANCES,
    trials: int = TRIALS,
    lead: int = 0,
) -> list[Asked]:
    """Ask for five random digits that were said before `distance` tokens of `filler`.

    Args:
        model: A causal LM in eval mode.
        tokenizer: Its tokenizer; it should write digits as single tokens.
        fit: `choose_fit(model)`.
        filler: A long text; a new stretch of it in each trial.
        tick: Called with what is done.
        policies: How the cache is bounded.
        distances: Numbers of tokens between the fact and the question.
        trials: Random numbers per policy and distance.
        lead: Tokens of `filler` before the fact; 0 puts it at the start of the stream.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    between, found = encode(filler), []
    for policy in policies:
        for distance in distances:
            losses = []
            for trial in range(trials):
                draw = random.Random(trial)
                number = "".join(draw.choices("0123456789", k=5))
                start = draw.randrange(0, len(between) - distance - lead)
                answer = encode(f" {number}")
                stop = start + distance
                fact = [*between[stop : stop + lead], *encode(FACT.format(number=number))]
                head = fact if lead else encode(OPENING + FACT.format(number=number))
                ids = [*head, *between[start:stop], *encode(QUESTION), *answer]
                with open_stream(policy, model, fit, 16) as stream:
                    # the first token of the answer is the space before it, for some tokenizers
                    losses.append(score(stream, torch.tensor(ids)).losses[-5:])
            tick(f"{policy.name}, {distance} tokens between")
            each = np.stack(losses)
            known = float((each < np.log(2)).all(axis=1).mean())
            found.append(Asked(policy, distance, float(each.mean()), known))
    return found
