"""Splits a chat template into parts: renders it with marks in place of all texts, and cuts the result at the marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise

from streamchat.conversation.template.rendering import (
    MARK,
    Marks,
    Message,
    Renderer,
    UnusableTemplateError,
    new_mark,
    new_marks,
)

TURNS = 4
"""Conversations of 1 to `TURNS` turns must have the same parts."""
LONG = 17
"""Another length of marks than the default."""


@dataclass(frozen=True)
class Parts:
    """What a template writes around the texts, without the texts."""

    system_open: str
    system_close: str
    """Between the system prompt and the first message; empty without a system prompt."""
    generation: str
    """After the newest message, if the next reply is generated."""
    reply_open: str
    """Between a message and its reply, if the reply is part of the conversation."""
    between: str
    """Between a reply and the next message."""
    consistent: bool = False
    """Whether conversations of 1 to 4 turns consist only of these parts and the texts."""


@dataclass(frozen=True)
class _Cut:
    """One rendered conversation, cut at the marks of its messages."""

    head: tuple[str, ...]
    """Before the first message: one text, or two with the system prompt between them."""
    replies: tuple[str, ...]
    betweens: tuple[str, ...]
    tail: str


def measure(render: Renderer, *, with_system: bool) -> Parts:
    """Return the parts of the template.

    Two sets of marks with different lengths are used: a part that depends on a text differs between them.

    Raises:
        UnusableTemplateError: The template raises, does not write each text once and in order, or writes texts into
            the parts.
    """
    marks = new_marks(), new_marks(LONG)
    one, two, *others = [_cut(render, each, turns, with_system) for each in marks for turns in (1, 2)]
    if others != [one, two]:  # also if one has a mark
        raise UnusableTemplateError("the text around messages depends on the messages")
    # the newest turn decides: some templates write the same turn differently later
    system_close = one.head[1] if with_system else ""
    parts = Parts(one.head[0], system_close, two.tail, two.replies[0], two.betweens[0])
    consistent = one.tail == two.tail and one.head == two.head and _keeps_to(render, parts, with_system)
    return replace(parts, consistent=consistent)


def natural_close(render: Renderer) -> str:
    """Return what the template writes after the last reply of a conversation; '' if that is unknown."""
    reply = new_mark()
    try:
        text = render(conversation([new_mark(), reply]))
    except UnusableTemplateError:
        return ""
    close = text.partition(reply)[2]
    return "" if MARK.search(close) else close


def _keeps_to(render: Renderer, parts: Parts, with_system: bool) -> bool:
    head = (parts.system_open, parts.system_close) if with_system else (parts.system_open,)
    for turns in range(3, TURNS + 1):
        try:
            cut = _cut(render, new_marks(), turns, with_system)
        except UnusableTemplateError:
            return False
        expected = _Cut(head, (parts.reply_open,) * (turns - 1), (parts.between,) * (turns - 1), parts.generation)
        if cut != expected:
            return False
    return True


def _cut(render: Renderer, marks: Marks, turns: int, with_system: bool) -> _Cut:
    texts = [text for pair in zip(marks.users, marks.replies, strict=True) for text in pair][: 2 * turns - 1]
    text = render(conversation(texts, marks.system if with_system else None), generation=True)
    start, *inner, tail = split(text, texts)
    head = tuple(start.split(marks.system)) if with_system else (start,)
    if len(head) != 1 + with_system:
        raise UnusableTemplateError("it does not write the system prompt once and before the first message")
    return _Cut(head, tuple(inner[::2]), tuple(inner[1::2]), tail)


def conversation(texts: Sequence[str], system_prompt: str | None = None) -> list[Message]:
    """Return alternating user and assistant messages, after a system prompt if there is one."""
    start = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    roles = cycle(("user", "assistant"))
    return start + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def split(text: str, marks: Sequence[str]) -> list[str]:
    """Cut `text` at each of `marks`.

    Raises:
        UnusableTemplateError: A mark is missing, repeated or out of order.
    """
    places = [text.find(mark) for mark in marks]
    if any(text.count(mark) != 1 for mark in marks) or any(a > b for a, b in pairwise(places)):
        raise UnusableTemplateError("it does not write each message once and in order")
    pieces, at = [], 0
    for place, mark in zip(places, marks, strict=True):
        pieces.append(text[at:place])
        at = place + len(mark)
    return [*pieces, text[at:]]


def first_system(render: Renderer) -> tuple[str, str]:
    """Return what a template writes before and after the system prompt in a conversation of one message.

    Raises:
        UnusableTemplateError: The template does not write the system prompt once and before the message.
    """
    cut, other = (_cut(render, each, 1, True) for each in (new_marks(), new_marks(LONG)))
    if cut != other:
        raise UnusableTemplateError("the text around the system prompt depends on it")
    before, after = cut.head
    return before, after
