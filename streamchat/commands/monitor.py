"""`streamchat monitor [SESSION|RUN]`: watch a running or finished chat or replay from another terminal."""

from __future__ import annotations

import argparse
import sys
import time

from streamchat.base.errors import ExitCode, SessionError
from streamchat.base.formatting import human_when, plural
from streamchat.base.jsonlines import json_line
from streamchat.base.sanitize import one_line
from streamchat.cli import flags
from streamchat.frontend.status_table import Row, rows_text, status_rows
from streamchat.frontend.watch import MonitoredSession, Watcher, find_monitored, monitored_sessions

HELP = "watch a running or finished chat or replay from another terminal"
DESCRIPTION = (
    "The status panel of a chat or replay in another process: live figures, history since its start, "
    "and violations of a replay. Read-only. Defaults to the running conversation, else the most recent."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "name", nargs="?", metavar="SESSION|RUN", help="a session id, the start of one, or the folder of a replay"
    )
    parser.add_argument("--list", action="store_true", help="list the sessions and replays that can be watched")
    parser.add_argument("--once", action="store_true", help="print the current figures and exit")
    parser.add_argument("--json", action="store_true", help="print the current figures as one JSON object and exit")
    flags.add_setting_flags(parser, ("theme",))


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        SessionError: No session or replay has that name.
        StoreError: The store cannot be read.
    """
    if args.list:
        return _list()
    what = _what(args.name)
    if args.once or args.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _once(what, args.json)
    configuration = flags.configuration_of(args, announce=False)
    from streamchat.tui.monitor import run_monitor  # deferred: only this form needs Textual

    return run_monitor(what, configuration.settings.theme)


def _what(name: str | None) -> MonitoredSession:
    if name is not None:
        return find_monitored(name)
    found = monitored_sessions(limit=1)
    if not found:
        raise SessionError("nothing to watch yet; start `streamchat` or `streamchat replay`")
    return found[0]


def _list() -> int:
    now = time.time()
    for each in monitored_sessions():
        state = "running" if each.running else "       "
        turns = plural(each.info.turns, "turn")
        name, title = one_line(each.name), one_line(each.info.title)
        sys.stdout.write(f"{state}  {name}  {human_when(each.info.updated, now)}  {turns}  {title}\n")
    return ExitCode.OK


def _once(what: MonitoredSession, as_json: bool) -> int:
    watcher = Watcher(what)
    watcher.poll()
    if as_json:
        sys.stdout.write(json_line(watcher.as_dict()) + "\n")
        return ExitCode.OK
    board, info = watcher.board, watcher.session.info
    rows = [
        Row("conversation", one_line(f"{info.title} ({watcher.session.name})")),
        Row("state", "running" if watcher.session.running else "not running"),
        *([] if board.info is not None else [Row("model", one_line(f"{info.model_name} ({info.dtype})"))]),
        *status_rows(board),
        *(Row("violated", one_line(violation)) for violation in watcher.violations),
    ]
    sys.stdout.write(rows_text(rows) + "\n")
    return ExitCode.OK
