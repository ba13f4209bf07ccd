"""The full-screen app: engine lifecycle, themes and shutdown. `screens` has everything visible."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.actions import ActionParseResult
from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.css.query import NoMatches
from textual.dom import DOMNode
from textual.driver import Driver
from textual.notifications import Notify
from textual.screen import Screen
from textual.theme import Theme, ThemeProvider
from textual.widget import MountError

from streamchat.base import events as ev
from streamchat.base.colors import is_color_forbidden
from streamchat.base.errors import ExitCode
from streamchat.base.sanitize import one_line
from streamchat.config.keymap import BY_ID
from streamchat.config.loader import Configuration
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.outbox import Phase
from streamchat.frontend.window_title import WindowTitle
from streamchat.telemetry import log_file
from streamchat.telemetry.memory import free_unused, return_freed
from streamchat.telemetry.trace import FAILED, PAINT, mark
from streamchat.tui.attention import AttentionCall
from streamchat.tui.bindings import bind
from streamchat.tui.bridge import EventBridge
from streamchat.tui.commands import add_app_commands
from streamchat.tui.leaving import Leaving, report_unsent
from streamchat.tui.pace import CollectionPace
from streamchat.tui.palette import Palette, palette_entries
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.closable import Closable
from streamchat.tui.state import ChatState
from streamchat.tui.terminal import guarded_driver, guarded_terminal
from streamchat.tui.themes import remember_theme, remembered_theme, unknown_theme, user_themes
from streamchat.tui.type_ahead import TypeAhead
from streamchat.web.launch import SESSION_META, in_browser

SWITCH_INTERVAL_S = 0.0001
"""Seconds after which a thread that waits for the GIL requests it from the other one."""
MAX_TOASTS = 2
"""Maximum toasts on the screen; identical ones are shown once."""


class StreamchatApp(App[int]):
    """The app. `run` returns the exit code.

    Args:
        engine: Started and closed by the app.
        configuration: For theme and history.
        watching: Read-only: another component drives the engine.
    """

    TITLE = "streamchat"
    # Textual ignores the CSS_PATH of the default screen
    CSS_PATH: ClassVar[list[str]] = ["screens/figures.tcss", "screens/chat.tcss"]  # type: ignore[assignment]
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("app.help", "screen.open_help", show=True),
        bind("app.quit", "quit", priority=True, show=True),
        bind("app.palette", "command_palette", priority=True),
    ]

    def __init__(self, engine: ChatEngine, configuration: Configuration, *, watching: bool = False) -> None:
        if not is_color_forbidden(os.environ):
            os.environ.pop("NO_COLOR", None)  # Textual obeys an empty one as well
        super().__init__()
        self.window_title = WindowTitle(os.environ, is_on=configuration.settings.window_title)
        self.state = ChatState(engine, configuration, watching=watching)
        self.watching = watching
        self.takes_input = threading.Event()
        """Set after the first paint; `KeyboardDriver` keeps earlier keys until then."""
        self.failure: ev.EngineFailed | None = None
        """Why the engine failed; None if it did not."""
        self._configuration = configuration
        themes, self._theme_problems = user_themes()
        for theme in themes:
            self.register_theme(theme)
        self._bridge = EventBridge(lambda: self._chat.call_later(self._chat.show_soon))
        self._chat = ChatScreen(self.state, self._bridge, self._react)
        add_app_commands(self, self._chat)
        self._leaving = Leaving(self, engine, self._bridge)
        self._collections = CollectionPace()
        self._had_model = False
        self._type_ahead = TypeAhead(self, self._handle_typed)
        self._attention = AttentionCall(
            lambda: engine.settings, lambda: not self.app_focus and self.state.outbox.phase is Phase.IDLE
        )

    def action_command_palette(self) -> None:
        """Open the command palette."""
        if not isinstance(self.screen, Palette):
            self.push_screen(Palette())  # without an id: the last one may not be removed yet

    def search_themes(self) -> None:
        """Open the list of themes."""
        self.push_screen(Palette(providers=[ThemeProvider], placeholder="Search for themes…"))

    def get_driver_class(self) -> type[Driver]:
        """Textual's driver, with safe pastes and suspension (see `keyboard`)."""
        return guarded_driver(super().get_driver_class())

    def keys_of(self, key_id: str) -> str:
        """The configured keys for a key id."""
        return self._configuration.keys.get(key_id, BY_ID[key_id].keys)

    async def on_event(self, event: events.Event) -> None:
        """Handle keys and pastes in order, also while a dialog opens or closes."""
        if isinstance(event, events.Key | events.Paste) and not event.is_forwarded:
            await self._type_ahead.put(event)
        else:
            await super().on_event(event)

    async def _handle_typed(self, event: events.Event) -> None:
        """Handle a key or a paste. If no widget has the focus, as after a click where nothing is, the input gets it."""
        self.app_focus = True  # whatever the terminal reported; Textual then restores the focus
        chat = self._chat
        if self.screen is chat and chat.is_mounted and chat.focused is None:
            chat.set_focus(chat.prompt, scroll_visible=False)
        await super().on_event(event)

    async def run_action(
        self,
        action: str | ActionParseResult,
        default_namespace: DOMNode | None = None,
        namespaces: Mapping[str, DOMNode] | None = None,
    ) -> bool:
        """Run an action, unless its dialog has no widgets yet, or not any more.

        A key may be on its way to the input while a dialog opens. Textual looks for its action in the dialog.
        """
        nodes = default_namespace.ancestors_with_self if default_namespace else ()
        dialog = next((node for node in nodes if isinstance(node, Closable)), None)
        if dialog and not dialog.has_widgets:
            return False
        return await super().run_action(action, default_namespace, namespaces)

    # --- startup --------------------------------------------------------------------------------------------

    def get_default_screen(self) -> Screen[None]:
        """Show the chat from the first paint."""
        return self._chat

    def on_mount(self) -> None:
        """Set keys and theme; start the engine after the first paint."""
        self.set_keymap(dict(self._configuration.keys))
        name = self._configuration.settings.theme
        if not self._configuration.is_explicit("theme") and remembered_theme() in self.available_themes:
            name = remembered_theme()
        if name in self.available_themes:
            self.theme = name
        else:
            place = self._configuration.origin("theme")
            self.notify(
                f"{place}: {unknown_theme(name, self.available_themes)}", severity="warning", markup=False, timeout=8
            )
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        for problem in self._theme_problems:
            self.notify(problem, severity="warning", markup=False, timeout=8)
        self.begin_capture_print(self)
        if not self.is_headless:
            self._leaving.watch_signals()
        self.state.engine.subscribe(self._bridge.put)
        self.call_after_refresh(mark, PAINT)
        self.call_after_refresh(self.takes_input.set)
        self.call_after_refresh(self.state.engine.start)

    def on_unmount(self) -> None:
        """Restore the settings of the process."""
        self._collections.resume()

    def model_ready(self) -> None:
        """Free the previous model, if there was one, then exempt the loaded objects from garbage collection.

        About 400,000 objects of torch and transformers are long-lived. A search for garbage among them stops drawing.
        """
        if self._had_model:
            free_unused()
        else:
            return_freed()
        self._had_model = True
        gc.freeze()

    def _react(self, event: ev.Event) -> None:
        """Handle an event that concerns the whole app; the chat screen has shown it."""
        self.write_code(self.window_title.after(event) + self._attention.after(event))
        match event:
            case ev.ModelReady():
                self.model_ready()
            case ev.SessionOpened(session=session):
                report_session(self._driver, session)
            case ev.ConversationCleared():
                report_session(self._driver, None)
            case ev.TurnStarted():
                self._collections.delay()
            case ev.TurnFinished():
                self._collections.resume()
            case ev.EngineFailed():
                self._collections.resume()
                self.engine_failed(event)
            case _:
                pass

    def write_code(self, code: str) -> None:
        """Write a control sequence that draws nothing to the terminal; a browser gets none."""
        write = getattr(self._driver, "write_code", None)  # only `KeyboardDriver` has it
        if code and write is not None:
            write(code)

    def on_print(self, event: events.Print) -> None:
        """Send output of `print` to the log."""
        if event.text.strip():
            record = logging.LogRecord("stdout", logging.INFO, "", 0, event.text.rstrip(), None, None)
            log_file.start_logging().handle(record)

    def engine_failed(self, event: ev.EngineFailed) -> None:
        """Remember the failure for the exit code and log its traceback; the chat shows the message."""
        self.failure = event
        mark(FAILED + one_line(event.message))
        if event.details:
            log_file.log_crash(event.details)

    def _handle_exception(self, error: Exception) -> None:
        """End the app with an error, unless an exit has removed a widget, or not created it, for which it looks."""
        if self._exit and isinstance(error, NoMatches | MountError):
            logging.getLogger(__name__).info("while the app exits: %s", error)
            return
        super()._handle_exception(error)

    def _fatal_error(self) -> None:
        """Handle a bug in the app: print one sentence after the terminal is restored instead of Textual's traceback."""
        details = traceback.format_exc()
        path = log_file.log_crash(details)
        if log_file.is_debug():
            super()._fatal_error()
            return
        error = sys.exc_info()[1]
        where = f"the traceback is in {path}" if path else "run again with --debug to see the traceback"
        self.panic(Text(f"streamchat: unexpected {type(error).__name__}: {one_line(str(error))}; {where}"))

    def on_notify(self, event: Notify) -> None:
        """Limit the number of toasts before Textual shows a new one, so that they do not cover the conversation."""
        others = [note for note in self._notifications if note.message != event.notification.message]
        for note in list(self._notifications):
            if note not in others[1 - MAX_TOASTS :]:
                del self._notifications[note]

    # --- shutdown -------------------------------------------------------------------------------------------

    @property
    def _code(self) -> int:
        return self.failure.exit_code if self.failure else ExitCode.OK

    async def action_quit(self) -> None:
        """Close the engine in another thread, then exit. A second call exits immediately."""
        self._leaving.leave(self._code)

    def action_help_quit(self) -> None:
        """Ctrl+C with nothing to stop or copy: quit on a second press. Textual binds the key."""
        self._leaving.interrupt(self._code)

    def report_unsent(self) -> None:
        """Print the messages that were still queued, after the terminal is restored."""
        in_history = self._configuration.settings.history and not self.state.history.problem
        report_unsent(self.state.outbox.queue, in_history)

    # --- themes and palette -----------------------------------------------------------------------------------

    def _keep_theme(self, theme: Theme) -> None:
        """Remember a theme chosen with /theme or in the palette, unless the configuration sets one."""
        if not self._configuration.is_explicit("theme"):
            remember_theme(theme.name)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Entries of the command palette."""
        return palette_entries(self, self._chat)


def report_session(driver: Driver | None, session: str | None) -> None:
    """In a browser tab, tell the server the id of the saved session, so that the tab can resume it after a reload."""
    if in_browser(os.environ) and (write := getattr(driver, "write_meta", None)) is not None:
        write({"type": SESSION_META, "session": session})


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Reduce GIL contention between the drawing and the decoding thread.

    Each torch operation releases the GIL and then waits to reacquire it, by default up to 5 ms while the other thread
    computes. There are dozens of such operations per token, so the wait must be short.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_app(engine: ChatEngine, configuration: Configuration, *, watching: bool = False) -> int:
    """Run the app until the user quits and return the exit code. With `watching` the app has no input.

    After `EngineFailed`, prints its message to stderr once the terminal is restored and returns its exit code.
    """
    log_file.start_logging()
    app = StreamchatApp(engine, configuration, watching=watching)
    with guarded_terminal(), short_switch_interval():
        code = app.run()
    app.report_unsent()
    if app.failure is not None:
        with suppress(OSError):  # the terminal may be closed
            print(f"streamchat: {one_line(app.failure.message)}", file=sys.stderr, flush=True)
    if code is None:  # the app failed, and has printed why
        return app.return_code or ExitCode.FAILURE
    return code
