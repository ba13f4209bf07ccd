"""Carries out requests: the same code for the chat's own engine and for sessions of a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, assert_never

from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import ConfigError
from streamchat.base.sanitize import encodable
from streamchat.engine.hosting import ConversationHost
from streamchat.engine.jobs import Job
from streamchat.engine.status_sampler import StatusSampler
from streamchat.engine.time_travel import TimeTravel
from streamchat.engine.turn_runner import TurnRunner
from streamchat.sessions.archive import Archive


class RequestHost(ConversationHost, Protocol):
    """A host whose conversation, settings and model front ends may change."""

    def start_over(self, *, system_prompt: str | None = None) -> None:
        """Start a new conversation, with another system prompt if one is given."""
        ...

    def set_option(self, name: str, value: rq.SettingValue) -> None:
        """Change a live setting; raises ConfigError."""
        ...

    def reset_option(self, name: str) -> None:
        """Set a live setting to its default, or to what the model's makers advise; raises ConfigError."""
        ...

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it."""
        ...

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Resume a saved session."""
        ...


class RequestHandler:
    """Carries out one request at a time. Used on the thread that owns the model.

    Args:
        host: Has the active conversation.
        turns: Runs its turns.
        archive: Saves it.
        status: Samples its figures.
        emit: Records and publishes an event.
    """

    def __init__(
        self,
        host: RequestHost,
        turns: TurnRunner,
        archive: Archive,
        status: StatusSampler,
        emit: Callable[[ev.Event], None],
    ) -> None:
        self._host, self._turns, self._archive, self._status, self._emit = host, turns, archive, status, emit
        self._travel = TimeTravel(host, archive, emit, host.open_session)

    def handle(self, job: Job) -> None:
        """Carry out a request, up to its last event; emit a notice if it is not allowed."""
        try:
            self._carry_out(job)
        except ConfigError as error:
            self._emit(ev.Notice(str(error), "warning"))
        if not isinstance(job.request, rq.TurnRequest):  # the end of a turn samples by itself
            self._status.sample()

    def _carry_out(self, job: Job) -> None:
        match job.request:
            case rq.Submit(text):
                self._turns.run(job, encodable(text))
            case rq.Quote(turn=turn) if turn and self._turns.page_in(job, turn):
                pass
            case rq.Quote(text, reply, pin):
                self._turns.run(job, encodable(text), reply=encodable(reply), pin=pin)
            case rq.Retry(turns):
                self._turns.replace(job, recall=turns)
            case rq.Edit(text):
                self._turns.replace(job, encodable(text))
            case rq.Compact():
                self._turns.compact(job)
            case rq.Undo(to_edit):
                self._turns.undo(to_edit=to_edit)
            case rq.Rewind(turn, drop):
                self._travel.rewind(turn, drop=drop)
            case rq.Fork(turn):
                self._travel.fork(turn)
            case rq.Pin(turn):
                self._turns.set_pin(turn, True)
            case rq.Unpin(turn):
                self._turns.set_pin(turn, False)
            case rq.Clear():
                self._host.start_over()
            case rq.SetSystemPrompt(text):
                self._host.start_over(system_prompt=encodable(text))
            case rq.SetOption(name, value):
                self._host.set_option(name, value)
            case rq.ResetOption(name):
                self._host.reset_option(name)
            case rq.SwitchModel(name):
                self._host.switch_model(name)
            case rq.OpenSession(session, agreed_model):
                self._host.open_session(session, agreed_model)
            case rq.Save():
                self._archive.start_saving(self._host.active)
            case rq.SetTitle(text):
                self._archive.set_title(text)
            case rq.CountTokens(text):
                tokens = len(self._host.active.conversation.encoder.text(encodable(text)))
                self._emit(ev.TextCounted(text, tokens))
            case rq.Stop() | rq.FetchModel() | rq.CancelFetch():
                pass  # took effect when it was sent
            case _:
                assert_never(job.request)
