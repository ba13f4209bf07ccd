"""Which conversation the model's forward pre-hook belongs to: one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported on the model's thread only
    from streamchat.conversation.conversation import Conversation


class Attachment:
    """Switches the model between conversations. Takes about 70 µs."""

    def __init__(self) -> None:
        self._current: Conversation | None = None

    def use(self, conversation: Conversation | None) -> None:
        """Attach the hook of `conversation`, and no other; None for none."""
        if self._current is conversation:
            return
        if self._current is not None:
            self._current.close()
        if conversation is not None:
            conversation.reopen()
        self._current = conversation

    def adopt(self, conversation: Conversation) -> None:
        """Note that a new conversation has attached its hook itself."""
        assert self._current is None
        self._current = conversation
