"""The engine's thread: dispatches requests to the model host and the turn runner.

Nothing here may be called from another thread; use `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, assert_never

from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import ConfigError
from streamchat.base.progress import Progress
from streamchat.base.sanitize import encodable
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load
from streamchat.engine.jobs import Job, JobQueue
from streamchat.engine.model_host import ModelHost
from streamchat.engine.status_sampler import StatusSampler
from streamchat.engine.turn_runner import TurnRunner
from streamchat.sessions.archive import Archive, OpenStore

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation


class Owner:
    """Owns model, conversation and archive.

    Args:
        configuration: Settings and their origins, for messages.
        load: Loads the model.
        publish: Sends an event to the front ends.
        progress: Reports the progress of loading; may raise to stop it.
        open_store: Opens the store; None if nothing is saved.
        jobs: The queue that the jobs for `handle` come from.
        save_later: Save nothing until a `Save` or `OpenSession`.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load,
        publish: Callable[[ev.Event], None],
        progress: Progress,
        open_store: OpenStore | None,
        jobs: JobQueue,
        *,
        save_later: bool = False,
    ) -> None:
        self._publish = publish
        self.archive = Archive(open_store, publish, is_deferred=save_later)
        self.host = ModelHost(configuration, load, self.archive, self._emit, progress)
        self.status = StatusSampler(self.host, jobs, self.archive, publish)
        self._turns = TurnRunner(self.host, jobs, self.archive, self.status, self._emit)

    @property
    def conversation(self) -> Conversation | None:
        """The active conversation; None until the first model is loaded."""
        return None if self.host.started is None else self.host.started.conversation

    def handle(self, job: Job) -> None:
        """Carry out a request, up to its last event; emit a notice if it is not allowed."""
        try:
            self._carry_out(job)
        except ConfigError as error:
            self._emit(ev.Notice(str(error), "warning"))
        if not isinstance(job.request, rq.TurnRequest):  # the end of a turn samples by itself
            self.status.sample()

    def _carry_out(self, job: Job) -> None:
        match job.request:
            case rq.Submit(text):
                self._turns.run(job, encodable(text))
            case rq.Quote(turn=turn) if turn and self._turns.page_in(job, turn):
                pass
            case rq.Quote(text, reply, pin):
                self._turns.run(job, encodable(text), reply=encodable(reply), pin=pin)
            case rq.Retry():
                self._turns.replace(job)
            case rq.Edit(text):
                self._turns.replace(job, encodable(text))
            case rq.Compact():
                self._turns.compact(job)
            case rq.Undo(to_edit):
                self._turns.undo(to_edit=to_edit)
            case rq.Pin(turn):
                self._turns.set_pin(turn, True)
            case rq.Unpin(turn):
                self._turns.set_pin(turn, False)
            case rq.Clear():
                self.host.start_over()
            case rq.SetSystemPrompt(text):
                self.host.start_over(system_prompt=encodable(text))
            case rq.SetOption(name, value):
                self.host.set_option(name, value)
            case rq.ResetOption(name):
                self.host.reset_option(name)
            case rq.SwitchModel(name):
                self.host.switch_model(name)
            case rq.OpenSession(session, agreed_model):
                self.host.open_session(session, agreed_model)
            case rq.Save():
                self.archive.start_saving(self.host.active)
            case rq.SetTitle(text):
                self.archive.set_title(text)
            case rq.CountTokens(text):
                tokens = len(self.host.active.conversation.encoder.text(encodable(text)))
                self._emit(ev.TextCounted(text, tokens))
            case rq.Stop() | rq.FetchModel() | rq.CancelFetch():
                pass  # took effect when it was sent
            case _:
                assert_never(job.request)

    def _emit(self, event: ev.Event) -> None:
        """Record and publish an event; sample the status if it is due."""
        self.archive.record(event)
        self._publish(event)
        self.status.sample_if_due()
