"""Count the processors this process should use: in a container or with hyperthreads, fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

from streamchat.base.cgroups import group_folders, read_lines

TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_processors() -> int:
    """Return the number of cores by affinity, limited by the CPU quota of the control groups; at least 1.

    Hyperthreads of one core count once: they share its arithmetic units and caches. A quota of 1.5 processors counts as
    1: threads that wait for each other would all stall when the quota is used up.
    """
    quota = processor_quota()
    return allowed_cores() if quota is None else max(1, min(allowed_cores(), int(quota)))


def allowed_cores() -> int:
    """Return the number of different cores of the processors on which this process may be scheduled.

    Only Linux tells; elsewhere each processor counts as a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return allowed_processors()
    numbers = os.sched_getaffinity(0)
    siblings = (read_lines(TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list") for number in numbers)
    cores = {lines[0] if lines else number for number, lines in zip(numbers, siblings, strict=True)}
    return len(cores) or 1


def allowed_processors() -> int:
    """Return the number of processors on which this process may be scheduled (`taskset`, `cpuset`)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


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
