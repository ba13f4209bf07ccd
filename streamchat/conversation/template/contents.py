"""How a template writes the texts of messages and replies: trimmed, without reasoning, or changed in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamchat.conversation.template.rendering import MARK, Message, Renderer, UnusableTemplateError


@dataclass(frozen=True)
class Frame:
    """A conversation with a variable text.

    Args:
        messages: Returns the conversation for a text.
        before: What the template writes before the text.
        after: What the template writes after the text.
    """

    messages: Callable[[str], list[Message]]
    before: str
    after: str

    def content(self, render: Renderer, text: str) -> str | None:
        """Return `text` as the template writes it; None if the text around it has changed."""
        try:
            rendered = render(self.messages(text), generation=True)
        except UnusableTemplateError:
            return None
        stop = len(rendered) - len(self.after)
        if len(self.before) > stop or not (rendered.startswith(self.before) and rendered.endswith(self.after)):
            return None
        content = rendered[len(self.before) : stop]
        return content if len(MARK.findall(content)) <= len(MARK.findall(text)) else None


@dataclass(frozen=True)
class Contents:
    """The template's own handling of messages and replies."""

    render: Renderer
    first: Frame
    """Frame of the first message of a conversation."""
    later: Frame
    """Frame of a later message."""
    reply: Frame
    """Frame of a reply that is followed by another message."""

    def message(self, text: str, first: bool) -> str | None:
        """Return a message as the template writes it, never empty; None if that is unknown."""
        content = (self.first if first else self.later).content(self.render, text)
        return None if content is not None and text.strip() and not content.strip() else content

    def given(self, text: str) -> str | None:
        """Return a reply as the template writes it before another message; None if that is unknown."""
        return self.reply.content(self.render, text)
