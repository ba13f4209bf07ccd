"""Learns what a chat template writes inside a reply by rendering one with and without reasoning.

Control tokens inside a reply cannot end it. Some templates (gpt-oss) write one reply as several messages, each with a
header that the model itself generates; some write their own marks around reasoning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from streamchat.base.thinking import Tags
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.rendering import UnusableTemplateError, render

# Words that no template contains.
USER, ANSWER, REASONING = "qUSERq", "qANSWERq", "qREASONINGq"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys that templates use for the reasoning of a message."""
TAG = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]|◁[^\s◁▷]+▷")
"""A mark of a template: `<think>`, `<|START_THINKING|>`, `[THINK]`, `◁think▷`."""


@dataclass(frozen=True)
class Messages:
    """Tokens and names of a reply that has several messages."""

    start: int
    """Token that opens a message; its role follows."""
    role: str
    """The role of the model's messages."""
    header_end: int
    """Token between the header of a message and its text."""
    close: int | None
    """Token that closes a message."""
    channel: int | None
    """Token before the name of the channel in a header."""
    answer: str
    """The channel of the answer; messages of other channels are reasoning."""


@dataclass(frozen=True)
class ReplyShape:
    """How a template writes a reply."""

    close: int | None = None
    """The control token that closes a message; None without one."""
    user: int | None = None
    """The control token that opens a user message; None without one."""
    user_role: str = ""
    """The text after it."""
    inside: frozenset[int] = frozenset()
    """Control tokens between the reasoning and the answer of a reply."""
    around: frozenset[int] = frozenset()
    """All control tokens of a reply and of the text after it, up to the next message."""
    prompt: str = ""
    """The text after the message when a reply is requested."""
    tags: Tags | None = None
    """The tags that the template writes around reasoning; None if unknown."""
    messages: Messages | None = None
    """None if a reply is one message."""


def learn_shape(tokenizer: Any, encoder: ChatEncoder) -> ReplyShape:
    """Render a reply with the tokenizer's template, and return its shape."""
    if encoder.format.name != "template":
        return ReplyShape()
    return _Learner(tokenizer, encoder).shape()


class _Learner:
    def __init__(self, tokenizer: Any, encoder: ChatEncoder) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder
        self._prompt = self._after_message([], add_generation_prompt=True)

    def shape(self) -> ReplyShape:
        between = [*self._encoder.close(), *self._encoder.opening(first=False)]
        close = self._leading_control(between)
        opening = between if close is None else between[between.index(close) + 1 :]
        user = self._leading_control(opening)
        plain = self._inside_reply({})
        each = [self._inside_reply({key: REASONING}) for key in REASONING_KEYS]
        reasoned = [text for text in each if REASONING in text]
        passed = [token for text in reasoned for token in self._controls(text.partition(REASONING)[2])]
        written = [token for text in (plain, *reasoned) for token in self._controls(text)]
        messages = None if user is None else self._messages(user, close, opening, plain)
        return ReplyShape(
            close,
            user,
            "" if user is None else self._role(opening[opening.index(user) + 1 :]),
            frozenset(passed),
            frozenset([*written, *(token for token in between if token in self._encoder.control_ids)]),
            self._prompt,
            None if messages or not reasoned else self._tags(reasoned[0], user),
            messages,
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _controls(self, text: str) -> list[int]:
        return [token for token in self._ids(text) if token in self._encoder.control_ids]

    def _leading_control(self, ids: list[int]) -> int | None:
        """Return the first id, after white space, if it is a control token."""
        for token in ids:
            if token in self._encoder.control_ids:
                return token
            if self._tokenizer.decode([token]).strip():
                return None
        return None

    def _role(self, ids: list[int]) -> str:
        """Return the text of `ids` up to the first control token."""
        stop = next((at for at, token in enumerate(ids) if token in self._encoder.control_ids), len(ids))
        return str(self._tokenizer.decode(ids[:stop])).strip()

    def _after_message(self, more: list[dict[str, str]], **options: Any) -> str:
        """Return what the template writes after a user message; '' if it raises."""
        messages = [{"role": "user", "content": USER}, *more]
        try:
            text = render(self._tokenizer, messages, **options, **self._encoder.format.arguments)
        except UnusableTemplateError:
            return ""
        return text.partition(USER)[2]

    def _inside_reply(self, extra: dict[str, str]) -> str:
        """Return the text of a past reply between the part shared with the generation prompt and the answer."""
        text = self._after_message([{"role": "assistant", "content": ANSWER, **extra}])
        if text.count(ANSWER) != 1:
            return ""
        text = text.partition(ANSWER)[0]
        common = _common(text, self._prompt)
        for tag in TAG.finditer(text):
            if tag.start() < common < tag.end():
                common = tag.start()
        return text[common:]

    def _messages(self, start: int, close: int | None, opening: list[int], plain: str) -> Messages | None:
        """Return the tokens of a template in which the model itself ends the header of its message."""
        prompt, inside = self._ids(self._prompt), self._ids(plain)
        header_end = next((token for token in reversed(opening) if token in self._encoder.control_ids), start)
        if start not in prompt or header_end == start or header_end not in inside:
            return None
        started = prompt[len(prompt) - prompt[::-1].index(start) :]
        if header_end in started:
            return None
        header = inside[: len(inside) - 1 - inside[::-1].index(header_end)]
        at = next((index for index, token in enumerate(header) if token in self._encoder.control_ids), None)
        channel = None if at is None else header[at]
        answer = "" if at is None else self._tokenizer.decode(header[at + 1 :]).strip()
        return Messages(start, self._role(started), header_end, close, channel, answer)

    def _tags(self, reasoned: str, start: int | None) -> Tags | None:
        before, _, after = reasoned.partition(REASONING)
        opening = ([*TAG.finditer(before)] or [*TAG.finditer(self._prompt)])[-1:]
        closing = TAG.match(after.lstrip())
        if not opening or closing is None or opening[0][0] == closing[0]:
            return None
        name = opening[0][0]
        if self._ids(name) == [start] or (name in self._prompt and not self._prompt.rstrip().endswith(name)):
            return None  # it opens the message
        label = before[opening[0].end() :].strip() if opening[0].string == before else ""
        return Tags(name, closing[0], label)


def _common(text: str, other: str) -> int:
    """Return the length of the prefix of `text` that `other` also starts with, ignoring white space."""
    at = behind = 0
    while True:
        after = len(text) - len(text[at:].lstrip())
        behind = len(other) - len(other[behind:].lstrip())
        if after == len(text) or behind == len(other) or text[after] != other[behind]:
            return at
        at, behind = after + 1, behind + 1
