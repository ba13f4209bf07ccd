"""Compiles the sources of this package to a shared library for this processor, stored in the cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base import child_processes, paths
from streamchat.base.cgroups import read_lines
from streamchat.base.errors import reason_of
from streamchat.kernels.check import challenge, expected_response
from streamchat.kernels.sealed import is_ours_alone, open_sealed, seal

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
COMPILERS = ("gcc", "clang", "cc")
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # allow sums in any order. Not -ffast-math: when linked, it changes the arithmetic of the whole process
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-strict-aliasing",
    "-fopenmp-simd",  # vectorize marked loops; needs no OpenMP library
    "-pthread",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
TARGETS = ("-march=native", "-mcpu=native", "")
"""Flags for this exact processor, as compilers for x86 and for ARM spell them; else for its architecture."""
COMPILE_S = 120
CHECK_S = 60


class KernelsUnavailableError(Exception):
    """There are no compiled kernels on this machine; the message says why."""


@dataclass(frozen=True)
class Library:
    """The compiled kernels, checked and open."""

    path: Path
    descriptor: int
    """Stays open while the library is loaded: the loader distinguishes libraries by name."""

    @property
    def loadable(self) -> str:
        """A name for the loader that refers to the checked file, even if `path` has been replaced since."""
        return _loadable(self.descriptor)


def library() -> Library:
    """Return the compiled kernels; compiles them if they are missing or damaged. Needs Linux, and gcc or clang.

    Raises:
        KernelsUnavailableError: They cannot be compiled, or cannot be stored.
    """
    path = library_path()
    try:
        _prepare(path.parent)
        descriptor = open_sealed(path, path.stem)
        if descriptor is None:
            _build(path)
            descriptor = open_sealed(path, path.stem)
    except OSError as error:
        what = f"compiled kernels cannot be stored in {path.parent}: {reason_of(error)}"
        raise KernelsUnavailableError(what) from error
    if descriptor is None:
        raise KernelsUnavailableError(f"{path} was changed after it was written; see the log")
    return Library(path, descriptor)


def _loadable(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _prepare(folder: Path) -> None:
    """Create the folder, and refuse one in which others could put code.

    Parent folders may be group-writable: others could then replace the folder, but would own the replacement's files.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours_alone(folder.stat()):
        raise KernelsUnavailableError(f"{folder} must belong to you and not be writable by others (chmod go-w)")


def _build(path: Path) -> None:
    """Compile and check the library, then move it to `path` atomically: safe with two processes and power failures."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "kernels.so"
        _compile(find_compiler(), built)
        descriptor = os.open(built, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not is_ours_alone(os.fstat(descriptor)):
                raise KernelsUnavailableError(f"{built} is writable by others")
            _check(descriptor)
            seal(descriptor, path.stem)
        finally:
            os.close(descriptor)
        built.replace(path)
    paths.fsync(path.parent)


def library_path() -> Path:
    """Return the path of the compiled library, whether it exists or not.

    Raises:
        KernelsUnavailableError: They cannot be compiled on this machine.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise KernelsUnavailableError(f"compiled kernels need Linux (little-endian), and this is {platform.system()}")
    return paths.cache_dir() / "kernels" / f"{_digest(find_compiler())}.so"


def find_compiler() -> list[str]:
    """Return the compiler command: `CC` with its arguments if it is set, else the first of `COMPILERS`.

    Raises:
        KernelsUnavailableError: No compiler was found.
    """
    named = os.environ.get("CC", "").split()
    for program, *words in [named] if named else [[name] for name in COMPILERS]:
        if found := child_processes.find_program(program):
            return [found, *words]
    wanted = named[0] if named else "gcc"
    raise KernelsUnavailableError(f"no C compiler ({wanted}) was found; install gcc for about twice the speed")


def _compile(compiler: list[str], to: Path) -> None:
    """Compile the sources, trying the flags for this exact processor first."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    for processor in TARGETS:
        flags = [*FLAGS, *([processor] if processor else [])]
        command = [*compiler, *flags, *sources, "-o", str(to)]
        done = _run(command, COMPILE_S, compiler[0], umask=0o077)  # not group-writable, whatever the user's umask
        if done.returncode == 0:
            _log.info("compiled the kernels with %s %s", " ".join(compiler), processor)
            return
        _log.info("%s %s failed: %s", " ".join(compiler), processor, done.stderr.strip()[:2000])
    message = next((line for line in done.stderr.splitlines() if "error" in line), "").strip()
    raise KernelsUnavailableError(f"{compiler[0]} could not compile the kernels ({message or done.returncode})")


def _check(descriptor: int) -> None:
    """Compare the kernels with plain Python in a separate process, which may crash."""
    number = secrets.randbits(32)
    command = child_processes.python("-m", "streamchat.kernels.check", _loadable(descriptor), str(number))
    done = _run(command, CHECK_S, "the check of the compiled kernels", pass_fds=[descriptor])
    if done.returncode:
        _log.warning("the compiled kernels failed their check: %s", done.stderr.strip()[:2000])
        raise KernelsUnavailableError(f"the compiled library failed its check (status {done.returncode})")
    # exit status 0 proves nothing: the check itself may not have run
    if done.stdout.split() != list(map(str, expected_response(*challenge(number)))):
        _log.warning("the check of the compiled kernels printed: %s", done.stdout.strip()[:2000])
        raise KernelsUnavailableError("the check of the compiled library did not run")


def _run(command: Sequence[str], seconds: float, what: str, **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return child_processes.run(command, timeout=seconds, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{what} did not finish: {error}") from error


def _digest(compiler: list[str]) -> str:
    """Return a digest of everything that the library depends on."""
    found = Path(compiler[0]).resolve().stat()
    digest = hashlib.sha256(json.dumps([FLAGS, TARGETS, compiler, found.st_size, found.st_mtime]).encode())
    digest.update(_processor().encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Return what distinguishes this processor's instruction set from that of another machine sharing the folder."""
    lines = read_lines(Path("/proc/cpuinfo"))
    kept = [line for line in lines if line.partition(":")[0].strip() in ("flags", "Features", "model name")]
    return "\n".join([platform.machine(), *sorted(set(kept))])
