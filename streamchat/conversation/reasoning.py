"""Recognizes the reasoning of a reply by what the model's template writes around it.

Models mark their reasoning in many ways: with texts, with special tokens that decoding drops, with named channels, or
without an opening mark, because the prompt opened it. A `ReplyReader` converts all of them to one form of text,
`<think>\\n...\\n</think>\\n\\n` before the answer, which `streamchat.base.thinking` splits. The ids do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamchat.base.thinking import THINK, Part, Tags, ThinkingStream, tag_prefix_length
from streamchat.conversation.template.reply_shape import Messages, ReplyShape

KNOWN = (
    THINK,
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("◁think▷", "◁/think▷"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),
    Tags("<|channel>", "<channel|>", "thought"),
)
"""Recognized if the template or the vocabulary has the opening tag; `<think>` always."""
CHANNEL = Tags("", "")
"""Tags of reasoning that only a control token ends."""


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its reasoning."""

    tags: tuple[Tags, ...] = (THINK,)
    """Tags that may open a block at the start of a reply."""
    inside: Tags | None = None
    """Tags of the block that the prompt opens; None if the reply starts with its answer or a tag."""
    opening: Mapping[int, Tags] = field(default_factory=dict)
    """Special tokens that open a block; decoding drops them."""
    closing: frozenset[int] = frozenset()
    """Special tokens that close a block."""
    silent: frozenset[int] = frozenset()
    """Other tokens of the template, which decode to no text."""
    messages: Messages | None = None
    """Set if a reply has several messages."""

    @property
    def plain(self) -> bool:
        """Whether replies already have the `<think>` form."""
        return self == ReasoningFormat(silent=self.silent)


def learn_reasoning(tokenizer: Any, shape: ReplyShape) -> ReasoningFormat:
    """Return how a model with this template marks its reasoning."""
    vocabulary = tokenizer.get_added_vocab()
    template = str(tokenizer.chat_template or "")
    tags = [shape.tags] if shape.tags is not None else []
    tags += [known for known in KNOWN if known.opening in vocabulary or known.opening in template]
    tags = list({known.opening: known for known in (*tags, THINK)}.values())
    inside = [tags for tags in tags if _is_open(tags, shape.prompt)]
    opening, closing = {}, set()
    for known in tags:
        for name, is_opening in ((known.opening, True), (known.closing, False)):
            token = vocabulary.get(name)
            if token is None or tokenizer.decode([token], skip_special_tokens=True):
                continue  # decoding does not drop it, so the text contains it
            if is_opening:
                opening[token] = known
            else:
                closing.add(token)
    named = {vocabulary[name] for known in tags for name in (known.opening, known.closing) if name in vocabulary}
    return ReasoningFormat(
        tuple(tags), inside[0] if inside else None, opening, frozenset(closing), shape.around - named, shape.messages
    )


def _is_open(tags: Tags, prompt: str) -> bool:
    at = prompt.rfind(tags.opening)
    return at >= 0 and tags.closing not in prompt[at:]


class ReplyReader:
    """Converts the text and control tokens of one reply to text with `<think>` tags, as they arrive."""

    def __init__(self, reasoning: ReasoningFormat) -> None:
        self._format = reasoning
        self._stream = ThinkingStream(reasoning.tags, reasoning.inside)
        self._writer = _Writer()
        self._header: _Header | None = None if reasoning.messages is None else _Header("")

    def is_mark(self, token: int) -> bool:
        """Return whether `token` must be passed to `mark`; the text of all others goes to `text`."""
        how, messages = self._format, self._format.messages
        if token in how.opening or token in how.closing or token in how.silent:
            return True
        return messages is not None and token in (
            messages.start,
            messages.header_end,
            messages.close,
            messages.channel,
        )

    def text(self, text: str) -> str:
        """Return more text to show after the model generated `text`."""
        if self._header is None:
            return self._writer.write(self._stream.feed(text))
        self._header.add(text)
        answer = self._header.answer
        if not answer:
            return ""
        self._header = None
        return self._writer.write([*self._stream.close(), *self._stream.feed(answer)])

    def mark(self, token: int) -> str:
        """Return more text to show after the model generated a control token."""
        how = self._format
        if how.messages is not None and (shown := self._mark_message(how.messages, token)) is not None:
            return shown
        if token in how.opening:
            shown = self._writer.write(self._stream.open(how.opening[token]))
            self._writer.begin_block()
            return shown
        return self._writer.write(self._stream.close()) if token in how.closing else ""

    def end(self) -> str:
        """End the reply; return the text that was held back."""
        rest = "" if self._header is None else self._header.rest
        if rest:
            return self._writer.write([*self._stream.close(), *self._stream.feed(rest), *self._stream.end()])
        return self._writer.write(self._stream.end()) + self._writer.end(is_open=self._stream.inside)

    def _mark_message(self, messages: Messages, token: int) -> str | None:
        """Like `mark`, for the tokens of message headers; None for others."""
        if token in (messages.start, messages.close):
            shown = self._writer.write(self._stream.close())
            self._header = _Header(messages.role if token == messages.start else "")
            return shown
        if token == messages.channel:
            shown = self._writer.write(self._stream.end())
            self._header = self._header or _Header("")
            self._header.channel = ""
            return shown
        if token == messages.header_end:
            channel = (self._header.channel if self._header else None) or ""
            self._header = None
            is_answer = channel.split()[:1] in ([], [messages.answer])
            parts = self._stream.close() if is_answer else self._stream.open(CHANNEL)
            shown = self._writer.write(parts)
            if not is_answer:
                self._writer.begin_block()
            return shown
        return None


class _Header:
    """The header of a message, as far as it has arrived.

    Args:
        role: The role at its start; '' if the prompt already has it.
    """

    def __init__(self, role: str) -> None:
        self._role, self._text = role, ""
        self.channel: str | None = None
        """Name of the channel; None before its control token."""

    def add(self, text: str) -> None:
        """Add text to the header."""
        if self.channel is None:
            self._text += text
        else:
            self.channel += text

    @property
    def answer(self) -> str:
        """Text that is not a header, because the model skipped the header and answers; '' if there is none."""
        text = self._text.lstrip()
        if self.channel is not None or self._role.startswith(text):
            return ""
        text = text.removeprefix(self._role)
        bare = text.lstrip()
        return "" if "to=".startswith(bare[:3]) else text

    @property
    def rest(self) -> str:
        """Text that is an answer if the reply ends here, because no header followed; '' if there is none."""
        begins = self.channel is None and not self._role and self._text.lstrip()
        return self._text if begins and "to=".startswith(begins) else ""


class _Writer:
    """Writes the parts of a reply as text with `<think>` tags.

    Reasoning after the answer is dropped, because a tag after the answer would be shown as text.
    """

    def __init__(self) -> None:
        self._open = self._answered = self._gap = False
        self._held = ""
        """End of the reasoning, if it may be the start of a closing tag."""

    def write(self, parts: list[Part]) -> str:
        """Return the text of `parts`."""
        return "".join(
            self._thought(part.text) if part.kind == "thought" else self._answer(part.text) for part in parts
        )

    def begin_block(self) -> None:
        """Start another block of reasoning."""
        self._gap = self._open

    def end(self, *, is_open: bool) -> str:
        """Return the end of the reply; an open block of reasoning stays open if `is_open`."""
        if not self._open:
            return ""
        return self._release() + ("" if is_open else f"\n{THINK.closing}")

    def _thought(self, text: str) -> str:
        if self._answered:
            return ""
        before = ""
        if not self._open or self._gap:
            text = text.lstrip("\n") if text.strip() else ""
            if not text:
                return ""
            before = self._release() + "\n\n" if self._gap else f"{THINK.opening}\n"
        self._open, self._gap = True, False
        # a closing tag inside would end the reasoning early for every parser of this text
        text = (self._held + text).replace(THINK.closing, _harmless(THINK.closing))
        keep = tag_prefix_length(text, THINK.closing)
        self._held = text[len(text) - keep :]
        return before + text[: len(text) - keep]

    def _answer(self, text: str) -> str:
        before = f"{self._release()}\n{THINK.closing}\n\n" if self._open else ""
        self._open, self._answered = False, True
        return before + text

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held


def _harmless(tag: str) -> str:
    """Return `tag` with a word joiner in it: it looks the same and is not a tag."""
    return f"{tag[0]}\N{WORD JOINER}{tag[1:]}"
