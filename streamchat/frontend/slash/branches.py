"""The slash commands `/rewind` and `/fork`."""

from __future__ import annotations

from functools import partial

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.requests import Fork, Rewind
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult


def rewind_done(event: ev.Event) -> bool:
    """Whether the rewind is done or was refused."""
    return isinstance(event, ev.ConversationRewound) or _is_refusal(event)


def fork_done(event: ev.Event) -> bool:
    """Whether the fork is open or was refused."""
    return isinstance(event, ev.ConversationResumed) or _is_refusal(event)


def _is_refusal(event: ev.Event) -> bool:
    return isinstance(event, ev.Notice) and event.level != "info"


def _rewind(context: SlashContext, argument: str) -> SlashResult:
    number, _, answer = argument.partition(" ")
    if not number:
        raise ConfigError("usage: /rewind N (undoes all turns after turn N; a fork of the session keeps them)")
    if answer.strip() not in ("", "yes"):
        raise ConfigError(f"{answer.strip()!r} is not a valid answer; only yes may follow the number")
    context.engine.send(Rewind(_turn(context, number), drop=bool(answer)))
    return SlashResult(done_when=rewind_done)


def _fork(context: SlashContext, argument: str) -> SlashResult:
    context.engine.send(Fork(_turn(context, argument) if argument else 0))
    return SlashResult(done_when=fork_done)


def _turn(context: SlashContext, argument: str) -> int:
    """Return the turn number in `argument`.

    Raises:
        ConfigError: There is no such turn.
    """
    turn = parse_whole_number(argument) or 0
    if not 1 <= turn <= context.board.turns:
        clear = "; /clear starts over" if argument == "0" else ""
        raise ConfigError(
            f"{argument} is not a turn; this conversation has {plural(context.board.turns, 'turn')}{clear}"
        )
    return turn


def _complete(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    turns = range(context.board.turns, 0, -1)
    return [
        (str(turn), f"the conversation as it was after turn {turn}") for turn in turns if str(turn).startswith(argument)
    ]


_command = partial(SlashCommand, asks_engine=True, needs_idle=True, complete=_complete)
REWIND = _command("rewind", "N", "go back to turn N; a fork keeps the later turns", _rewind)
FORK = _command("fork", "[N]", "continue after turn N in a new session", _fork)
