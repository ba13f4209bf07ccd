"""Memory use of the process and the device."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from streamchat.base.devices import device_type, devices_of
from streamchat.base.events import MemoryState

RETURN_BYTES = 16_000_000
RETURN_SHARE = 0.02
"""Freed memory is returned to the system when the process has grown by the larger of these since the last time."""


def process_rss() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def memory_state(device: str) -> MemoryState:
    """Return the memory of this process, and that of 'cuda', 'cuda:1' or 'mps', or the sum for 'cuda:0,1'."""
    import torch

    kind, rss = device_type(device), process_rss()
    if kind == "cuda":
        names = devices_of(device)
        return MemoryState(
            rss,
            device,
            sum(torch.cuda.memory_allocated(name) for name in names),
            sum(torch.cuda.memory_reserved(name) for name in names),
            sum(torch.cuda.get_device_properties(name).total_memory for name in names),
        )
    if kind == "mps":
        return MemoryState(
            rss,
            device,
            torch.mps.current_allocated_memory(),
            torch.mps.driver_allocated_memory(),
            torch.mps.recommended_max_memory(),
        )
    return MemoryState(rss, device)


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the peak allocated bytes above the level at the start of the block.

    It returns None if the device does not count them (CPU, MPS), and the sum of the peaks for several devices.
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
    """Collect garbage and return freed memory to the system, after a model was unloaded.

    Models contain reference cycles, and a front end may have frozen existing objects (`gc.freeze`).
    """
    gc.unfreeze()
    gc.collect()
    return_freed()


def return_freed() -> None:
    """Return freed memory to the system: glibc keeps it for reuse, which would count as memory of the process."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Returns freed memory to the system from time to time.

    glibc's heaps keep free memory between blocks that are in use, and take new blocks from all of it in turn. Without
    this, a chat on the CPU comes to occupy whatever its heaps once had: after the peak of loading a model, 80 MB more
    over 400 turns of the default model. Returning it takes a few milliseconds.
    """

    def __init__(self) -> None:
        self._least: int | None = None

    def return_if_grown(self) -> None:
        """Return it if the process has grown since the last call that did, and on the first call."""
        now = process_rss()
        if self._least is not None:
            self._least = min(self._least, now)
            if now - self._least < max(RETURN_BYTES, RETURN_SHARE * self._least):
                return
        return_freed()
        self._least = process_rss()
