"""Leaving the app: close the engine first, but never wait long for it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from textual.app import App

from streamchat.base.formatting import plural
from streamchat.base.sanitize import printable
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.outbox import QueuedMessage
from streamchat.frontend.slash.queue import shortened
from streamchat.tui.bindings import hint
from streamchat.tui.bridge import EventBridge

CLOSE_S = 1.0
"""Seconds to wait for the engine thread on exit."""
QUIT_WINDOW_S = 3.0
"""Seconds in which a second Ctrl+C quits."""
MAX_LISTED = 10
"""Unsent messages that are listed on exit if the input history has them."""


class Leaving:
    """Ends `app` after `engine` has closed, or after a timeout."""

    def __init__(self, app: App[int], engine: ChatEngine, bridge: EventBridge) -> None:
        self._app, self._engine, self._bridge = app, engine, bridge
        self._begun = False
        self._armed = False

    def leave(self, code: int) -> None:
        """Close the engine in another thread, then exit with `code`. A second call exits immediately."""
        if self._begun:
            self._app.exit(code, return_code=code)
            return
        self._begun = True
        self._bridge.close()
        # not a worker: Textual and asyncio would wait for a hanging thread
        threading.Thread(target=self._close_engine, args=(code,), name="streamchat-close", daemon=True).start()
        self._app.set_timer(CLOSE_S + 0.2, lambda: self._leave_unless_saving(code))

    def _leave_unless_saving(self, code: int) -> None:
        """Exit after the timeout, unless the engine is saving; then only a second Ctrl+Q exits."""
        if self._engine.saving:
            quit_key = hint(self._app, "app.quit")
            self._app.notify(f"the conversation is being saved; press {quit_key} to quit immediately", timeout=30)
        else:
            self._app.exit(code, return_code=code)

    def _close_engine(self, code: int) -> None:
        in_time = self._engine.close(CLOSE_S)
        with suppress(RuntimeError):  # the loop may have ended
            self._app.call_later(self._closed, code, in_time)

    def _closed(self, code: int, in_time: bool) -> None:
        """Exit: the engine thread has ended, or timed out."""
        if not in_time:
            logging.getLogger(__name__).warning("the engine did not stop within %s s", CLOSE_S)
        self._app.exit(code, return_code=code)

    def interrupt(self, code: int) -> None:
        """Leave with `code` on a second press."""
        if self._armed:
            self.leave(code)
            return
        self._armed = True
        self._app.notify(f"press {hint(self._app, 'chat.interrupt')} again to quit", timeout=QUIT_WINDOW_S)
        self._app.set_timer(QUIT_WINDOW_S, self._disarm)

    def _disarm(self) -> None:
        self._armed = False

    def watch_signals(self) -> None:
        """Exit cleanly on SIGTERM and SIGHUP, with the terminal restored."""
        loop = asyncio.get_running_loop()
        for name, leave in (("SIGTERM", self.leave), ("SIGHUP", self._hang_up)):
            number = getattr(signal, name, None)
            if number is not None:
                with suppress(NotImplementedError, RuntimeError, ValueError):
                    loop.add_signal_handler(number, leave, 128 + number)

    def _hang_up(self, code: int) -> None:
        """Leave once: both the kernel and the driver may report a closed terminal."""
        if not self._begun:
            self.leave(code)


def report_unsent(queue: Sequence[QueuedMessage], in_history: bool) -> None:
    """Print the messages that were not sent to stderr, in full unless the input history has them."""
    if not queue:
        return
    where = "; the input history (Up) has them" if in_history else ""
    lines = [f"streamchat: {plural(len(queue), 'queued message')} not sent{where}"]
    if in_history:
        lines += [f"  {shortened(each.message.typed)}" for each in queue[:MAX_LISTED]]
        if len(queue) > MAX_LISTED:
            lines.append(f"  and {len(queue) - MAX_LISTED} more")
    else:
        lines += [printable(each.message.typed) for each in queue]
    with suppress(OSError):  # the terminal may be closed
        print("\n".join(lines), file=sys.stderr, flush=True)
