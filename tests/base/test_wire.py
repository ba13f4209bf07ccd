"""Requests and events as JSON: all of them come back as they were, and nothing else comes back at all."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base import events, requests, wire
from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import WireError

INT64 = st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def defined_in(module: types.ModuleType) -> list[type[Any]]:
    """Dataclasses that a module defines."""
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    return [each for each in classes if dataclasses.is_dataclass(each)]


def all_requests() -> list[type[Any]]:
    return defined_in(requests)


def all_events() -> list[type[Any]]:
    names = [f"{events.__name__}.{info.name}" for info in pkgutil.iter_modules(events.__path__)]
    modules = [importlib.import_module(name) for name in names]
    found = [each for module in modules for each in defined_in(module)]
    return [each for each in found if issubclass(each, ev.Event) and each is not ev.Event]


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, also the ones at its edges."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of([values(each) for each in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})  # type: ignore[arg-type]
    if hint is str:
        return st.text() | st.sampled_from(["\u2028", "\x1b[2J", "inf", "\udc80", "🌊", '"', "\\"])
    return {int: INT64, float: st.floats(), bool: st.booleans(), type(None): st.none()}[hint]


@given(st.data())
@pytest.mark.parametrize("kind", [*all_requests(), *all_events()], ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was(kind: type[Any], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    line = wire.to_json(message)
    assert "\n" not in line
    assert line.encode()
    read = wire.event_from_json if issubclass(kind, ev.Event) else wire.request_from_json
    for text in (line, line.encode()):
        assert repr(read(text)) == repr(message)  # repr: NaN differs from itself, and 1 equals 1.0


def test_every_class_has_a_place() -> None:
    assert set(wire.REQUESTS.values()) == set(all_requests())
    assert set(wire.EVENTS.values()) == set(all_events())
    assert not any(field.name == "type" for kind in wire.EVENTS.values() for field in dataclasses.fields(kind))
    assert not any(field.name == "type" for kind in wire.REQUESTS.values() for field in dataclasses.fields(kind))


def test_the_form() -> None:
    assert wire.to_json(rq.Submit("Grüße\n")) == '{"type": "Submit", "text": "Grüße\\n"}'
    assert wire.to_json(rq.Stop()) == '{"type": "Stop"}'
    assert wire.to_json(ev.SummaryReady("s", (1, 2))) == '{"type": "SummaryReady", "text": "s", "turns": [1, 2]}'
    assert '"value": {"float": "inf"}' in wire.to_json(rq.SetOption("temperature", float("inf")))
    assert wire.request_from_json('{"type": "Undo"}') == rq.Undo()  # it has a default
    assert wire.request_from_json('{"type": "SetOption", "name": "top_p", "value": 1}') == rq.SetOption("top_p", 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a request must be a JSON object in UTF-8"),
        ("[]", "a request = [] is not valid; it must be an object"),
        ("{}", "None is not a type of request; choose from Submit, Retry, "),
        ('{"type": "Notice", "text": "an event"}', "'Notice' is not a type of request"),
        ('{"type": ["Pin"], "turn": 1}', "['Pin'] is not a type of request"),
        ('{"type": "Pin"}', "Pin needs the field 'turn'"),
        ('{"type": "Pin", "turn": 1, "all": 2}', "Pin has no field 'all'"),
        ('{"type": "Pin", "turn": 1, "turn": 2}', "a field is given twice"),
        ('{"type": "Pin", "turn": "1"}', "Pin.turn = '1' is not valid; it must be a whole number"),
        ('{"type": "Pin", "turn": true}', "Pin.turn = True is not valid; it must be a whole number"),
        ('{"type": "Pin", "turn": 1.0}', "Pin.turn = 1.0 is not valid; it must be a whole number"),
        ('{"type": "Pin", "turn": 9223372036854775808}', "it must be a whole number"),
        ('{"type": "Pin", "turn": NaN}', "NaN is not JSON"),
        (
            '{"type": "SetOption", "name": "top_p", "value": 1e999}',
            "SetOption.value = inf is not valid; it must be text or",
        ),
        ('{"type": "SetOption", "name": "top_p", "value": {"float": "1"}}', "it must be text or"),
        ('{"type": "SetOption", "name": "top_p", "value": [1]}', "it must be text or"),
        ('{"type": "Undo", "to_edit": 0}', "Undo.to_edit = 0 is not valid; it must be true or false"),
        ('{"type": "Submit", "text": null}', "Submit.text = None is not valid; it must be text"),
        ('{"type": "Submit", "text": ' + "[" * 100_000, "a request is nested too deeply"),
        ('{"type": "Pin", "turn": ' + "9" * 5000 + "}", "a request has a number with too many digits"),
        (b'{"type": "Submit", "text": "\xff"}', "a request must be a JSON object in UTF-8"),
        (b"\xff\xfe{\x00}\x00", "a request must be a JSON object in UTF-8"),
        ('{"type": "Submit", "text": "' + "x" * wire.MAX_REQUEST + '"}', "the limit is 16,777,216"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_are_one_sentence(text: str | bytes, sentence: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.request_from_json(text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_event_names_the_place_that_is_wrong() -> None:
    record = json.loads(wire.to_json(ev.SummaryReady("s", (1, 2))))
    for turns, sentence in (
        ([1], "SummaryReady.turns = [1] is not valid; it must be a list of 2"),
        ([1, "x"], "SummaryReady.turns[1] = 'x' is not valid; it must be a whole number"),
        ("12", "SummaryReady.turns = '12' is not valid; it must be a list"),
    ):
        with pytest.raises(WireError) as caught:
            wire.event_from_json(json.dumps(record | {"turns": turns}))
        assert str(caught.value) == sentence
    with pytest.raises(WireError, match="'loud' is not valid; it must be 'info' or 'warning' or 'error'"):
        wire.event_from_json('{"type": "Notice", "text": "", "level": "loud"}')
    with pytest.raises(WireError, match="'Submit' is not a type of event"):
        wire.event_from_json(wire.to_json(rq.Submit("a request")))


@given(st.sampled_from([*wire.REQUESTS, *wire.EVENTS]), st.data())
def test_whatever_a_field_is_nothing_but_a_wire_error_comes_of_it(name: str, data: st.DataObject) -> None:
    """One field of a valid message becomes anything, is left out, or is added."""
    kind = wire.REQUESTS.get(name) or wire.EVENTS[name]
    record = json.loads(wire.to_json(data.draw(values(kind))))
    at: Any = record
    while at and data.draw(st.booleans()):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        inner = [key for key in keys if isinstance(at[key], dict | list)]
        if not inner:
            break
        at = at[data.draw(st.sampled_from(inner))]
    if isinstance(at, dict):
        at[data.draw(st.sampled_from([*at, "other"]))] = data.draw(JSON)
    else:
        at.append(data.draw(JSON))
    for read in (wire.request_from_json, wire.event_from_json):
        try:
            message = read(json.dumps(record))
        except WireError:
            continue
        assert repr(read(wire.to_json(message))) == repr(message)  # it was valid all the same


@given(JSON)
def test_any_json_is_a_message_or_a_wire_error(value: Any) -> None:
    for read in (wire.request_from_json, wire.event_from_json):
        with pytest.raises(WireError):
            read(json.dumps(value))
