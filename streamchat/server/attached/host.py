"""Carries out what front ends request of a server's session, or refuses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import StartedConversation
from streamchat.engine.live_settings import LiveSettings
from streamchat.sessions.archive import Archive

if TYPE_CHECKING:  # torch is imported on the model's thread only
    from streamchat.models.sampling import SamplingAdvice

KEPT_MODEL = "the model belongs to the server; to change it, start `streamchat serve` with --model {name}"


@dataclass(frozen=True)
class NewSession:
    """The front end wants to move to a new session."""

    system_prompt: str | None
    """None for the system prompt of the session."""


@dataclass(frozen=True)
class OtherSession:
    """The front end wants to move to a saved session."""

    name: str
    """Its id, or the start of its id."""


class SeatHost(LiveSettings):
    """Implements `RequestHost` for one request of one front end.

    A front end that starts over, or resumes another session, moves to that session. This one is unchanged, since other
    front ends may use it.

    Args:
        configuration: The settings of the session.
        active: Its conversation.
        archive: Saves the conversation.
        emit: Records and publishes an event.
        advice: Sampling settings that the model's makers advise.
        tell: Sends an event to the front end that sent the request.
    """

    def __init__(
        self,
        configuration: Configuration,
        active: StartedConversation,
        archive: Archive,
        emit: Callable[[ev.Event], None],
        advice: SamplingAdvice,
        tell: Callable[[ev.Event], None],
    ) -> None:
        super().__init__(configuration, archive, emit)
        self.started: StartedConversation = active
        self._given_advice, self._tell = advice, tell
        self.pin_next = False
        self.wish: NewSession | OtherSession | None = None
        """Where the front end wants to move; None if it stays."""

    @property
    def active(self) -> StartedConversation:
        """The conversation."""
        return self.started

    @property
    def configuration(self) -> Configuration:
        """The settings of the session, with their origins."""
        return self._configuration

    @property
    def _advice(self) -> SamplingAdvice:
        return self._given_advice

    def start_over(self, *, system_prompt: str | None = None) -> None:
        """Move the front end to a new session."""
        self.wish = NewSession(system_prompt)

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Move the front end to a saved session."""
        self.wish = OtherSession(session)

    def switch_model(self, name: str) -> None:
        """Refuse, because other sessions use the model as well."""
        self._tell(ev.Notice(KEPT_MODEL.format(name=name), "error"))
