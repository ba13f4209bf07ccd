"""Messages between the parts of the app that belong to no single widget."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message


class EventsArrived(Message):
    """Events of the engine wait in the bridge."""


@dataclass
class EngineClosing(Message):
    """Closing the engine is over."""

    exit_code: int
    """What the app ends with."""
    in_time: bool
    """Its thread has ended."""
