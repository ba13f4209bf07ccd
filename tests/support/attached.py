"""Front ends that are attached to a server in this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from streamchat.attach.address import parse_address
from streamchat.attach.connection import AttachError, Connection
from streamchat.attach.engine import AttachedEngine
from streamchat.attach.frames import FromServer, Numbered
from streamchat.base import events as ev
from streamchat.base.requests import SetOption, Submit
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from tests.support.api_server import Running, serving
from tests.support.real_engine import Watched

ENDLESS = 100_000
"""Tokens of a reply that ends with `Stop`."""


class Front(Watched):
    """An attached front end, and the events that it got."""

    def __init__(self, engine: AttachedEngine) -> None:
        super().__init__(cast(Any, engine))
        self.attached = engine
        self.numbered: list[tuple[int, ev.Event]] = []
        """The numbered events, as the server sent them."""

    def cut(self) -> None:
        """Lose the connection."""
        connection = self.attached._connection
        assert connection is not None
        connection._socket.socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def attached(running: Running | str, session: str = "", *, new: bool = False, token: str = "") -> Iterator[Front]:
    """A front end that is attached and ready."""
    fronts: list[Front] = []

    class Recorded(Connection):
        def read(self) -> Iterator[FromServer]:
            for message in super().read():
                if isinstance(message, Numbered):
                    fronts[0].numbered.append((message.number, message.event))
                yield message

    base = running if isinstance(running, str) else running.base
    configuration = Configuration(Settings(), {})
    engine = AttachedEngine(parse_address(base, token), configuration, session, new=new, connect=Recorded)
    front = Front(engine)
    fronts.append(front)
    try:
        engine.start()
        front.wait(ev.ModelReady)
        yield front
    finally:
        assert engine.close(10)


def steady(numbered: list[tuple[int, ev.Event]]) -> bool:
    """Whether the numbers of events have no gap and no repetition."""
    numbers = [number for number, _ in numbered]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that saves its sessions."""
    with serving(tmp_path_factory.mktemp("attach"), temperature=0.8) as server:
        yield server


@pytest.fixture
def front(api: Running) -> Iterator[Front]:
    """A front end of a new session."""
    with attached(api, new=True) as made:
        yield made


def begin_endless(front: Front) -> None:
    """Start a reply that ends with `Stop`, and wait until it has shown text."""
    front.engine.send(SetOption("max_new_tokens", ENDLESS))
    front.engine.send(Submit("go on"))
    front.wait(ev.TextDelta, len(front.of(ev.TextDelta)) + 3)


class LaterConnections:
    """Opens connections only if `is_open`."""

    def __init__(self, opens: Any) -> None:
        self._opens, self.is_open = opens, False

    def __call__(self, *arguments: Any) -> Any:
        if not self.is_open:
            raise AttachError("not yet")
        return self._opens(*arguments)
