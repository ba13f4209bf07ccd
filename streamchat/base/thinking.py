"""Split the reasoning of a reply, `<think> ... </think>`, from its answer, also while the text streams.

Whatever tags a model writes around its reasoning, the text of a reply contains `<think>` and `</think>` instead (see
`streamchat.conversation.reasoning`). Front ends, exports and saved sessions all split it with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamchat.base.formatting import plural

Kind = Literal["thought", "answer"]


@dataclass(frozen=True)
class Tags:
    """The texts that enclose reasoning."""

    opening: str
    closing: str
    """'' if only a control token closes it."""
    label: str = ""
    """A name after the opening tag that is not shown."""


THINK = Tags("<think>", "</think>")


@dataclass(frozen=True)
class Part:
    """A piece of a reply: reasoning or answer."""

    kind: Kind
    text: str


class ThinkingStream:
    """Splits a reply that arrives in pieces. Tags are removed; all other text is returned once, in order.

    A reasoning block opens only at the start of the reply or directly after another block: a `<think>` in the middle of
    a sentence is text. White space around the block is removed.

    Args:
        tags: All tags that may open a block.
        inside: Tags of a block that is already open before the first piece.
    """

    def __init__(self, tags: Sequence[Tags] = (THINK,), inside: Tags | None = None) -> None:
        self._tags = tuple(tags)
        self._block: Tags | None = None
        """Tags of the open block."""
        self._pending = ""
        """Text that may be the start of a tag."""
        self._at_start = True
        self._thought = False
        """A block was found."""
        self._has_text = False
        """The open block has text."""
        self._repeated = "" if inside is None else inside.opening
        """Opening tag at the end of the prompt, which the model may repeat."""
        if inside is not None:
            self.open(inside)

    @property
    def inside(self) -> bool:
        """Whether a reasoning block is open."""
        return self._block is not None

    def feed(self, text: str) -> list[Part]:
        """Add text and return the parts that are certain now."""
        self._pending += text
        return self._drain(final=False)

    def end(self) -> list[Part]:
        """Return what was held back, at the end of the text or before a control token."""
        return self._drain(final=True)

    def open(self, tags: Tags) -> list[Part]:
        """Open a block at a control token; return what was held back before it."""
        parts = self.end()
        self._block, self._thought, self._has_text = tags, True, False
        return parts

    def close(self) -> list[Part]:
        """Close the open block, if any, at a control token; return what was held back before it."""
        if self._block is not None:
            self._pending = self._pending.rstrip("\n")
        parts = self.end()
        self._block, self._at_start = None, True
        return parts

    def _drain(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._pending:
            length, block = len(self._pending), self._block
            part = self._outside(final) if block is None else self._inside(block, final)
            if part.text:
                parts.append(part)
            if len(self._pending) == length:
                break
        return _joined(parts)

    def _outside(self, final: bool) -> Part:
        text = self._pending
        if self._at_start:
            bare = text.lstrip()
            for tags in self._tags:
                if bare.startswith(tags.opening):
                    self._pending, self._block = bare[len(tags.opening) :], tags
                    self._thought, self._has_text = True, False
                    return Part("thought", "")
                if tags.closing and bare.startswith(tags.closing):  # there is nothing to close
                    self._pending, self._thought = bare[len(tags.closing) :], True
                    return Part("answer", "")
            if not final and any(tag.startswith(bare) for tags in self._tags for tag in (tags.opening, tags.closing)):
                return Part("answer", "")  # may become a tag
            self._at_start = False
            text = bare if self._thought else text
        self._pending = ""
        return Part("answer", text)

    def _inside(self, block: Tags, final: bool) -> Part:
        if not self._has_text and not self._skip_to_text(block, final):
            return Part("thought", "")
        if not block.closing:
            text, self._pending = self._pending, ""
            return Part("thought", text)
        text, tag, rest = self._pending.partition(block.closing)
        if tag:
            self._pending, self._block = rest, None
            return Part("thought", text.rstrip("\n"))
        keep = 0 if final else _tag_and_line_ends(self._pending, block.closing)
        cut = len(self._pending) - keep
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return Part("thought", text)

    def _skip_to_text(self, block: Tags, final: bool) -> bool:
        """Remove what precedes the first word of a block; return whether that word has arrived."""
        self._pending = self._pending.lstrip("\n")
        for name in filter(None, (self._repeated, block.label)):
            bare = self._pending.lstrip()
            if bare.startswith(name):
                self._pending = bare[len(name) :].lstrip("\n")
            elif bare and name.startswith(bare) and not final:
                return False
        if self._pending:
            self._has_text, self._repeated = True, ""
        return self._has_text


def tag_prefix_length(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the start of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)


def _tag_and_line_ends(text: str, tag: str) -> int:
    """As `tag_prefix_length`, plus the line ends before it."""
    size = tag_prefix_length(text, tag)
    before = text[: len(text) - size]
    return size + len(before) - len(before.rstrip("\n"))


def _joined(parts: list[Part]) -> list[Part]:
    out: list[Part] = []
    for part in parts:
        if out and out[-1].kind == part.kind:
            out[-1] = Part(part.kind, out[-1].text + part.text)
        else:
            out.append(part)
    return out


def split(reply: str) -> tuple[str, str]:
    """Return the reasoning and the answer of a complete reply."""
    stream = ThinkingStream()
    parts = [*stream.feed(reply), *stream.end()]
    thoughts, answer = ("".join(part.text for part in parts if part.kind == kind) for kind in ("thought", "answer"))
    return thoughts, answer


ONLY_REASONING = "only reasoning, and no answer"


def plain_text(reply: str, thinking: str) -> str:
    """Return a complete reply as plain text, with its reasoning as the setting `thinking` displays it."""
    thoughts, answer = split(reply)
    if thoughts and thinking == "show":
        return f"{thoughts}\n\n{answer}".rstrip("\n")
    if thoughts and not answer:
        return f"({ONLY_REASONING})"
    return f"(thought for {word_count(thoughts)})\n\n{answer}" if thoughts and thinking == "collapse" else answer


def word_count(text: str) -> str:
    """Return "1 word" or "1,234 words"."""
    return plural(len(text.split()), "word")
