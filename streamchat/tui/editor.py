"""The user's editor, with the app suspended meanwhile."""

from __future__ import annotations

from typing import Any

from textual.app import App, SuspendNotSupported

from streamchat.base.errors import ConfigError
from streamchat.frontend import editor


def edit(app: App[Any], text: str) -> str:
    """What the user makes of `text`.

    Raises:
        ConfigError: There is no editor, or it failed; the text is as it was.
    """
    try:
        return editor.edit(text, app.suspend())
    except SuspendNotSupported:
        raise ConfigError("the app cannot be suspended on this system, so no editor can be opened") from None
