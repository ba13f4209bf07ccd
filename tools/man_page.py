"""The man page, made from the parser, the settings and the slash commands; `python -m tools.docs --write` writes it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from typing import Any

from streamchat import __version__
from streamchat.base.errors import ExitCode
from streamchat.cli import parser
from streamchat.config.settings import setting_fields, spec_of
from streamchat.frontend.slash.commands import default_registry

EXIT_CODES = {
    ExitCode.OK: "Success.",
    ExitCode.FAILURE: "Something failed at run time, for example a turn of a piped conversation.",
    ExitCode.USAGE: "A flag, an environment variable or a configuration file is wrong.",
    ExitCode.MODEL: "The model cannot be found, fetched, read or used, or memory ran out.",
    ExitCode.CHECK_FAILED: "A check of verify, or an invariant of replay, does not hold.",
    ExitCode.STORE: "Saved sessions cannot be read or written, or the session does not exist or is open elsewhere.",
    ExitCode.HUNG_UP: "The terminal was closed.",
    ExitCode.INTERRUPTED: "Ctrl+C outside a reply.",
    ExitCode.BROKEN_PIPE: "The reader of stdout has exited.",
    ExitCode.TERMINATED: "Terminated from outside.",
}
ENVIRONMENT = {
    "STREAMCHAT_NAME": "The setting NAME in capitals, as in STREAMCHAT_CACHE_SIZE.",
    "STREAMCHAT_CONFIG": "The configuration file, like --config.",
    "STREAMCHAT_HOME": "One folder for configuration, models, sessions, and logs.",
    "STREAMCHAT_DEBUG": "Any value except 0: show tracebacks of errors, like --debug.",
    "NO_COLOR": "Any value: no colors.",
    "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...": "As for all Hugging Face programs.",
}
FILES = {
    "~/.config/streamchat/config.toml": "The user's configuration file; config --path prints the one in use.",
    "./config.toml": "A configuration file of the current folder; some settings in it need config --trust.",
}


def man_page() -> str:
    """Return the page in the man macros."""
    top, subparsers = parser.build_parser()
    lines = [
        r".\" Made by `python -m tools.docs --write`; changes here are overwritten.",
        f'.TH STREAMCHAT 1 "" "streamchat {__version__}" "User Commands"',
        ".nh",
        ".ad l",
        ".SH NAME",
        r"streamchat \- a terminal chat that never ends, with a language model on this machine",
        ".SH SYNOPSIS",
        r".B streamchat",
        r"[\fISETTING\fR ...] [\fICOMMAND\fR ...]",
        ".SH DESCRIPTION",
        *_text(top.description or ""),
        ".PP",
        *_text(top.epilog or ""),
        ".SH OPTIONS",
        *_flags(action for action in top._actions if not _is_setting(action)),
        ".SH SETTINGS",
    ]
    section = ""
    for action in filter(_is_setting, top._actions):
        if spec_of(action.dest).section != section:
            section = spec_of(action.dest).section
            lines.append(f".SS [{section}]")
        lines += _flags([action])
    lines.append(".SH COMMANDS")
    for name in parser.COMMANDS:
        lines += _command(subparsers.choices[name], f"streamchat {name}")
    lines.append(".SH IN THE CHAT")
    for command in default_registry():
        lines += _entry(f"/{f'{command.name} {command.arguments}'.strip()}", f"{command.help}.")
    for title, entries in (("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
        lines += [f".SH {title}", *(line for name, text in entries.items() for line in _entry(name, text))]
    lines.append(".SH EXIT STATUS")
    for code in ExitCode:
        lines += _entry(str(int(code)), EXIT_CODES[code])
    return "\n".join(lines) + "\n"


def _command(each: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """Yield the part of a command, and those of its actions; settings that it shares with the chat are named only."""
    yield f".SS {_escaped(name)}"
    yield from _text(each.description or "")
    below = [action for action in each._actions if isinstance(action, argparse._SubParsersAction)]
    own = [action for action in each._actions if not _is_setting(action) and action not in below]
    yield from _flags(own)
    settings = [action.option_strings[0] for action in each._actions if _is_setting(action)]
    if settings:
        yield ".PP"
        yield from _text(f"Settings: {', '.join(settings)}.")
    for action in below:
        help_of = {choice.dest: choice.help for choice in action._choices_actions}
        for word, lower in action.choices.items():
            lower.description = lower.description or f"{str(help_of[word])[:1].upper()}{str(help_of[word])[1:]}."
            yield from _command(lower, f"{name} {word}")


def _is_setting(action: argparse.Action) -> bool:
    return action.dest in setting_fields() and action.default is argparse.SUPPRESS


def _flags(actions: Iterable[argparse.Action]) -> Iterator[str]:
    for action in actions:
        is_shown = action.dest != "help" and action.help is not argparse.SUPPRESS
        if is_shown and not isinstance(action, argparse._SubParsersAction):
            yield from _entry(usage(action), (action.help or "").replace("%%", "%"))


def usage(action: argparse.Action) -> str:
    """Return how an argument is written: its flags and its value."""
    value: Any = action.metavar or (
        f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
    )
    several = {"?": f"[{value}]", "*": f"[{value} ...]", "+": f"{value} [{value} ...]"}.get(str(action.nargs), value)
    if not action.option_strings:
        return str(several)
    flag = ", ".join(action.option_strings)
    return flag if action.nargs == 0 else f"{flag} {several}"


def _entry(name: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield rf".B {_escaped(name)}"
    yield from _text(text)


def _text(text: str) -> list[str]:
    """Return a paragraph, one sentence per line."""
    return [_escaped(sentence) for sentence in re.split(r"(?<=[a-z)][.!?]) +(?=[A-Z`])", " ".join(text.split()))]


def _escaped(text: str) -> str:
    """Return `text` so that roff prints it as it is."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")
    text = text.replace("~", r"\(ti").replace("^", r"\(ha").replace('"', r"\(dq")
    return rf"\&{text}" if text.startswith(".") else text
