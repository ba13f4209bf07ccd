"""Differences between operating systems and processors when the kernels are compiled and loaded."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from streamchat.base import child_processes, sysctl
from streamchat.base.cgroups import read_lines
from streamchat.base.sysctl import is_macos

X86 = ("x86_64", "amd64", "i386", "i686")
SELECT = "/usr/bin/xcode-select"
SELECT_S = 20
STUBS = Path("/usr/bin")
"""macOS: folder of the developer tools' commands, which exist there even if the tools are not installed."""
FEATURES = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
"""Names of `sysctl` values on macOS. Apple silicon has only the first, which implies the instruction set."""


def is_supported() -> bool:
    """Return whether kernels can be compiled for this system."""
    return (sys.platform == "linux" or is_macos()) and sys.byteorder == "little"


def library_suffix() -> str:
    """Return the suffix of a shared library."""
    return ".dylib" if is_macos() else ".so"


def library_flag() -> str:
    """Return the flag that makes the compiler link a shared library."""
    return "-dynamiclib" if is_macos() else "-shared"


def loads_descriptors() -> bool:
    """Return whether the system's loader opens an open file by the number of its descriptor."""
    return not is_macos()


def processor_flags(compiler: Sequence[str]) -> Sequence[str]:
    """Return flags to try in turn: those for this exact processor, then '' for its architecture.

    A command that names a processor itself, as `gcc -march=haswell` does, gets none.
    """
    if any(word.startswith(("-march=", "-mcpu=")) for word in compiler):
        return [""]
    if platform.machine().lower() in X86:
        return ["-march=native", ""]
    # on ARM, only the first also tunes for the processor, and older compilers of Apple support only the first
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
    """Return whether a command is only a stub that opens a dialog to install the developer tools of macOS."""
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
