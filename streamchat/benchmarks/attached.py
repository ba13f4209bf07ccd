"""Lets several conversations use one model alternately."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from streamchat.conversation.conversation import Conversation


@contextmanager
def attached(conversation: Conversation) -> Iterator[None]:
    """Attach the hook of a closed conversation to the model inside this context."""
    conversation.reopen()
    try:
        yield
    finally:
        conversation.close()
