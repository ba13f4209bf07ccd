"""Textual messages that no single widget owns."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message


class EventsArrived(Message):
    """Events are pending in the bridge."""


@dataclass
class EngineClosing(Message):
    """Closing the engine has ended."""

    exit_code: int
    """Exit code of the app."""
    in_time: bool
    """Whether the engine thread has ended; False after a timeout."""
