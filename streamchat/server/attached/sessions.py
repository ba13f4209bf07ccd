"""The sessions of the attached front ends, and the choice of a session for each front end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from streamchat.base import events as ev
from streamchat.base.errors import SessionError, StreamchatError, describe_unexpected
from streamchat.config.loader import Configuration
from streamchat.config.settings import setting_fields, spec_of
from streamchat.server.attached.host import NewSession, OtherSession
from streamchat.server.attached.session import Closing, SharedParts, SharedSession
from streamchat.server.known import KnownSession
from streamchat.server.live_sessions import CallCancelledError
from streamchat.server.model_thread import ModelThread
from streamchat.sessions.settings import resumed_configuration

_log = logging.getLogger(__name__)
MAX_IDLE = 16
"""Maximum number of histories of sessions without a front end; front ends that lost their connection need them."""


@dataclass(frozen=True)
class Newest:
    """The front end wants the newest session, or a new one if there is none."""


Wish = Newest | NewSession | OtherSession


@dataclass(frozen=True)
class Placed:
    """The session of a front end, and the events that show it."""

    shared: SharedSession
    number: int
    """Number of the newest event before the state."""
    events: tuple[ev.Event, ...]


class SharedSessions:
    """All sessions with front ends. Used on the event loop's thread, unless a method says otherwise.

    Args:
        model: The model's thread; the model is loaded.
    """

    def __init__(self, model: ModelThread) -> None:
        self._model = model
        self._closing = Closing()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shared: dict[KnownSession, SharedSession] = {}
        """In order of their latest use. Used on the model's thread."""
        self.is_viewed: Callable[[SharedSession], bool] = lambda shared: False
        """Returns whether a session has a connected front end; called on the model's thread."""
        self.wake: Callable[[SharedSession], None] = lambda shared: None
        """Called after an event was added to the history of a session."""

    def stop(self) -> None:
        """Stop all turns of front ends, before the model's thread is stopped. May be called from any thread."""
        self._closing.cancelled.set()
        for shared in list(self._shared.values()):
            shared.cancel_all()

    def receive(self, session: KnownSession, event: ev.Event) -> None:
        """Publish an event of a session to its front ends. Called on the model's thread."""
        shared = self._shared.get(session)
        if shared is not None:
            shared.publish(event)

    @property
    def is_closing(self) -> bool:
        """Whether the server stops."""
        return self._closing.cancelled.is_set()

    def find(
        self,
        wish: Wish,
        near: SharedSession | None,
        placed: Callable[[Placed], None],
        refused: Callable[[StreamchatError], None],
    ) -> None:
        """Find or start the session that a front end wants, then call `placed` or `refused` on the event loop's thread.

        Args:
            wish: What it wants.
            near: The session that the front end leaves; None for none.
            placed: Called with the session.
            refused: Called with the reason why there is none.
        """
        self._loop = asyncio.get_running_loop()
        self._model.scheduler.submit(lambda: self._place(lambda: self._wanted(wish, near), placed, refused))

    def describe(
        self, shared: SharedSession, placed: Callable[[Placed], None], refused: Callable[[StreamchatError], None]
    ) -> None:
        """Like `find`, for a known session."""
        self._model.scheduler.submit(lambda: self._place(lambda: self._shared_of(shared.session), placed, refused))

    # --- the model's thread -----------------------------------------------------------------------------------

    def post(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function on the event loop's thread, after those posted before it."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(function, *arguments)

    def _place(
        self,
        wanted: Callable[[], SharedSession],
        placed: Callable[[Placed], None],
        refused: Callable[[StreamchatError], None],
    ) -> None:
        try:
            shared = wanted()
            events = shared.describe()
        except CallCancelledError:
            self.post(refused, SessionError("the server is stopping; try again in a moment"))
        except StreamchatError as error:
            self.post(refused, error)
        except Exception as error:
            _log.exception("a session could not be shown")
            self.post(refused, StreamchatError(f"unexpected {describe_unexpected(error)}"))
        else:
            self.post(lambda: placed(Placed(shared, shared.history.last, events)))

    def _wanted(self, wish: Wish, near: SharedSession | None) -> SharedSession:
        saved, known = self._model.saved, self._model.known
        match wish:
            case OtherSession(name):
                session = known.get(name)
                if session is None:
                    if saved is None:
                        raise SessionError("the server saves no sessions (save = never), so none can be opened")
                    found = saved.named(name)
                    session = known.get(found.id) or found
                return self._shared_of(session)
            case Newest():
                newest = None if saved is None else saved.newest()
                if newest is not None:
                    return self._shared_of(known.get(newest.id) or newest)
                live = [each for each in known if each.is_live and (each.keep or saved is None)]
                if live:
                    return self._shared_of(max(live, key=lambda each: each.used))
                return self._started(None, None)
            case NewSession(system_prompt):
                return self._started(system_prompt, near)

    def _shared_of(self, session: KnownSession) -> SharedSession:
        session = self._model.known.get(session.id) or session
        shared = self._shared.pop(session, None)
        if shared is None:
            if session.id not in self._model.known:
                self._model.known.add(session)
            shared = self._added(session, self._configuration_of(session))
        self._shared[session] = shared
        return shared

    def _started(self, system_prompt: str | None, near: SharedSession | None) -> SharedSession:
        """Return a new session, with the settings of the session that the front end leaves, if any."""
        base = self._model.configuration if near is None else near.configuration
        if system_prompt is not None:
            base = replace(base, settings=replace(base.settings, system_prompt=system_prompt))
        usual = self._model.configuration.settings
        prompt = base.settings.system_prompt
        session = KnownSession(None if prompt == usual.system_prompt else prompt, keep=self._model.saved is not None)
        session.settings = None if base.settings == usual else base.settings
        self._model.known.add(session)
        return self._added(session, base)

    def _added(self, session: KnownSession, configuration: Configuration) -> SharedSession:
        model, live, loaded = self._model, self._model.live, self._model.loaded
        assert live is not None
        assert loaded is not None
        parts = SharedParts(model.scheduler, model.claims, live, model.known, loaded.advice, self._closing, self.post)
        shared = SharedSession(session, configuration, parts, lambda: self.wake(shared))
        self._shared[session], session.is_shared = shared, True
        self._drop_old()
        return shared

    def _drop_old(self) -> None:
        idle = [each for each in self._shared.values() if not self.is_viewed(each) and not each.waiting]
        for shared in idle[: max(0, len(idle) - MAX_IDLE)]:
            shared.is_dropped = True
            if self.is_viewed(shared):  # a front end has come back just now, perhaps before it could see that
                shared.is_dropped = False
            else:
                del self._shared[shared.session]
                shared.session.is_shared = False

    def _configuration_of(self, session: KnownSession) -> Configuration:
        """Return the settings of a session: the server's, with those saved with the session, as for a resume."""
        base, saved = self._model.configuration, self._model.saved
        if session.system is not None:
            base = replace(base, settings=replace(base.settings, system_prompt=session.system))
        if session.settings is not None:
            return replace(base, settings=session.settings)
        if saved is None or not session.is_saved:
            return base
        resumed = resumed_configuration(base, saved.info(session.id))
        names = [name for name in setting_fields() if spec_of(name).live and spec_of(name).section != "interface"]
        values = {name: getattr(resumed.settings, name) for name in names}
        origins = {name: resumed.origins[name] for name in names if name in resumed.origins}
        configuration = replace(base, settings=replace(base.settings, **values), origins={**base.origins, **origins})
        if configuration.settings != base.settings:
            session.settings = configuration.settings
        return configuration
