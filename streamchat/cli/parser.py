"""The argument parser: flags of the chat, subcommands, and one-sentence errors.

Parsing imports neither torch nor Textual: commands import them when they run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn, Protocol, cast

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import parse_float, parse_int
from streamchat.base.suggestions import did_you_mean
from streamchat.cli import flags, old_serve
from streamchat.cli.flags import Subparsers

COMMANDS = (
    "serve",
    "attach",
    "web",
    "replay",
    "monitor",
    "sessions",
    "verify",
    "ppl",
    "sweep",
    "bench",
    "recall-bench",
    "models",
    "doctor",
    "config",
    "completion",
    "acp",
)
"""Modules of `streamchat.commands` (with `_` for `-`), each a `Command`, in help order."""


class Command(Protocol):
    """Interface of the modules in `COMMANDS`."""

    HELP: str
    """One line for `streamchat --help`."""
    DESCRIPTION: str
    """What `streamchat COMMAND --help` prints above the flags."""

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags to its parser."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return the exit code."""
        ...


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `ConfigError` instead of printing the usage and exiting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: argparse.ArgumentParser = self
        """Parser of the given command; errors refer to its help."""
        self.register("type", int, parse_int)  # how `type=int` converts text
        self.register("type", float, parse_float)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message, reworded."""
        if wrong := re.match(r"argument (\S+): invalid choice: (.*?) \(choose from (.*)\)", message):
            word, choices = wrong[2].strip("'\""), re.findall(r"[\w-]+", wrong[3])
            kind = "a command" if wrong[1] in ("COMMAND", "ACTION") else f"valid for {wrong[1]}"
            message = f"{word} is not {kind}{did_you_mean(word, choices) or '; choose from ' + ', '.join(choices)}"
            if self.prog == "streamchat" and not did_you_mean(word, choices):
                message += ", or give none to start a chat"
        elif stray := re.match(r"unrecognized arguments: (.*)", message):
            message = f"unexpected argument {stray[1]}"
        else:
            message = message.removeprefix("argument ")
        raise ConfigError(message if message.endswith("?") else f"{message}; see {self.asked.prog} --help")


class _VersionAction(argparse.Action):
    """Print the versions for bug reports, without importing the packages."""

    def __init__(self, option_strings: Sequence[str], dest: str, **rest: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **rest)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_text())
        parser.exit()


def version_text() -> str:
    """Return `streamchat 0.1.0 (Python 3.11.9, torch 2.13.0, transformers 5.24.0)`."""
    from importlib.metadata import PackageNotFoundError, version

    from streamchat import __version__

    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} not installed"

    python = ".".join(map(str, sys.version_info[:3]))
    return f"streamchat {__version__} (Python {python}, {installed('torch')}, {installed('transformers')})"


def command(name: str) -> Command:
    """Import and return the module of a command, which loads only what it needs."""
    return cast(Command, import_module(f"streamchat.commands.{name.replace('-', '_')}"))


def build_parser(*, with_commands: bool = True) -> tuple[Parser, Subparsers[Parser]]:
    """Return the parser and its subparsers; without commands it imports no module of a command."""
    parser = Parser(
        prog="streamchat",
        usage="streamchat [SETTING ...] [COMMAND ...]",
        description="A terminal chat that never ends. Without a command it starts a chat: the app on a terminal, plain "
        "text in a pipe.",
        epilog="Settings can also be given as STREAMCHAT_NAME in the environment or in a configuration file; "
        "`streamchat config` prints the settings in use and their origins.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_VersionAction, help="print version information and exit")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="ID",
        help="resume a saved conversation (default: the last one); ID is an id that `streamchat sessions` lists, or "
        "the start of one",
    )
    old_serve.add_flags(parser)
    parser.add_argument("--tab-files", action="store_true", help=argparse.SUPPRESS)  # given by `streamchat web` to tabs
    flags.add_setting_flags(parser)
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", prog="streamchat", parser_class=Parser
    )
    for name in COMMANDS if with_commands else ():
        module = command(name)
        module.add_flags(subparsers.add_parser(name, help=module.HELP, description=module.DESCRIPTION))
    for subparser in _all_below(subparsers):
        subparser.allow_abbrev = False
    return parser, subparsers


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: An argument is wrong; one sentence with a hint.
        SystemExit: `--help` or `--version` was printed.
    """
    if not any(word in COMMANDS or word in ("-h", "--help") for word in argv):
        with suppress(ConfigError):  # the complete parser reports the error
            return _parse(argv, with_commands=False)
    return _parse(argv)


def _parse(argv: Sequence[str], *, with_commands: bool = True) -> argparse.Namespace:
    parser, subparsers = build_parser(with_commands=with_commands)
    known: set[str] = set()
    for each in (parser, *_all_below(subparsers)):
        known.update(each._option_string_actions)
    chosen = next((subparsers.choices[word] for word in argv if word in subparsers.choices), None)
    parser.asked = chosen or parser
    # Check first: argparse would take the value of a misspelled flag for the command.
    for word in argv:
        name = word.partition("=")[0]
        if word == "--":
            break
        if re.match(r"--?[A-Za-z]", word) and " " not in name and name not in known:
            hint = did_you_mean(name, _flags_of(parser.asked)) or f"; see {parser.asked.prog} --help"
            raise ConfigError(f"{name} is not a flag{hint}")
    return parser.parse_args(argv)


def _flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a command and of its actions."""
    flags_ = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and parser.prog != "streamchat":
            flags_.update(*(_flags_of(each) for each in action.choices.values()))
    return flags_


def _all_below(subparsers: Subparsers[Any]) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of commands and of their actions."""
    for each in subparsers.choices.values():
        yield each
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from _all_below(action)
