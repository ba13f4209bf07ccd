"""Which step computes the new tokens of a model, and why it is not a faster one."""

from __future__ import annotations

from typing import Any

from streamchat.cache.token_ids import input_device
from streamchat.config.settings import Decode
from streamchat.decode.captured_steps import CapturedSteps
from streamchat.decode.families.registry import model_spec
from streamchat.decode.native_step import CompiledStep
from streamchat.decode.steps import COMPILED, FUSED, GRAPH, NOT_SUPPORTED, OPERATIONS, PLAIN, StepReport


def step_report(model: Any, decode: Decode = "auto", no_kernels: str = "") -> StepReport:
    """Return which step computes the new tokens of `model` now.

    Args:
        model: A causal LM, after `install` or without it.
        decode: What `install` was called with.
        no_kernels: Why there are no compiled kernels for a CPU; '' if there are.
    """
    step, chosen = getattr(model.forward, "step", None), f"decode = {decode}"
    if isinstance(step, CompiledStep):
        return StepReport(COMPILED)
    if isinstance(step, CapturedSteps):
        return _captured(step)
    if step is not None:
        return StepReport(OPERATIONS, chosen if decode == "graph" else no_kernels or NOT_SUPPORTED)
    return StepReport(PLAIN, chosen if decode == "plain" else _why_no_step(model))


def recorded_step(model: Any) -> StepReport | None:
    """Return the captured step that computes new tokens now, or what replaced it; None for a model without one.

    Only such steps may be given up after the model was loaded.
    """
    step = getattr(model.forward, "step", None)
    return _captured(step) if isinstance(step, CapturedSteps) else None


def _captured(step: CapturedSteps) -> StepReport:
    if step.is_fused:
        return StepReport(FUSED)
    failed = step.of(1).failed
    return StepReport(PLAIN, failed) if failed else StepReport(GRAPH, step.why_not_fused)


def _why_no_step(model: Any) -> str:
    device = input_device(model)
    if any(weight.device != device for weight in model.parameters()):
        return "the layers are on several devices"
    if device.type not in ("cpu", "cuda"):
        return f"there is no step for {device.type}"
    if model_spec(model) is None:
        return f"there is no step for {type(model).__name__}"
    return "a check of the step failed"
