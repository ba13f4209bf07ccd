"""Renders and tokenizes whole conversations with the chat template, to compare them with the ids that are fed.

The parts that turns are fed from are not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from streamchat.conversation.template.chat_format import ChatFormat
from streamchat.conversation.template.cutting import conversation
from streamchat.conversation.template.rendering import Message, Renderer

Exchange = tuple[str, str]
"""A message and its reply."""
# Texts that have no character in common.
_PROBES = "alpha", "0"


class Reference:
    """The reference ids of conversations in a format.

    Args:
        tokenizer: The model's tokenizer.
        format: The format in use. Only its name, moment, arguments and fallbacks are used.
        system_prompt: The system prompt setting; '' for none.
    """

    def __init__(self, tokenizer: Any, format: ChatFormat, system_prompt: str) -> None:  # noqa: A002
        self._tokenizer = tokenizer
        self.format = format
        self._system_prompt = system_prompt
        self.fallbacks = format.fallbacks
        self._render = Renderer(tokenizer, format.moment, format.arguments) if format.name == "template" else None

    def ids(self, history: Sequence[Exchange], message: str) -> list[int]:
        """Return the ids of a conversation up to the start of the reply to `message`."""
        return self.tokenized(self.text(history, message))

    def text(self, history: Sequence[Exchange], message: str, with_system: bool = True) -> str:
        """Return the text of a conversation up to the start of the reply to `message`."""
        if self._render is None:
            return self._plain(history, message)
        return self._render(self._messages(history, message, with_system), generation=True)

    def tokenized(self, text: str) -> list[int]:
        """Return the ids of a whole text."""
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def window(self, history: Sequence[Exchange]) -> list[Exchange]:
        """Return the part of a long conversation that the newest turn depends on."""
        if "newest-turn" in self.fallbacks:
            return list(history[:1])
        return list(history) if len(history) <= 2 else [history[0], history[-1]]

    @cached_property
    def between(self) -> list[int]:
        """The ids between any reply and the next message."""
        first, second = (self._opened([(_PROBES[0], reply)]) for reply in _PROBES)
        return first[len(first) - common_end(first, second) :]

    def behind_opening(self, history: Sequence[Exchange], ids: Sequence[int]) -> list[int]:
        """Return the ids after the opening of the next message, in a conversation that continues `history`."""
        return list(ids[common_start(self._opened(history), ids) :])

    def replied(self, history: Sequence[Exchange], message: str, reply: str) -> tuple[list[int], int]:
        """Return the ids of a conversation in which another message follows the given `reply`.

        The second value is the number of ids at the end that do not depend on the reply.
        """
        ids, other = (self._replied(history, message, text) for text in (reply, f"{reply} {_PROBES[1]}x"))
        return ids, common_end(ids, other)

    def _replied(self, history: Sequence[Exchange], message: str, reply: str) -> list[int]:
        text = self.text([*history, (message, reply)], _PROBES[0])
        if self._system_prompt and not history and "system-first" in self.fallbacks:
            # The template has moved the system prompt: use the text that is before the reply in the first turn.
            prompt, without = self.text([], message), self.text([], message, with_system=False)
            same = common_start(without, text)
            text = prompt[: len(prompt) - (len(without) - same)] + text[same:]
        return self.tokenized(text)

    def _opened(self, history: Sequence[Exchange]) -> list[int]:
        """Return the ids before the next message."""
        first, second = (self.ids(history, probe) for probe in _PROBES)
        return first[: common_start(first, second)]

    def _messages(self, history: Sequence[Exchange], message: str, with_system: bool) -> list[Message]:
        texts = [text for exchange in history for text in exchange]
        prompt = self._system_prompt if self._system_prompt and with_system else None
        if prompt and "system-folded" in self.fallbacks:
            texts = [*texts, message]
            return conversation([f"{prompt}\n\n{texts[0]}", *texts[1:]], None)
        if history and "system-first" in self.fallbacks:
            prompt = None
        return conversation([*texts, message], prompt)

    def _plain(self, history: Sequence[Exchange], message: str) -> str:
        start = self.format.system_open + (self._system_prompt.strip() + "\n\n" if self._system_prompt.strip() else "")
        turns = [f"User: {text.strip()}\nAssistant: {reply.strip()}\n" for text, reply in history]
        return start + "".join(turns) + f"User: {message.strip()}\nAssistant:"


def common_start(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the common prefix."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def common_end(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the common suffix."""
    return common_start(first[::-1], second[::-1])
