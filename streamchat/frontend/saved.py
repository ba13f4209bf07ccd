"""Where front ends read saved sessions: the user's database, unless the session is in one of another machine."""

from __future__ import annotations

from streamchat.base.errors import StoreError
from streamchat.store.store import Store

_refusal = ""


def refuse(reason: str) -> None:
    """Refuse to read the user's database, with `reason`; '' allows it again."""
    global _refusal
    _refusal = reason


def open_store() -> Store:
    """Open the user's database.

    Raises:
        StoreError: It cannot be opened, or it does not have the sessions of this chat.
    """
    if _refusal:
        raise StoreError(_refusal)
    return Store()
