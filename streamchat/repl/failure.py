"""Reports fatal engine errors in prompt and pipe."""

from __future__ import annotations

from typing import TextIO

from streamchat.base import events as ev
from streamchat.base.errors import ExitCode
from streamchat.base.sanitize import one_line, printable
from streamchat.telemetry import log_file


def report_failure(event: ev.EngineFailed, stream: TextIO | None) -> int:
    """Print one sentence, write the traceback to the log and return the exit code."""
    sentence = event.message
    if event.details:
        path = log_file.log_crash(event.details)
        # Expected failures explain themselves; unexpected ones need the traceback.
        if path is not None and event.exit_code == ExitCode.FAILURE:
            sentence += f" (the traceback is in {path})"
    if stream is not None:
        if event.details and log_file.is_debug():
            print(printable(event.details), file=stream)
        print(f"streamchat: {one_line(sentence)}", file=stream, flush=True)
    return event.exit_code
