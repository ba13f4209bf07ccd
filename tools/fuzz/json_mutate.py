"""Changes JSON so that it remains valid: bytes changed at random would nearly always be refused by the JSON parser."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", "a", "\0", "\x1b[2J", "a\nb", "\ud800", "é" * 300, "-1", "../x", "null"),
    *([], [[]], [None], [1, 0], [[5, 2]], {}, {"a": 1}, {"": {}}),
)
Place = tuple[Any, Any]
"""A list or an object, and an index or a key in it."""


def mutate_json(rng: random.Random, data: bytes) -> bytes | None:
    """Return `data` with one value of its JSON changed; None if it has no JSON.

    The JSON may be one line of several, and one byte may stand before it.
    """
    lines = data.split(b"\n")
    for at in rng.sample(range(len(lines)), len(lines))[:4]:
        for start in (0, 1):
            try:
                value = json.loads(lines[at][start:])
            except (ValueError, RecursionError):
                continue
            lines[at] = lines[at][:start] + _changed(rng, value)
            return b"\n".join(lines)
    return None


def _changed(rng: random.Random, value: Any) -> bytes:
    outer = [value]
    holder, key = rng.choice([*_places(outer)])
    other_holder, other_key = rng.choice([*_places(outer)])
    match rng.randrange(6):
        case 0 if isinstance(holder, dict):
            holder[rng.choice(("", "a", "type", str(other_key), "\x1b[2J"))] = holder.pop(key)
        case 1 if holder is not outer:
            del holder[key]
        case 2:
            holder[key] = json.loads(json.dumps(other_holder[other_key]))
        case 3 if isinstance(holder, list):
            holder[key:key] = [json.loads(json.dumps(holder[key]))] * rng.choice((1, 1, 2, 40))
        case _:
            holder[key] = rng.choice(VALUES)
    return json.dumps(outer[0]).encode()


def _places(holder: Any) -> Iterator[Place]:
    """Yield all places inside a list or an object."""
    keys: Sequence[Any] = range(len(holder)) if isinstance(holder, list) else [*holder]
    for key in keys:
        yield holder, key
        if isinstance(holder[key], list | dict):
            yield from _places(holder[key])
