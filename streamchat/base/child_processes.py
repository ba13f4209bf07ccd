"""Starts child processes that use nothing in the current folder: no module, program, library or configuration.

They start in the folder of this package, whose files are as trusted as the program that runs; Python does not look for
modules there (`-P`), and search paths keep their absolute entries only.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamchat.base import search_path

FOLDER = Path(__file__).absolute().parents[1]
"""The current folder of children."""


def python(*arguments: str) -> list[str]:
    """Return the command of a Python that does not look for modules in the current folder."""
    return [sys.executable, "-P", *arguments]


def streamchat(arguments: Sequence[str]) -> list[str]:
    """Return the command of a streamchat that works in the current folder but loads no modules from it."""
    return python("-m", "streamchat.cli.in_folder", os.getcwd(), *arguments)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child, which finds this package even if it is not installed."""
    found = search_path.clean(os.environ)
    root = str(FOLDER.parent)
    given = found.get("PYTHONPATH", "").split(os.pathsep)
    if root not in (*given, *site.getsitepackages(), site.getusersitepackages()):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (*given, root)))
    return found | more


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, without input; its output is captured as text.

    Args:
        command: An absolute program (`python`, `find_program`) and its arguments.
        options: For `subprocess.run`.

    Raises:
        OSError, subprocess.TimeoutExpired: As `subprocess.run`.
    """
    return subprocess.run(
        command,
        env=environment(),
        cwd=FOLDER,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        **options,
    )


def find_program(name: str) -> str | None:
    """The absolute path of a program, by its path or looked for in the absolute folders of PATH."""
    if os.path.dirname(name):
        return shutil.which(os.path.abspath(name))
    # (without folders `which` would look in its default ones)
    folders = search_path.absolute_entries(os.environ.get("PATH", os.defpath))
    return shutil.which(name, path=folders) if folders else None


@contextmanager
def safe_environment() -> Iterator[None]:
    """Give our `environment` to children that a library (`multiprocessing`, Ray) starts inside the block."""
    before = dict(os.environ)
    found = environment()
    os.environ.update(found)
    for name in set(before) - set(found):
        del os.environ[name]
    try:
        yield
    finally:
        for name in {*search_path.VARIABLES, search_path.SAFE_PATH}:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
