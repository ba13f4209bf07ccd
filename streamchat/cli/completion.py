"""Shell completion in bash, zsh and fish: argcomplete asks the parser which words may follow the typed line.

The script of a shell (`streamchat completion SHELL`) runs `streamchat` with the typed line in the environment at each
Tab; `answer` then prints the possible words. No other start imports this module.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from streamchat.base.errors import StreamchatError
from streamchat.base.sanitize import one_line
from streamchat.cli.parser import build_parser
from streamchat.config.settings import setting_fields, spec_of

VARIABLE = "_ARGCOMPLETE"
"""Set by the shell's script."""
MAX_SESSIONS = 50
Completer = Callable[..., Mapping[str, str]]
"""Called with the start of a word as `prefix`; returns words and their explanations."""


def answer() -> None:
    """Print the completions of the typed line, and exit."""
    from argcomplete import autocomplete
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter, SuppressCompleter

    parser, _ = build_parser()
    for action in _actions(parser):
        if action.metavar in ("FILE", "DIR", "FOLDER"):
            files = FilesCompleter() if action.metavar == "FILE" else DirectoriesCompleter()
            action.completer = files  # type: ignore[attr-defined]
        elif completer := _completer(action):
            action.completer = completer  # type: ignore[attr-defined]
    autocomplete(parser, default_completer=SuppressCompleter())


def script(shell: str, program: str = "streamchat") -> str:
    """Return the script that a shell reads to complete `program`."""
    from argcomplete.shell_integration import shellcode

    return shellcode([program], True, shell)


def _completer(action: argparse.Action) -> Completer | None:
    """Return the completer for the values of a flag or an argument; None if there is none."""
    if action.dest == "model":
        return _models
    if action.dest in ("resume", "id") or action.metavar == "SESSION|RUN":
        return _sessions
    if action.dest in setting_fields() and (spec := spec_of(action.dest)).choices:
        return lambda prefix, **_: {choice: "" for choice in spec.choices if choice.startswith(prefix)}
    return None


def _models(prefix: str, **_: object) -> Mapping[str, str]:
    from streamchat.frontend.model_names import complete_model

    return {name: one_line(note) for name, note in complete_model(prefix)}


def _sessions(prefix: str, **_: object) -> Mapping[str, str]:
    from streamchat.store.store import Store

    with suppress(StreamchatError), Store() as store:
        found = store.sessions(limit=MAX_SESSIONS)
        return {info.id: one_line(info.title) for info in found if info.id.startswith(prefix)}
    return {}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the flags and arguments of a parser and of all its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
        else:
            yield action
