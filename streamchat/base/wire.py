"""Requests and events as JSON, for other processes, and dataclasses of figures as they are saved.

A message is one JSON object on one line: `type`, the name of its class, and the fields of the class. Nested dataclasses
are objects without `type`, and tuples are lists. JSON has no infinite numbers and no NaN: they are `{"float": "inf"}`,
`{"float": "-inf"}`, and `{"float": "nan"}`. Whole numbers have 64 bits.

Nothing that is read is trusted: everything that does not match the class is a `WireError`. Fields with a default may be
left out, so that an older program can talk to a newer one.
"""

from __future__ import annotations

import json
import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from streamchat.base import events as ev
from streamchat.base.errors import WireError, short
from streamchat.base.events import Event
from streamchat.base.jsonlines import json_line
from streamchat.base.requests import Request

MAX_REQUEST = 2**24
"""Maximum length of a request, in characters. Events have none: they come from an engine that the reader chose."""
REQUESTS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in get_args(Request)}
EVENTS: Mapping[str, type[Any]] = {
    name: kind
    for name, kind in vars(ev).items()
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
}
_NOT_FINITE = {repr(number): number for number in (math.inf, -math.inf, math.nan)}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
Record = TypeVar("Record")


def to_json(message: Event | Request) -> str:
    """Return a message as JSON, on one line without a line ending."""
    return json_line({"type": type(message).__name__, **_plain(message)})


def request_from_json(text: str | bytes) -> Request:
    """Return the request that another process wrote.

    Raises:
        WireError: It is too long, not JSON, or not a valid request.
    """
    if len(text) > MAX_REQUEST:
        raise WireError(f"a request has {len(text):,} characters; the limit is {MAX_REQUEST:,}")
    return request_from_record(decoded("request", text))


def event_from_json(text: str | bytes) -> Event:
    """Return the event that another process wrote.

    Raises:
        WireError: It is not JSON, or not a valid event.
    """
    return event_from_record(decoded("event", text))


def request_from_record(record: object) -> Request:
    """Return the request that a decoded JSON object is; raises WireError."""
    return cast(Request, _message("request", REQUESTS, record))


def event_from_record(record: object) -> Event:
    """Return the event that a decoded JSON object is; raises WireError."""
    return cast(Event, _message("event", EVENTS, record))


def from_record(kind: type[Record], record: object, where: str = "") -> Record:
    """Return a dataclass filled with the values of `record`.

    Args:
        kind: A dataclass of texts, numbers, booleans, literals, tuples, dataclasses, and unions of these.
        record: The decoded JSON object.
        where: What to call it in errors; by default the name of the class.

    Raises:
        WireError: A field is missing, unknown or of another type.
    """
    where = where or kind.__name__
    if not isinstance(record, Mapping):
        raise _wrong(where, record, "an object")
    hints, required = _fields(cast(Any, kind))
    for name in record:
        if name not in hints:
            raise WireError(f"{where} has no field {_shown(name)}")
    for name in required:
        if name not in record:
            raise WireError(f"{where} needs the field {name!r}")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in record.items()})


def decoded(what: str, text: str | bytes) -> Any:
    """Return the JSON value of `text`, which is called `what` in errors; raises WireError."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise WireError(f"a {what} is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WireError(f"a {what} must be a JSON object in UTF-8 ({short(error)})") from None
    except ValueError:
        raise WireError(f"a {what} has a number with too many digits; whole numbers have 64 bits") from None


def _message(what: str, kinds: Mapping[str, type[Any]], record: object) -> Any:
    if not isinstance(record, dict):
        raise _wrong(f"a {what}", record, "an object")
    name = record.pop("type", None)
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise WireError(f"{_shown(name)} is not a type of {what}; choose from {', '.join(kinds)}")
    return from_record(kind, record)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise WireError("a field is given twice")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise WireError(f"{name} is not JSON; such numbers are objects like {{'float': 'nan'}}")


@cache
def _fields(kind: type[Any]) -> tuple[dict[str, Any], list[str]]:
    """The type of every field of a dataclass, and the names of those without a default."""
    hints = get_type_hints(kind)
    every = fields(kind)
    required = [field.name for field in every if field.default is MISSING and field.default_factory is MISSING]
    return {field.name: hints[field.name] for field in every}, required


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(options, value, where)
    if origin is tuple:
        return _items(options, value, where)
    if is_dataclass(hint):
        return from_record(cast(type[Any], hint), value, where)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in options):
            raise _wrong(where, value, " or ".join(map(repr, options)))
        return value
    if hint is float and isinstance(value, Mapping):
        return _not_finite(value, where)
    if not _is(hint, value):
        raise _wrong(where, value, _NAMES[hint])
    return value


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    if len(hints) == 1:
        return _value(hints[0], value, where)
    for hint in hints:
        try:
            return _value(hint, value, where)
        except WireError:
            continue
    raise _wrong(where, value, " or ".join(_NAMES.get(hint, "an object") for hint in hints))


def _items(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, value, "a list")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        raise _wrong(where, value, f"a list of {len(hints)}")
    return tuple(_value(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _is(hint: Any, value: Any) -> bool:
    if hint in (int, float):
        number = isinstance(value, int) or (hint is float and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool) and (isinstance(value, float) or -(2**63) <= value < 2**63)
    return isinstance(value, hint)


def _not_finite(value: Mapping[Any, Any], where: str) -> float:
    name = value.get("float")
    if len(value) != 1 or not isinstance(name, str) or name not in _NOT_FINITE:
        raise _wrong(where, value, "a number")
    return _NOT_FINITE[name]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _wrong(where: str, value: object, wanted: str) -> WireError:
    return WireError(f"{where} = {_shown(value)} is not valid; it must be {wanted}")


def _shown(value: object) -> str:
    return short(reprlib.repr(value))
