"""Builds and controls `shim.c`, the preloaded library that records file operations and makes them fail."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from enum import IntFlag
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")
_COMPILERS = ("cc", "gcc", "clang")


class Kind(IntFlag):
    """Kinds of calls that can fail, with the numbers of `shim.c`."""

    OPEN = 1
    WRITE = 2
    SYNC = 4
    RENAME = 8
    MAP = 16
    TRUNCATE = 32
    UNLINK = 64
    MKDIR = 128
    LINK = 256
    CREATE = 512
    """An `open` that creates a file."""
    READ = 1024


def compiler() -> str | None:
    """Return the C compiler; None if there is none."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the library into `folder`; return its path.

    Raises:
        RuntimeError: There is no C compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(f"no C compiler found (tried {', '.join(_COMPILERS)}); install gcc or clang")
    target = folder / "shim.so"
    done = subprocess.run(
        [command, "-O2", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-ldl", "-lpthread"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr.strip()[:400]}")
    return target


def work_folder() -> str | None:
    """Return a folder in memory; None if there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def environment(library: Path, home: Path) -> dict[str, str]:
    """Return the environment for a Python process that preloads `library` and has its files in `home`."""
    return os.environ | {
        "LD_PRELOAD": str(library),
        "STREAMCHAT_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SOURCE.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }


class Shim:
    """The library in this process, which was started with `environment`.

    Raises:
        RuntimeError: The library is not preloaded.
    """

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL(None)
        if not hasattr(self._library, "disk_start"):
            raise RuntimeError("the library is not preloaded; start this process with `tools.disk.shim.environment`")
        for name in ("disk_calls", "disk_failed"):
            getattr(self._library, name).restype = ctypes.c_long
        self._library.disk_failed_call.restype = ctypes.c_char_p
        self._library.disk_fail.argtypes = (ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int)

    def start(self, root: Path, log: Path | None = None) -> None:
        """Record all changes of this process in `root` in the file `log`; None records nothing."""
        if self._library.disk_start(os.fsencode(root), os.fsencode(log or "")):
            raise RuntimeError(f"{log} cannot be written")

    def stop(self) -> None:
        """Stop recording and failing calls."""
        self._library.disk_stop()

    def mark(self, text: str) -> None:
        """Write a mark into the log."""
        self._library.disk_mark(text.encode())

    def fail(self, kinds: Kind, after: int, count: int, error: int) -> None:
        """Let `after` calls of `kinds` pass, and fail the next `count` ones with the errno `error`."""
        self._library.disk_fail(int(kinds), after, count, error)

    def heal(self) -> None:
        """Fail no further call."""
        self._library.disk_heal()

    def calls(self, kind: Kind) -> int:
        """Return the number of calls of one kind since `start`, whether they failed or not."""
        return int(self._library.disk_calls(int(kind)))

    @property
    def failed(self) -> int:
        """Number of calls that failed since `fail`."""
        return int(self._library.disk_failed())

    @property
    def failed_call(self) -> str:
        """Name and path of the first call that failed; the path is relative to the root."""
        return os.fsdecode(self._library.disk_failed_call())
