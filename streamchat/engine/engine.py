"""The engine: one thread that owns model and cache, a queue of requests in, a stream of events out."""

from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.errors import ExitCode, StreamchatError, describe_unexpected, limit_reached
from streamchat.base.requests import CancelFetch, FetchModel, Request
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.engine.fetcher import Fetch, Fetcher, fetch_model
from streamchat.engine.jobs import JobQueue
from streamchat.engine.owner import Owner
from streamchat.models.limits import check_start
from streamchat.sessions.archive import OpenStore

_log = logging.getLogger(__name__)

IDLE_INTERVAL_S = 1.0
SAVING_S = 60.0
"""How much longer `close` waits while the cache is written to the disk."""


class _Closing(Exception):
    """Loading was interrupted because the engine is closing."""


class Engine:
    """Implements `ChatEngine`. All methods may be called from any thread and return at once.

    Args:
        configuration: Settings and their origins, for messages.
        load: Loads the model; replaceable for tests.
        fetch: Fetches a model for `FetchModel`; replaceable for tests.
        open_store: Opens the store of saved sessions; None saves nothing.
        session: The saved session to resume; None starts a new one.
        agreed_model: The model that the user agreed to load for it, if only an imported file named it.
        audit: Emit `CacheAudited` with every event that may change the cache.
        save_later: Save nothing until a `Save` or `OpenSession`.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load = load_from_settings,
        *,
        fetch: Fetch = fetch_model,
        open_store: OpenStore | None = None,
        session: str | None = None,
        agreed_model: str = "",
        audit: bool = False,
        save_later: bool = False,
    ) -> None:
        publish: Callable[[ev.Event], None] = self.publish
        if audit:
            from streamchat.conversation.audit import Auditor

            publish = Auditor(self.publish, lambda: self._owner.conversation)
        self._jobs = JobQueue()
        self._owner = Owner(configuration, load, publish, self._progress, open_store, self._jobs, save_later=save_later)
        self._fetcher = Fetcher(fetch, self.publish)
        self._session, self._agreed_model = session, agreed_model
        self._sinks: list[Callable[[ev.Event], None]] = []
        self._thread = threading.Thread(target=self._run, name="streamchat-engine", daemon=True)

    # --- requests, from any thread ----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The current settings."""
        return self._owner.host.settings

    def origin(self, name: str) -> str:
        """Return where the value of a setting came from: a flag, a file, the model, `/set`, for messages."""
        return self._owner.host.origin(name)

    @property
    def busy(self) -> bool:
        """Whether a turn is running or queued."""
        return self._jobs.busy

    @property
    def saving(self) -> bool:
        """Whether the conversation is being saved; closing waits for it."""
        return self._owner.archive.saving.is_set()

    @property
    def server(self) -> str:
        """None: this process has the model."""
        return ""

    def subscribe(self, sink: Callable[[ev.Event], None]) -> Callable[[], None]:
        """Call `sink` with every event, on the engine's thread; return a function that unsubscribes it."""
        self._sinks.append(sink)

        def unsubscribe() -> None:
            if sink in self._sinks:
                self._sinks.remove(sink)

        return unsubscribe

    def publish(self, event: ev.Event) -> None:
        """Emit an event to all subscribers, on the caller's thread."""
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception:
                _log.exception("a subscriber failed on %s", type(event).__name__)

    def start(self) -> None:
        """Start loading the model."""
        gc.enable()  # the command line disables it
        self._thread.start()

    def send(self, request: Request) -> None:
        """Queue a request; `Stop`, `FetchModel` and `CancelFetch` take effect at once."""
        match request:
            case FetchModel(name) if not self._jobs.closed:
                self._fetcher.start(name)
            case CancelFetch():
                self._fetcher.cancel()
            case _:
                self._jobs.put(request)

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything; return whether the thread ended in time. Waits longer if the conversation is being saved."""
        self._jobs.close()
        self._fetcher.cancel()
        if self._thread.ident is None:
            return True
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._owner.archive.saving.is_set():
                self._thread.join(SAVING_S)
        return not self._thread.is_alive()

    # --- the owner's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            check_start()
            self._owner.host.start(self._session, self._agreed_model)
            self._owner.status.sample()
            self._serve()
        except _Closing:
            pass
        except StreamchatError as error:
            self._fail(error.title, str(error), error.exit_code)
        except BaseException as error:
            if (limit := limit_reached(error)) is not None:
                self._fail(limit.title, str(limit), limit.exit_code)
                return
            self._fail("The engine failed", f"unexpected {describe_unexpected(error)}", ExitCode.FAILURE)
        finally:
            self._owner.host.end()
            self.publish(ev.EngineClosed())

    def _fail(self, title: str, message: str, exit_code: ExitCode) -> None:
        details = traceback.format_exc()
        _log.error("%s: %s\n%s", title, message, details)
        self.publish(ev.EngineFailed(title, message, int(exit_code), details))

    def _progress(self, stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        if self._jobs.closed:
            raise _Closing
        self.publish(ev.ModelLoading(stage, done, total, "bytes" if unit == "bytes" else ""))

    def _serve(self) -> None:
        while not self._jobs.closed:
            job = self._jobs.get(IDLE_INTERVAL_S)
            if job is not None:
                self._owner.handle(job)
            elif not self._jobs.closed:
                self._owner.status.sample()
