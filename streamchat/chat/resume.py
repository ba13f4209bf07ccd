"""Having a saved conversation back: log, turns and cache, from a snapshot or by reading again what was held."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from streamchat.cache import checkpoint
from streamchat.cache.ledger import Ledger
from streamchat.cache.policy import Retention, Run, merged_runs, plan_cuts
from streamchat.chat import snapshot as snapshots
from streamchat.chat.conversation import Conversation
from streamchat.chat.log import Before, TurnRecord
from streamchat.chat.recorder import Identity
from streamchat.chat.rollback import REACH
from streamchat.chat.snapshot import Snapshot, SnapshotError
from streamchat.errors import CacheError
from streamchat.store.records import StoredSession, StoredTurn


@dataclass(frozen=True)
class Resumed:
    """How it went."""

    seconds: float
    tokens: int
    """Held now."""
    read_again: int = 0
    """Of these read again; 0 where a snapshot had them."""
    reason: str = ""
    """Why, as the end of a sentence; '' with a snapshot."""
    cut_turn: int = 0
    """The turn whose reply was cut off and is still open; 0 for none."""
    cut_reply: tuple[int, ...] = ()
    """The ids of that reply, for `close_cut_reply`."""
    message_back: str = ""
    """A message whose reply had not begun; it is not part of the conversation."""
    rewritten: bool = False
    """Its ids are new: those in the store are of another tokenizer."""


def resume(conversation: Conversation, stored: StoredSession, identity: Identity, path: Path) -> Resumed:
    """Restore `stored` into a fresh conversation.

    Args:
        conversation: On the model to go on with; what it holds is replaced.
        stored: As the store has it.
        identity: Of that model.
        path: Of the snapshot, whether it is there or not.
    """
    started = time.perf_counter()
    if stored.info.tokenizer != identity.tokenizer:
        read = _write_anew(conversation, stored)
        reason = "it was led with another model, and its texts were tokenised anew"
        return Resumed(time.perf_counter() - started, conversation.cache.length, read, reason, rewritten=True)
    turns, message_back = list(stored.turns), ""
    held, pins, compressions = stored.info.held, stored.info.pins, stored.info.compressions
    if turns and turns[-1].state == "running" and not _reply_ids(conversation, turns[-1]):
        unanswered = turns.pop()
        message_back = unanswered.text
        before = unanswered.before
        held, pins, compressions = before.held, before.pins, before.compressions
    _fill_log(conversation, stored.system_ids, turns)
    reason, read = "", 0
    try:
        saved = snapshots.load(path)
        _use(conversation, saved, stored, identity)
    except SnapshotError as error:
        reason = str(error)
        read = _read_again(conversation, held, pins, turns, stored)
    conversation.cache.compression_count = compressions
    cut_turn, cut_reply = 0, list[int]()
    if turns and turns[-1].state == "running":
        cut_turn, cut_reply = turns[-1].number, _reply_ids(conversation, turns[-1])
    seconds = time.perf_counter() - started
    return Resumed(seconds, conversation.cache.length, read, reason, cut_turn, tuple(cut_reply), message_back)


def _fill_log(conversation: Conversation, system_ids: array[int], turns: Sequence[StoredTurn]) -> None:
    log = conversation.log
    log.clear()
    log.append(system_ids)
    conversation.system_tokens = len(system_ids)
    recent = turns[-1].number - REACH if turns else 0
    for turn in turns:
        log.turns.append(
            TurnRecord(
                turn.number,
                turn.first,
                turn.content,
                turn.reply_first,
                turn.first + len(turn.ids),
                turn.text,
                turn.reply,
                Before(turn.before) if turn.number > recent else None,
            )
        )
        log.append(turn.ids)
    if turns and turns[-1].state == "running":
        log.turns[-1].stop = None


def _reply_ids(conversation: Conversation, turn: StoredTurn) -> list[int]:
    """What of the reply itself was fed, without its opening."""
    ids = turn.ids[turn.reply_first - turn.first :].tolist()
    for opening in (conversation.encoder.reply_opening(), conversation.encoder.reply_opening(given=True)):
        if ids[: len(opening)] == opening:
            return ids[len(opening) :]
    return ids


def _use(conversation: Conversation, saved: Snapshot, stored: StoredSession, identity: Identity) -> None:
    """Put a snapshot into the cache.

    Raises:
        SnapshotError: It is of something else.
    """
    cache, log = conversation.cache, conversation.log
    if saved.session != stored.info.id:
        raise SnapshotError("its saved cache belongs to another conversation")
    if saved.dtype != identity.dtype:
        raise SnapshotError(f"its cache was saved in {saved.dtype} and the model runs in {identity.dtype} now")
    if saved.fingerprint != identity.fingerprint:
        raise SnapshotError("its cache was saved with another model")
    taken = saved.checkpoint
    if taken.next_index != len(log) or log.take(taken.runs) != saved.ids.tolist():
        raise SnapshotError("its cache was saved at another moment")
    if taken.length > cache.cache_size:
        raise SnapshotError(f"its saved cache of {taken.length} tokens does not fit into {cache.cache_size}")
    if cache.seen is not None:
        cache.seen.clear()
        cache.seen.append(_row(log.ids))
    try:
        checkpoint.restore(cache, taken)
    except CacheError as error:
        raise SnapshotError("its cache was saved with another model") from error
    conversation.draw = saved.generator


def _row(ids: array[int]) -> torch.Tensor:
    return torch.tensor([ids.tolist()], dtype=torch.int32)


def _read_again(
    conversation: Conversation,
    held: Sequence[Run],
    pins: Sequence[Run],
    turns: Sequence[StoredTurn],
    stored: StoredSession,
) -> int:
    """Prefill what was held, or as much of it as fits now; returns how many tokens."""
    cache, log = conversation.cache, conversation.log
    starts = _turn_starts(turns, stored)
    cache.pins = tuple(merged_runs(pins))
    ledger = Ledger(list(held), len(log))
    _make_fit(ledger, Retention(cache.cache_size, cache.num_sink_tokens, cache.pins), starts)
    cache.turn_starts = [start for start in starts if ledger.count_in(start, start + 1)]
    return conversation.read_again(ledger.runs, len(log))


def _turn_starts(turns: Sequence[StoredTurn], stored: StoredSession) -> list[int]:
    """Where whole turns can still be cut, as the living cache knew it."""
    if not turns:
        return []
    last = turns[-1]
    starts = [*last.before.turn_starts, last.first]
    for eviction in stored.evictions:
        if eviction.turn == last.number and eviction.runs:
            starts = [start for start in starts if start >= eviction.runs[-1][1]]
    return starts


def _make_fit(ledger: Ledger, retention: Retention, turn_starts: Sequence[int]) -> None:
    """Leave out the oldest where the budget is smaller than it was."""
    if len(ledger) > retention.cache_size:
        for cut in plan_cuts(ledger, retention, 0, turn_starts=turn_starts):
            ledger.evict(cut.at, cut.count)


def _write_anew(conversation: Conversation, stored: StoredSession) -> int:
    """Encode all texts with this model's tokenizer, and read the newest turns that fit; returns how many tokens."""
    cache, log, encoder = conversation.cache, conversation.log, conversation.encoder
    system = log.ids[: conversation.system_tokens]
    log.clear()
    log.append(system)
    for turn in stored.turns:
        first = not log.turns
        at = len(log)
        encoded = encoder.encoded(turn.text, first, turn.reply, "." if first else log.turns[-1].reply)
        log.append(encoded.prompt)
        log.append(encoded.reply)
        log.turns.append(
            TurnRecord(turn.number, at, at + encoded.content, at + encoded.reply_first, len(log), turn.text, turn.reply)
        )
    ledger = Ledger([(0, len(log))] if len(log) else [], len(log))
    starts = [turn.first for turn in log.turns]
    cache.pins = ((0, len(system)),) if len(system) else ()
    _make_fit(ledger, Retention(cache.cache_size, cache.num_sink_tokens, cache.pins), starts)
    cache.turn_starts = [start for start in starts if ledger.count_in(start, start + 1)]
    cache.compression_count = stored.info.compressions
    return conversation.read_again(ledger.runs, len(log))
