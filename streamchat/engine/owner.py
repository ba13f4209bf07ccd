"""The engine's thread: dispatches requests to the model host and the turn runner.

Nothing here may be called from another thread; use `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.progress import Progress
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load
from streamchat.engine.jobs import Job, JobQueue
from streamchat.engine.model_host import ModelHost
from streamchat.engine.request_handler import RequestHandler
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
        turns = TurnRunner(self.host, jobs, self.archive, self.status, self._emit)
        self._handler = RequestHandler(self.host, turns, self.archive, self.status, self._emit)

    @property
    def conversation(self) -> Conversation | None:
        """The active conversation; None until the first model is loaded."""
        return None if self.host.started is None else self.host.started.conversation

    def handle(self, job: Job) -> None:
        """Carry out a request, up to its last event; emit a notice if it is not allowed."""
        self._handler.handle(job)

    def _emit(self, event: ev.Event) -> None:
        """Record and publish an event; sample the status if it is due."""
        self.archive.record(event)
        self._publish(event)
        self.status.sample_if_due()
