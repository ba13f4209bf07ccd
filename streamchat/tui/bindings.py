"""Textual bindings made from the one table of keys."""

from __future__ import annotations

from typing import Any

from textual.binding import Binding

from streamchat.keys import BY_ID


def bind(key_id: str, action: str, **options: Any) -> Binding:
    """The binding of a key of `streamchat.keys`; `[keys]` of the configuration can change it by its id.

    Args:
        key_id: As in the table.
        action: What is done.
        options: Of `Binding`; `show` is off unless given.
    """
    key = BY_ID[key_id]
    return Binding(key.keys, action, key.label, id=key_id, tooltip=key.help, **{"show": False, **options})
