"""The notice about saved sessions at the end of a run."""

from __future__ import annotations

from streamchat.base import events as ev


class SavingOutcome:
    """Tracks which session a run has open, and whether its latest turns are saved."""

    def __init__(self) -> None:
        self._session: str | None = None
        self._works = True
        self._has_turns = False
        self._lost: list[str] = []

    def apply(self, event: ev.Event) -> None:
        """Update the outcome from an event."""
        match event:
            case ev.SessionOpened(session=session):
                if self._session not in (None, session):
                    self._lost = self.lost
                self._session = session
            case ev.SavingChanged(works=works):
                self._works = works
            case ev.TurnFinished():
                self._has_turns = True
            case ev.ConversationCleared():
                self._lost = self.lost
                self._session, self._has_turns = None, False

    @property
    def lost(self) -> list[str]:
        """Conversations of this run whose latest turns or changes should be saved, but are not."""
        if self._works or not (self._has_turns or self._session):
            return self._lost
        return [*self._lost, self._session or "this conversation"]

    def sentence(self, *, is_pipe: bool) -> str:
        """Return the notice for the end of the run, or ''. A pipe gets one only for turns that are not saved."""
        if self.lost and (is_pipe or not self._works):
            return f"the latest turns of {', '.join(self.lost)} were not saved"
        if self._session is None or is_pipe:
            return ""
        return f"saved as {self._session}; resume it with: streamchat --resume {self._session}"
