"""Measures the loss of quality by quantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamchat.cache.token_ids import as_input
from streamchat.quantization.linear import always_quantized, never_quantized

AUTO_LIMIT = 0.00995
"""Largest KL divergence, in nats per token, that `auto` accepts: 1 % of perplexity if the model's own predictions are
the truth."""
TOKENS = 256
TEXT = """\
The mill stood where the river bends, half a mile below the village, and in the spring its wheel could be heard from \
the church. Anna's grandfather had built it with two of his brothers. They were not rich people; what they earned in \
good years went into the roof, and in bad years the roof had to wait. When the railway came, grain was carried to the \
large steam mills in the city, and one after another the small ones fell silent.

"Why did he not sell it?" asked the boy. He was looking at the photograph over the fireplace, in which three men in \
dark coats stood before a door.

"Because nobody offered anything for it," she said and laughed. "Later somebody did. A company wanted the water for a \
power station. That was in 1924. He read the letter twice, put it into his pocket and went out to clean the grating. \
He never spoke of it again, but from that day on he paid his taxes on time."

To measure the flow of a stream, choose a straight part of it, mark a distance of ten metres, and drop an orange into \
the middle. The time that it takes gives the speed at the surface; about four fifths of that is the mean speed. \
Multiply it by the width and by the mean depth, and you have the volume that passes in one second. For example, with \
0.5 m/s, a width of 3 m and a depth of 0.4 m, it is 0.6 cubic metres.
"""


def divergence(model: Any, tokenizer: Any) -> float:
    """Return `divergence_from` between the quantized layers of `model` and its own weights."""
    with never_quantized(model):
        plain = predictions(model, tokenizer)
    with always_quantized(model):
        quantized = predictions(model, tokenizer)
    return divergence_from(plain, quantized)


@torch.inference_mode()
def predictions(model: Any, tokenizer: Any) -> Tensor:
    """Return (tokens, vocabulary) log probabilities, float32, for 256 tokens of an English text."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:TOKENS]
    tokens = as_input(model, ids)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def divergence_from(plain: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence of `other` predictions from `plain` ones, in nats per token.

    If the plain predictions are taken as the truth, it is the log of the factor by which perplexity grows. Infinite if
    any prediction is not finite.
    """
    nats = (plain.exp() * (plain - other)).sum(-1).mean()
    return float(nats) if bool(torch.isfinite(nats)) else float("inf")
