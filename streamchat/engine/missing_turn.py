"""The end of a turn that no conversation has figures for: it never started, or its end was not seen."""

from __future__ import annotations

from streamchat.base import events as ev

_NO_STATS = ev.TurnStats(0, 0, 0, 0, 0, 0, 0, None, None, 0, 0, None, "cancelled")


def missing_turn(text: str, message: str = "", *, rolled_back: bool = True) -> ev.TurnFinished:
    """Return the event for the end of such a turn.

    Args:
        text: The user's message; '' if it is not to be restored.
        message: Why the turn failed, one sentence; '' if it was canceled.
        rolled_back: False if the turn is part of the conversation.
    """
    reason: ev.FinishReason = "error" if message else "cancelled"
    return ev.TurnFinished(_NO_STATS, reason, "", text, rolled_back, message, "other" if message else "")
