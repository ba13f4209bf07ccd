"""A model whose layers are spread over several GPUs by accelerate, and what one is told apart by."""

from __future__ import annotations

from typing import Any

from streamchat.base.devices import devices_of, join_devices
from streamchat.base.errors import ModelNotFoundError, short
from streamchat.models import device as devices

USABLE = 0.9
"""Of each GPU's free memory for weights; the rest is for the cache and for what a forward holds."""


def spread_arguments(place: str) -> dict[str, Any]:
    """What `from_pretrained` needs to spread a model over the GPUs of `place` alone, evenly."""
    free = {name: int(USABLE * (devices.free_memory(name) or 0)) for name in devices_of(place)}
    # accelerate knows GPUs by number
    numbers: dict[int | str, int] = {int(name.partition(":")[2]): size for name, size in free.items()}
    return {"device_map": "auto", "max_memory": numbers}


def spread_place(model: Any, place: str, name: str) -> str:
    """Where the layers of `model` are now: `cuda:0,1`, or fewer GPUs than `place` has.

    Raises:
        ModelNotFoundError: Some were left for main memory or the disk, which would be unbearably slow.
    """
    used = {_device_name(device) for device in model.hf_device_map.values()}
    if rest := used - set(devices_of(place)):
        raise ModelNotFoundError(
            f"{name} does not fit into the memory of {place}: parts of it would be left on "
            f"{' and '.join(sorted(rest))}; choose a smaller model, or close other programs on these GPUs"
        )
    return join_devices(sorted(used, key=_number))


def fault_of(model: Any) -> str:
    """What goes wrong in a forward of a few tokens; '' where nothing does. Layers of several devices may not agree."""
    import torch

    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    try:
        with torch.inference_mode():
            out = model(ids % model.config.get_text_config().vocab_size, use_cache=True)
            torch.isfinite(out.logits).all().item()  # waits for the devices
    except Exception as error:  # whatever a model's code or a driver raises
        return short(error)
    return ""


def best_single(place: str) -> str:
    """The GPU of `place` with the most free memory."""
    return max(devices_of(place), key=lambda name: devices.free_memory(name) or 0)


def _device_name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _number(name: str) -> int:
    return int(name.partition(":")[2])
