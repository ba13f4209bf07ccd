"""The command line: runs a front end or command and reports every failure. Cheap to import."""

from __future__ import annotations

import codecs
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streamchat.base import ascii_text
from streamchat.base.errors import ExitCode, OutputError, SessionError, StreamchatError, limit_reached
from streamchat.base.sanitize import one_line, printable
from streamchat.cli import flags, old_serve, parser
from streamchat.cli.front_ends import choose_front_end, mark_start, run_front_end
from streamchat.cli.output import exit_now
from streamchat.cli.stdout import HUNG_UP, drop_output, guarded_output, is_hung_up
from streamchat.frontend import file_access
from streamchat.web.launch import FILES_REFUSED, in_browser

if TYPE_CHECKING:
    from streamchat.base.events import Event
    from streamchat.config.loader import Configuration
    from streamchat.engine.protocol import ChatEngine


THREADS = {"GOMP_SPINCOUNT": "1000"}
"""Environment of torch's OpenMP, read when it is loaded. By default its threads spin 300,000 times before they sleep,
which takes the core from the compiled kernels' threads, and from the thread they wait for if other programs run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run streamchat and return the exit code."""
    with guarded_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    ascii_text.register()
    for stream in (sys.stdout, sys.stderr):
        # A locale that cannot encode a character must not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ascii_text.ERRORS)
    if hasattr(sys.stdin, "reconfigure") and codecs.lookup(sys.stdin.encoding).name == "ascii":
        # The locale of a console without a language. Terminals still send UTF-8, which includes ASCII.
        sys.stdin.reconfigure(encoding="utf-8")
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has exited (`| head`)
        drop_output()
        return ExitCode.BROKEN_PIPE
    except OutputError as error:  # for example a full disk
        drop_output()
        print_message(str(error))
        return error.exit_code


def _run(argv: list[str]) -> int:
    """Run the command line and report its errors; only failures to write stdout are left to the caller."""
    try:
        return _dispatch(argv)
    except (BrokenPipeError, OutputError):
        raise
    except SystemExit as exiting:  # --help, --version, a signal
        return exiting.code if isinstance(exiting.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except StreamchatError as error:
        _show_traceback()
        print_message(str(error))
        return error.exit_code
    except Exception as error:
        if (limit := limit_reached(error)) is not None:
            _show_traceback()
            print_message(str(limit))
            return limit.exit_code
        if is_hung_up(error):
            _show_traceback()
            print_message(HUNG_UP)
            return ExitCode.HUNG_UP
        import traceback

        from streamchat.telemetry.log_file import log_crash

        _show_traceback()
        path = log_crash(traceback.format_exc())
        where = f"the traceback is in {path}" if path else "run again with --debug to see the traceback"
        print_message(f"unexpected {type(error).__name__}: {error}; {where}")
        return ExitCode.FAILURE


def print_message(text: str) -> None:
    """Print one line on stderr."""
    if sys.stderr is not None:
        with suppress(OSError):  # stderr may be full as well
            print(f"streamchat: {one_line(text)}", file=sys.stderr, flush=True)


def _show_traceback() -> None:
    if os.environ.get("STREAMCHAT_DEBUG", "0") not in ("", "0") and sys.stderr is not None:
        import traceback

        print(printable(traceback.format_exc()), end="", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from streamchat.cli import completion

        completion.answer()
    if "--debug" in argv:  # first, so that it covers every failure
        os.environ["STREAMCHAT_DEBUG"] = "1"
    args = parser.parse(argv)
    if args.command is not None:
        return parser.command(args.command).run(args)
    if args.serve is not None:
        return old_serve.run(args)
    if not in_browser(os.environ):
        old_serve.refuse_without_serve(args)
    elif not args.tab_files:
        file_access.refuse(FILES_REFUSED)
    configuration = flags.configuration_of(args, announce=False)
    return chat(configuration, args.resume)


def make_engine(configuration: Configuration, save: bool, session: str | None, agreed_model: str = "") -> ChatEngine:
    """Return a new engine, without starting it.

    Args:
        save: Whether the conversation is saved.
        session: Id of the session to resume.
        agreed_model: The model that the user agreed to load for that session.
    """
    from streamchat.engine.engine import Engine
    from streamchat.store.store import Store

    return Engine(configuration, open_store=Store if save else None, session=session, agreed_model=agreed_model)


def check_model(name: str, adapter: str = "") -> None:
    """Check the local files of a model and its adapters before the app takes over the screen.

    Raises:
        ModelError: The name is not a model, its folder or an adapter cannot be loaded, or the memory limit of the shell
            is too low.
        ConfigError: An adapter needs peft, which is not installed; or Python runs without docstrings.
    """
    from streamchat.models import catalogue
    from streamchat.models.limits import check_start

    check_start()
    if adapter:
        from streamchat.models.adapters import find_adapters, require_peft

        find_adapters(adapter)
        require_peft()

    if name == catalogue.DEFAULT:
        return  # not a local one
    from streamchat.models.folder import inspect
    from streamchat.models.resolve import resolve

    source = resolve(name)
    if source.kind in ("folder", "hub-cache"):
        inspect(Path(source.location))


def resolve_session(name: str, configuration: Configuration, *, may_ask: bool) -> tuple[str, str]:
    """Resolve `--resume NAME` to a session id and to the model that the user agreed to load for it ('' if not asked).

    Args:
        name: 'last', or the start of an id.
        configuration: Settings of this run.
        may_ask: Whether the user is at a terminal and can answer.

    Raises:
        SessionError: The session does not exist, is open in another process, or the user rejected its model.
    """
    from streamchat.sessions.settings import foreign_model, foreign_model_notice
    from streamchat.store.lock import SessionLock
    from streamchat.store.store import Store

    with Store() as store:
        found = store.find(name)
        SessionLock(store.lock_folder, found.id, found.opened_by).release()
    model = foreign_model(configuration, found)
    if model:
        sentence = foreign_model_notice(found, model)
        if may_ask and _is_agreed(f"{sentence}. Load it?"):
            return found.id, model
        raise SessionError(f"{sentence}; give --model {model} to load it, or --model NAME to resume with another one")
    return found.id, ""


def _is_agreed(question: str) -> bool:
    """Ask a yes-or-no question on stderr, and return whether the answer is yes."""
    print(one_line(f"streamchat: {question} [y/N]"), end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def chat(configuration: Configuration, resume: str | None = None) -> int:
    """Run the chat and return the exit code.

    Args:
        configuration: All settings.
        resume: 'last', or the start of a session id.

    Raises:
        ConfigError: `stats_json` cannot be written, or the metrics port cannot be opened.
        ModelError: The name is not a model, or its local files cannot be loaded.
        SessionError: The session does not exist, or is open in another process.
    """
    gc.disable()  # the imports at a start create many objects but no garbage; the engine enables it when it starts
    from streamchat.base.events import TurnFinished
    from streamchat.cli.saving import SavingOutcome
    from streamchat.telemetry import trace
    from streamchat.telemetry.log_file import start_logging
    from streamchat.telemetry.metrics import observe
    from streamchat.telemetry.stats_log import StatsLog

    start_logging()
    # Keep warnings of transformers off the terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    front_end = choose_front_end(configuration.settings.plain, sys.stdin, sys.stdout, os.environ)
    if front_end != "app" and configuration.local_notice:  # the app shows it on its screen
        print_message(configuration.local_notice)
    session, agreed = None, ""
    if resume is not None:
        session, agreed = resolve_session(resume, configuration, may_ask=front_end != "pipe" and sys.stdin.isatty())
    elif not in_browser(os.environ):
        check_model(configuration.settings.model, configuration.settings.adapter)
    stats = StatsLog(configuration.settings.stats_json) if configuration.settings.stats_json else None
    save = {"always": True, "never": False, "chats": front_end != "pipe"}[configuration.settings.save]
    engine = make_engine(configuration, save or session is not None, session, agreed)

    outcome = SavingOutcome()

    def record(event: Event) -> None:
        outcome.apply(event)
        if stats is not None and isinstance(event, TurnFinished):
            stats.write(event.stats.as_dict())

    engine.subscribe(record)
    if trace.is_enabled():
        engine.subscribe(mark_start)
    metrics = observe(engine.subscribe, configuration.settings)
    ended = False
    code: int = ExitCode.INTERRUPTED
    try:
        code = run_front_end(front_end, engine, configuration)
    except KeyboardInterrupt:
        pass
    finally:
        ended = engine.close()
        if metrics is not None:
            metrics.close()
        if stats is not None:
            stats.close()
    if not in_browser(os.environ) and (said := outcome.sentence(is_pipe=front_end == "pipe")):
        print_message(said)
    if front_end == "pipe" and outcome.lost:
        code = code or ExitCode.FAILURE
    if stats is not None and stats.failure:
        print_message(stats.failure)
        code = code or ExitCode.FAILURE
    if not ended:
        exit_now(code)
    return code
