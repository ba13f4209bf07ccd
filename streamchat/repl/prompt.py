"""The prompt (`--plain`): read a message, stream the reply, print notices. One asyncio loop in the main thread.

Events arrive on the engine's thread and are forwarded to the loop; everything else here runs in the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.requests import Stop, Submit
from streamchat.base.sanitize import printable, without_blank_ends
from streamchat.base.signals import on_signals
from streamchat.config.loader import Configuration
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend import mentions
from streamchat.frontend.progress import ProgressLine
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext
from streamchat.frontend.slash.session_commands import reply_done
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.suspend import stop_process
from streamchat.frontend.typed_history import TypedHistory
from streamchat.frontend.window_title import WindowTitle
from streamchat.repl.failure import report_failure
from streamchat.repl.history import PromptToolkitHistory
from streamchat.repl.keys import interrupt_character
from streamchat.repl.others import OtherTurns, other_pieces
from streamchat.repl.render import Narrator
from streamchat.repl.session import InputLine
from streamchat.repl.terminal import (
    ENDING_SIGNALS,
    STOP_SIGNALS,
    Terminal,
    as_before,
    between_prompts,
    terminal_modes,
)
from streamchat.repl.toolbar import toolbar_text

ANSWER_WAIT_S = 1.0
"""Maximum wait, in seconds, for the event that answers a command before the prompt returns."""


def run_prompt(engine: ChatEngine, configuration: Configuration) -> int:
    """Run the conversation on a terminal and return the exit code. Starts the engine; the caller closes it.

    Ctrl+C exits (130) while the model loads, stops a reply in progress (a third press exits), and clears the line at
    the prompt.
    """
    return asyncio.run(Prompt(engine, configuration).run())


class _EngineGone(Exception):
    """The engine has stopped; `Prompt` has the event."""


class Prompt:
    """One conversation at a prompt."""

    def __init__(self, engine: ChatEngine, configuration: Configuration) -> None:
        self._engine = engine
        self._board = StatusBoard()
        self._narrator = Narrator(lambda: engine.settings.thinking)
        self._terminal = Terminal()
        self._title = WindowTitle(os.environ, is_on=configuration.settings.window_title)
        self._progress = ProgressLine(sys.stderr)
        self._registry = default_registry()
        self._context = SlashContext(engine, self._board)
        self._keys = configuration.keys
        self._interrupt_key = interrupt_character(self._keys)
        self._others = OtherTurns()
        self._typed = TypedHistory.open(configuration.settings.history)
        self._changed = asyncio.Event()
        self._input: InputLine | None = None

        self._ready = False
        self._recent: list[ev.Event] = []
        """Events since the last request that may complete it."""
        self._answered = self._loading = False
        self._failure: ev.EngineFailed | ev.EngineClosed | None = None
        self._interrupts = 0
        self._on_interrupt: Callable[[], None] | None = None
        """Ctrl+C handler while no prompt reads the keyboard; None = ignore it."""
        self._ended_by = 0
        self._error: Exception | None = None
        """Raised while an event was handled; ends the prompt."""
        self._modes = terminal_modes()
        self._task: asyncio.Task[int] | None = None

    async def run(self) -> int:
        """Load the model, then answer messages until the user quits."""
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()  # prompt-toolkit looks up its terminal there
        self._task = cast("asyncio.Task[int] | None", asyncio.current_task())

        def forward(event: ev.Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._receive, event, context=context)

        def on_signal(number: int) -> None:
            loop.call_soon_threadsafe(self._signalled, number)

        unsubscribe = self._engine.subscribe(forward)
        self._terminal.code(self._title.begin())
        try:
            with on_signals((signal.SIGINT, *STOP_SIGNALS, *ENDING_SIGNALS), on_signal):
                await self._converse()
        except _EngineGone:
            self._progress.clear()
            if isinstance(self._failure, ev.EngineFailed):
                return report_failure(self._failure, sys.stderr)
            return ExitCode.FAILURE
        except asyncio.CancelledError:
            if self._error is not None:
                raise self._error from None
            if not self._ended_by:
                raise
            return 128 + self._ended_by
        finally:
            unsubscribe()
            self._terminal.code(self._title.end())
        return ExitCode.OK

    async def _converse(self) -> None:
        with self._between_prompts(lambda: self._leave(signal.SIGINT)):
            self._engine.start()
            await self._until(lambda: self._ready)
        self._input = InputLine(
            self._registry,
            self._context,
            PromptToolkitHistory(self._typed),
            partial(toolbar_text, self._board),
            self._keys,
        )
        if self._failure is not None:  # the engine failed before the input existed
            raise _EngineGone
        if self._typed.problem:
            self._terminal.line(self._typed.problem, "warning")
        text = ""
        while True:
            given = await self._input.ask(text)
            text = ""
            if given is None:
                return
            given = printable(without_blank_ends(given))
            self._begin()
            result = self._registry.run(self._context, given)
            if result is None or result.message:
                text = await self._send(self._registry.unescape(given) if result is None else result.message, given)
                continue
            if result.quit:
                return
            text = result.insert
            if result.done_when is not None:
                text = await self._wait(result.done_when)
            elif result.text:
                self._terminal.line(printable(result.text), "error" if result.error else "answer")
            elif not text:  # the answer is an event
                self._answered = False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._until(lambda: self._answered), ANSWER_WAIT_S)
                if self._loading:  # /model; Ctrl+C exits
                    with self._between_prompts(lambda: self._leave(signal.SIGINT)):
                        await self._until(lambda: not self._loading)

    async def _send(self, message: str, given: str) -> str:
        """Send a message with the files that it mentions; returns the text to restore if it was rejected."""
        try:
            expanded = mentions.expand(message)
        except ConfigError as error:
            self._terminal.line(str(error), "error")
            return given
        if expanded.notice:
            self._terminal.line(expanded.notice, "warning")
        self._begin()
        self._others.sent = expanded.text
        self._engine.send(Submit(expanded.text))
        # restore the text as typed, without the contents of files
        return given if await self._wait(reply_done) else ""

    async def _wait(self, done_when: Callable[[ev.Event], bool]) -> str:
        """Wait until `done_when` is true for an event; returns the text to put into the input."""
        self._others.is_waiting = True
        try:
            with self._between_prompts(self._stop):
                await self._until(lambda: any(done_when(event) for event in self._recent))
        finally:
            self._others.is_waiting, self._others.sent = False, None
        last = next(event for event in self._recent if done_when(event))
        match last:
            case ev.TurnFinished(rolled_back=True, text=text):
                return text
            case ev.TurnUndone(to_edit=True, text=text):
                return self._registry.escape(text)
            case ev.SummaryReady(text=text) if text:
                return f"/keep {printable(text)}"
            case ev.ConversationResumed(restored_message=text):
                return self._registry.escape(text)
            case _:
                return ""

    def _begin(self) -> None:
        self._recent, self._interrupts = [], 0

    # --- events ---------------------------------------------------------------------------------------------------

    def _receive(self, event: ev.Event) -> None:
        """Handle an event, and end the prompt with any error: the loop would only log it, and nothing would follow."""
        try:
            self._on_event(event)
        except Exception as error:  # for example the closed terminal
            self._error = self._error or error
            if self._task is not None:
                self._task.cancel()

    def _on_event(self, event: ev.Event) -> None:
        self._board.apply(event)
        self._terminal.code(self._title.after(event))
        if isinstance(event, ev.ModelLoading):
            self._progress.show(event)
            self._loading = self._answered = True
            self._changed.set()
            return
        if not isinstance(event, ev.StatusSampled):
            self._progress.clear()
        is_own = self._others.owns(event)
        for piece in self._narrator.pieces_for(event) if is_own else other_pieces(event):
            self._terminal.show(piece)
        match event:
            case ev.ModelReady():
                if not self._ready:
                    self._terminal.line("/help lists the commands.", "info")
                self._ready, self._loading = True, False
            case ev.TurnFinished() if not is_own:
                pass
            case ev.TurnStarted():
                if self._interrupts:  # Ctrl+C was pressed before the turn started
                    self._engine.send(Stop())
            case ev.TurnFinished() | ev.TurnPagedIn() | ev.TurnUndone() | ev.SummaryReady() | ev.ConversationResumed():
                self._recent.append(event)
            case ev.ConversationRewound():
                self._recent.append(event)
            case ev.Notice() if event.level != "info":
                self._recent.append(event)
                self._answered = True
            case ev.ConversationCleared() | ev.Notice() | ev.TurnPinned() | ev.SettingChanged():
                self._answered = True
                if isinstance(event, ev.Notice) and event.level == "error":
                    self._loading = False  # /model failed
            case ev.EngineFailed() | ev.EngineClosed():
                self._failure = self._failure or event
                if self._input is not None:
                    self._input.end(_EngineGone())
            case _:
                pass
        if self._input is not None:
            self._input.redraw()
        self._changed.set()

    async def _until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            if self._failure is not None:
                raise _EngineGone
            self._changed.clear()
            await self._changed.wait()

    # --- signals --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _between_prompts(self, on_interrupt: Callable[[], None]) -> Iterator[None]:
        """While no prompt reads the keyboard: buffer what is typed, and handle Ctrl+C."""
        self._on_interrupt = on_interrupt
        try:
            with between_prompts(self._interrupt_key):
                yield
        finally:
            self._on_interrupt = None

    def _signalled(self, number: int) -> None:
        if number in STOP_SIGNALS:
            self._suspend()
        elif number != signal.SIGINT:
            self._leave(number)
        elif self._on_interrupt is not None:
            self._on_interrupt()

    def _suspend(self) -> None:
        """Suspend the process (SIGTSTP), at the prompt or during a reply."""
        if self._input is None or not self._input.suspend():
            self._terminal.code(self._title.end())
            with as_before(self._modes):
                stop_process()
            self._terminal.code(self._title.begin())

    def _leave(self, number: int) -> None:
        self._ended_by = number
        if self._task is not None:
            self._task.cancel()

    def _stop(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._engine.send(Stop())
        elif self._interrupts == 2:
            self._terminal.line("\nstopping ...; press Ctrl+C again to exit immediately", "info")
        else:
            self._leave(signal.SIGINT)
