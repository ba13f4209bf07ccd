"""Open the user's editor while the app is suspended."""

from __future__ import annotations

from typing import Any

from textual.app import App, SuspendNotSupported

from streamchat.base.errors import ConfigError
from streamchat.frontend import editor


def edit(app: App[Any], text: str) -> str:
    """Open `text` in the editor and return the edited text.

    Raises:
        ConfigError: No editor is set, or it failed; the text is unchanged.
    """
    try:
        return editor.edit(text, app.suspend())
    except SuspendNotSupported:
        raise ConfigError("cannot open an editor: this system cannot suspend the app") from None
