"""Fetches models on a thread of its own, so that the chat continues meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError, describe_unexpected
from streamchat.base.progress import Progress

_log = logging.getLogger(__name__)

Fetch = Callable[[str, Progress], None]


class _CanceledError(Exception):
    """The fetch was canceled."""


class Fetcher:
    """Runs at most one fetch at a time. All methods may be called from any thread.

    Args:
        fetch: Fetches the model of a name; its progress may raise to cancel.
        publish: Sends an event to the front ends, on the thread of the fetch.
    """

    def __init__(self, fetch: Fetch, publish: Callable[[ev.Event], None]) -> None:
        self._fetch, self._publish = fetch, publish
        self._lock = threading.Lock()
        self._canceled = threading.Event()
        """Of the newest fetch."""

    def start(self, name: str) -> None:
        """Start to fetch `name`; cancel the fetch that is running."""
        with self._lock:
            self._canceled.set()
            self._canceled = threading.Event()
            arguments = (name, self._canceled)
        threading.Thread(target=self._run, args=arguments, name="streamchat-fetch", daemon=True).start()

    def cancel(self) -> None:
        """Cancel the fetch that is running; it ends before its next block."""
        with self._lock:
            self._canceled.set()

    def _run(self, name: str, canceled: threading.Event) -> None:
        def progress(stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
            if canceled.is_set():
                raise _CanceledError
            self._publish(ev.ModelFetching(name, stage, done, total, "bytes" if unit == "bytes" else ""))

        try:
            progress(f"Looking for {name}")
            self._fetch(name, progress)
            end = ev.ModelFetched(name)
        except _CanceledError:
            end = ev.ModelFetched(name, canceled=True)
        except StreamchatError as error:
            _log.warning("fetching %r failed", name, exc_info=True)
            end = ev.ModelFetched(name, str(error))
        except Exception as error:
            _log.exception("fetching %r failed", name)
            end = ev.ModelFetched(name, f"{name} could not be fetched ({describe_unexpected(error)})")
        self._publish(end)


def fetch_model(name: str, progress: Progress) -> None:
    """Fetch the model that `name` means, unless it is on this machine.

    Raises:
        ModelError: It does not exist, or cannot be fetched.
    """
    from streamchat.models.fetch import fetch_model as fetch

    fetch(name, progress)
