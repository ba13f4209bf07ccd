"""Shared by the server of `streamchat web` and the processes of its tabs. Cheap to import."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamchat.base import child_processes

HOST = "127.0.0.1"
"""By default this machine only: anyone who opens the page can use the model and read the chats."""
PORT = 8000
WEB_DRIVER = "web_driver"
"""Part of TEXTUAL_DRIVER if textual-serve started this process."""
SESSION_META = "streamchat_session"
"""Type of the message with which a tab's process reports the id of its saved session."""
FILES_REFUSED = (
    "in the browser: it would access files of the machine that streamchat runs on; start `streamchat web` with "
    "--files to allow it"
)


@dataclass(frozen=True)
class Served:
    """Arguments of `streamchat web`."""

    settings: Sequence[str] = ()
    """Flags of the settings, for the process of each tab."""
    host: str = HOST
    """Address to bind."""
    port: int = PORT
    """1 to 65535."""
    url: str = ""
    """The address that browsers use, if different."""
    files: bool = False
    """Whether tabs may use files of this machine."""
    resume: str | None = None
    """The session of the first tab that has none: 'last', or the start of an id."""


def tab_command(served: Served, session: str | None) -> str:
    """Return the shell command of a tab: it starts in streamchat's folder, then changes to the current one.

    Args:
        session: The saved session to resume, if any.
    """
    argv = [*served.settings, *(["--tab-files"] if served.files else []), *([f"--resume={session}"] if session else [])]
    command = child_processes.streamchat(argv)
    if os.name == "nt":
        return subprocess.list2cmdline(command)
    return f"cd {shlex.quote(str(child_processes.FOLDER))} && exec {shlex.join(command)}"


def in_browser(environ: Mapping[str, str]) -> bool:
    """Return whether this process runs the app of a browser tab."""
    return WEB_DRIVER in environ.get("TEXTUAL_DRIVER", "")
