"""Reasoning in the text of a reply: `<think> ... </think>` split from the answer, also while the text arrives.

Whatever marks a model writes around its reasoning, the text of a reply has `<think>` and `</think>` in their place
(see `streamchat.conversation.reasoning`). Front ends, exports and saved sessions therefore all split it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamchat.base.formatting import plural

Kind = Literal["thought", "answer"]


@dataclass(frozen=True)
class Tags:
    """The texts around reasoning."""

    opening: str
    closing: str
    """'' if no text closes it."""
    label: str = ""
    """A name that follows the opening tag and is not shown."""


THINK = Tags("<think>", "</think>")


@dataclass(frozen=True)
class Part:
    """A stretch of a reply."""

    kind: Kind
    text: str


class ThinkingStream:
    """Splits a reply that arrives in pieces. Tags are left out; everything else comes out once, in order.

    Only what opens at the start of the reply, or directly after another block, is a reasoning block: a `<think>` in the
    middle of a sentence is text. White space around the block is dropped with it.

    Args:
        tags: All tags that may open a block.
        inside: The tags of a block that is open before the first piece.
    """

    def __init__(self, tags: Sequence[Tags] = (THINK,), inside: Tags | None = None) -> None:
        self._tags = tuple(tags)
        self._block: Tags | None = None
        """Tags of the open block."""
        self._held = ""
        """Text that may be the beginning of a tag."""
        self._at_start = True
        self._thought = False
        """There was a block."""
        self._begun = False
        """The open block has text."""
        self._repeated = "" if inside is None else inside.opening
        """What the model may repeat, as the prompt ended with it."""
        if inside is not None:
            self.open(inside)

    @property
    def inside(self) -> bool:
        """A reasoning block is open."""
        return self._block is not None

    def feed(self, text: str) -> list[Part]:
        """Return the parts that are certain after `text`."""
        self._held += text
        return self._take(final=False)

    def end(self) -> list[Part]:
        """Return what was held back: the text ends here, or a control token follows."""
        return self._take(final=True)

    def open(self, tags: Tags) -> list[Part]:
        """A control token opened a block; return what was held back before it."""
        parts = self.end()
        self._block, self._thought, self._begun = tags, True, False
        return parts

    def close(self) -> list[Part]:
        """A control token closed the block, if one was open; return what was held back before it."""
        if self._block is not None:
            self._held = self._held.rstrip("\n")
        parts = self.end()
        self._block, self._at_start = None, True
        return parts

    def _take(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._held:
            length, block = len(self._held), self._block
            part = self._outside(final) if block is None else self._inside(block, final)
            if part.text:
                parts.append(part)
            if len(self._held) == length:
                break
        return _joined(parts)

    def _outside(self, final: bool) -> Part:
        text = self._held
        if self._at_start:
            bare = text.lstrip()
            for tags in self._tags:
                if bare.startswith(tags.opening):
                    self._held, self._block, self._thought, self._begun = bare[len(tags.opening) :], tags, True, False
                    return Part("thought", "")
                if tags.closing and bare.startswith(tags.closing):  # closes nothing
                    self._held, self._thought = bare[len(tags.closing) :], True
                    return Part("answer", "")
            if not final and any(tag.startswith(bare) for tags in self._tags for tag in (tags.opening, tags.closing)):
                return Part("answer", "")  # may become a tag
            self._at_start = False
            text = bare if self._thought else text
        self._held = ""
        return Part("answer", text)

    def _inside(self, block: Tags, final: bool) -> Part:
        if not self._begun and not self._begin(block, final):
            return Part("thought", "")
        if not block.closing:
            text, self._held = self._held, ""
            return Part("thought", text)
        text, tag, rest = self._held.partition(block.closing)
        if tag:
            self._held, self._block = rest, None
            return Part("thought", text.rstrip("\n"))
        keep = 0 if final else _tag_beginning(self._held, block.closing)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return Part("thought", text)

    def _begin(self, block: Tags, final: bool) -> bool:
        """Drop what stands before the first word of a block; return whether that word has come."""
        self._held = self._held.lstrip("\n")
        for name in filter(None, (self._repeated, block.label)):
            bare = self._held.lstrip()
            if bare.startswith(name):
                self._held = bare[len(name) :].lstrip("\n")
            elif bare and name.startswith(bare) and not final:
                return False
        if self._held:
            self._begun, self._repeated = True, ""
        return self._begun


def tag_beginning(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)


def _tag_beginning(text: str, tag: str) -> int:
    """As `tag_beginning`, with the line ends before it."""
    size = tag_beginning(text, tag)
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
    """Return the reasoning and the answer of a whole reply."""
    stream = ThinkingStream()
    parts = [*stream.feed(reply), *stream.end()]
    thoughts, answer = ("".join(part.text for part in parts if part.kind == kind) for kind in ("thought", "answer"))
    return thoughts, answer


ONLY_REASONING = "only reasoning, and no answer"


def plain_text(reply: str, thinking: str) -> str:
    """Return a whole reply as plain text, its reasoning as the setting `thinking` shows it."""
    thoughts, answer = split(reply)
    if thoughts and thinking == "show":
        return f"{thoughts}\n\n{answer}".rstrip("\n")
    if thoughts and not answer:
        return f"({ONLY_REASONING})"
    return f"(thought for {word_count(thoughts)})\n\n{answer}" if thoughts and thinking == "collapse" else answer


def word_count(text: str) -> str:
    """Return "1 word" or "1,234 words"."""
    return plural(len(text.split()), "word")
