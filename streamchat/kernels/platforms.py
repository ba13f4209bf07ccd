"""What differs between operating systems and processors when the kernels are compiled and loaded."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from streamchat.base import child_processes, sysctl
from streamchat.base.cgroups import read_lines
from streamchat.kernels.sealed import read_library

X86 = ("x86_64", "amd64", "i386", "i686")
SELECT = "/usr/bin/xcode-select"
SELECT_S = 20
STUBS = Path("/usr/bin")
"""macOS: where the commands of the developer tools are, whether these are installed or not."""
FEATURES = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
"""Values of macOS. On Apple silicon there is only the first, which implies the instruction set."""


def is_supported() -> bool:
    """Return whether kernels can be compiled for this system."""
    return sys.platform in ("linux", "darwin") and sys.byteorder == "little"


def is_macos() -> bool:
    """Return whether this is macOS."""
    return sys.platform == "darwin"


def library_suffix() -> str:
    """Return the suffix of a shared library."""
    return ".dylib" if is_macos() else ".so"


def library_flag() -> str:
    """Return the flag that makes the compiler link a shared library."""
    return "-dynamiclib" if is_macos() else "-shared"


def processor_flags(compiler: Sequence[str]) -> Sequence[str]:
    """Return flags to try in turn: those for this exact processor, then '' for its architecture.

    A command that names a processor itself, as `gcc -march=haswell` does, gets none.
    """
    if any(word.startswith(("-march=", "-mcpu=")) for word in compiler):
        return [""]
    if platform.machine().lower() in X86:
        return ["-march=native", ""]
    # compilers for ARM tune for the processor only with the first, and older ones of Apple know only the first
    return ["-mcpu=native", "-march=native", ""]


def processor_features() -> str:
    """Return what distinguishes this processor's instruction set from that of another machine sharing the folder."""
    if is_macos():
        found = {sysctl.read_text(name) for name in FEATURES}
    else:
        lines = read_lines(Path("/proc/cpuinfo"))
        found = {line for line in lines if line.partition(":")[0].strip() in ("flags", "Features", "model name")}
    return "\n".join([platform.machine(), *sorted(found)])


def is_stub(program: str) -> bool:
    """Return whether a command only offers, in a dialog, to install the developer tools of macOS."""
    return is_macos() and Path(program).parent == STUBS and not _has_developer_tools()


def how_to_install() -> str:
    """Return how to install a compiler."""
    return "`xcode-select --install` installs one" if is_macos() else "install gcc"


@functools.cache
def _has_developer_tools() -> bool:
    try:
        return child_processes.run([SELECT, "-p"], timeout=SELECT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextmanager
def loadable(descriptor: int) -> Iterator[str]:
    """Yield a name under which the loader finds the contents of an open, sealed library.

    On Linux this is the descriptor itself, so nobody can put another file there. The loader of macOS needs a file: a
    copy, without the checksum, in a new folder that only this user can write. It may be deleted once it is loaded. The
    file of `descriptor` itself is never mapped there, as macOS ends a process whose library is written to later.
    """
    if not is_macos():
        yield f"/proc/self/fd/{descriptor}"
        return
    with tempfile.TemporaryDirectory(prefix="streamchat-") as folder:
        copy = Path(folder) / f"kernels{library_suffix()}"
        copy.write_bytes(read_library(descriptor))
        yield str(copy)
