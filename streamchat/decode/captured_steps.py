"""The recorded steps of a model: one for a new token, and one for each of a few lengths of short prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.token_ids import input_device
from streamchat.decode.cuda_graph import CapturedStep, Record
from streamchat.decode.eager import Step
from streamchat.decode.static_prompt import LENGTHS, prompt_step


class CapturedSteps:
    """Chooses the captured step for a number of tokens.

    Args:
        model: The model of the steps.
        one: `static_step(model)`.
        record: Records the steps.
    """

    def __init__(self, model: Any, one: Step, record: Record) -> None:
        device, dtype, several = input_device(model), model.dtype, prompt_step(model)
        steps = [CapturedStep(one, device, dtype, record)]
        if several is not None:
            steps += [CapturedStep(several, device, dtype, record, length) for length in LENGTHS]
        self._steps = steps
        self.max_prompt = LENGTHS[-1] if several is not None else 1
        """Maximum tokens per call, for the logits of the last one only."""

    def of(self, count: int) -> CapturedStep:
        """Return the shortest step for `count` tokens, up to `max_prompt`."""
        return next(step for step in self._steps if count <= step.length)

    @property
    def failed(self) -> str:
        """Why steps are disabled, one line per step; '' while all work."""
        return "\n".join(step.failed for step in self._steps if step.failed)

    @torch.inference_mode()
    def record_used(self, layers: Sequence[StreamingLayer]) -> None:
        """Record the prompt steps that have served `layers` and are not recorded yet."""
        for step in self._steps[1:]:
            step.record_used(layers)
