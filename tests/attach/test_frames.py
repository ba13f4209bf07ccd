"""The messages between a server and its front ends."""

from __future__ import annotations

import pytest

from streamchat.attach.frames import (
    Asked,
    Hello,
    Numbered,
    Private,
    Received,
    Refusal,
    State,
    event_text,
    hello_text,
    read_from_server,
    read_request,
    received_text,
    refusal_text,
    request_text,
    state_text,
)
from streamchat.base import events as ev
from streamchat.base.errors import WireError
from streamchat.base.requests import Submit

NOTICE = ev.Notice('a "text"\nof two lines \u2028 \x9b', "warning")


def test_messages_arrive_as_they_were_sent() -> None:
    state = State("log", 7, "abc", {"temperature": 0.5}, {"temperature": "/set"}, (3, 4), (NOTICE, ev.EngineClosed()))
    for text, meant in (
        (hello_text(Hello(1, "streamchat 1", "tiny", 9, "id")), Hello(1, "streamchat 1", "tiny", 9, "id")),
        (refusal_text(Refusal("no", 5)), Refusal("no", 5)),
        (state_text(state), state),
        (event_text(NOTICE, 8), Numbered(8, NOTICE)),
        (event_text(NOTICE), Private(NOTICE)),
        (received_text(3), Received(3)),
    ):
        assert read_from_server(text) == meant
        assert "\n" not in text
    asked = Asked(2, Submit('hello "there"'))
    assert read_request(request_text(asked)) == asked


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "a message of the server is not known"),
        ("nothing", "a message must be a JSON object in UTF-8"),
        ('{"number": "1", "event": {}}', "1 is not a number of a message"),
        ('{"event": {"type": "Newer"}}', "'Newer' is not a type of event"),
        ('{"state": {}}', "a state needs the field 'events'"),
        (
            '{"hello": {"version": "1", "server": "", "model": "", "max_request": 1}}',
            "Hello.version = '1' is not valid",
        ),
        ('{"refused": {"message": "x"}}', "Refusal needs the field 'exit_code'"),
    ],
)
def test_what_is_not_valid_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(WireError, match=sentence):
        read_from_server(text)


@pytest.mark.parametrize("name", ["log", "number", "session", "settings", "origins", "unfinished", "events"])
def test_a_state_with_a_wrong_field_is_refused(name: str) -> None:
    import json

    record = json.loads(state_text(State("log", 7, "abc", {}, {}, (), ())))
    record["state"][name] = None
    with pytest.raises(WireError):
        read_from_server(json.dumps(record))
