"""The pipe: each line of stdin is a user turn, the replies go to stdout as plain text, everything else to stderr.

A line is read only after the previous reply has ended, so endless input needs no extra memory.
"""

from __future__ import annotations

import queue
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO, TextIO

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import human_bytes
from streamchat.base.requests import CountTokens, Submit
from streamchat.base.sanitize import printable
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend import mentions
from streamchat.frontend.presenter import Line
from streamchat.frontend.progress import ProgressLine
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext, SlashResult
from streamchat.frontend.slash.session_commands import reply_done
from streamchat.frontend.status import StatusBoard
from streamchat.repl.failure import report_failure
from streamchat.repl.others import OtherTurns
from streamchat.repl.render import Narrator

QUIET = {"figures", "ready", "aside", "past_message", "past_reply"}
"""Kinds of lines that a pipe does not print; `--stats-json` has the figures."""


def run_pipe(engine: ChatEngine) -> int:
    """Answer every line of stdin and return the exit code. Starts the engine; the caller closes it.

    Raises:
        KeyboardInterrupt: Ctrl+C.
        BrokenPipeError: stdout was closed.
    """
    source = sys.stdin.buffer if sys.stdin is not None else None
    return Pipe(engine, sys.stdout, sys.stderr).run(source)


MAX_LINE_BYTES = 2_000_000
"""The same limit as for a file in a message; far more than a cache holds."""


class Pipe:
    """Reads messages from a stream and writes replies to another."""

    def __init__(self, engine: ChatEngine, out: TextIO | None, err: TextIO | None) -> None:
        self._engine, self._out, self._err = engine, out, err
        self._events: queue.Queue[ev.Event] = queue.Queue()
        self._narrator = Narrator(lambda: engine.settings.thinking)
        self._board = StatusBoard()
        self._progress = ProgressLine(err)
        self._others = OtherTurns()
        self._failed = False

    def run(self, source: BinaryIO | None) -> int:
        """Answer every line of `source` and return the exit code."""
        registry = default_registry()
        context = SlashContext(self._engine, self._board)
        self._engine.subscribe(self._on_event)
        self._engine.start()
        if (code := self._until(lambda event: isinstance(event, ev.ModelReady))) is not None:
            return code
        for line in self._lines(source):
            result = registry.run(context, line)
            message = registry.unescape(line) if result is None else self._message_of(result)
            if message:
                self._others.sent, self._others.is_waiting = message, True
                self._engine.send(Submit(message))
                code = self._until(reply_done)
            elif result is None:
                continue
            elif result.done_when is not None:
                self._others.is_waiting = True
                code = self._until(result.done_when)
            else:
                self._answer(result)
                if result.quit:
                    break
                code = self._wait_for_command()
            if code is not None:
                return code
        code = self._drain()
        return code if code is not None else ExitCode.FAILURE if self._failed else ExitCode.OK

    def _on_event(self, event: ev.Event) -> None:
        if isinstance(event, ev.StatusSampled):
            self._board.apply(event)  # not queued: samples arrive even while stdin is idle
        else:
            self._events.put(event)

    def _answer(self, result: SlashResult) -> None:
        self._failed |= result.error
        if result.text:
            self._report(f"streamchat: {printable(result.text)}" if result.error else printable(result.text))

    def _message_of(self, result: SlashResult) -> str:
        """The message that a command sends. Only /read attaches files; `@file` in a line stays text."""
        try:
            return mentions.expand(result.message or result.insert.strip()).text
        except ConfigError as error:
            self._answer(SlashResult(str(error), error=True))
            return ""

    def _until(self, done_when: Callable[[ev.Event], bool]) -> int | None:
        """Handle events until `done_when` is true for one; returns an exit code if the engine ended before."""
        while True:
            event = self._events.get()
            is_own = self._others.owns(event)
            code = self._handle(event) if is_own else None
            if code is not None or (is_own and done_when(event)):
                self._others.sent, self._others.is_waiting = None, False
                return code

    def _wait_for_command(self) -> int | None:
        """Handle events until the engine has carried out a command; returns an exit code if the engine ended before."""
        mark = secrets.token_hex(8)  # another front end of the session may count tokens as well
        self._engine.send(CountTokens(mark))  # requests are answered in order
        return self._until(lambda event: isinstance(event, ev.TextCounted) and event.text == mark)

    def _drain(self) -> int | None:
        """Handle queued events; returns an exit code if the engine ended."""
        code = None
        while code is None and not self._events.empty():
            event = self._events.get()
            code = self._handle(event) if self._others.owns(event) else None
        return code

    def _handle(self, event: ev.Event) -> int | None:
        self._board.apply(event)
        if isinstance(event, ev.ModelLoading):
            self._progress.show(event)
            return None
        self._progress.clear()
        for piece in self._narrator.pieces_for(event):
            self._show(piece)
        match event:
            case ev.EngineFailed():
                return report_failure(event, self._err)
            case ev.EngineClosed():
                return ExitCode.FAILURE
            case ev.TurnFinished(finish_reason="error"):
                self._failed = True
            case _:
                pass
        return None

    def _show(self, piece: Line) -> None:
        if piece.kind == "answer":
            piece = Line("end", piece.text + "\n")
        if piece.kind in ("reply", "thought", "end"):
            if self._out is not None and piece.text:
                self._out.write(piece.text)
                self._out.flush()
        elif piece.kind not in QUIET:
            self._report(f"streamchat: {piece.text}")

    def _report(self, text: str) -> None:
        if self._err is not None:
            print(text, file=self._err, flush=True)

    def _lines(self, source: BinaryIO | None) -> Iterator[str]:
        """The non-blank lines without line ends; undecodable bytes are replaced, with one notice."""
        noted = False
        for number, raw in enumerate(self._raw_lines(source), start=1):
            data = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            line = data.decode("utf-8", errors="replace").rstrip("\r\n")
            if not noted and not _is_utf8(data):
                noted = True
                self._report(
                    f"streamchat: line {number} of the input is not valid UTF-8; the invalid bytes were replaced"
                )
            if line.strip():
                yield line

    def _raw_lines(self, source: BinaryIO | None) -> Iterator[bytes]:
        """The lines as bytes; lines longer than `MAX_LINE_BYTES` are skipped, with a notice."""
        number = 0
        while source is not None and (raw := source.readline(MAX_LINE_BYTES)):
            number += 1
            if len(raw) < MAX_LINE_BYTES or raw.endswith(b"\n"):
                yield raw
                continue
            self._failed = True
            self._report(
                f"streamchat: line {number} of the input is longer than {human_bytes(MAX_LINE_BYTES)} and was skipped"
            )
            while raw and not raw.endswith(b"\n"):
                raw = source.readline(MAX_LINE_BYTES)
            yield b"\n"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
