"""The messages between a server and its attached front ends: one JSON object per message of a WebSocket.

From a front end: `{"number": 3, "request": {"type": "Submit", "text": "hello"}}`. Requests are numbered from 1. A
request that is sent again after a lost connection has the same number, so that it is carried out only once.

From the server:

- `{"hello": {...}}`: a `Hello`, the first message.
- `{"state": {...}}`: a `State`, with everything that a front end shows. It is sent when a front end attaches, after
  `/clear` and `/resume`, and after a lost connection if the history no longer has all missed events.
- `{"number": 17, "event": {...}}`: an event of the session. Every front end gets the same events, without gaps.
- `{"event": {...}}`: an event for this front end only.
- `{"received": 3}`: all requests up to this number have arrived.
- `{"refused": {...}}`: a `Refusal`, after which the connection is closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from streamchat.base.errors import WireError
from streamchat.base.events import Event
from streamchat.base.jsonlines import json_line
from streamchat.base.requests import Request
from streamchat.base.wire import decoded, event_from_record, from_record, request_from_record, to_json

PATH = "/v1/attach"
VERSION = 1
"""Version of the protocol. It changes if older and newer programs can no longer work together."""
MAX_NUMBER = 2**53


@dataclass(frozen=True)
class Hello:
    """The first message of a server."""

    version: int
    server: str
    """Name and version of the program."""
    model: str
    max_request: int
    """Maximum length of a request, in bytes."""
    store: str = ""
    """Identifies the database of saved sessions; '' if nothing is saved."""


@dataclass(frozen=True)
class Refusal:
    """Why a front end cannot be attached."""

    message: str
    exit_code: int
    is_final: bool = False
    """Whether trying again cannot help, for example because the session was deleted."""


@dataclass(frozen=True)
class State:
    """The state of a session after event `number` of its history."""

    log: str
    """Id of the history that numbers the events."""
    number: int
    session: str
    """Id of the saved session; '' if it is not saved."""
    settings: Mapping[str, Any]
    """The settings of the session, without those of the interface."""
    origins: Mapping[str, str]
    unfinished: tuple[int, ...]
    """Numbers of the turns that this front end requested and that still run or wait."""
    events: tuple[Event, ...]
    """What to show, in order."""


@dataclass(frozen=True)
class Numbered:
    """An event of the session."""

    number: int
    event: Event


@dataclass(frozen=True)
class Private:
    """An event for one front end."""

    event: Event


@dataclass(frozen=True)
class Received:
    """All requests up to this number have arrived."""

    number: int


FromServer = Hello | Refusal | State | Numbered | Private | Received


@dataclass(frozen=True)
class Asked:
    """A request with its number."""

    number: int
    request: Request = field(repr=False)


def hello_text(hello: Hello) -> str:
    """Return the message for a `Hello`."""
    return json_line({"hello": asdict(hello)})


def refusal_text(refusal: Refusal) -> str:
    """Return the message for a `Refusal`."""
    return json_line({"refused": asdict(refusal)})


def state_text(state: State) -> str:
    """Return the message for a `State`."""
    parts: dict[str, Any] = {
        "log": state.log,
        "number": state.number,
        "session": state.session,
        "settings": dict(state.settings),
        "origins": dict(state.origins),
        "unfinished": list(state.unfinished),
    }
    events = ",".join(map(to_json, state.events))
    return f'{{"state": {json_line(parts)[:-1]}, "events": [{events}]}}}}'


def event_text(event: Event, number: int | None = None) -> str:
    """Return the message for an event; without a number it is for one front end only."""
    start = "" if number is None else f'"number": {number}, '
    return f'{{{start}"event": {to_json(event)}}}'


def received_text(number: int) -> str:
    """Return the message for a `Received`."""
    return json_line({"received": number})


def request_text(asked: Asked) -> str:
    """Return the message for a request."""
    return f'{{"number": {asked.number}, "request": {to_json(asked.request)}}}'


def read_request(text: str | bytes) -> Asked:
    """Return the request in a message of a front end.

    Raises:
        WireError: It is not valid.
    """
    record = _object("message", text, {"number", "request"})
    return Asked(_number(record["number"]), request_from_record(record["request"]))


def read_from_server(text: str | bytes) -> FromServer:
    """Return the content of a server's message.

    Raises:
        WireError: It is not valid, for example from another version.
    """
    match record := decoded("message", text):
        case {"number": number, "event": event}:
            return Numbered(_number(number), event_from_record(event))
        case {"event": event}:
            return Private(event_from_record(event))
        case {"received": number}:
            return Received(_number(number))
        case {"state": dict(state)}:
            return _state(state)
        case {"hello": hello}:
            return from_record(Hello, hello)
        case {"refused": refusal}:
            return from_record(Refusal, refusal)
        case _:
            raise WireError(f"a message of the server is not known: {str(record)[:80]}")


def _state(record: dict[str, Any]) -> State:
    fields = {"log", "number", "session", "settings", "origins", "unfinished", "events"}
    if missing := fields - record.keys():
        raise WireError(f"a state needs the field {min(missing)!r}")
    texts, tables, lists = ("log", "session"), ("settings", "origins"), ("unfinished", "events")
    for kind, names in ((str, texts), (dict, tables), (list, lists)):
        for name in names:
            if not isinstance(record[name], kind):
                raise WireError(f"state.{name} is not valid")
    return State(
        record["log"],
        _number(record["number"]),
        record["session"],
        record["settings"],
        {str(name): str(origin) for name, origin in record["origins"].items()},
        tuple(map(_number, record["unfinished"])),
        tuple(map(event_from_record, record["events"])),
    )


def _object(what: str, text: str | bytes, names: set[str]) -> dict[str, Any]:
    record = decoded(what, text)
    if not isinstance(record, dict) or set(record) != names:
        raise WireError(f"a {what} must be an object with the fields {', '.join(sorted(names))}")
    return record


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        raise WireError(f"{str(value)[:40]} is not a number of a message")
    return value
