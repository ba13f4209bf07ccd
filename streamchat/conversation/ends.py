"""Finds the tokens that end a reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamchat.conversation.template.reply_shape import ReplyShape


@dataclass(frozen=True)
class NextMessage:
    """Distinguishes the model's messages inside a reply from another role's message, which ends the reply."""

    start: int
    """Token that opens a message."""
    role: str
    """The text after it."""
    own: bool
    """True: `role` is the model's, and any other role ends the reply. False: it is the user's, and ends the reply."""
    close: int | None
    """Token that closes a message; None without one."""


@dataclass(frozen=True)
class Ends:
    """What ends the replies of a model."""

    ids: frozenset[int]
    """Tokens that end a reply anywhere."""
    next: NextMessage | None = None
    """Set if a reply may have several messages."""


def find_ends(model: Any, tokenizer: Any, shape: ReplyShape) -> Ends:
    """Return what ends a reply: the tokens that model and tokenizer list, and guesses from the template.

    A small model that skips its end token often starts the next message instead, and some models do not list the token
    that closes their messages. So the control tokens that close a message or open a user message also end a reply,
    unless the template writes them inside one.
    """
    guesses = frozenset(token for token in (shape.close, shape.user) if token is not None)
    inside = shape.inside | (guesses if shape.messages is not None else frozenset())
    listed = _listed(model, tokenizer)
    # a list may include the token that closes each message of a reply
    return Ends(((listed - inside) or listed) | (guesses - inside), _next_message(shape, inside))


def _next_message(shape: ReplyShape, inside: frozenset[int]) -> NextMessage | None:
    if shape.messages is not None:
        return NextMessage(shape.messages.start, shape.messages.role, True, shape.close)
    if shape.user in inside and shape.user_role:
        assert shape.user is not None
        return NextMessage(shape.user, shape.user_role, False, shape.close if shape.close in inside else None)
    return None


def _listed(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    own = getattr(model.config.get_text_config(), "eos_token_id", None)  # the text part of a multimodal model
    for listed in (model.generation_config.eos_token_id, own, tokenizer.eos_token_id):
        ids.update(listed if isinstance(listed, list | tuple) else [listed] if listed is not None else [])
    return frozenset(int(token) for token in ids)


class EndWatch:
    """Follows one reply, token by token, up to its end.

    In a reply of several messages, a closed message may be followed by another message of the model. A message of
    another role (`<|start|>user`) ends the reply before it.
    """

    def __init__(self, ends: Ends, tokenizer: Any) -> None:
        self._ends, self._tokenizer = ends, tokenizer
        self._count = 0
        self._between = False
        """Whether a message was closed and only white space followed."""
        self._header: list[int] | None = None
        """Ids of a message header whose role is not certain yet."""
        self.length = 0
        """Number of ids that belong to the reply if it ends now."""

    def ended_by(self, token: int) -> bool:
        """Return whether `token` ends the reply; it is then not part of it."""
        if token in self._ends.ids:
            return True
        self._count += 1
        message = self._ends.next
        if message is None:
            self.length = self._count
        elif token == message.start:
            self._header = []
        elif self._header is not None:
            return self._is_foreign(message, token)
        elif token == message.close:
            self._between = True
        elif not self._between or self._tokenizer.decode([token]).strip():
            self.length, self._between = self._count, False
        return False

    def _is_foreign(self, message: NextMessage, token: int) -> bool:
        """Return whether the new message is certainly not the model's."""
        assert self._header is not None
        self._header.append(token)
        role = str(self._tokenizer.decode(self._header, clean_up_tokenization_spaces=False)).lstrip()
        if message.role.startswith(role) and role != message.role:
            return False
        if role.startswith(message.role) == message.own:
            self._header = None
            return False
        return True
