"""Loads the weights as planned; retries on a single GPU, or in another dtype, if the model fails that way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from streamchat.base.devices import is_spread
from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.base.progress import Progress, silent
from streamchat.cache.token_ids import counting_ids
from streamchat.models import device as devices
from streamchat.models.plan import LoadPlan
from streamchat.models.read import read_model
from streamchat.models.spread import forward_error, gpu_with_most_memory, used_devices


def load_weights(plan: LoadPlan, progress: Progress = silent) -> tuple[PreTrainedModel, LoadPlan]:
    """Return the model and what was carried out: `plan`, or one with another dtype or device and a note about it.

    Raises:
        ModelNotFoundError: The model does not fit into memory.
        UnsupportedModelError: The model cannot be loaded.
    """
    model, done = _load_on_device(plan, progress)
    if done.dtype != "float16" or _is_finite(model):
        return model, done
    del model
    devices.free_unused_memory()
    safe = replace(plan, device=done.device).in_safe_dtype()
    safe.check_memory()
    return _load_on_device(safe, progress)


def _load_on_device(plan: LoadPlan, progress: Progress) -> tuple[PreTrainedModel, LoadPlan]:
    """Load a model as planned. A model that fails on several GPUs is loaded on a single one."""
    model, notes = read_model(plan, progress)
    done = replace(plan, notes=(*plan.notes, *notes))
    if not is_spread(plan.device):
        return model, done
    used = used_devices(model, plan.device, plan.name)
    fault = forward_error(model)
    if not fault:
        return model, replace(done, device=used)
    del model
    devices.free_unused_memory()
    single = replace(plan, device=gpu_with_most_memory(plan.device))
    why = f"{plan.name} cannot be spread over {plan.device} ({fault})"
    try:
        single.check_memory()
    except ModelNotFoundError as error:
        raise UnsupportedModelError(f"{why}, and it does not fit on one of them: {error}") from error
    model, notes = read_model(single, progress)
    return model, replace(single, notes=(*plan.notes, *notes, f"{why}, so it runs on {single.device}"))


def _is_finite(model: Any) -> bool:
    """Return whether the logits of a few tokens are finite; float16 overflows above 65,504."""
    with torch.inference_mode():
        return bool(torch.isfinite(model(counting_ids(model, 8), use_cache=False).logits).all())
