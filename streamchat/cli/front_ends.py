"""Select the front end: app, prompt or pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, Literal

from streamchat.base.sanitize import one_line
from streamchat.web.launch import in_browser

if TYPE_CHECKING:
    from streamchat.base.events import Event
    from streamchat.config.loader import Configuration
    from streamchat.engine.protocol import ChatEngine

FrontEnd = Literal["pipe", "prompt", "app"]


def choose_front_end(
    plain: bool, stdin: IO[Any] | None, stdout: IO[Any] | None, environ: Mapping[str, str]
) -> FrontEnd:
    """Return the pipe if stdin or stdout is not a terminal, else the prompt or the app.

    The prompt is chosen with `plain` and on dumb terminals; a browser tab always gets the app.
    """
    if in_browser(environ):
        return "app"  # its stdin and stdout are pipes
    if stdin is None or stdout is None or not (stdin.isatty() and stdout.isatty()):
        return "pipe"
    return "prompt" if plain or environ.get("TERM") in ("dumb", "unknown") else "app"


def run_front_end(front_end: FrontEnd, engine: ChatEngine, configuration: Configuration) -> int:
    """Run a front end until the user leaves, and return the exit code."""
    if front_end == "pipe":
        from streamchat.repl.pipe import run_pipe

        return run_pipe(engine)
    if front_end == "prompt":
        from streamchat.repl.prompt import run_prompt

        return run_prompt(engine, configuration)
    from streamchat.tui.app import run_app

    return run_app(engine, configuration)


def mark_start(event: Event) -> None:
    """Record startup trace events; subscribed only by `streamchat bench --startup`."""
    from streamchat.base.events import ModelReady, PrefillProgress, TextDelta, TurnFinished
    from streamchat.telemetry.trace import FAILED, PREFILLED, READY, TOKEN, mark

    if isinstance(event, ModelReady):
        mark(READY)
    elif isinstance(event, PrefillProgress) and event.done == event.total:
        mark(PREFILLED)
    elif isinstance(event, TurnFinished) and event.finish_reason == "error":
        mark(FAILED + one_line(event.message))
    elif isinstance(event, TextDelta | TurnFinished):  # the first token may end the reply before it has any text
        mark(TOKEN)
