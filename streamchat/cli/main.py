"""The command line: which face or command runs, and how every failure reaches the user. Light to import."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streamchat.base import ascii_text
from streamchat.base.errors import OUT_OF_MEMORY, ExitCode, OutputError, SessionError, StreamchatError
from streamchat.base.sanitize import one_line, printable
from streamchat.cli import flags, parser, serve
from streamchat.cli.front_ends import Face, choose_face
from streamchat.cli.stdout import drop_output, guarded_output
from streamchat.frontend import file_access

if TYPE_CHECKING:
    from streamchat.base.events import Event
    from streamchat.config.loader import Configuration
    from streamchat.engine.protocol import ChatEngine
    from streamchat.store.records import SessionInfo


THREADS = {"GOMP_SPINCOUNT": "1000"}
"""For torch's OpenMP, which reads it when it is loaded. Its threads wait for each other hundreds of times per token and
spin 300,000 times each by default, which takes the core from the thread they wait for when other programs run."""

TOO_MANY_FILES = "too many files are open; raise the limit of this shell, for example with `ulimit -n 1024`"


def main(argv: Sequence[str] | None = None) -> int:
    """Run streamchat; returns the exit code."""
    with guarded_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    ascii_text.register()
    for stream in (sys.stdout, sys.stderr):
        # A locale that cannot show a character must not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ascii_text.ERRORS)
    if hasattr(sys.stdin, "reconfigure") and codecs.lookup(sys.stdin.encoding).name == "ascii":
        # The locale of a console without a language; terminals send UTF-8 all the same, of which ASCII is a part.
        sys.stdin.reconfigure(encoding="utf-8")
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads on (`| head`)
        drop_output()
        return ExitCode.BROKEN_PIPE
    except OutputError as error:  # a full device
        drop_output()
        say(str(error))
        return error.exit_code


def _run(argv: list[str]) -> int:
    """Carry out the command line; only a stdout that cannot be written is an error of the caller."""
    try:
        return _dispatch(argv)
    except (BrokenPipeError, OutputError):
        raise
    except SystemExit as leaving:  # --help, --version, a signal
        return leaving.code if isinstance(leaving.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except StreamchatError as error:
        _show_traceback()
        say(str(error))
        return error.exit_code
    except MemoryError:
        _show_traceback()
        say(OUT_OF_MEMORY)
        return ExitCode.MODEL
    except Exception as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            _show_traceback()
            say(TOO_MANY_FILES)
            return ExitCode.FAILURE
        import traceback

        from streamchat.telemetry.log_file import log_crash

        _show_traceback()
        path = log_crash(traceback.format_exc())
        where = f"the traceback is in {path}" if path else "run again with --debug to see the traceback"
        say(f"unexpected {type(error).__name__}: {error}; {where}")
        return ExitCode.FAILURE


def say(sentence: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        with suppress(OSError):  # it may be full as well
            print(f"streamchat: {one_line(sentence)}", file=sys.stderr, flush=True)


def _show_traceback() -> None:
    if os.environ.get("STREAMCHAT_DEBUG", "0") not in ("", "0") and sys.stderr is not None:
        import traceback

        print(printable(traceback.format_exc()), end="", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    if "--debug" in argv:  # before anything can fail
        os.environ["STREAMCHAT_DEBUG"] = "1"
    args = parser.parse(argv)
    if args.command is not None:
        return parser.command(args.command).run(args)
    if args.serve is not None:
        flags.configuration_of(args)  # what is wrong is said here, and not in each tab
        return serve.serve(serve.without_serve(argv), args.serve_host, args.serve, args.serve_url)
    if not serve.in_browser(os.environ):
        serve.refuse_without_serve(args.serve_host, args.serve_url, files=args.serve_files)
    elif not args.serve_files:
        file_access.refuse(serve.FILES_REFUSED)
    configuration = flags.configuration_of(args, announce=False)
    return chat(configuration, args.resume)


def make_engine(configuration: Configuration, save: bool, session: str | None, agreed_model: str = "") -> ChatEngine:
    """The engine of a run, not started yet.

    Args:
        save: The conversation is saved.
        session: The saved conversation to go on with.
        agreed_model: The model that the user agreed to load for it.
    """
    from streamchat.engine.engine import Engine
    from streamchat.store.store import Store

    return Engine(configuration, open_store=Store if save else None, session=session, agreed_model=agreed_model)


def check_model(name: str) -> None:
    """Look at what is on this machine, before an app opens over it.

    Raises:
        ModelError: The name means nothing, or its folder is not a model that can be read.
    """
    from streamchat.models.folder import inspect
    from streamchat.models.resolve import resolve

    source = resolve(name)
    if source.kind in ("folder", "hub-cache"):
        inspect(Path(source.location))


def wanted_session(name: str, configuration: Configuration, *, may_ask: bool) -> tuple[str, str]:
    """What `--resume NAME` means: an id, and the model that the user agreed to load for it, if that needed a question.

    Args:
        name: 'last', or the start of an id.
        configuration: Of this start.
        may_ask: The user is at the terminal and can answer.

    Raises:
        SessionError: There is none, another process has it open, or its model was not agreed to.
    """
    from streamchat.sessions.settings import foreign_model
    from streamchat.store.lock import SessionLock
    from streamchat.store.store import Store

    with Store() as store:
        found = store.find(name)
        SessionLock(store.lock_folder, found.id, found.opened_by).release()
    model = foreign_model(configuration, found)
    if model and not (may_ask and _agrees(found, model)):
        from streamchat.sessions.settings import foreign_model_sentence

        sentence = foreign_model_sentence(found, model)
        raise SessionError(f"{sentence}; give --model {model} to load it, or --model NAME to resume with another one")
    return found.id, model


def _agrees(info: SessionInfo, model: str) -> bool:
    """Whether the user wants the model that an imported conversation names."""
    from streamchat.sessions.settings import foreign_model_sentence

    question = f"{foreign_model_sentence(info, model)}. Load it? [y/N] "
    print(one_line(f"streamchat: {question}"), end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def chat(configuration: Configuration, resume: str | None = None) -> int:
    """Hold the conversation; returns the exit code.

    Args:
        configuration: All settings.
        resume: 'last', or the start of a saved conversation's id.

    Raises:
        ConfigError: `stats_json` cannot be written, or the port of the metrics cannot be had.
        ModelError: The model is on this machine and cannot be read, or its name means nothing.
        SessionError: There is no such conversation, or another process has it open.
    """
    from streamchat.base.events import ConversationCleared, SavingChanged, SessionOpened, TurnFinished
    from streamchat.telemetry import trace
    from streamchat.telemetry.log_file import start_logging
    from streamchat.telemetry.observer import observe
    from streamchat.telemetry.stats_log import StatsLog

    start_logging()
    # transformers would write its warnings to the terminal, past the log
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    face = choose_face(configuration.settings.plain, sys.stdin, sys.stdout, os.environ)
    if face != "app" and configuration.local_notice:  # the app shows it in the conversation
        say(configuration.local_notice)
    session, agreed = None, ""
    if resume is not None:
        session, agreed = wanted_session(resume, configuration, may_ask=face != "pipe" and sys.stdin.isatty())
    elif not serve.in_browser(os.environ):
        check_model(configuration.settings.model)
    stats = StatsLog(configuration.settings.stats_json) if configuration.settings.stats_json else None
    save = {"always": True, "never": False, "chats": face != "pipe"}[configuration.settings.save]
    engine = make_engine(configuration, save or session is not None, session, agreed)

    saved_as: str | None = None
    saving_works = True

    def record(event: Event) -> None:
        nonlocal saved_as, saving_works
        if stats is not None and isinstance(event, TurnFinished):
            stats.write(event.stats.as_dict())
        elif isinstance(event, SessionOpened):
            saved_as = event.session
        elif isinstance(event, ConversationCleared):
            saved_as = None
        elif isinstance(event, SavingChanged):
            saving_works = event.works

    engine.subscribe(record)
    if trace.wanted():
        engine.subscribe(_mark_start)
    metrics = observe(engine, configuration.settings)
    ended = False
    code: int = ExitCode.INTERRUPTED
    try:
        code = _run_face(face, engine, configuration)
    except KeyboardInterrupt:
        pass
    finally:
        ended = engine.close()
        if metrics is not None:
            metrics.close()
        if stats is not None:
            stats.close()
    if saved_as is not None and face != "pipe" and not serve.in_browser(os.environ):
        if saving_works:
            say(f"saved as {saved_as}; streamchat --resume {saved_as} continues it")
        else:
            say(f"the latest turns of {saved_as} were not saved")
    if stats is not None and stats.failure:
        say(stats.failure)
        code = code or ExitCode.FAILURE
    if not ended:
        _leave_at_once(code)
    return code


def _mark_start(event: Event) -> None:
    """For who measures the start; nobody else subscribes it."""
    from streamchat.base.events import ModelReady, TextDelta
    from streamchat.telemetry.trace import mark

    if isinstance(event, ModelReady):
        mark("model ready")
    elif isinstance(event, TextDelta):
        mark("first token")


def _run_face(face: Face, engine: ChatEngine, configuration: Configuration) -> int:
    if face == "pipe":
        from streamchat.repl.pipe import run_pipe

        return run_pipe(engine)
    if face == "prompt":
        from streamchat.repl.prompt import run_prompt

        return run_prompt(engine, configuration)
    from streamchat.tui.app import run_app

    return run_app(engine, configuration)


def _leave_at_once(code: int) -> None:
    """End the process although the engine's thread is still inside a long native call, which nothing can interrupt."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
