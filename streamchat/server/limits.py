"""Limits on requests, so that no client can take the memory or the time of all."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from streamchat.base.formatting import human_bytes
from streamchat.server.errors import ApiError
from streamchat.server.fields import shown

BODY_S = 30.0
"""How long a client may take to send the body of a request."""


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    requests: int = 64
    """Requests that run or wait at a time; more get status 429."""
    seconds: float = 600.0
    """Time of one request; then its reply is stopped."""
    body_bytes: int = 8_000_000
    messages: int = 4096
    """Messages in one request."""


class Admission:
    """Counts the requests that run or wait. Used on the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.running = 0
        self.refused = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Count a request for the length of the block.

        Raises:
            ApiError: Too many requests run or wait.
        """
        if self.running >= self._limit:
            self.refused += 1
            raise ApiError(
                429,
                f"{self._limit} requests run or wait already; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


async def read_json(stream: AsyncIterator[bytes], max_bytes: int) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises:
        ApiError: It is too long, too slow, or not a JSON object.
    """
    return parse_json(await read_body(stream, max_bytes))


async def read_body(stream: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: It is too long or too slow.
    """
    from starlette.requests import ClientDisconnect

    try:
        async with asyncio.timeout(BODY_S):
            data = bytearray()
            async for piece in stream:
                data += piece
                if len(data) > max_bytes:
                    raise ApiError(
                        413, f"the body is longer than {human_bytes(max_bytes)}; send less", code="body_too_large"
                    )
    except ClientDisconnect:
        raise ApiError(400, "the client is gone", code="client_gone") from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", code="body_too_slow") from None
    return bytes(data)


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ApiError: It is not one.
    """
    try:
        text = data.decode("utf-8")
        body = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # also invalid UTF-8, and numbers with too many digits
        raise ApiError(400, f"the body is not JSON in UTF-8 ({error})", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. Of two equal names, some programs read the first one and some the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        message = f"the name {shown(twice)} occurs more than once in one object; send it once"
        raise ApiError(400, message, twice[:80], "invalid_json")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
