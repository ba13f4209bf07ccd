"""Count the processors this process should use: in a container or with hyperthreads, fewer than the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from streamchat.base import sysctl
from streamchat.base.cgroups import group_folders, read_lines
from streamchat.base.sysctl import is_macos

TOPOLOGY = Path("/sys/devices/system/cpu")
PERFORMANCE_CORES = Path("/sys/devices/cpu_core/cpus")
"""Processors of the performance cores, as "0-7,16"; only on Intel's hybrid processors."""


def usable_processors() -> int:
    """Return the number of performance cores by affinity, limited by the CPU quota of the control groups; at least 1.

    Hyperthreads of one core count once: they share its arithmetic units and caches. Efficiency cores do not count, as
    PyTorch divides work equally and would wait for them. A quota of 1.5 processors counts as 1: threads that wait for
    each other would all stall when the quota is used up.
    """
    quota = processor_quota()
    return performance_cores() if quota is None else max(1, min(performance_cores(), int(quota)))


def performance_cores() -> int:
    """Return how many of `allowed_cores` are performance cores; all if none is, or if the system does not report it."""
    if is_macos():
        return sysctl.read_number("hw.perflevel0.physicalcpu") or allowed_cores()
    numbers = _affinity()
    fast = numbers & _parse_processors(" ".join(read_lines(PERFORMANCE_CORES)))
    return _count_cores(fast) if fast else allowed_cores()


def allowed_cores() -> int:
    """Return the number of different cores of the processors on which this process may be scheduled.

    Only Linux and macOS report cores; elsewhere each processor counts as one.
    """
    if is_macos():
        return sysctl.read_number("hw.physicalcpu") or allowed_processors()
    return _count_cores(_affinity()) or allowed_processors()


def _affinity() -> set[int]:
    """Return the numbers of the processors on which this process may be scheduled; none if unknown."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _count_cores(numbers: Iterable[int]) -> int:
    """Return the number of different cores of some processors of Linux."""
    siblings = {each: read_lines(TOPOLOGY / f"cpu{each}" / "topology" / "thread_siblings_list") for each in numbers}
    return len({lines[0] if lines else each for each, lines in siblings.items()})


def _parse_processors(text: str) -> set[int]:
    """Return the numbers of a list such as "0-7,16"."""
    ranges = (part.strip().partition("-")[::2] for part in text.split(","))
    return {
        number
        for first, last in ranges
        if first.isdecimal() and (last or first).isdecimal()
        for number in range(int(first), int(last or first) + 1)
    }


def allowed_processors() -> int:
    """Return the number of processors on which this process may be scheduled (`taskset`, `cpuset`)."""
    return len(_affinity()) or os.cpu_count() or 1


def processor_quota() -> float | None:
    """Return the CPU quota of the Linux control groups, in processors; None without one and on other systems."""
    readers = {1: _old_quota, 2: _unified_quota}
    found = (readers[version](folder) for folder, version in group_folders("cpu"))
    return min((quota for quota in found if quota is not None), default=None)


def _unified_quota(folder: Path) -> float | None:
    """Read `cpu.max` of version 2: `max 100000`, or `150000 100000` in microseconds."""
    words = " ".join(read_lines(folder / "cpu.max")).split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _old_quota(folder: Path) -> float | None:
    """Read `cpu.cfs_quota_us` (-1 without a limit) and `cpu.cfs_period_us` of version 1."""
    quota, period = (" ".join(read_lines(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None  # "max", "-1", nothing
    return int(quota) / int(period)
