"""The prompt (`--plain`): ask, stream the reply, tell what happened. One asyncio loop in the main thread.

Events arrive on the engine's thread and are handed to the loop; everything below runs in the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import sys
from collections.abc import Callable, Iterator
from typing import cast

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.sanitize import printable, without_blank_ends
from streamchat.config.loader import Configuration
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend import mentions
from streamchat.frontend.progress import ProgressLine
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext
from streamchat.frontend.slash.session_commands import turn_over
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.suspend import stop_process
from streamchat.repl.failure import told_failure
from streamchat.repl.history import make_history
from streamchat.repl.keys import interrupt_character
from streamchat.repl.render import Narrator, ready_sentence
from streamchat.repl.session import InputLine
from streamchat.repl.terminal import (
    ENDING_SIGNALS,
    STOP_SIGNALS,
    Terminal,
    as_before,
    between_prompts,
    on_signals,
    terminal_modes,
)
from streamchat.repl.toolbar import toolbar_text

ANSWER_WAIT_S = 1.0
"""How long a command that answers through an event may take before the prompt comes back anyway."""


def run_prompt(engine: ChatEngine, configuration: Configuration) -> int:
    """Hold the conversation on a terminal; returns the exit code. Starts the engine, leaves closing it to the caller.

    Ctrl+C leaves (130) while the model loads, stops the reply while one is written (a third one leaves), and at the
    prompt clears the line.
    """
    return asyncio.run(Prompt(engine, configuration).run())


class _EngineGone(Exception):
    """The engine cannot go on; `Prompt` holds the event."""


class Prompt:
    """One conversation at a prompt."""

    def __init__(self, engine: ChatEngine, configuration: Configuration) -> None:
        self._engine = engine
        self._board = StatusBoard()
        self._narrator = Narrator(lambda: engine.settings.thinking)
        self._terminal = Terminal()
        self._progress = ProgressLine(sys.stderr)
        self._registry = default_registry()
        self._context = SlashContext(engine, self._board)
        self._keys = configuration.keys
        self._interrupt_key = interrupt_character(self._keys)
        self._history, self._history_note = make_history(configuration.settings.history)
        self._changed = asyncio.Event()
        self._input: InputLine | None = None

        self._ready = False
        self._told: list[ev.Event] = []
        """What came since the last request that may end it."""
        self._answered = self._loading = False
        self._failure: ev.EngineFailed | ev.EngineClosed | None = None
        self._interrupts = 0
        self._on_interrupt: Callable[[], None] | None = None
        """What Ctrl+C does while no prompt reads the keyboard; None = nothing, between two phases."""
        self._ended_by = 0
        self._modes = terminal_modes()
        self._task: asyncio.Task[int] | None = None

    async def run(self) -> int:
        """Load, then ask and answer until the user leaves."""
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()  # prompt-toolkit finds its terminal there
        self._task = cast("asyncio.Task[int] | None", asyncio.current_task())

        def hand_over(event: ev.Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._take, event, context=context)

        def on_signal(number: int) -> None:
            loop.call_soon_threadsafe(self._signalled, number)

        unsubscribe = self._engine.subscribe(hand_over)
        try:
            with on_signals((signal.SIGINT, *STOP_SIGNALS, *ENDING_SIGNALS), on_signal):
                await self._converse()
        except _EngineGone:
            self._progress.clear()
            if isinstance(self._failure, ev.EngineFailed):
                return told_failure(self._failure, sys.stderr)
            return ExitCode.FAILURE
        except asyncio.CancelledError:
            if not self._ended_by:
                raise
            return 128 + self._ended_by
        finally:
            unsubscribe()
        return ExitCode.OK

    async def _converse(self) -> None:
        with self._interruptible(lambda: self._leave(signal.SIGINT)), between_prompts(self._interrupt_key):
            self._engine.start()
            await self._until(lambda: self._ready)
        self._input = InputLine(self._registry, self._context, self._history, self._toolbar, self._keys)
        if self._failure is not None:  # it came when there was no input to end
            raise _EngineGone
        if self._history_note:
            self._terminal.line(self._history_note, "warning")
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
                text = await self._send(self._registry.message_text(given) if result is None else result.message, given)
                continue
            if result.quit:
                return
            text = result.insert
            if result.over is not None:
                text = await self._wait(result.over)
            elif result.text:
                self._terminal.line(printable(result.text), "error" if result.error else "answer")
            elif not text:  # it answers through an event
                self._answered = False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._until(lambda: self._answered), ANSWER_WAIT_S)
                if self._loading:  # another model; Ctrl+C leaves
                    with (
                        self._interruptible(lambda: self._leave(signal.SIGINT)),
                        between_prompts(self._interrupt_key),
                    ):
                        await self._until(lambda: not self._loading)

    async def _send(self, message: str, given: str) -> str:
        """A message with the files that it mentions; returns the text to offer again where it was not taken."""
        try:
            expanded = mentions.expand(message)
        except ConfigError as error:
            self._terminal.line(str(error), "error")
            return given
        if expanded.notice:
            self._terminal.line(expanded.notice, "warning")
        self._begin()
        self._engine.submit(expanded.text)
        # not what the files of a refused message hold
        return given if await self._wait(turn_over) else ""

    async def _wait(self, over: Callable[[ev.Event], bool]) -> str:
        """Let the engine work until an event for which `over` is true; returns the text to offer then."""
        with self._interruptible(self._stop), between_prompts(self._interrupt_key):
            await self._until(lambda: any(over(event) for event in self._told))
        last = next(event for event in self._told if over(event))
        match last:
            case ev.TurnFinished(rolled_back=True, text=text):
                return text
            case ev.TurnUndone(to_edit=True, text=text):
                return self._registry.as_typed(text)
            case ev.SummaryReady(text=text) if text:
                return f"/keep {printable(text)}"
            case ev.ConversationResumed(restored_message=text):
                return self._registry.as_typed(text)
            case _:
                return ""

    def _begin(self) -> None:
        self._told, self._interrupts = [], 0

    # --- events ---------------------------------------------------------------------------------------------------

    def _take(self, event: ev.Event) -> None:
        self._board.apply(event)
        if isinstance(event, ev.ModelLoading):
            self._progress.show(event)
            self._loading = self._answered = True
            self._changed.set()
            return
        if not isinstance(event, ev.StatusSampled):
            self._progress.clear()
        for piece in self._narrator.take(event):
            self._terminal.show(piece)
        match event:
            case ev.ModelReady(info=info):
                self._terminal.line(ready_sentence(info), "info")
                self._ready, self._loading = True, False
            case ev.TurnStarted():
                if self._interrupts:  # Ctrl+C came before there was anything to stop
                    self._engine.stop_reply()
            case ev.TurnFinished() | ev.TurnUndone() | ev.SummaryReady() | ev.ConversationResumed():
                self._told.append(event)
            case ev.Notice() if event.level != "info":
                self._told.append(event)
                self._answered = True
            case ev.ConversationCleared() | ev.Notice() | ev.TurnPinned() | ev.SettingChanged():
                self._answered = True
                if isinstance(event, ev.Notice) and event.level == "error":
                    self._loading = False  # another model could not be loaded
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

    def _toolbar(self, columns: int) -> str:
        return toolbar_text(self._board, columns)

    # --- signals --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _interruptible(self, action: Callable[[], None]) -> Iterator[None]:
        self._on_interrupt = action
        try:
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
        """A shell stops the process, at the prompt or while a reply is written."""
        if self._input is None or not self._input.suspend():
            with as_before(self._modes):
                stop_process()

    def _leave(self, number: int) -> None:
        self._ended_by = number
        if self._task is not None:
            self._task.cancel()

    def _stop(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._engine.stop_reply()
        elif self._interrupts == 2:
            self._terminal.line("\nstopping ...; press Ctrl+C again to leave at once", "info")
        else:
            self._leave(signal.SIGINT)
