"""The interface of what has the active conversation: a model host, or a seat of the server."""

from __future__ import annotations

from typing import Protocol

from streamchat.config.settings import Settings
from streamchat.conversation.assemble import StartedConversation


class ConversationHost(Protocol):
    """Has one active conversation at a time. Used on the thread that owns the model."""

    pin_next: bool
    """Whether to pin the next turn, because it replaces a pinned one."""

    @property
    def settings(self) -> Settings:
        """The current settings."""
        ...

    @property
    def started(self) -> StartedConversation | None:
        """The active conversation; None until the first model is loaded."""
        ...

    @property
    def active(self) -> StartedConversation:
        """The active conversation, once there is one."""
        ...
