"""Device names: `cpu`, `mps`, `cuda`, `cuda:1`, and `cuda:0,1` for a model sharded over several GPUs."""

from __future__ import annotations

from collections.abc import Iterable

ATTENTION_ON_GPUS = "flash, memory-efficient or math for prompts; also cuDNN in captured steps"
"""Which of PyTorch's attention kernels serve on CUDA, for people; `cache.attention_backends` sets them."""


def device_type(device: str) -> str:
    """Return the part before the index: `cuda:0,1` -> `cuda`."""
    return device.partition(":")[0]


def devices_of(device: str) -> list[str]:
    """Split into torch's device names: `cuda:0,1` -> `cuda:0` and `cuda:1`; a single device is returned as it is."""
    kind, _, numbers = device.partition(":")
    return [f"{kind}:{number}" for number in numbers.split(",")] if numbers else [kind]


def is_spread(device: str) -> bool:
    """Whether the name stands for several devices."""
    return len(devices_of(device)) > 1


def join_devices(devices: Iterable[str]) -> str:
    """Join devices of one type into one name: `cuda:0` and `cuda:1` -> `cuda:0,1`."""
    names = list(dict.fromkeys(devices))
    kind, _, numbers = names[0].partition(":")
    return kind if not numbers else f"{kind}:{','.join(name.partition(':')[2] for name in names)}"
