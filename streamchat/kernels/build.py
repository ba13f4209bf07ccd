"""From the sources in this package to a shared library for this very processor, kept in the cache folder."""

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
from streamchat.kernels.check import answer, question
from streamchat.kernels.sealed import is_ours_alone, open_sealed, seal

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "source"
COMPILERS = ("gcc", "cc")
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # sums may be taken in any order. Not -ffast-math: linked in, it changes the arithmetic of the whole process
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
TARGETS = ("-march=native", "-mcpu=native", "")
"""For this processor, as compilers for x86 and for ARM say it; else for any of its kind."""
COMPILE_S = 120
CHECK_S = 60


class KernelsUnavailableError(Exception):
    """There are no compiled kernels here; the text says why, for people."""


@dataclass(frozen=True)
class Library:
    """The compiled kernels, checked and open."""

    path: Path
    descriptor: int
    """Stays open while the library is loaded: the loader tells libraries apart by their names."""

    @property
    def loadable(self) -> str:
        """A name for the loader, which means the file that was checked even where `path` is another one by now."""
        return _loadable(self.descriptor)


def library() -> Library:
    """The compiled kernels, made now where they are not there or damaged (about 2 s). Needs Linux and gcc.

    Raises:
        KernelsUnavailableError: They cannot be had here.
    """
    kept = target()
    try:
        _prepare(kept.parent)
        descriptor = open_sealed(kept, kept.stem)
        if descriptor is None:
            _make(kept)
            descriptor = open_sealed(kept, kept.stem)
    except OSError as error:
        raise KernelsUnavailableError(f"they cannot be kept in {kept.parent}: {error.strerror or error}") from error
    if descriptor is None:
        raise KernelsUnavailableError(f"{kept} is not what was written there; the log says more")
    return Library(kept, descriptor)


def _loadable(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _prepare(folder: Path) -> None:
    """Have the folder, and refuse one in which others could put code.

    Folders above it may be writable by a group: then others can put another folder in its place, but own what is in it.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_ours_alone(folder.stat()):
        raise KernelsUnavailableError(f"others may write to {folder}; make it yours alone (chmod go-w)")


def _make(kept: Path) -> None:
    """Compile, check, and put in place at once, also where two processes do it and where the power fails."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / "kernels.so"
        _compile(find_compiler(), made)
        descriptor = os.open(made, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not is_ours_alone(os.fstat(descriptor)):
                raise KernelsUnavailableError(f"others may write to {made}")
            _check(descriptor)
            seal(descriptor, kept.stem)
        finally:
            os.close(descriptor)
        made.replace(kept)
    paths.fsync(kept.parent)


def target() -> Path:
    """Where the library is, or would be.

    Raises:
        KernelsUnavailableError: They cannot be compiled here.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise KernelsUnavailableError(f"they are for Linux, and this is {platform.system()}")
    return paths.cache_dir() / "kernels" / f"{_digest(find_compiler())}.so"


def find_compiler() -> list[str]:
    """The command of the compiler: what `CC` says, words and all, or gcc.

    Raises:
        KernelsUnavailableError: There is none.
    """
    named = os.environ.get("CC", "").split()
    for program, *words in [named] if named else [[name] for name in COMPILERS]:
        if found := child_processes.find_program(program):
            return [found, *words]
    wanted = named[0] if named else "gcc"
    raise KernelsUnavailableError(f"no C compiler ({wanted}) was found; install gcc for about twice the speed")


def _compile(compiler: list[str], to: Path) -> None:
    """Try the flags for this very processor first."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    for processor in TARGETS:
        flags = [*FLAGS, *([processor] if processor else [])]
        command = [*compiler, *flags, *sources, "-o", str(to)]
        done = _run(command, COMPILE_S, compiler[0], umask=0o077)  # not writable by a group, whatever the umask is here
        if done.returncode == 0:
            _log.info("compiled the kernels with %s %s", " ".join(compiler), processor)
            return
        _log.info("%s %s failed: %s", " ".join(compiler), processor, done.stderr.strip()[:2000])
    message = next((line for line in done.stderr.splitlines() if "error" in line), "").strip()
    raise KernelsUnavailableError(f"{compiler[0]} could not compile them ({message or done.returncode})")


def _check(descriptor: int) -> None:
    """Compare with plain Python in a process of its own, which may crash."""
    asked = secrets.randbits(32)
    command = child_processes.python("-m", "streamchat.kernels.check", _loadable(descriptor), str(asked))
    done = _run(command, CHECK_S, "their check", pass_fds=[descriptor])
    if done.returncode:
        _log.warning("the compiled kernels failed their check: %s", done.stderr.strip()[:2000])
        raise KernelsUnavailableError(f"what the compiler made failed its check (status {done.returncode})")
    # an end without an error proves nothing: the check itself may not have run
    if done.stdout.split() != list(map(str, answer(*question(asked)))):
        _log.warning("the check of the compiled kernels printed: %s", done.stdout.strip()[:2000])
        raise KernelsUnavailableError("the check of what the compiler made did not run")


def _run(command: Sequence[str], seconds: float, what: str, **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return child_processes.run(command, timeout=seconds, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{what} did not finish: {error}") from error


def _digest(compiler: list[str]) -> str:
    """Of all that the library depends on."""
    found = Path(compiler[0]).resolve().stat()
    digest = hashlib.sha256(json.dumps([FLAGS, TARGETS, compiler, found.st_size, found.st_mtime]).encode())
    digest.update(_processor().encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What tells this processor's instructions from another's that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.partition(":")[0].strip() in ("flags", "Features", "model name")]
    return "\n".join([platform.machine(), *sorted(set(kept))])
