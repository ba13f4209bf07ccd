"""What a run says about its saved sessions when it ends."""

from __future__ import annotations

from streamchat.base import events as ev


class SavingOutcome:
    """Follows the events of a run: which session is open, and whether its latest turns are saved."""

    def __init__(self) -> None:
        self._session: str | None = None
        self._works = True
        self._has_turns = False
        self._lost: list[str] = []

    def apply(self, event: ev.Event) -> None:
        """Take note of an event."""
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
        """The conversations of this run whose latest turns or changes are not saved although they should be."""
        if self._works or not (self._has_turns or self._session):
            return self._lost
        return [*self._lost, self._session or "this conversation"]

    def sentence(self, *, is_pipe: bool) -> str:
        """Return what to tell the user at the end; '' if nothing. For a pipe, that is only what is not saved."""
        if self.lost and (is_pipe or not self._works):
            return f"the latest turns of {', '.join(self.lost)} were not saved"
        if self._session is None or is_pipe:
            return ""
        return f"saved as {self._session}; resume it with: streamchat --resume {self._session}"
