"""Start child processes that load nothing from the current folder: no module, program, library or configuration.

Their current folder is that of this package, whose files are as trusted as the running program. Python does not look
for modules there (`-P`), and search paths keep only their absolute entries.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamchat.base import search_path

FOLDER = Path(__file__).absolute().parents[1]
"""The current folder of child processes."""


def python(*arguments: str) -> list[str]:
    """Return a command that runs Python without the current folder on its module path."""
    return [sys.executable, "-P", *arguments]


def streamchat(arguments: Sequence[str]) -> list[str]:
    """Return a command that runs streamchat in the current folder without loading modules from it."""
    return python("-m", "streamchat.cli.in_folder", os.getcwd(), *arguments)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child process that can import this package even if it is not installed."""
    found = search_path.clean(os.environ)
    root = str(FOLDER.parent)
    given = found.get("PYTHONPATH", "").split(os.pathsep)
    if root not in (*given, *site.getsitepackages(), site.getusersitepackages()):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (*given, root)))
    return found | more


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `command` without input, wait for it, and capture its output as text.

    Args:
        command: Absolute path of a program (see `python`, `find_program`) and its arguments.
        options: Passed on to `subprocess.run`.

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
    """Return the absolute path of a program, given as a path or found in the absolute folders of PATH."""
    if os.path.dirname(name):
        return shutil.which(os.path.abspath(name))
    # given an empty list, `which` would search its default folders
    folders = search_path.absolute_entries(os.environ.get("PATH", os.defpath))
    return shutil.which(name, path=folders) if folders else None


@contextmanager
def safe_environment() -> Iterator[None]:
    """Apply `environment` to child processes that a library (`multiprocessing`, Ray) starts inside the block."""
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


def end_with_parent() -> None:
    """End this process, started by `multiprocessing`, when its parent ends, even if that is killed.

    A worker of a pool has both ends of the pipe that it waits on, so it would wait forever.
    """
    import multiprocessing  # slow to import, and most programs start no worker

    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
