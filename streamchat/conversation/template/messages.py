"""Whole lists of messages for the template, as APIs and imports have them: content parts, tools, calls, and results.

The template gets messages and tools as they are, with all keys: `content` as a list of parts, `tool_calls`, messages of
the role `tool`. There are two exceptions. A template that reads text only gets the joined text of text parts. And names
of control tokens in the data are hidden from the template and put back into its text as ordinary letters, so that no
text of a message, a tool, or a result becomes a control token. Replies keep the tags around their reasoning, which
templates look for.

Chats do not need this: they are written turn by turn (`format`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.conversation.encoding import TextEncoder
from streamchat.conversation.safe_text import Span
from streamchat.conversation.template.arguments import NO_ARGUMENTS, Arguments
from streamchat.conversation.template.rendering import (
    MARK,
    Message,
    Renderer,
    UnusableTemplateError,
    new_mark,
)


@dataclass(frozen=True)
class RenderedMessages:
    """The text of a list of messages."""

    text: str
    letters: tuple[Span, ...]
    """Spans with names of control tokens that came from the data and are ordinary letters."""
    ids: tuple[int, ...]


def render_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    arguments: Arguments = NO_ARGUMENTS,
    generation: bool = True,
    moment: datetime | None = None,
) -> RenderedMessages:
    """Render a list of messages with the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: Messages with `role`, and what the template reads besides: `content`, `tool_calls`, `name`, ...
        tools: Descriptions of tools, as JSON schemas.
        arguments: Arguments for the template.
        generation: Whether to open the next reply at the end.
        moment: The time that the template's clock shows; now by default.

    Raises:
        ConfigError: A message has a part that is not text, and the template reads text only.
        UnusableTemplateError: The template raises.
    """
    render = Renderer(tokenizer, moment or datetime.now(), arguments)
    given = list(messages) if reads_parts(render) else [_as_text(i, each) for i, each in enumerate(messages, 1)]
    encoder = TextEncoder(tokenizer, render.source)
    hidden = _Hidden(encoder)
    shown = [hidden.hide(each, replies=each.get("role") == "assistant") for each in given]
    text, letters = hidden.put_back(render(shown, generation=generation, tools=[hidden.hide(each) for each in tools]))
    return RenderedMessages(text, letters, tuple(encoder.rendered(text, letters)))


def reads_parts(render: Renderer) -> bool:
    """Return whether the template writes a list with a text part as it writes the text itself."""
    mark = new_mark()

    def written(content: Any) -> str:
        return render([{"role": "user", "content": content}], generation=True)

    try:
        return written([{"type": "text", "text": mark}]) == written(mark)
    except UnusableTemplateError:
        return False


def _as_text(number: int, message: Message) -> Message:
    """Return `message` with the joined text of its parts; unchanged if its content is not a list."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ConfigError(
                f"message {number} has a part of the type {kind!r}; this model's chat template reads text only"
            )
    return {**message, "content": "".join(part["text"] for part in content)}


class _Hidden:
    """Puts marks in place of the names of control tokens, and the names in place of the marks."""

    def __init__(self, encoder: TextEncoder) -> None:
        names = sorted(encoder.control_names, reverse=True)  # a name before one that it starts with
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._reasoning = encoder.reasoning_names
        self._marks: dict[str, str] = {}

    def hide(self, value: Any, *, replies: bool = False) -> Any:
        """Return a copy of `value` without names of control tokens; `replies` keep tags of reasoning."""
        keep = self._reasoning if replies else frozenset[str]()
        return self._map(value, lambda match: match[0] if match[0] in keep else self._mark(match[0]))

    def put_back(self, text: str) -> tuple[str, tuple[Span, ...]]:
        """Return `text` with names in place of marks, and their spans."""
        pieces, spans, length, at = list[str](), list[Span](), 0, 0
        for match in MARK.finditer(text):
            name = self._marks.get(match[0])
            if name is not None:
                pieces += [text[at : match.start()], name]
                length += match.start() - at + len(name)
                spans.append((length - len(name), length))
                at = match.end()
        return "".join([*pieces, text[at:]]), tuple(spans)

    def _mark(self, name: str) -> str:
        mark = new_mark()
        self._marks[mark] = name
        return mark

    def _map(self, value: Any, change: Callable[[re.Match[str]], str]) -> Any:
        if isinstance(value, str):
            return value if self._names is None else self._names.sub(change, value)
        if isinstance(value, Mapping):
            return {self._map(key, change): self._map(each, change) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._map(each, change) for each in value]
        return value
