"""How much memory this process may allocate: limits of the machine, the container and the shell."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from streamchat.base.cgroups import group_folders
from streamchat.base.errors import ConfigError, OutOfMemoryError

START_BYTES = 1_250_000_000
"""Address space that torch and transformers need before a model is loaded (1.0 GB measured with two threads)."""


def available_memory() -> int:
    """Return the bytes that can still be allocated: the minimum over the machine, cgroups and `ulimit -v`."""
    import psutil

    left = [int(psutil.virtual_memory().available), _address_space_left(), _cgroup_left()]
    return max(0, min(size for size in left if size is not None))


def check_start() -> None:
    """Check that torch and transformers can be imported. Call this before their first import.

    Raises:
        ConfigError: Python runs without docstrings, which transformers reads.
        OutOfMemoryError: The limit of the address space (`ulimit -v`) is below `START_BYTES`.
    """
    if sys.flags.optimize >= 2:
        raise ConfigError(
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), and transformers needs them; unset it, or use -O"
        )
    limit = _address_space_limit()
    if limit is not None and limit < START_BYTES:
        raise OutOfMemoryError(
            f"this shell limits the memory of a program to {_megabytes(limit)} (ulimit -v), and PyTorch alone needs "
            f"{_megabytes(START_BYTES)}; run `ulimit -v unlimited` first, or raise the limit"
        )
    _choose_temporary_folder()


def too_large(name: str, device: str, dtype: str) -> OutOfMemoryError:
    """Return the error of a model whose weights do not fit into the memory of the device."""
    limit = _address_space_limit() if device == "cpu" else None
    if limit is None:
        return OutOfMemoryError(f"{name} does not fit into the memory of {device} in {dtype}; choose a smaller model")
    return OutOfMemoryError(
        f"{name} in {dtype} does not fit into the memory that this shell allows a program: {_megabytes(limit)} "
        "(ulimit -v); raise the limit, or choose a smaller model"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"  # both numbers of a sentence in one unit, as they may be close


def _choose_temporary_folder() -> None:
    """Choose a folder for temporary files even if none is writable, for example on a full disk.

    torch asks for the folder when it is imported, and fails without one. It writes nothing there.
    """
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = os.path.abspath(os.environ.get("TMPDIR") or os.sep + "tmp")


def _address_space_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _address_space_left() -> int | None:
    import psutil

    limit = _address_space_limit()
    return None if limit is None else limit - int(psutil.Process().memory_info().vms)


def _cgroup_left() -> int | None:
    """Return the bytes left in the enclosing cgroup with the fewest, or None without a limit; file caches are free."""
    left = (_left_in(folder, NAMES[version]) for folder, version in group_folders("memory"))
    return min((size for size in left if size is not None), default=None)


Names = tuple[str, str, str]
"""Files with the limit and the usage of a cgroup, and the field of `memory.stat` that the kernel can reclaim."""
NAMES: dict[int, Names] = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _left_in(folder: Path, names: Names) -> int | None:
    limit_file, use_file, droppable = names
    try:
        limit = int((folder / limit_file).read_text(encoding="utf-8"))
        used = int((folder / use_file).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return limit - used + int(stat.get(droppable, 0))
    except (OSError, ValueError):
        return None  # no such cgroup here, or "max"
