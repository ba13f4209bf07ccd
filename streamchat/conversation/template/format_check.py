"""Compares the ids that a format feeds with those of the rendered chat template, when a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.chat_format import ChatFormat
from streamchat.conversation.template.reference import Exchange, Reference
from streamchat.conversation.template.rendering import UnusableTemplateError

CONVERSATION: tuple[Exchange, ...] = (
    ("Köln: 5 € & <b>1</b>?", "Blue."),
    ("two\nlines", " Spaced."),
    ("三 🙂", "\n\nNew lines.\n"),
    ("The end.", "Yes"),
)


def fed(encoder: ChatEncoder, history: Sequence[Exchange], message: str) -> list[int]:
    """Return the ids that a conversation with given replies feeds up to the start of the reply to `message`."""
    ids, previous = encoder.system_block(), "."
    for i, (text, reply) in enumerate(history):
        turn = encoder.encoded(text, i == 0, reply, previous)
        ids += turn.prompt + turn.reply
        previous = reply
    return ids + encoder.encoded(message, not history, previous=previous).prompt


def differs(tokenizer: Any, chosen: ChatFormat, system_prompt: str) -> bool:
    """Return whether the ids fed for a sample conversation differ from the template's, or lack part of a message."""
    encoder = ChatEncoder(tokenizer, chosen)
    try:
        reference = Reference(tokenizer, chosen, system_prompt)
        for turns in (0, len(CONVERSATION) - 1):
            history, (message, _) = list(CONVERSATION[:turns]), CONVERSATION[turns]
            if "newest-turn" in chosen.fallbacks or "system-first" in chosen.fallbacks:
                history = history[:0]
            if fed(encoder, history, message) != reference.ids(history, message):
                return True
    except UnusableTemplateError:  # these texts make the template raise
        return True
    return not all(_is_kept(tokenizer, encoder, text) for text, _ in CONVERSATION)


def _is_kept(tokenizer: Any, encoder: ChatEncoder, text: str) -> bool:
    """Return whether the fed ids contain a message, except for what the tokenizer itself drops."""

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    alone = decoded(tokenizer(text, add_special_tokens=False)["input_ids"])
    return alone.strip() in decoded(encoder.turn(text, first=False))
