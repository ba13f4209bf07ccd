"""Encodes chat texts to token ids. Control tokens come only from the format, never from user text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamchat.conversation.control_tokens import control_tokens
from streamchat.conversation.safe_text import SafeText, Span, Token
from streamchat.conversation.template.chat_format import ChatFormat

# Characters of the previous reply that may affect how a message's opening is tokenized.
CONTEXT = 64
_REASONING = re.compile("think|thought|reason", re.IGNORECASE)


class TextEncoder:
    """Encodes text in which the names of control tokens are ordinary letters.

    Args:
        tokenizer: The model's tokenizer.
        written: The chat template and the texts that it writes around messages; added tokens in it are control tokens.
    """

    def __init__(self, tokenizer: Any, written: str | None = None) -> None:
        self._control = control_tokens(tokenizer, _source(tokenizer) if written is None else written)
        self._safe = SafeText(tokenizer, self._control)
        self.control_ids = frozenset(self._control)

    @property
    def control_names(self) -> frozenset[str]:
        """The names of the control tokens."""
        return frozenset(self._control.values())

    @property
    def reasoning_names(self) -> frozenset[str]:
        """The names of those that mark reasoning."""
        return frozenset(name for name in self._control.values() if _REASONING.search(name))

    def rendered(self, text: str, letters: Sequence[Span]) -> list[int]:
        """Encode a text of the template, in which names of control tokens are ordinary letters inside `letters`."""
        return _ids(self._safe.encode(text, letters))

    def text(self, text: str) -> list[int]:
        """Encode plain text on its own, without control tokens."""
        return _ids(self._safe.encode(text, [(0, len(text))]))


@dataclass(frozen=True)
class EncodedTurn:
    """The ids of one turn."""

    prompt: list[int]
    """Ids up to the first id of the reply."""
    message_start: int
    """Index in the prompt where the message starts, after its opening."""
    reply_start: int
    """Index in the prompt where the reply's opening starts."""
    reply: list[int]
    """Ids of a given reply with its close; empty if the model generates the reply."""


class ChatEncoder(TextEncoder):
    """Encodes the parts of turns, each as it would be encoded inside the whole conversation.

    Args:
        tokenizer: The model's tokenizer.
        format: The fixed texts.
    """

    def __init__(self, tokenizer: Any, format: ChatFormat) -> None:  # noqa: A002 - the usual word
        around = (format.system_open, format.system_close, format.first_user_open, format.user_open)
        fixed = "\n".join((*around, format.assistant_close))
        super().__init__(tokenizer, "\n".join((format.source, fixed, format.generation, format.reply_open)))
        self.format = format
        added = tokenizer.added_tokens_decoder
        self._reasoning = frozenset(
            token
            for token, name in self._control.items()
            if _REASONING.search(name) and token in added and not added[token].special and name not in fixed
        )
        """Tokens around reasoning, which a given reply may contain."""

    def system_block(self) -> list[int]:
        """Return the ids before the first turn."""
        start = len(self.format.system_open)
        prompt = (start, start + len(self.format.system_prompt))
        return _ids(self._safe.encode(self.format.system_block, [prompt], right=self._opened(first=True)))

    def opening(self, first: bool) -> list[int]:
        """Return the ids that open a user message; a window must not start inside them."""
        return _ids(self._safe.encode(self._user_open(first), left=self._before(first, ".")))

    def turn(self, message: str, first: bool) -> list[int]:
        """Return the ids that a turn feeds before a generated reply: opening, message, and the reply's opening."""
        return self.encoded(message, first).prompt

    def encoded(self, message: str, first: bool, reply: str | None = None, previous: str = ".") -> EncodedTurn:
        """Return the ids of a turn.

        Args:
            message: The user's message.
            first: Whether it is the first turn.
            reply: A given reply; None if the model generates it.
            previous: The previous reply; its end may affect how this turn is tokenized.
        """
        opening, written = self._user_open(first), self._readable(self.format.message(message, first))
        message_end = len(opening) + len(written)
        left = self._before(first, previous)
        if reply is None:
            text = opening + written + self.format.generation
            tokens = self._safe.encode(text, [(len(opening), message_end)], left)
            return EncodedTurn(_ids(tokens), _index_at(tokens, len(opening)), _index_at(tokens, message_end), [])
        given = self.format.given_reply(reply)
        start = message_end + len(self.format.reply_open)
        text = opening + written + self.format.reply_open + given + self.format.assistant_close
        spans = [(len(opening), message_end), (start, start + len(given))]
        tokens = self._encode_given(text, spans, left)
        at = _index_at(tokens, start)
        message_start, reply_start = _index_at(tokens, len(opening)), _index_at(tokens, message_end)
        return EncodedTurn(_ids(tokens[:at]), message_start, reply_start, _ids(tokens[at:]))

    def reply_opening(self, given: bool = False) -> list[int]:
        """Return the ids that open a reply, as at the end of a turn's prompt."""
        return _ids(self._safe.encode(self.format.reply_open if given else self.format.generation, left="."))

    def close(self, reply: str = ".", rest: str = "") -> list[int]:
        """Return the ids that close a reply.

        Args:
            reply: The reply's text that is in the cache.
            rest: Text after it that also belongs to the reply.
        """
        text = rest + self.format.assistant_close
        left = reply[-CONTEXT:] or "."
        return _ids(self._safe.encode(text, [(0, len(rest))], left, self._opened(first=False)))

    def _readable(self, message: str) -> str:
        """Return `message`, or a replacement character if the tokenizer drops all of it: a turn is never empty."""
        is_read = not message.strip() or self.text(message[:CONTEXT]) or self.text(message)
        return message if is_read else "\N{REPLACEMENT CHARACTER}"

    def _encode_given(self, text: str, spans: list[Span], left: str) -> list[Token]:
        """Return the tokens of a whole turn; its second span is a given reply."""
        right = self._opened(first=False)
        if not self._reasoning:
            return self._safe.encode(text, spans, left, right)
        message, reply = spans
        tokens = self._safe.encode(text, spans, left, right, self._reasoning)
        if not any(token.id in self._reasoning and token.start < message[1] for token in tokens):
            return tokens
        start = reply[0]  # the message contains names of tokens that only the reply may have
        head = self._safe.encode(text[:start], [message], left)
        reply_span = [(0, reply[1] - start)]
        tail = self._safe.encode(text[start:], reply_span, text[message[1] : start], right, self._reasoning)
        return [*head, *(Token(token.id, token.start + start, token.stop + start) for token in tail)]

    def _user_open(self, first: bool) -> str:
        return self.format.first_user_open if first else self.format.user_open

    def _opened(self, first: bool) -> str:
        """Return the text that follows a system block or a closed reply."""
        return self._user_open(first) + "a"

    def _before(self, first: bool, previous: str) -> str:
        """Return the text before a turn."""
        return self.format.system_block if first else previous[-CONTEXT:] + self.format.assistant_close


def _source(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else ""


def _ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def _index_at(tokens: list[Token], start: int) -> int:
    """Return how many tokens start before character `start`."""
    return sum(token.start < start for token in tokens)
