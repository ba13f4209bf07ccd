"""Switches to another model: what must be fetched is fetched while the chat continues, then loaded between replies."""

from __future__ import annotations

from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.requests import CancelFetch, FetchModel, Request, SwitchModel
from streamchat.frontend.messages import fetching_text


class ModelSwitch:
    """The model that the user chose, from choosing it until it is loaded. Not thread-safe.

    Args:
        send: Sends a request to the engine.
    """

    def __init__(self, send: Callable[[Request], None]) -> None:
        self._send = send
        self._fetching = ""
        """Name of the model that is being fetched."""
        self._progress: ev.ModelFetching | None = None
        self._fetched = ""
        """Name of a model that was fetched and waits for the end of the reply."""

    @property
    def is_active(self) -> bool:
        """Whether a model is being fetched, or waits to be loaded."""
        return bool(self._fetching or self._fetched)

    @property
    def is_due(self) -> bool:
        """Whether a fetched model waits to be loaded."""
        return bool(self._fetched)

    def is_fetching(self, name: str) -> bool:
        """Return whether `name` is being fetched."""
        return bool(name) and name == self._fetching

    @property
    def text(self) -> str:
        """What happens, as text; '' if nothing does."""
        if self._fetched:
            return f"{self._fetched} is fetched and loads when this reply is done"
        if not self._fetching:
            return ""
        return fetching_text(self._fetching, self._progress)

    def fetch(self, name: str) -> None:
        """Start to fetch `name`; a fetch that is running is canceled."""
        self._fetching, self._progress, self._fetched = name, None, ""
        self._send(FetchModel(name))

    def cancel(self) -> None:
        """Cancel the fetch, or the loading of the fetched model; `ModelFetched` follows if one was running."""
        if self._fetching:
            self._send(CancelFetch())
        self._fetched = ""

    def load(self, name: str) -> None:
        """Load `name`, which is on this machine; a fetch that is running is canceled."""
        self.cancel()
        self._fetching = ""
        self._send(SwitchModel(name))

    def load_fetched(self) -> None:
        """Load the fetched model. The engine must be idle."""
        name, self._fetched = self._fetched, ""
        self._send(SwitchModel(name))

    def apply(self, event: ev.Event) -> None:
        """Update for `event`."""
        match event:
            case ev.ModelFetching(name=name) if name == self._fetching:
                self._progress = event
            case ev.ModelFetched(name=name) if name == self._fetching and not (event.canceled and self._is_new):
                self._fetched = "" if event.error or event.canceled else name
                self._fetching, self._progress = "", None
            case ev.EngineFailed():
                self.cancel()
                self._fetching = ""
            case _:
                pass

    @property
    def _is_new(self) -> bool:
        """Whether the fetch has not reported anything: the end of one before it, of the same name, is not its end."""
        return self._progress is None
