"""Writing a message in the user's own editor."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from streamchat.base.errors import ConfigError
from streamchat.base.search_path import users_environment
from streamchat.frontend import file_access

VARIABLES = ("VISUAL", "EDITOR")


def edit(text: str, aside: AbstractContextManager[object] | None = None) -> str:
    """What the user makes of `text`. Returns when the editor has ended.

    Args:
        text: To start with.
        aside: The terminal belongs to the editor while this is entered.

    Raises:
        ConfigError: There is no editor, it must not be opened here, or it failed; the text is as it was.
    """
    file_access.require("the editor")
    words = _command()
    handle, name = tempfile.mkstemp(suffix=".md", prefix="streamchat-")  # private to the user
    file = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        try:
            with aside or nullcontext():
                code = subprocess.run([*words, name], env=users_environment(), check=False).returncode
        except OSError as error:
            raise ConfigError(f"the editor {words[0]} cannot be started ({error.strerror or error})") from None
        if code:
            raise ConfigError(f"the editor {words[0]} ended with {code}; the message is as it was")
        return file.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    finally:
        file.unlink(missing_ok=True)


def _command() -> list[str]:
    variable = next((name for name in VARIABLES if os.environ.get(name, "").strip()), None)
    if variable is None:
        raise ConfigError("no editor is set; put its name into the environment as EDITOR, for example EDITOR=nano")
    command = os.environ[variable]
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{variable} = {command} cannot be read ({error})") from None
