"""The event of the connection to a server that has the model."""

from __future__ import annotations

from dataclasses import dataclass

from streamchat.base.events.event import Event


@dataclass(frozen=True)
class ConnectionChanged(Event):
    """The connection to the server was lost (`works` is False), or works again. Only an attached engine emits it."""

    works: bool
    reason: str = ""
    """Why it was lost, in a few words."""
