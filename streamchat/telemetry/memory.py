"""Memory figures of the process and of the device, each with a name of its own."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from streamchat.base.devices import device_type, devices_of


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory in bytes."""

    allocated: int
    """In live tensors of torch."""
    reserved: int
    """Held by torch's allocator for reuse; above `allocated` without being a leak."""
    total: int
    """Of the device, or of all of them."""


def process_rss() -> int:
    """Resident memory of this process in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def device_memory(device: str) -> DeviceMemory | None:
    """Memory of 'cuda', 'cuda:1' or 'mps', or of all devices of 'cuda:0,1' together; None on a CPU."""
    import torch

    kind = device_type(device)
    if kind == "cuda":
        names = devices_of(device)
        return DeviceMemory(
            sum(torch.cuda.memory_allocated(name) for name in names),
            sum(torch.cuda.memory_reserved(name) for name in names),
            sum(torch.cuda.get_device_properties(name).total_memory for name in names),
        )
    if kind == "mps":
        return DeviceMemory(
            torch.mps.current_allocated_memory(),
            torch.mps.driver_allocated_memory(),
            torch.mps.recommended_max_memory(),
        )
    return None


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int | None]]:
    """Yields a function: the most bytes of live tensors since the block began, beside those that were there then.

    None where the device does not keep count (CPU, MPS). Of several devices, the sum of the most of each.
    """
    import torch

    if device_type(device) != "cuda":
        yield lambda: None
        return
    names = devices_of(device)
    for name in names:
        torch.cuda.reset_peak_memory_stats(name)
    before = sum(torch.cuda.memory_allocated(name) for name in names)
    yield lambda: sum(torch.cuda.max_memory_allocated(name) for name in names) - before


def free_unused() -> None:
    """Free what nobody refers to, and give it back to the system. For the moment after a model was switched off.

    A model hangs in reference cycles, and a face may have frozen what was there (`gc.freeze`). glibc keeps freed memory
    for later, which would show as memory of the process.
    """
    gc.unfreeze()
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
