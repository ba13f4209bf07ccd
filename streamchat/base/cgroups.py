"""Finds the Linux control groups (cgroups, versions 1 and 2) that limit this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Mount point of the cgroup file systems."""
MEMBERSHIP = Path("/proc/self/cgroup")
"""File that lists the groups of this process, as lines `number:controllers:path`."""


def group_folders(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's groups and of their parents, which may not exist, with the cgroup version.

    A limit of a group applies to all groups below it. Yields nothing on other systems.

    Args:
        controller: "cpu" or "memory".
    """
    for line in read_lines(MEMBERSHIP):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or next to version 1
            mounts, version = [CGROUPS, CGROUPS / "unified"], 2
        elif controller in controllers.split(","):
            mounts, version = [CGROUPS / controllers, CGROUPS / controller], 1
        else:
            continue
        for mount in mounts:
            # a container may have its own group mounted as the root while the path is that of the host
            folder = mount / path.lstrip("/")
            yield folder, version
            yield from ((each, version) for each in folder.parents if each == mount or mount in each.parents)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of the kernel; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
