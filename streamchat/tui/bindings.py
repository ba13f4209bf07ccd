"""Textual bindings from the key table in `streamchat.config.keymap`."""

from __future__ import annotations

from typing import Any

from textual.app import App
from textual.binding import Binding

from streamchat.config.keymap import BY_ID, display_keys


def bind(key_id: str, action: str, **options: Any) -> Binding:
    """Create the binding for a key id; `[keys]` in the configuration can change its keys.

    Args:
        key_id: Id in `streamchat.config.keymap`.
        action: Textual action to run.
        options: Options of `Binding`; `show` is off by default.
    """
    key = BY_ID[key_id]
    return Binding(key.keys, action, key.label, id=key_id, tooltip=key.help, **{"show": False, **options})


def hint(app: App[Any], key_id: str) -> str:
    """Display name of the first configured key for a key id: 'Ctrl+Q', 'Esc'."""
    keys_of = getattr(app, "keys_of", None)  # tests may use another app
    keys: str = keys_of(key_id) if keys_of else BY_ID[key_id].keys
    return display_keys(keys).split(", ")[0].replace("Escape", "Esc")
