"""From the sources in this package to a shared library for this very processor, kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from streamchat import paths

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


def library() -> Path:
    """The compiled kernels, made now where they are not there yet (about 2 s). Needs Linux and gcc.

    Raises:
        KernelsUnavailableError: They cannot be had here.
    """
    kept = target()
    try:
        if kept.is_file():
            _check_owner(kept)
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / "kernels.so"
            _compile(find_compiler(), made)
            made.chmod(0o700)  # not writable by a group, whatever the umask
            _check(made)
            _check_owner(made)
            made.replace(kept)
    except OSError as error:
        raise KernelsUnavailableError(f"they cannot be kept in {kept.parent}: {error.strerror or error}") from error
    return kept


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
        if found := shutil.which(program):
            return [found, *words]
    wanted = named[0] if named else "gcc"
    raise KernelsUnavailableError(f"no C compiler ({wanted}) was found; install gcc for about twice the speed")


def _compile(compiler: list[str], to: Path) -> None:
    """Try the flags for this very processor first."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    for processor in TARGETS:
        flags = [*FLAGS, *([processor] if processor else [])]
        done = _run([*compiler, *flags, *sources, "-o", str(to)], COMPILE_S, compiler[0])
        if done.returncode == 0:
            _log.info("compiled the kernels with %s %s", " ".join(compiler), processor)
            return
        _log.info("%s %s failed: %s", " ".join(compiler), processor, done.stderr.strip()[:2000])
    message = next((line for line in done.stderr.splitlines() if "error" in line), "").strip()
    raise KernelsUnavailableError(f"{compiler[0]} could not compile them ({message or done.returncode})")


def _check(made: Path) -> None:
    """Compare with plain Python in a process of its own, which may crash."""
    done = _run([sys.executable, "-m", "streamchat.kernels.check", str(made)], CHECK_S, "their check")
    if done.returncode:
        _log.warning("the compiled kernels failed their check: %s", done.stderr.strip()[:2000])
        raise KernelsUnavailableError(f"what the compiler made failed its check (status {done.returncode})")


def _run(command: list[str], seconds: float, what: str) -> subprocess.CompletedProcess[str]:
    """Run `command`, with this package for Python to import."""
    try:
        return subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{what} did not finish: {error}") from error


def _check_owner(path: Path) -> None:
    """Refuse to run code that somebody else could have put there."""
    for each in (path, path.parent):
        found = each.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise KernelsUnavailableError(f"others may write to {each}; make it yours alone (chmod go-w)")


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
