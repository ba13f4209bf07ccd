"""How many processors this process may use: fewer than there are on a shared machine or in a container."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_processors() -> int:
    """The processors of this process's affinity, at most as many as its control groups give it time for; at least 1.

    A limit of 1.5 processors counts as 1: threads that wait for each other would all stop whenever the time is used up.
    """
    quota = processor_quota()
    return allowed_processors() if quota is None else max(1, min(allowed_processors(), int(quota)))


def allowed_processors() -> int:
    """The processors on which this process may be scheduled (`taskset`, `cpuset`)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def processor_quota(cgroups: Path | None = None, membership: Path | None = None) -> float | None:
    """The processors that the control groups of Linux give time for; None without a limit, and on other systems.

    Args:
        cgroups: Where their file systems are mounted.
        membership: Lines `number:controllers:path`, the groups of this process.
    """
    cgroups, membership = cgroups or CGROUPS, membership or MEMBERSHIP
    found: list[float] = []
    for line in _lines(membership):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            mounts, read = [cgroups, cgroups / "unified"], _unified_quota
        elif "cpu" in controllers.split(","):
            mounts, read = [cgroups / controllers, cgroups / "cpu"], _old_quota
        else:
            continue
        for mount in mounts:
            # a container may see its own group as the root, and the path from outside
            found += [quota for folder in _up(mount, path) if (quota := read(folder)) is not None]
    return min(found, default=None)


def _up(mount: Path, path: str) -> list[Path]:
    """The folder of a group and those of the groups that it is in: a limit counts for all below it."""
    folder = mount / path.lstrip("/")
    return [folder, *(each for each in folder.parents if each == mount or mount in each.parents)]


def _unified_quota(folder: Path) -> float | None:
    """`cpu.max` of version 2: `max 100000`, or `150000 100000` in microseconds."""
    words = " ".join(_lines(folder / "cpu.max")).split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _old_quota(folder: Path) -> float | None:
    """`cpu.cfs_quota_us` (-1 without a limit) and `cpu.cfs_period_us` of version 1."""
    quota, period = (" ".join(_lines(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None  # "max", "-1", nothing
    return int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
