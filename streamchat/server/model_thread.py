"""The thread that owns the model: loads it, and works on calls until it is closed."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.errors import StoreError, StreamchatError, limit_reached
from streamchat.base.progress import Progress, silent
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.server.attachment import Attachment
from streamchat.server.calls import Call
from streamchat.server.claims import Claims
from streamchat.server.errors import ApiError
from streamchat.server.known import KnownSession, KnownSessions
from streamchat.server.live_sessions import LiveSessions
from streamchat.server.scheduler import Scheduler
from streamchat.server.snapshot_writer import SnapshotWriter
from streamchat.sessions.archive import Archive, OpenStore
from streamchat.sessions.identities import Identities

if TYPE_CHECKING:  # torch is imported on the model's thread only
    from streamchat.models.load import LoadedModel
    from streamchat.server.saved_sessions import SavedSessions
    from streamchat.server.service import Service
    from streamchat.store.store import Store

_log = logging.getLogger(__name__)
Observe = Callable[[KnownSession, ev.Event], None]
LOADING_S = 2.0
"""Maximum time to wait at the end for a model that is still being loaded."""


class ModelThread:
    """Loads the model and works on calls. All methods may be called from any thread.

    Args:
        configuration: Settings and their origins, for messages.
        live: Number of sessions whose caches are in memory.
        load: Loads the model; replaceable for tests.
        open_store: Opens the store of saved sessions; None saves nothing.
        observe: Called with every event and its session, on the model's thread.
        observe_switch: Called with the time, in seconds, to put a saved session into a seat, on the model's thread.
        progress: Reports the progress of loading.
        is_shared: Whether other replicas may continue the sessions.
    """

    def __init__(
        self,
        configuration: Configuration,
        live: int,
        load: Load = load_from_settings,
        *,
        open_store: OpenStore | None = None,
        observe: Observe = lambda session, event: None,
        observe_switch: Callable[[float], None] = lambda seconds: None,
        progress: Progress = silent,
        is_shared: bool = False,
    ) -> None:
        self._is_shared = is_shared
        self.configuration, self._size, self._load = configuration, live, load
        self._open_store, self._progress = open_store, progress
        self.observe = observe
        """Called with every event and its session, on the model's thread."""
        self._observe_switch = observe_switch
        self.scheduler = Scheduler()
        self.known = KnownSessions()
        self.claims = Claims(self.known)
        self.attachment = Attachment()
        self.loaded: LoadedModel | None = None
        """The model, its tokenizer and more; for the model's thread. None until it is loaded."""
        self.info: ev.ModelInfo | None = None
        """The model; None until it is loaded."""
        self.notes: tuple[str, ...] = ()
        """Notices about the model, one sentence each."""
        self._service: Service | None = None
        self.live: LiveSessions | None = None
        """The sessions with a cache in memory; None until the model is loaded."""
        self.saved: SavedSessions | None = None
        """The sessions in the store; None if nothing is saved."""
        self._calls: set[Call] = set()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._is_closing = False
        self.failure: BaseException | None = None
        """Why the thread ended; None if it was closed."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called on the thread when it has failed."""
        self._thread = threading.Thread(target=self._run, name="streamchat-model", daemon=True)

    def start(self) -> None:
        """Load the model, and return when it is ready.

        Raises:
            StreamchatError: The model cannot be loaded, or the store cannot be opened.
        """
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    def submit(self, call: Call) -> None:
        """Work on a call; an error is reported at once if the server stops."""
        with self._lock:
            is_closing = self._is_closing
            if not is_closing:
                self._calls.add(call)
        if is_closing or self._service is None:
            call.report(ApiError(503, "the server is stopping; try again in a moment", code="stopping"))
            return
        service = self._service

        def work() -> None:
            try:
                service.work(call)
            finally:
                with self._lock:
                    self._calls.discard(call)

        self.scheduler.submit(work)

    def cancel(self, call: Call) -> None:
        """Stop a call: what its reply has shown is kept."""
        call.cancelled.set()
        self.scheduler.wake()

    @property
    def waiting(self) -> int:
        """Number of calls that run or wait."""
        with self._lock:
            return len(self._calls)

    def stop(self) -> None:
        """Stop all calls, and refuse new ones."""
        with self._lock:
            self._is_closing = True
            for call in self._calls:
                call.cancelled.set()
        self.scheduler.close()

    def close(self, timeout_s: float = 60.0) -> bool:
        """Stop all calls, save all sessions, end the thread; return whether it ended in time.

        Waits only `LOADING_S` for a model that is still being loaded: there is nothing to save.
        """
        self.stop()
        if self._thread.ident is not None:
            self._thread.join(timeout_s if self._ready.is_set() else min(timeout_s, LOADING_S))
        return not self._thread.is_alive()

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        gc.enable()
        try:
            with self._opened_store() as store:
                self._serve(store)
        except BaseException as error:
            self.failure = error
            if not isinstance(error, StreamchatError):
                _log.exception("the model's thread ended")
            self._fail_calls(error)
            self.on_failure()
        finally:
            self._ready.set()

    def _fail_calls(self, error: BaseException) -> None:
        """Report to all calls that nothing works on them any more, and refuse new ones."""
        with self._lock:
            self._is_closing = True
            calls = list(self._calls)
        for call in calls:
            call.report(ApiError(503, str(limit_reached(error) or "the server failed"), code="stopping"))

    @contextmanager
    def _opened_store(self) -> Iterator[Store | None]:
        if self._open_store is None:
            yield None
            return
        with self._open_store() as store:
            yield store

    def _serve(self, store: Store | None) -> None:
        loaded = self.loaded = self._load(self.configuration, self._progress)
        self.configuration = self.configuration.advised_by(loaded.advice.values, loaded.advice.origins)
        writer = SnapshotWriter(self._note_failure)
        live = self._new_live(loaded, writer)
        self.live = live
        try:
            from streamchat.server.service import Service

            seat = live.add_seat()  # loads what a first request would wait for, and reports wrong settings now
            self.info, self.notes = seat.started.info, seat.started.notes
            self.saved = self._saved(store, loaded)
            self._service = Service(self.known, live, self.saved, self.scheduler.wait, self.claims)
            self._ready.set()
            self.scheduler.run(live.sample)
        finally:
            live.close()
            writer.close()

    def _new_live(self, loaded: LoadedModel, writer: SnapshotWriter) -> LiveSessions:
        from streamchat.server.formats import Formats
        from streamchat.server.seat import Seat, SeatParts

        identities = Identities()

        def new_archive(emit: Callable[[ev.Event], None]) -> Archive:
            archive = Archive(self._open_store, emit, identities=identities, write=writer.write, upkeep=False)
            archive.open(required=True)
            return archive

        parts = SeatParts(
            self.configuration,
            loaded,
            self.attachment,
            Formats(loaded.model, loaded.tokenizer, self.configuration.settings).of_settings,
            new_archive,
            self.scheduler.pause,
            self._publish,
            writer.finish,
            self._is_shared,
        )
        return LiveSessions(
            self._size,
            lambda: Seat(parts),
            self.scheduler.wait,
            writer.finish,
            self.known.remove,
            self._observe_switch,
        )

    def _saved(self, store: Store | None, loaded: LoadedModel) -> SavedSessions | None:
        from streamchat.models.fingerprint import model_fingerprint
        from streamchat.server.saved_sessions import SavedSessions

        if store is None:
            return None
        return SavedSessions(store, model_fingerprint(loaded.model), self.configuration.settings)

    def _publish(self, session: KnownSession, event: ev.Event) -> None:
        if isinstance(event, ev.SessionOpened):
            self.known.rename(session, event.session)
        self.observe(session, event)

    def _note_failure(self, error: StoreError) -> None:
        _log.warning("a snapshot could not be written: %s", error)
