"""`streamchat attach`: a front end of a session on a server."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

from streamchat.attach.address import DEFAULT_URL, parse_address
from streamchat.attach.connection import require_library
from streamchat.base import paths
from streamchat.base.errors import ExitCode
from streamchat.base.sanitize import one_line
from streamchat.cli import flags
from streamchat.cli.front_ends import choose_front_end, mark_start, run_front_end
from streamchat.config.settings import setting_fields, spec_of
from streamchat.frontend import saved

HELP = "open a chat on a server that runs `streamchat serve`"
DESCRIPTION = (
    "Open the app, the prompt, or a pipe on a session of `streamchat serve`, whose model is loaded already. To leave, "
    "enter /detach, press Ctrl+Q, or close the terminal; a running reply continues on the server. Several terminals "
    "can be attached to one session. Needs the extra streamchat[attach]."
)
LEFT_OUT = {"metrics_port", "metrics_host", "stats_json"}
"""Settings of the interface that belong to the process of the model."""
OTHER_STORE = (
    "the saved sessions of this chat are on the machine of its server; use the command there, or open a session with "
    "`streamchat attach --session ID`"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    own = parser.add_argument_group("attach")
    own.add_argument(
        "url", nargs="?", default=DEFAULT_URL, metavar="URL", help=f"address of the server (default: {DEFAULT_URL})"
    )
    own.add_argument(
        "--session",
        default="",
        metavar="ID",
        help="session to open: an id, or the start of one (default: the most recent one)",
    )
    own.add_argument("--new", action="store_true", help="start a new session")
    own.add_argument("--token-file", metavar="FILE", help="file with the server's token, if the server needs one")
    names = [name for name in setting_fields() if spec_of(name).section == "interface" and name not in LEFT_OUT]
    flags.add_setting_flags(parser, names)


def run(args: argparse.Namespace) -> int:
    """Run the front end and return the exit code.

    Raises:
        ConfigError: An argument is wrong, or the optional package is missing.
        AttachError: No server answers, or it refuses.
    """
    from streamchat.base.errors import ConfigError

    if args.new and args.session:
        raise ConfigError("--new and --session exclude each other; give one of them")
    require_library()
    gc.disable()  # the imports of a start make many objects, and no garbage
    configuration = flags.configuration_of(args, announce=False)
    address = parse_address(args.url, "" if args.token_file is None else _token(args.token_file))
    from streamchat.attach.engine import AttachedEngine
    from streamchat.telemetry import trace
    from streamchat.telemetry.log_file import start_logging

    start_logging()
    front_end = choose_front_end(configuration.settings.plain, sys.stdin, sys.stdout, os.environ)
    engine = AttachedEngine(address, configuration, args.session, new=args.new)
    engine.connect()
    _choose_store(engine.hello.store if engine.hello is not None else "")
    if trace.is_enabled():
        engine.subscribe(mark_start)
    code: int = ExitCode.INTERRUPTED
    try:
        gc.enable()
        code = run_front_end(front_end, engine, configuration)
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
    for text in engine.unsent:
        _say(f"the server has not received this message: {text}")
    if front_end != "pipe" and code in (ExitCode.OK, ExitCode.INTERRUPTED):
        where = "" if args.url == DEFAULT_URL else f" {args.url}"
        session = f" --session {engine.session}" if engine.session else ""
        _say(f"detached; the session continues. Return with: streamchat attach{where}{session}")
    return code


def _choose_store(identity: str) -> None:
    """Refuse commands that read saved sessions if those of the server are in another database."""
    from streamchat.store.database import database_identity, database_path

    if identity and identity != database_identity(database_path()):
        saved.refuse(OTHER_STORE)


def _token(file: str) -> str:
    from streamchat.base.errors import ConfigError
    from streamchat.server.access import read_token

    path = paths.user_path(Path(file))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"the token file {path} does not exist; give the file that the server named at its start"
        ) from None
    except OSError:
        pass  # `read_token` says why
    return read_token(path)[0]


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"streamchat: {one_line(text)}", file=sys.stderr, flush=True)
