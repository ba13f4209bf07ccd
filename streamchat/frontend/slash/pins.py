"""The slash commands `/pin` and `/unpin`."""

from __future__ import annotations

from functools import partial

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.requests import Pin, Unpin
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult


def _pin(context: SlashContext, argument: str) -> SlashResult:
    context.engine.send(Pin(_turn_of(context, argument)))
    return SlashResult()


def _unpin(context: SlashContext, argument: str) -> SlashResult:
    pinned = sorted({segment.turn for segment in context.board.cache.segments if segment.turn and segment.pinned})
    if not argument and len(pinned) > 1:
        turns = ", ".join(map(str, pinned))
        raise ConfigError(f"turns {turns} are pinned; choose one: /unpin {pinned[-1]}")
    turn = pinned[0] if pinned and not argument else _turn_of(context, argument)
    context.engine.send(Unpin(turn))
    return SlashResult()


def _turn_of(context: SlashContext, argument: str) -> int:
    """The turn that `argument` names, or the last one.

    Raises:
        ConfigError: There is none.
    """
    turn = parse_whole_number(argument) if argument else context.board.turns
    if not turn:
        raise ConfigError(f"{argument} is not a turn number" if argument else "no turn yet")
    return turn


def _complete_turns(context: SlashContext, argument: str, pinned: bool) -> list[tuple[str, str]]:
    cached: dict[int, int] = {}
    for segment in context.board.cache.segments:
        if segment.turn and segment.pinned == pinned:
            cached[segment.turn] = cached.get(segment.turn, 0) + segment.tokens
    newest = sorted(cached.items(), reverse=True)
    return [(str(turn), plural(tokens, "token")) for turn, tokens in newest if str(turn).startswith(argument)]


PIN = SlashCommand(
    "pin",
    "[TURN]",
    "pin a turn (default: the last)",
    _pin,
    complete=partial(_complete_turns, pinned=False),
    asks_engine=True,
)
UNPIN = SlashCommand(
    "unpin", "[TURN]", "unpin a turn", _unpin, complete=partial(_complete_turns, pinned=True), asks_engine=True
)
