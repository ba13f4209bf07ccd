"""Measures sampling of one token, and DRY, on one thread: `python -m tools.sampling_speed`.

Prints microseconds per token, the fastest of several calls in processor time.
"""

from __future__ import annotations

import random
from array import array
from functools import partial

import torch

from streamchat.config.settings import Settings
from streamchat.conversation.dry import DryPenalty
from streamchat.conversation.log import TokenLog
from streamchat.conversation.sampling import REPETITION_WINDOW, Sampler, new_generator
from tools.product_speed import least_time

VOCABULARIES = (49_152, 262_144)
"""Those of the default model and of Gemma 3."""
SETTINGS = {
    "greedy": Settings(temperature=0.0),
    "default settings": Settings(),
    "no filters": Settings(top_k=0, top_p=1.0, min_p=0.0),
}
DRY_SPANS = (1_024, 32_768)
"""Latest tokens in which DRY looks for repeated sequences."""
TEXTS = {"few repeats": 5_000, "one token": 1}
"""Text of DRY -> number of different tokens in it."""
SPREAD = 3.0
"""Standard deviation of the random logits."""


def main() -> None:
    """Print one line for each vocabulary."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    print(f"{'vocabulary':>10}", *(f"{name:>17}" for name in SETTINGS))
    for size in VOCABULARIES:
        logits = SPREAD * torch.randn(size, generator=torch.Generator().manual_seed(0))
        recent = list(range(REPETITION_WINDOW))
        times = []
        for settings in SETTINGS.values():
            sample = Sampler(settings, device, new_generator(0, device))
            times.append(1e6 * least_time(partial(sample, logits, recent)))
        print(f"{size:10,}", *(f"{microseconds:17.0f}" for microseconds in times), flush=True)
    print("DRY, microseconds per token added to the text")
    for span in DRY_SPANS:
        for name, tokens in TEXTS.items():
            print(f"{span:10,} {name:>17} {1e6 * _dry_time(span, tokens):6.0f}", flush=True)


def _dry_time(span: int, tokens: int) -> float:
    """Return the seconds that DRY takes for each new token of a text of random tokens."""
    chance = random.Random(0)
    log = TokenLog(array("i", [chance.randrange(tokens) for _ in range(2 * span)]))
    dry = DryPenalty(Settings(dry_multiplier=0.8), log, span, (), str)

    def add_token() -> None:
        log.append([chance.randrange(tokens)])
        dry.penalties()

    add_token()
    return least_time(add_token)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
