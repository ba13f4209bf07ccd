"""A request to the API, checked, in the form that the model's thread works on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from streamchat.base.requests import SettingValue
from streamchat.base.thinking import Kind
from streamchat.server.errors import ApiError

Finish = Literal["stop", "length", "loop", "cancelled"]


@dataclass(frozen=True)
class Exchange:
    """An earlier message and its reply, as the client has them."""

    message: str | None
    """None if the client's history starts with the reply."""
    reply: str


@dataclass(frozen=True)
class Prompt:
    """What a request asks the model."""

    message: str
    """The newest message, to reply to."""
    history: tuple[Exchange, ...] = ()
    """What the client says was before it, oldest first."""
    system: str | None = None
    """The system prompt; None if the client gave none, or that of the settings."""
    has_system: bool = False
    """Whether the client gave one."""
    previous: str = ""
    """Id of the response that it follows; '' for none."""
    scope: str = ""
    """Only sessions of the same scope are continued; '' for clients that name none."""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    """Settings for this reply only."""
    stop: tuple[str, ...] = ()
    keep: bool = True
    """Whether the session is kept after the reply."""
    is_response: bool = False
    """Whether it came to `/v1/responses`."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt: int
    """Tokens that the model saw when it started to reply."""
    cached: int
    """Those of them that were cached before, and were not prefilled."""
    reply: int


@dataclass(frozen=True)
class Began:
    """The reply has an id; its prompt is prefilled next."""

    id: str
    """Without the prefix of the API."""


@dataclass(frozen=True)
class Delta:
    """More text of the reply, or of the reasoning before it."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Ended:
    """The reply is complete."""

    finish: Finish
    usage: Usage
    saved: bool
    """Whether the turn is in the store."""


News = Began | Delta | Ended | ApiError
"""What a call reports, in this order: `Began`, any number of `Delta`, `Ended`; or an error at any point."""


class Call:
    """One request on its way through the model's thread.

    Args:
        prompt: What it asks.
        report: Called with its news, on the model's thread.
    """

    def __init__(self, prompt: Prompt, report: Callable[[News], None]) -> None:
        self.prompt, self.report = prompt, report
        self.created = time.time()
        self.cancelled = threading.Event()
        """Set if the client is gone, the time is over, or the server stops."""
