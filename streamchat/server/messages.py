"""Reads the messages of a request: system prompt, earlier exchanges, and the message to reply to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamchat.base.sanitize import encodable
from streamchat.server.calls import Exchange
from streamchat.server.errors import ApiError, wrong_value
from streamchat.server.fields import is_one_of, shown

_SYSTEM = ("system", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "function_call": (),
    "name": ("",),
    "logprobs": ([],),
}
"""Fields of a message that are not served, and their values besides null that ask for nothing."""
_PASSED = ("role", "content", "type", "id", "status", "reasoning_content", "reasoning")
"""Fields that are read, or that say nothing that a model reads: templates leave out the reasoning of past replies."""
JOIN = "\n\n"
"""Between messages of one role that follow each other."""


@dataclass
class Messages:
    """The messages of a request."""

    system: list[str] = field(default_factory=list)
    history: list[Exchange] = field(default_factory=list)
    message: str = ""


def read_messages(given: Sequence[Any], where: str, limit: int) -> Messages:
    """Return the messages of a request.

    Args:
        given: The list in the body.
        where: Its name.
        limit: Maximum number of messages.

    Raises:
        ApiError: A message is not valid, or the last one is not the user's.
    """
    if not given:
        raise wrong_value(where, f"{where} is empty; it needs at least one message of the user")
    if len(given) > limit:
        raise ApiError(
            400, f"{where} has {len(given):,} messages; at most {limit:,} are possible", where, "too_many_messages"
        )
    read = Messages()
    turns: list[tuple[str, str]] = []
    for number, each in enumerate(given):
        place = f"{where}[{number}]"
        role, text = _message(each, place)
        if role == "system":
            if turns:
                raise wrong_value(place, f"{place}: a {each['role']} message must come before all others")
            read.system.append(text)
        elif turns and turns[-1][0] == role:
            turns[-1] = role, turns[-1][1] + JOIN + text
        else:
            turns.append((role, text))
    if not turns or turns[-1][0] != "user":
        raise wrong_value(where, f"the last item of {where} must be a message of the user, which is replied to")
    read.message = turns.pop()[1]
    read.history = _exchanges(turns)
    return read


def _exchanges(turns: list[tuple[str, str]]) -> list[Exchange]:
    messages: list[str | None] = [text for role, text in turns if role == "user"]
    replies = [text for role, text in turns if role == "assistant"]
    if len(replies) > len(messages):  # the client has dropped the first message and not its reply
        messages.insert(0, None)
    return [Exchange(message, reply) for message, reply in zip(messages, replies, strict=True)]


def _message(given: Any, place: str) -> tuple[str, str]:
    """Return role and text of one message."""
    if not isinstance(given, dict):
        raise wrong_value(place, f"{place} must be an object, not {shown(given)}")
    if given.get("type") not in (None, "message"):
        raise ApiError(
            400, f"{place}.type = {shown(given['type'])} is not served; only messages are", place, "unsupported_value"
        )
    role = given.get("role")
    if role not in (*_SYSTEM, "user", "assistant"):
        raise wrong_value(
            place, f"{place}.role = {shown(role)} is not served; it must be system, developer, user, or assistant"
        )
    for name, value in given.items():
        if name in _PASSED or value is None or is_one_of(value, _NEUTRAL.get(name, ())):
            continue
        raise ApiError(
            400, f"{place}.{name[:80]} is not served; leave it out", f"{place}.{name[:80]}", "unsupported_parameter"
        )
    return "system" if role in _SYSTEM else role, encodable(_content(given.get("content"), f"{place}.content"))


def _content(given: Any, place: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise wrong_value(place, f"{place} must be a text or a list of text parts, not {shown(given)}")
    texts = []
    for number, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ApiError(
                400,
                f"{place}[{number}] = {shown(kind)} is not served; only text parts are",
                f"{place}[{number}]",
                "unsupported_value",
            )
        texts.append(part["text"])
    return "".join(texts)
