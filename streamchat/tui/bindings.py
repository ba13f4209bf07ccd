"""Textual bindings made from the one table of keys."""

from __future__ import annotations

from typing import Any

from textual.app import App
from textual.binding import Binding

from streamchat.config.keymap import BY_ID, display_keys


def bind(key_id: str, action: str, **options: Any) -> Binding:
    """The binding of a key of `streamchat.config.keymap`; `[keys]` of the configuration can change it by its id.

    Args:
        key_id: As in the table.
        action: What is done.
        options: Of `Binding`; `show` is off unless given.
    """
    key = BY_ID[key_id]
    return Binding(key.keys, action, key.label, id=key_id, tooltip=key.help, **{"show": False, **options})


def hint(app: App[Any], key_id: str) -> str:
    """The first key for something, as configured, for people: 'Ctrl+Q', 'Esc'."""
    keys_of = getattr(app, "keys_of", None)  # a test may have an app of its own
    keys: str = keys_of(key_id) if keys_of else BY_ID[key_id].keys
    return display_keys(keys).split(", ")[0].replace("Escape", "Esc")
