"""Writing a message in the user's own editor, with the app suspended meanwhile."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from textual.app import App, SuspendNotSupported

from streamchat.errors import ConfigError


def edit(app: App[int], text: str) -> str:
    """What the user makes of `text`.

    Raises:
        ConfigError: There is no editor, or it failed; the text is as it was.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    if not command.strip():
        raise ConfigError("no editor is set; put its name into the environment as EDITOR, for example EDITOR=nano")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"EDITOR = {command} cannot be read ({error})") from None
    handle, name = tempfile.mkstemp(suffix=".md", prefix="streamchat-")
    file = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        try:
            with app.suspend():
                code = subprocess.run([*words, name], check=False).returncode
        except SuspendNotSupported:
            raise ConfigError("the app cannot be suspended on this system, so no editor can be opened") from None
        except OSError as error:
            raise ConfigError(f"the editor {words[0]} cannot be started ({error.strerror or error})") from None
        if code:
            raise ConfigError(f"the editor {words[0]} ended with {code}; the message is as it was")
        return file.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    finally:
        file.unlink(missing_ok=True)
