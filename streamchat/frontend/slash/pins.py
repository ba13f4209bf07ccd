"""The slash commands `/pin` and `/unpin`."""

from __future__ import annotations

from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.requests import Pin, Unpin
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult


def _pin(context: SlashContext, argument: str) -> SlashResult:
    turn = _turn_of(context, argument)
    if isinstance(turn, SlashResult):
        return turn
    context.engine.send(Pin(turn))
    return SlashResult()


def _unpin(context: SlashContext, argument: str) -> SlashResult:
    pinned = _pinned_turns(context)
    if not argument and len(pinned) == 1:
        context.engine.send(Unpin(pinned[0]))
        return SlashResult()
    if not argument and pinned:
        turns = ", ".join(map(str, pinned))
        return SlashResult(f"turns {turns} are pinned; choose one: /unpin {pinned[-1]}", error=True)
    turn = _turn_of(context, argument)
    if isinstance(turn, SlashResult):
        return turn
    context.engine.send(Unpin(turn))
    return SlashResult()


def _turn_of(context: SlashContext, argument: str) -> int | SlashResult:
    if not argument:
        if not context.board.turns:
            return SlashResult("no turn yet", error=True)
        return context.board.turns
    return parse_whole_number(argument) or SlashResult(f"{argument} is not a turn number", error=True)


def _pinned_turns(context: SlashContext) -> list[int]:
    return sorted({segment.turn for segment in context.board.cache.segments if segment.turn and segment.pinned})


def _complete_turns(context: SlashContext, argument: str, pinned: bool) -> list[tuple[str, str]]:
    cached: dict[int, int] = {}
    for segment in context.board.cache.segments:
        if segment.turn and segment.pinned == pinned:
            cached[segment.turn] = cached.get(segment.turn, 0) + segment.tokens
    newest = sorted(cached.items(), reverse=True)
    return [(str(turn), plural(tokens, "token")) for turn, tokens in newest if str(turn).startswith(argument)]


def _complete_pin(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return _complete_turns(context, argument, pinned=False)


def _complete_unpin(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    return _complete_turns(context, argument, pinned=True)


PIN = SlashCommand("pin", "[TURN]", "pin a turn (default: the last)", _pin, complete=_complete_pin, asks_engine=True)
UNPIN = SlashCommand("unpin", "[TURN]", "unpin a turn", _unpin, complete=_complete_unpin, asks_engine=True)
