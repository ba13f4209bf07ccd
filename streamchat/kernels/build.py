"""Compiles the sources of this package to a shared library for this processor, stored in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base import child_processes, paths
from streamchat.base.errors import reason_of
from streamchat.kernels import platforms
from streamchat.kernels.check import challenge, expected_response
from streamchat.kernels.sealed import is_ours_alone, open_sealed, read_library, seal

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
)
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

    def load(self) -> ctypes.CDLL:
        """Load the checked file, even if `path` has been replaced since.

        Raises:
            KernelsUnavailableError: It cannot be copied (macOS).
            OSError: The system's loader refuses it.
        """
        with _loadable(self.descriptor) as name:
            return ctypes.CDLL(name)


def library() -> Library:
    """Return the compiled kernels; compiles them if they are missing or damaged.

    Needs Linux or macOS, and gcc or clang.

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


@contextmanager
def _loadable(descriptor: int) -> Iterator[str]:
    """Yield a name under which the loader finds the contents of an open, sealed library.

    On Linux this is the descriptor itself, so nobody can put another file there. The loader of macOS needs a file: a
    copy, without the checksum, in a new folder that only this user can write. It may be deleted once it is loaded. The
    file of `descriptor` itself is never loaded there: macOS ends a process if the file of a loaded library is modified.
    """
    if platforms.loads_descriptors():
        yield f"/proc/self/fd/{descriptor}"
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="streamchat-"))
            copy = Path(folder) / f"kernels{platforms.library_suffix()}"
            copy.write_bytes(read_library(descriptor))
        except OSError as error:
            what = f"compiled kernels cannot be copied to {error.filename or 'a temporary folder'}"
            raise KernelsUnavailableError(f"{what}: {reason_of(error)}") from error
        yield str(copy)


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
        built = Path(folder) / path.name
        _compile(find_compiler(), built)
        descriptor = os.open(built, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not is_ours_alone(os.fstat(descriptor)):
                raise KernelsUnavailableError(f"{built} is writable by others")
            seal(descriptor, path.stem)
            _check(descriptor)
        finally:
            os.close(descriptor)
        built.replace(path)
    paths.fsync(path.parent)


def library_path() -> Path:
    """Return the path of the compiled library, whether it exists or not.

    Raises:
        KernelsUnavailableError: They cannot be compiled on this machine.
    """
    if not platforms.is_supported():
        needed = "Linux or macOS on a little-endian processor"
        raise KernelsUnavailableError(f"compiled kernels need {needed}, and this is {platform.system()}")
    return paths.cache_dir() / "kernels" / f"{_digest(find_compiler())}{platforms.library_suffix()}"


def find_compiler() -> list[str]:
    """Return the compiler command: `CC` with its arguments if it is set, else the first of `COMPILERS`.

    Raises:
        KernelsUnavailableError: No compiler was found.
    """
    named = os.environ.get("CC", "").split()
    for program, *words in [named] if named else [[name] for name in COMPILERS]:
        found = child_processes.find_program(program)
        if found and not platforms.is_stub(found):
            return [found, *words]
    wanted, how = named[0] if named else COMPILERS[0], platforms.how_to_install()
    raise KernelsUnavailableError(f"no C compiler ({wanted}) was found; {how}, for about twice the speed")


def _compile(compiler: list[str], to: Path) -> None:
    """Compile the sources, trying the flags for this exact processor first."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    for processor in platforms.processor_flags(compiler):
        flags = [*FLAGS, platforms.library_flag(), *filter(None, [processor])]
        command = [*compiler, *flags, *sources, "-lm", "-o", str(to)]
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
    with _loadable(descriptor) as name:
        command = child_processes.python("-m", "streamchat.kernels.check", name, str(number))
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
    flags = [*FLAGS, platforms.library_flag(), *platforms.processor_flags(compiler)]
    digest = hashlib.sha256(json.dumps([flags, compiler, found.st_size, found.st_mtime]).encode())
    digest.update(platforms.processor_features().encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]
