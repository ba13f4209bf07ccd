"""Texts of a chat to token ids. Control tokens come from the format only: user text never becomes one."""

from __future__ import annotations

import re
from typing import Any

from streamchat.chat.template import ChatFormat


class TextEncoder:
    """Encodes text in which the names of control tokens are only letters.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Added tokens of white space (GPT-NeoX has runs of spaces) are text; all others are control.
        control = {text for text in tokenizer.get_added_vocab() if text.strip()} | set(tokenizer.all_special_tokens)
        pattern = "|".join(re.escape(text) for text in sorted(control, key=len, reverse=True))
        self._control = re.compile(pattern) if control else None
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(control)))

    def text(self, text: str) -> list[int]:
        """Plain text, without control tokens."""
        return [token for piece in self._harmless_pieces(text) for token in self._encode(piece)]

    def _has_control(self, text: str) -> bool:
        return self._control is not None and self._control.search(text) is not None

    def _harmless_pieces(self, text: str) -> list[str]:
        """Cut `text` inside every control token's name, so that no piece contains one."""
        if self._control is None or not text:
            return [text] if text else []
        pieces, at = [], 0
        while match := self._control.search(text, at):
            # One character names (rare) cannot be cut; they are left out.
            cut = match.start() + 1 if len(match[0]) > 1 else match.start()
            pieces.append(text[at:cut])
            at = cut if len(match[0]) > 1 else match.end()
        pieces.append(text[at:])
        return [piece for piece in pieces if piece]

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        # without its warning of texts that are longer than the model's context
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class ChatEncoder(TextEncoder):
    """Encodes the pieces of turns, each as it would be encoded inside the whole conversation.

    Args:
        tokenizer: The model's tokenizer.
        format: The fixed texts.
    """

    def __init__(self, tokenizer: Any, format: ChatFormat) -> None:  # noqa: A002 - the word for it
        super().__init__(tokenizer)
        self.format = format

    def system_block(self) -> list[int]:
        """What comes before the first turn."""
        prompt = self.format.system_prompt
        if not self._has_control(prompt):
            return self._encode(self.format.system_block)
        return self._encode(self.format.system_open) + self.text(prompt) + self._encode(self.format.system_close)

    def opening(self, first: bool) -> list[int]:
        """The ids that open a user message; a window must not begin inside them."""
        return self._encode(self.format.first_user_open if first else self.format.user_open)

    def turn(self, message: str, first: bool) -> list[int]:
        """The ids that a turn feeds before its reply: opening, message, and the opening of the reply."""
        opening = self.format.first_user_open if first else self.format.user_open
        text = self.format.message(message)
        before = self.format.system_block[-20:] if first else self.format.assistant_close
        if not self._has_control(text):
            return self._encode_after(before, opening + text + self.format.generation)
        return self._encode_after(before, opening) + self.text(text) + self._encode(self.format.generation)

    def reply_opening(self) -> list[int]:
        """The ids that open a reply, as they stand at the end of `turn`."""
        return self._encode(self.format.generation)

    def close(self) -> list[int]:
        """The ids that close a reply."""
        return self._encode_after(".", self.format.assistant_close)

    def _encode_after(self, before: str, text: str) -> list[int]:
        """`text` as it is encoded behind `before`: some tokenizers write the start of a text differently."""
        if not before or not text:
            return self._encode(text)
        context, whole = self._encode(before), self._encode(before + text)
        if whole[: len(context)] == context:
            return whole[len(context) :]
        return self._encode(text)


def end_ids(model: Any, tokenizer: Any, encoder: ChatEncoder) -> frozenset[int]:
    """All ids that end a reply: what model and tokenizer list, and the control tokens that close or open a message.

    A small model that skips its end token often begins the next message instead.
    """
    ids: set[int] = set()
    for listed in (
        model.generation_config.eos_token_id,
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        ids.update(listed if isinstance(listed, list | tuple) else [listed] if listed is not None else [])
    for piece in (encoder.close(), encoder.opening(first=False)):
        ids.update(piece[:1] if piece and piece[0] in encoder.control_ids else [])
    return frozenset(int(token) for token in ids)
