"""The bodies of API requests: each is read, or refused with an error in the format that clients expect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from streamchat.config.settings import Settings
from streamchat.server.errors import ApiError
from streamchat.server.known import ReplyId, exchange_key
from streamchat.server.limits import read_json
from streamchat.server.requests import Served, read_completion, read_response
from tools.fuzz.target import Target

SERVED = Served(("tiny",), Settings(), 64)


def run(data: bytes) -> None:
    """Read a body as a chat completion and as a response."""
    refusal: ApiError | None = None
    for read in (read_completion, read_response):
        try:
            body = asyncio.run(read_json(_pieces(data), 8192))
            asked = read(body, SERVED)
        except ApiError as error:
            json.dumps(error.as_dict(), ensure_ascii=False).encode()
            refusal = error
            continue
        prompt = asked.prompt
        prompt.message.encode()
        for exchange in prompt.history:
            exchange_key(exchange)
        ReplyId.parse(prompt.previous)
        json.dumps(prompt.settings, allow_nan=False)
    if refusal is not None:
        assert 400 <= refusal.status < 500
        raise refusal


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 100):
        yield data[at : at + 100]


def seeds() -> dict[str, bytes]:
    """Bodies of both kinds, with most fields."""
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    reply = {"role": "assistant", "content": "yo", "tool_calls": []}
    bodies = {
        "completion": {"model": "tiny", "messages": [system, user, reply, parts], "stream": True},
        "sampling": {
            "model": "tiny",
            "messages": [user],
            "temperature": 0.5,
            "max_tokens": 5,
            "stop": ["a"],
            "seed": 1,
        },
        "options": {"model": "tiny", "messages": [user], "stream_options": {"include_usage": True}, "stream": True},
        "response": {"model": "tiny", "input": "hi", "instructions": "be kind", "previous_response_id": "resp_ab_1_c"},
        "list": {"model": "tiny", "input": [user], "text": {"format": {"type": "text"}}, "user": "u", "store": False},
    }
    return {name: json.dumps(body).encode() for name, body in bodies.items()}


WORDS = (
    *b'"role" "content" null [] {} true -1 1e999 "top_k" "tools" "n" \\ud800 "logit_bias" "input_text"'.split(),
    *b'"response_format" "reasoning" "metadata" \\u001b[2J "type"'.split(),
)
TARGET = Target(
    "api",
    run,
    seeds,
    ("streamchat.server",),
    (ApiError,),
    WORDS,
    suite_runs=200,
)
