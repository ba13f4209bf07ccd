"""The limit of the memory: how many bytes it moves per second, how many a token reads, how many kernels it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from streamchat.models.quantize.weight_storage import stored_tensors
from streamchat.quantization.linear import quantized_bytes

COPIED = 1 << 30
"""Bytes per copy, far more than any cache of the chip."""
TRANSFERS = ("Memcpy", "Memset")
"""Start of the names of device events that are not kernels."""


def copy_bandwidth(device: str, size: int = COPIED, rounds: int = 10) -> float:
    """Return the bytes per second that a copy of `size` bytes reads and writes on `device`; the best of `rounds`."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds + 1):  # the first round also loads the kernel
        started = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def weight_bytes_per_token(model: Any) -> int:
    """Return the bytes of weights that one token reads: all of them, except an embedding table that is not tied."""
    parts = {part.data_ptr(): part for weight in model.parameters() for part in stored_tensors(weight)}
    own = quantized_bytes(model)  # tiles of an output layer, which then does not read the table that it shares
    head = set() if own else {part.data_ptr() for part in stored_tensors(model.get_output_embeddings().weight)}
    for part in stored_tensors(model.get_input_embeddings().weight):
        if part.data_ptr() not in head:
            parts.pop(part.data_ptr(), None)
    return sum(part.nbytes for part in parts.values()) + own


def kernels_of(run: Callable[[], object], device: str) -> tuple[int, float] | None:
    """Return the number of kernels that `run` starts on `device`, and their milliseconds; None if none are seen."""
    if torch.device(device).type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    return count_kernels(profiled.events() or ())


def count_kernels(events: Any) -> tuple[int, float] | None:
    """Return number and milliseconds of the kernels among the events of a profile; None without any."""
    cuda = DeviceType.CUDA
    times = [
        event.device_time_total
        for event in events
        if event.device_type == cuda and not event.name.startswith(TRANSFERS) and not event.is_user_annotation
    ]
    return (len(times), sum(times) / 1000) if times else None
