"""The full-screen app: owns the engine's life, theme, and the way out. Everything visible is in `screens`."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.notifications import Notify
from textual.screen import Screen
from textual.theme import Theme

from streamchat.base import events as ev
from streamchat.base.errors import ExitCode
from streamchat.base.sanitize import one_line
from streamchat.config.keymap import BY_ID
from streamchat.config.loader import Configuration
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.status import StatusBoard
from streamchat.telemetry import log_file
from streamchat.telemetry.memory import free_unused
from streamchat.telemetry.trace import FAILED, mark
from streamchat.tui.bindings import bind, hint
from streamchat.tui.bridge import EventBridge
from streamchat.tui.commands import app_registry, unknown_theme
from streamchat.tui.history import PromptHistory
from streamchat.tui.messages import EngineClosing, EventsArrived
from streamchat.tui.outbox import Outbox
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.help import HelpScreen
from streamchat.tui.terminal import guarded_driver, guarded_terminal
from streamchat.tui.themes import remember_theme, remembered_theme, user_themes

CLOSE_S = 1.0
"""How long leaving waits for the engine's thread."""
PALETTE_HAS = {"clear", "copy", "help", "quit", "recall", "sessions", "sidebar", "theme"}
"""Commands that the palette offers in words."""
MAX_TOASTS = 2
"""On the screen at a time; the same sentence is there once."""
AGAIN_S = 3.0
"""How long the first Ctrl+C counts."""


class StreamchatApp(App[int]):
    """The app. `run` returns the exit code.

    Args:
        engine: Not started yet; it is closed when the app ends.
        configuration: For theme and history.
        watching: Somebody else talks to the engine; the user looks on.
    """

    TITLE = "streamchat"
    # Textual does not read the sheet that a default screen names
    CSS_PATH: ClassVar[list[str]] = ["screens/figures.tcss", "screens/chat.tcss"]  # type: ignore[assignment]
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("app.help", "open_help", show=True),
        bind("app.quit", "quit", priority=True, show=True),
        bind("app.palette", "command_palette", priority=True),
        Binding(
            "ctrl+c", "interrupt", "Quit", show=False, id="app.interrupt", system=True, tooltip="Quit on a second press"
        ),
    ]

    def __init__(self, engine: ChatEngine, configuration: Configuration, *, watching: bool = False) -> None:
        super().__init__()
        self.engine, self.watching = engine, watching
        self.board = StatusBoard()
        self.registry = app_registry(self)
        self.failure: ev.EngineFailed | None = None
        """Why the engine ended, where it did."""
        self._configuration = configuration
        self._theme_problems = self._register_themes()
        self._bridge = EventBridge(lambda: self.post_message(EventsArrived()))
        self._outbox = Outbox(engine)
        self._chat = ChatScreen(self._bridge, self._outbox, PromptHistory.open(configuration.settings.history))
        self._leaving = False
        self._quit_armed = False

    def get_driver_class(self) -> type[Driver]:
        """Textual's choice, with pastes and stops guarded."""
        return guarded_driver(super().get_driver_class())

    def keys_of(self, key_id: str) -> str:
        """Names of the keys for something, as configured."""
        return self._configuration.keys.get(key_id, BY_ID[key_id].keys)

    @property
    def folder_sentence(self) -> str:
        """What the user must know about `./config.toml`; '' for nothing, and for who only looks on."""
        return "" if self.watching else self._configuration.local_notice

    def _register_themes(self) -> list[str]:
        """The user's themes; returns what is wrong with some."""
        themes, problems = user_themes()
        for theme in themes:
            self.register_theme(theme)
        return problems

    # --- life -----------------------------------------------------------------------------------------------

    def get_default_screen(self) -> Screen[None]:
        """The chat is there from the first paint on."""
        return self._chat

    def on_mount(self) -> None:
        """Keys and theme first, then the engine: it must not hold up the first paint."""
        self.set_keymap(dict(self._configuration.keys))
        name = self._configuration.settings.theme
        if not self._configuration.is_explicit("theme") and remembered_theme() in self.available_themes:
            name = remembered_theme()
        if name in self.available_themes:
            self.theme = name
        else:
            place = self._configuration.origin("theme")
            self.notify(f"{place}: {unknown_theme(name, self.themes())}", severity="warning", markup=False, timeout=8)
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        for problem in self._theme_problems:
            self.notify(problem, severity="warning", markup=False, timeout=8)
        self.begin_capture_print(self)
        if not self.is_headless:
            self._watch_signals()
        self.engine.subscribe(self._bridge.put)
        self.call_after_refresh(mark, "first paint")
        self.call_after_refresh(self.engine.start)

    def model_ready(self) -> None:
        """Some 400,000 objects of torch and transformers stay for long: the collector need not visit them again.

        Those of a model before are let go first.
        """
        free_unused()
        gc.freeze()

    def on_events_arrived(self, message: EventsArrived) -> None:
        """Let the chat handle them, so that keys are never held up here."""
        self._chat.post_message(EventsArrived())

    def on_print(self, event: events.Print) -> None:
        """What other code prints goes to the log."""
        if event.text.strip():
            record = logging.LogRecord("stdout", logging.INFO, "", 0, event.text.rstrip(), None, None)
            log_file.start_logging().handle(record)

    def engine_failed(self, event: ev.EngineFailed) -> None:
        """Remember the exit code; the chat shows the sentence."""
        self.failure = event
        mark(FAILED + one_line(event.message))
        if event.details:
            log_file.log_crash(event.details)

    def _fatal_error(self) -> None:
        """A bug of the interface: one sentence once the terminal is back, in the place of Textual's pages of it."""
        details = traceback.format_exc()
        path = log_file.log_crash(details)
        if log_file.is_debug():
            super()._fatal_error()
            return
        error = sys.exc_info()[1]
        where = f"the traceback is in {path}" if path else "run again with --debug to see the traceback"
        self.panic(Text(f"streamchat: unexpected {type(error).__name__}: {one_line(str(error))}; {where}"))

    def on_notify(self, event: Notify) -> None:
        """Make room for a toast, which Textual then shows: a pile of them would cover the conversation."""
        others = [note for note in self._notifications if note.message != event.notification.message]
        for note in list(self._notifications):
            if note not in others[1 - MAX_TOASTS :]:
                del self._notifications[note]

    # --- leaving --------------------------------------------------------------------------------------------

    async def action_quit(self) -> None:
        """Close the engine beside the loop, then end. A second time ends at once."""
        self.leave(self.failure.exit_code if self.failure else ExitCode.OK)

    def leave(self, code: int) -> None:
        """End with `code` once the engine has closed, or soon in any case."""
        if self._leaving:
            self.exit(code, return_code=code)
            return
        self._leaving = True
        self._bridge.close()
        # not a worker: Textual and asyncio would wait for a thread that hangs
        threading.Thread(target=self._close_engine, args=(code,), name="streamchat-close", daemon=True).start()
        self.set_timer(CLOSE_S + 0.2, lambda: self._leave_unless_saving(code))

    def _leave_unless_saving(self, code: int) -> None:
        """The engine has not closed in time. A cache that is being saved is waited for; a second Ctrl+Q does not."""
        if self.engine.saving:
            self.notify(f"the conversation is being saved; {hint(self, 'app.quit')} leaves at once", timeout=30)
        else:
            self.exit(code, return_code=code)

    def _close_engine(self, code: int) -> None:
        in_time = self.engine.close(CLOSE_S)
        with suppress(RuntimeError):  # the loop may have ended meanwhile
            self.post_message(EngineClosing(code, in_time))

    def on_engine_closing(self, message: EngineClosing) -> None:
        """The engine's thread has ended, or will not."""
        if not message.in_time:
            logging.getLogger(__name__).warning("the engine did not end within %s s", CLOSE_S)
        self.exit(message.exit_code, return_code=message.exit_code)

    def action_interrupt(self) -> None:
        """Ctrl+C with nothing to stop or copy: quit on the second press."""
        if self._quit_armed:
            self.leave(self.failure.exit_code if self.failure else ExitCode.OK)
            return
        self._quit_armed = True
        self.notify(f"press {hint(self, 'chat.interrupt')} again to quit", timeout=AGAIN_S)
        self.set_timer(AGAIN_S, self._disarm)

    def action_help_quit(self) -> None:
        """Textual's own Ctrl+C."""
        self.action_interrupt()

    def _disarm(self) -> None:
        self._quit_armed = False

    def _watch_signals(self) -> None:
        """A terminal that closes, or `kill`, ends the app in order, with the terminal restored."""
        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None:
                with suppress(NotImplementedError, RuntimeError, ValueError):
                    loop.add_signal_handler(number, self.leave, 128 + number)

    # --- actions, also for slash commands and palette --------------------------------------------------------

    def themes(self) -> list[str]:
        """Names of all themes."""
        return sorted(self.available_themes)

    def theme_name(self) -> str:
        """Name of the theme in use."""
        return self.theme

    def use_theme(self, name: str) -> str:
        """Switch; returns what the next start does."""
        self.theme = name
        if self._configuration.is_explicit("theme"):
            return f"for now; the next start has the theme of {self._configuration.origin('theme')}"
        return "also at the next start" if remember_theme(name) else "for now: the choice cannot be written"

    def _keep_theme(self, theme: Theme) -> None:
        """Chosen with /theme or in the palette. One that the user configured stays the one of the next start."""
        if not self._configuration.is_explicit("theme"):
            remember_theme(theme.name)

    def copy_reply(self, code_only: bool) -> str:
        """Copy the last reply or its last code block."""
        return self._chat.copy_reply(code_only)

    def toggle_sidebar(self) -> None:
        """Show or hide the sidebar."""
        self._chat.action_toggle_sidebar()

    def open_help(self) -> None:
        """Show keys and commands."""
        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen(self.registry, self.keys_of))

    def open_sessions(self, words: str) -> None:
        """Show the saved conversations that have `words`."""
        self._chat.action_sessions(words)

    def open_recall(self, words: str) -> None:
        """Show the messages that have `words`."""
        self._chat.action_recall(words)

    def download(self, name: str, text: str) -> None:
        """Have the browser save `text` under `name`."""
        self.deliver_text(StringIO(text), save_filename=name)

    def action_open_help(self) -> None:
        """Show keys and commands."""
        self.open_help()

    def action_new_conversation(self) -> None:
        """As /clear."""
        self._chat.run_slash("/clear")

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The command palette: what has a key, and every slash command."""
        chat = self._chat
        if not self.watching:
            yield from self._talking_commands()
        yield SystemCommand("Copy last reply", "To the terminal's clipboard", chat.action_copy_reply)
        yield SystemCommand("Copy last code block", "To the terminal's clipboard", chat.action_copy_code)
        yield SystemCommand("Memory map", "Walk through what the model still sees", chat.action_focus_map)
        yield SystemCommand("Sidebar", "Show or hide the status panel", chat.action_toggle_sidebar)
        for section in chat.panel_sections():
            yield SystemCommand(f"Panel: {section.title}", "Fold or unfold", lambda s=section: s.fold(not s.folded))
        yield SystemCommand("Reasoning", "Open or fold what replies thought", chat.action_toggle_thoughts)
        yield SystemCommand("Go to the end", "And follow the reply", chat.action_follow)
        yield SystemCommand("Theme", "Choose the colours", self.action_change_theme)
        yield SystemCommand("Help", "Keys and commands", self.action_open_help)
        yield SystemCommand(
            "Screenshot", "Save the screen as SVG", lambda: self.set_timer(0.1, self.deliver_screenshot)
        )
        if self._driver is not None and self._driver.can_suspend:
            yield SystemCommand("Suspend", "Stop until the shell's fg", self.action_suspend_process)
        yield SystemCommand("Quit", "Leave", self.action_quit)

    def _talking_commands(self) -> Iterable[SystemCommand]:
        """Those that change the conversation or the input."""
        chat = self._chat
        yield SystemCommand("New conversation", "Forget it all; keep model and settings", self.action_new_conversation)
        yield SystemCommand("Stop the reply", f"As {hint(self, 'chat.stop')}", chat.action_stop)
        yield SystemCommand("Recall", "Find what was said and put it before the model again", chat.action_recall)
        yield SystemCommand("Conversations", "Find a saved one and go on with it", chat.action_sessions)
        yield SystemCommand("Editor", "Write the message in $EDITOR", chat.action_edit)
        for command in self.registry:
            # those that work without an argument, but for what is above already
            if command.arguments[:1] in ("", "[") and command.name not in PALETTE_HAS:
                yield SystemCommand(f"/{command.name}", command.help, lambda c=command: chat.run_slash(f"/{c.name}"))


@contextmanager
def shared_interpreter() -> Iterator[None]:
    """Two threads want Python: one draws, one decodes.

    Every operation of torch gives the interpreter away and then waits for it, by default up to 5 ms where the other
    thread computes. The app may keep it for 1 ms.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_app(engine: ChatEngine, configuration: Configuration, *, watching: bool = False) -> int:
    """Run the app until the user leaves; returns the exit code. With `watching` there is no input.

    After `EngineFailed` that is its exit code, and its sentence is printed to stderr once the terminal is back.
    """
    log_file.start_logging()
    app = StreamchatApp(engine, configuration, watching=watching)
    with guarded_terminal(), shared_interpreter():
        code = app.run()
    if app.failure is not None:
        with suppress(OSError):  # the terminal may be gone
            print(f"streamchat: {one_line(app.failure.message)}", file=sys.stderr, flush=True)
    if code is None:  # the app itself failed; Textual has shown why
        return app.return_code or ExitCode.FAILURE
    return code
