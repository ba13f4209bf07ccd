"""Lists the cached tokens message by message, from the ledger and the turns of the log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamchat.base.events import Segment, SegmentPart
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run
from streamchat.conversation.log import TokenLog, TurnRecord


def segments(
    ledger: Ledger, log: TokenLog, *, sinks: int, pins: Iterable[Run], recalled: Iterable[Run] = ()
) -> tuple[Segment, ...]:
    """Return the segments of the cache in slot order. Takes time proportional to the cache, not to the log.

    Args:
        ledger: Log index of each slot.
        log: Turns by log index; the tokens before the first turn are the system block.
        sinks: Number of log indices, from the start, that are attention sinks.
        pins: Runs of log indices that are never evicted.
        recalled: Runs of log indices that were recalled for the newest message.
    """
    pins, recalled = tuple(pins), tuple(recalled)
    found: list[Segment] = []
    held_sinks = ledger.count_in(0, sinks)
    if held_sinks:
        found.append(Segment("sinks", 0, held_sinks, held_sinks, pinned=True))
    for part, turn, first, stop in _messages(ledger, log):
        first = max(first, sinks)
        tokens = ledger.count_in(first, stop)
        if tokens > 0:
            pinned = part == "system" or any(a <= first and stop <= b for a, b in pins)
            is_recalled = not pinned and any(a < stop and first < b for a, b in recalled)
            found.append(Segment(part, turn, tokens, stop - first, pinned, is_recalled))
    return tuple(found)


def _messages(ledger: Ledger, log: TokenLog) -> Iterator[tuple[SegmentPart, int, int, int]]:
    """Yield (part, turn, first, stop) of each message that a run of the ledger touches, oldest first."""
    system_stop = log.turns[0].start if log.turns else len(log)
    if system_stop:
        yield "system", 0, 0, system_stop
    last = 0
    for run in ledger.runs:
        for turn in log.turns_touching(*run):
            if turn.number > last:
                last = turn.number
                yield from _parts_of(turn, len(log))


def _parts_of(turn: TurnRecord, end: int) -> Iterator[tuple[SegmentPart, int, int, int]]:
    stop = end if turn.end is None else turn.end
    reply = stop if turn.reply_start is None else min(turn.reply_start, stop)
    yield "user", turn.number, turn.start, reply
    if reply < stop:
        yield "assistant", turn.number, reply, stop
