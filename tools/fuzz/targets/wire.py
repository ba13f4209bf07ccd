"""Requests and events from another process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from streamchat.base.errors import WireError
from streamchat.base.requests import Edit, Pin, Request, SetOption, Submit
from streamchat.base.wire import event_from_json, request_from_json, to_json
from tools.fuzz.target import Target

READERS: tuple[Callable[[bytes | str], Any], ...] = (request_from_json, event_from_json)


def run(data: bytes) -> None:
    """Read the input as both; write what was read, and read it again."""
    refusal: WireError | None = None
    for read in READERS:
        try:
            message = read(data)
            written = to_json(message)
            again = read(written)
        except WireError as error:
            refusal = error
        else:
            assert to_json(again) == written
            return
    assert refusal is not None
    raise refusal


def seeds() -> dict[str, bytes]:
    """Requests, and events with nested figures."""
    requests: dict[str, Request] = {"submit": Submit("hi"), "edit": Edit("hi"), "set": SetOption("seed", 3)}
    requests["pin"] = Pin(2)
    cache = {"length": 3, "cache_size": 64, "num_sink_tokens": 4, "pinned_tokens": 0}
    events = {
        "delta": {"type": "TextDelta", "turn": 1, "text": "a"},
        "notice": {"type": "Notice", "text": "a", "level": "warning"},
        "sampled": {"type": "StatusSampled", "cache": cache, "memory": {"rss_bytes": 1}, "ttft_s": {"float": "inf"}},
        "loading": {"type": "ModelLoading", "stage": "a", "done": 1, "total": 2},
    }
    written = {name: to_json(request).encode() for name, request in requests.items()}
    return written | {name: json.dumps(event).encode() for name, event in events.items()}


TARGET = Target(
    "wire",
    run,
    seeds,
    ("streamchat.base.wire",),
    (WireError,),
    (
        b'"type"',
        b'{"float": "nan"}',
        b"null",
        b"[]",
        b'"Submit"',
        b"true",
        b"1e400",
        b"\\ud800",
        b'"TurnFinished"',
        b'"stats"',
    ),
    suite_runs=500,
)
