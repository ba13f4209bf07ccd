"""Edit a message in the user's editor."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.search_path import users_environment
from streamchat.base.text_files import read_text
from streamchat.frontend import file_access

VARIABLES = ("VISUAL", "EDITOR")


def edit(text: str, aside: AbstractContextManager[object] | None = None) -> str:
    """Open `text` in the editor and return the edited text; blocks until the editor exits.

    Args:
        text: Initial text.
        aside: Context manager that hands the terminal to the editor.

    Raises:
        ConfigError: No editor is set, it is not allowed here, or it failed; the text is unchanged.
    """
    file_access.require("the editor")
    words = _command()
    handle, name = tempfile.mkstemp(suffix=".md", prefix="streamchat-")  # readable by the user only
    file = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        try:
            with aside or nullcontext():
                code = subprocess.run([*words, name], env=users_environment(), check=False).returncode
        except OSError as error:
            raise ConfigError(f"the editor {words[0]} could not be started ({reason_of(error)})") from None
        if code:
            raise ConfigError(f"the editor {words[0]} exited with code {code}; the message is unchanged")
        return read_text(file, guess=True).text.rstrip("\n")
    finally:
        file.unlink(missing_ok=True)


def _command() -> list[str]:
    variable = next((name for name in VARIABLES if os.environ.get(name, "").strip()), None)
    if variable is None:
        raise ConfigError("no editor is set; set the environment variable EDITOR, for example EDITOR=nano")
    command = os.environ[variable]
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{variable} = {command} cannot be parsed ({error})") from None
