"""Models sharded over several GPUs with accelerate."""

from __future__ import annotations

from typing import Any

import torch

from streamchat.base.devices import devices_of, join_devices
from streamchat.base.errors import ModelNotFoundError, short
from streamchat.cache.token_ids import counting_ids
from streamchat.models import device as devices

USABLE = 0.9
"""Share of each GPU's free memory for weights; the rest is for the cache and activations."""


def spread_arguments(device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that spread a model evenly over the GPUs of `device`."""
    # accelerate identifies GPUs by number
    free = {_number(name): int(USABLE * (devices.free_memory(name) or 0)) for name in devices_of(device)}
    return {"device_map": "auto", "max_memory": free}


def used_devices(model: Any, device: str, name: str) -> str:
    """Return the GPUs that hold layers of `model`: `cuda:0,1`, or fewer than `device` has.

    Raises:
        ModelNotFoundError: Some layers are offloaded to main memory or disk, which would be far too slow.
    """
    used = {_device_name(each) for each in model.hf_device_map.values()}
    if rest := used - set(devices_of(device)):
        raise ModelNotFoundError(
            f"{name} does not fit into the memory of {device}: layers would be offloaded to "
            f"{' and '.join(sorted(rest))}; choose a smaller model, or close other programs on these GPUs"
        )
    return join_devices(sorted(used, key=_number))


def forward_error(model: Any) -> str:
    """Return the error of a forward pass over a few tokens, or ''. Layers on several devices may be incompatible."""
    ids = counting_ids(model, 8)
    try:
        with torch.inference_mode():
            out = model(ids, use_cache=True)
            torch.isfinite(out.logits).all().item()  # waits for the devices
    except Exception as error:  # model code and drivers raise errors of any kind
        return short(error)
    return ""


def gpu_with_most_memory(device: str) -> str:
    """Return the GPU of `device` with the most free memory."""
    return max(devices_of(device), key=lambda name: devices.free_memory(name) or 0)


def _device_name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _number(name: str) -> int:
    return int(name.partition(":")[2])
