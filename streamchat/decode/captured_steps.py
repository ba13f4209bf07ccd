"""The captured steps of a model: one for a new token, and one for each of a few lengths of short prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.token_ids import input_device
from streamchat.decode.cuda_graph import CapturedStep, Record, Run
from streamchat.decode.eager import Step
from streamchat.decode.fused.step import FusedStep, bind_fused
from streamchat.decode.static_prompt import LENGTHS, prompt_step


class CapturedSteps:
    """Chooses the captured step for a number of tokens.

    Args:
        model: The model of the steps.
        one: `static_step(model)`.
        record: Captures the steps.
        fused: `fused_step(model)`, which is used for one token until it fails.
        no_fused: Why there is none.
    """

    def __init__(
        self, model: Any, one: Step, record: Record, fused: FusedStep | None = None, no_fused: str = ""
    ) -> None:
        self._no_fused, self._fused = no_fused, fused
        device, dtype, several = input_device(model), model.dtype, prompt_step(model)
        self._for_one = [CapturedStep(one, device, dtype, record)]
        if fused is not None:
            first = CapturedStep(fused, device, dtype, record, bind=bind_fused, name="fused kernels")
            self._for_one.insert(0, first)
        lengths = () if several is None else LENGTHS
        self._for_prompts = [CapturedStep(several, device, dtype, record, length) for length in lengths]
        self.max_prompt = max((1, *lengths))
        """Maximum tokens per call, for the logits of the last one only."""

    def of(self, count: int) -> CapturedStep:
        """Return the shortest step for `count` tokens, up to `max_prompt`; for one token, the first that works."""
        if count > 1:
            return next(step for step in self._for_prompts if count <= step.length)
        return next((step for step in self._for_one if not step.failed), self._for_one[-1])

    def compile_for(self, dtype: CacheDtype) -> str:
        """Compile the fused kernels for caches in `dtype`; return why they do not decode, '' if they do.

        They are given up after an error.
        """
        if self._fused is not None and self.is_fused:
            try:
                self._fused.compile(dtype)
            except Exception as error:  # whatever a compiler raises, there is another step
                self._for_one[0].give_up(f"{type(error).__name__}: {error}")
        return "" if self.is_fused else "the fused kernels do not decode here"

    def captured_for(self, layers: Sequence[StreamingLayer]) -> Run:
        """Return the step for one new token of `layers`, captured, for measurements: it writes their next slot."""
        return self.of(1).captured_for(layers)

    @property
    def is_fused(self) -> bool:
        """Whether fused kernels decode."""
        return self.of(1) is not self._for_one[-1]

    @property
    def why_not_fused(self) -> str:
        """Why fused kernels do not decode; '' if they do."""
        return "" if self.is_fused else self._no_fused or self._for_one[0].failed

    @property
    def failed(self) -> str:
        """Why steps are disabled, one line per step; '' while all work."""
        return "\n".join(step.failed for step in (*self._for_one, *self._for_prompts) if step.failed)

    @torch.inference_mode()
    def record_used(self, layers: Sequence[StreamingLayer]) -> None:
        """Capture the prompt steps that have served `layers` and are not captured yet."""
        for step in self._for_prompts:
            step.record_used(layers)
