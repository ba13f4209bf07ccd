"""Which tokens end a reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamchat.chat.reply_shape import Messages, ReplyShape


@dataclass(frozen=True)
class Ends:
    """What ends the replies of a model."""

    ids: frozenset[int]
    """Tokens that end a reply wherever they come."""
    messages: Messages | None = None
    """Set if a reply has several messages: then one that is not the model's own ends it."""


def find_ends(model: Any, tokenizer: Any, shape: ReplyShape) -> Ends:
    """Return what ends a reply: the tokens that model and tokenizer list, and guesses from the template.

    A small model that skips its end token often begins the next message instead, and some models do not list the token
    that closes their messages. So the control tokens that close a message or open a user message end a reply as well,
    unless the template writes them inside one.
    """
    listed = _listed(model, tokenizer)
    inside = shape.inside
    if shape.messages is not None:
        inside |= {token for token in (shape.close, shape.user) if token is not None}
    # a list may name the token that closes each message of a reply
    listed = (listed - inside) or listed
    guesses = {token for token in (shape.close, shape.user) if token is not None} - inside
    return Ends(frozenset(listed | guesses), shape.messages)


def _listed(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for listed in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ids.update(listed if isinstance(listed, list | tuple) else [listed] if listed is not None else [])
    return frozenset(int(token) for token in ids)


class EndWatch:
    """Follows one reply, token by token, up to its end.

    In a reply of several messages, a closed message may be followed by another one of the model; one of somebody else
    (`<|start|>user`) ends the reply before it.
    """

    def __init__(self, ends: Ends, tokenizer: Any) -> None:
        self._ends, self._tokenizer = ends, tokenizer
        self._count = 0
        self._header: list[int] | None = None
        """Ids of a header whose role is not complete."""
        self.length = 0
        """Ids from the start that belong to the reply if it ends now."""

    def ended_by(self, token: int) -> bool:
        """Return whether `token`, which then is not part of the reply, ends it."""
        if token in self._ends.ids:
            return True
        self._count += 1
        messages = self._ends.messages
        if messages is None:
            self.length = self._count
        elif token == messages.start:
            self._header = []
        elif self._header is not None:
            return not self._read_role(messages, token)
        elif token != messages.close:
            self.length = self._count
        return False

    def _read_role(self, messages: Messages, token: int) -> bool:
        """Return whether the header that opens may still be one of the model's."""
        assert self._header is not None
        self._header.append(token)
        role = self._tokenizer.decode(self._header, clean_up_tokenization_spaces=False).lstrip()
        if role.startswith(messages.role):
            self._header = None
            return True
        return messages.role.startswith(role)
