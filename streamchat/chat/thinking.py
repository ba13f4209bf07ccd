"""Reasoning blocks: `<think> ... </think>` told apart from the answer while the text is still coming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["thought", "answer"]
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Part:
    """A stretch of a reply."""

    kind: Kind
    text: str


class ThinkingStream:
    """Splits a reply that arrives in pieces. Tags are left out; everything else comes out once, in order.

    Only what opens at the start of the reply, or right behind another block, is a reasoning block: a `<think>` in the
    middle of a sentence is text. White space around the block goes with it.
    """

    def __init__(self) -> None:
        self._kind: Kind = "answer"
        self._held = ""
        """Text that may be the beginning of a tag."""
        self._at_start = True
        self._thought = False
        """There was a block."""
        self._begun = False
        """Something was thought in this one."""

    def feed(self, text: str) -> list[Part]:
        """What is certain once `text` has come."""
        self._held += text
        return self._take(final=False)

    def end(self) -> list[Part]:
        """The reply is over: what was held back is text."""
        return self._take(final=True)

    def _take(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._held:
            length = len(self._held)
            part = self._inside(final) if self._kind == "thought" else self._outside(final)
            if part.text:
                parts.append(part)
            if len(self._held) == length:
                break
        return _joined(parts)

    def _outside(self, final: bool) -> Part:
        text = self._held
        if self._at_start:
            bare = text.lstrip()
            if bare.startswith(OPEN):
                self._held, self._kind, self._thought = bare[len(OPEN) :], "thought", True
                self._begun = False
                return Part("thought", "")
            if OPEN.startswith(bare) and not final:
                return Part("answer", "")  # may become a tag
            self._at_start = False
            text = bare if self._thought else text
        self._held = ""
        return Part("answer", text)

    def _inside(self, final: bool) -> Part:
        if not self._begun:
            self._held = self._held.lstrip("\n")
            self._begun = bool(self._held)
        text, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held, self._kind = rest, "answer"
            return Part("thought", text.rstrip("\n"))
        keep = 0 if final else _tag_beginning(self._held)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return Part("thought", text)


def _tag_beginning(text: str) -> int:
    """How many characters at the end may be the beginning of the closing tag, or line ends before it."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-size:]):
            return size + _line_ends(text[:-size])
    return _line_ends(text)


def _line_ends(text: str) -> int:
    return len(text) - len(text.rstrip("\n"))


def _joined(parts: list[Part]) -> list[Part]:
    out: list[Part] = []
    for part in parts:
        if out and out[-1].kind == part.kind:
            out[-1] = Part(part.kind, out[-1].text + part.text)
        else:
            out.append(part)
    return out


def split(reply: str) -> tuple[str, str]:
    """(thoughts, answer) of a whole reply."""
    stream = ThinkingStream()
    parts = [*stream.feed(reply), *stream.end()]
    return tuple("".join(part.text for part in parts if part.kind == kind) for kind in ("thought", "answer"))  # type: ignore[return-value]
