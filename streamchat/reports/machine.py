"""The machine and the software that affect a result, named the same on every page."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from streamchat.base import sysctl
from streamchat.base.cgroups import read_lines
from streamchat.base.formatting import plural
from streamchat.base.processors import usable_processors


def versions() -> dict[str, str]:
    """Return the versions of streamchat, Python, the libraries, and the system."""
    from streamchat import __version__

    return {
        "streamchat": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "textual")},
        "system": platform.platform(),
    }


def processor() -> str:
    """Return the name of the processor and how many of its cores this process may use."""
    lines = read_lines(Path("/proc/cpuinfo"))
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, "") or sysctl.read_text("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    return f"{name}, {plural(usable_processors(), 'core')}"


def machine_line() -> str:
    """Return the versions and the processor as one line."""
    names = ", ".join(
        f"{name.replace('python', 'Python')} {found}"
        for name, found in versions().items()
        if name not in ("system", "textual")
    )
    return f"{names}; {processor()}"
