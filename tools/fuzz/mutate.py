"""Changes inputs at random, without coverage. For the test suite, which has no atheris and little time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from tools.fuzz.json_mutate import mutate_json

JSON_SHARE = 0.5
"""Share of changes that keep JSON valid, where there is any."""
NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"9" * 400, b"4294967296", b"-9223372036854775809", b"0.1")
BYTES = (b"\0", b"\xff", b"\x1b[2J", b"\x7f", b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\\")
BRACKETS = (b"[" * 3000, b'{"a":' * 2000, b"(" * 500)


def mutations(
    corpus: Sequence[bytes], words: Sequence[bytes], *, seed: int, count: int, max_bytes: int
) -> Iterator[bytes]:
    """Yield `count` inputs, each made from an input of the corpus by a few changes. A seed gives the same inputs."""
    rng = random.Random(seed)
    for _ in range(count):
        data = rng.choice(corpus)
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            changed = mutate_json(rng, data) if rng.random() < JSON_SHARE else None
            data = _changed(rng, data, corpus, words) if changed is None else changed
        yield data[:max_bytes]


def _changed(rng: random.Random, data: bytes, corpus: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    first, last = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    stop = min(len(data), first + rng.choice((1, 1, 2, 4, 8, 32)))
    match rng.randrange(10):
        case 0 if data:
            return data[:first] + bytes([rng.randrange(256)]) + data[first + 1 :]
        case 1 if data:
            at = min(first, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:first] + data[stop:]
        case 3:
            return data[:first] + data[first:last] * rng.choice((2, 2, 2, 3, 20)) + data[last:]
        case 4:
            other = rng.choice(corpus)
            return data[:first] + other[rng.randint(0, len(other)) :]
        case 5:
            return data[: rng.randint(0, len(data))]
        case 6:
            return data[:first] + rng.choice((*NUMBERS, *BYTES)) + data[stop:]
        case 7:
            return data[:first] + rng.choice(BRACKETS if rng.random() < 0.1 else BYTES) + data[first:]
        case 8 if words:
            return data[:first] + rng.choice(words) + data[stop:]
        case _ if words:
            return data[:first] + rng.choice(words) + data[first:]
        case _:
            return data[:first] + rng.randbytes(stop - first) + data[stop:]
