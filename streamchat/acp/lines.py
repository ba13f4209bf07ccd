"""Passes on what a client sends line by line; a line that the SDK cannot read must not end the agent.

The SDK (0.12) assumes that every line with JSON is an object, whose id can be a key of a dictionary.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

PARSE_ERROR, INVALID_REQUEST = -32700, -32600
"""Codes of JSON-RPC."""


async def pass_on(lines: asyncio.StreamReader, valid: asyncio.StreamReader, answer: Callable[[bytes], None]) -> None:
    """Feed the lines that are messages of JSON-RPC to `valid`, up to the end; answer the others with an error.

    Args:
        lines: What the client sends.
        valid: What the SDK reads.
        answer: Sends a line to the client.
    """
    try:
        while True:
            try:
                line = await lines.readline()
            except ValueError:  # longer than the reader's limit; it has dropped the start
                answer(_error(INVALID_REQUEST, "a line is too long"))
                continue
            if not line:
                return
            if refusal := _refusal(line):
                answer(refusal)
            else:
                valid.feed_data(line if line.endswith(b"\n") else line + b"\n")
    finally:
        valid.feed_eof()


def _refusal(line: bytes) -> bytes:
    """Return the answer to a line that is not a message; b'' if it is one."""
    if not line.strip():
        return b""
    try:
        message: Any = json.loads(line)
    except (ValueError, RecursionError):
        return _error(PARSE_ERROR, "a line is not JSON; send one message per line")
    if not isinstance(message, dict):
        return _error(INVALID_REQUEST, "a line is not a JSON object; send one message per line, and no batches")
    if not isinstance(message.get("id"), str | int | float | None):
        return _error(INVALID_REQUEST, "the id of a message must be text or a number")
    if not isinstance(message.get("method"), str | None):
        return _error(INVALID_REQUEST, "the method of a message must be text", message.get("id"))
    if not isinstance(message.get("error"), dict | None):
        return _error(INVALID_REQUEST, "the error of a message must be an object", message.get("id"))
    return b""


def _error(code: int, text: str, request: str | float | None = None) -> bytes:
    answer = {"jsonrpc": "2.0", "id": request, "error": {"code": code, "message": text}}
    return json.dumps(answer).encode() + b"\n"
