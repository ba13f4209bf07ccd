"""Restores a saved session: log, turns and cache, from a snapshot or by prefilling the cached tokens again."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamchat.base.errors import CacheError
from streamchat.cache import checkpoint
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Retention, Run, starts_after
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.fitting import CacheSelection, fit_to_budget
from streamchat.conversation.log import TurnRecord, TurnStart
from streamchat.conversation.rollback import REACH
from streamchat.decode.one_thread import calling_thread_only
from streamchat.models.fingerprint import FINGERPRINT_PREFIX
from streamchat.sessions import snapshot as snapshots
from streamchat.sessions.snapshot import Snapshot, SnapshotError
from streamchat.store.records import CacheMark, ModelIdentity, StoredSession, StoredTurn


@dataclass(frozen=True)
class ResumeResult:
    """The result of a resume."""

    seconds: float
    read_again: int = 0
    """Number of tokens that were prefilled; 0 if a snapshot had them."""
    reason: str = ""
    """Why there was a prefill, as the end of a sentence; '' with a snapshot."""
    cut_turn: int = 0
    """The turn whose reply was cut off and is not closed yet; 0 for none."""
    cut_reply: tuple[int, ...] = ()
    """The ids of that reply, for `close_cut_reply`."""
    message_back: str = ""
    """A message whose reply had not started; it is not part of the conversation."""
    rewritten: bool = False
    """Whether the ids are new, because those in the store are of another tokenizer."""
    unpinned: tuple[int, ...] = ()
    """Turns whose pins no longer fit."""


def resume(conversation: Conversation, stored: StoredSession, identity: ModelIdentity, path: Path) -> ResumeResult:
    """Restore `stored` into a new conversation.

    Args:
        conversation: A conversation on the model to continue with; its contents are replaced.
        stored: The session from the store.
        identity: The identity of the model.
        path: Path of the snapshot, whether it exists or not.
    """
    started = time.perf_counter()
    damaged = bool(stored.damage and not stored.info.tokenizer) or not _fits_the_model(conversation, stored)
    if damaged or stored.info.tokenizer != identity.tokenizer:
        read, fitted = _reencode(conversation, stored)
        reason = "it was recorded with a different model and had to be re-tokenized"
        if not stored.info.tokenizer:
            reason = "it was imported and had to be tokenized"
        if damaged:
            reason = "its saved tokens are damaged and it had to be re-tokenized"
        seconds = time.perf_counter() - started
        return ResumeResult(seconds, read, reason, rewritten=True, unpinned=fitted.unpinned)
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
        fitted = _restore_snapshot(conversation, saved, stored, identity, held, pins)
    except SnapshotError as error:
        reason = str(error)
        read, fitted = _prefill(conversation, held, pins, turns, stored)
    conversation.cache.compression_count = compressions
    cut_turn, cut_reply = 0, list[int]()
    if turns and turns[-1].state == "running":
        cut_turn, cut_reply = turns[-1].number, _reply_ids(conversation, turns[-1])
    seconds = time.perf_counter() - started
    return ResumeResult(seconds, read, reason, cut_turn, tuple(cut_reply), message_back, unpinned=fitted.unpinned)


def _fits_the_model(conversation: Conversation, stored: StoredSession) -> bool:
    """Return whether the stored ids, if they are used, are in the model's vocabulary and some of them are cached."""
    if stored.info.tokenizer == "" or not stored.turns:
        return True
    vocabulary = conversation.model.config.get_text_config().vocab_size
    ids = [stored.system_ids, *(turn.ids for turn in stored.turns)]
    nothing_fed = not any(ids)
    return nothing_fed or (_has_cached_tokens(stored) and all(max(each, default=0) < vocabulary for each in ids))


def _has_cached_tokens(stored: StoredSession) -> bool:
    first = stored.turns[0]
    return bool(stored.info.held) or (len(stored.turns) == 1 and first.state == "running")


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
                turn.start,
                turn.message_start,
                turn.reply_start,
                turn.start + len(turn.ids),
                turn.text,
                turn.reply,
                TurnStart(turn.before) if turn.number > recent and (turn.before.held or not turn.start) else None,
            )
        )
        log.append(turn.ids)
    if turns and turns[-1].state == "running":
        log.turns[-1].end = None


def _reply_ids(conversation: Conversation, turn: StoredTurn) -> list[int]:
    """Return the ids of the reply that were fed, without its opening."""
    ids = turn.ids[turn.reply_start - turn.start :].tolist()
    for opening in (conversation.encoder.reply_opening(), conversation.encoder.reply_opening(given=True)):
        if ids[: len(opening)] == opening:
            return ids[len(opening) :]
    return ids


def _restore_snapshot(
    conversation: Conversation,
    saved: Snapshot,
    stored: StoredSession,
    identity: ModelIdentity,
    held: Sequence[Run],
    pins: Sequence[Run],
) -> CacheSelection:
    """Restore the cache from a snapshot, and unpin turns if the pins exceed the budget.

    The tokens that are cached and pinned are `held` and `pins` of the store: turns may have been pinned since the
    snapshot.

    Raises:
        SnapshotError: The snapshot does not match the session, the model or the budget.
    """
    cache, log = conversation.cache, conversation.log
    if saved.session != stored.info.id:
        raise SnapshotError("its saved cache belongs to another session")
    # float32 keys and values are rounded as they would have been when cached; rounded ones cannot become exact again
    if saved.dtype not in (identity.dtype, identity.full_dtype):
        raise SnapshotError(f"its cache was saved in {saved.dtype} and the model now runs in {identity.dtype}")
    if not saved.fingerprint.startswith(FINGERPRINT_PREFIX):
        raise SnapshotError("its cache was saved by an older streamchat, which did not fingerprint all weights")
    if saved.fingerprint != identity.fingerprint:
        raise SnapshotError("its cache was saved with another model")
    saved_cache = saved.checkpoint
    if saved.dtype != identity.dtype:
        saved_cache = replace(saved_cache, form=None)  # its numbers are rounded
    is_of_these_turns = saved_cache.next_index == len(log) and log.ids_at(saved_cache.runs) == saved.ids.tolist()
    if not is_of_these_turns or list(saved_cache.runs) != list(held):
        raise SnapshotError("its saved cache does not match the saved turns")
    if saved_cache.length > cache.cache_size:
        raise SnapshotError(f"its saved cache of {saved_cache.length} tokens does not fit into {cache.cache_size}")
    conversation.feeder.set_fed_tokens(len(log))
    try:
        with calling_thread_only():
            checkpoint.restore(cache, saved_cache)
        conversation.rng_state = saved.generator
    except CacheError as error:
        raise SnapshotError("its cache was saved with another model") from error
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        # parts are missing or have other shapes although the checksum is correct
        raise SnapshotError("its saved cache is damaged") from error
    fitted = fit_to_budget(cache, log, saved_cache.runs, pins=pins, turn_starts=saved_cache.turn_starts)
    cache.pins = fitted.pins
    return fitted


def _prefill(
    conversation: Conversation,
    held: Sequence[Run],
    pins: Sequence[Run],
    turns: Sequence[StoredTurn],
    stored: StoredSession,
) -> tuple[int, CacheSelection]:
    """Prefill the tokens that were cached, as many as fit now; return the number of tokens and what fits."""
    cache, log = conversation.cache, conversation.log
    cut_off = bool(turns) and turns[-1].state == "running"
    fitted = fit_to_budget(
        cache,
        log,
        held,
        pins=pins,
        turn_starts=_turn_starts(conversation, turns, stored),
        reserve=len(conversation.encoder.close()) if cut_off else 0,
    )
    read = conversation.feeder.prefill_runs(fitted.runs, len(log))
    cache.pins, cache.turn_starts = fitted.pins, fitted.turn_starts
    return read, fitted


def _turn_starts(conversation: Conversation, turns: Sequence[StoredTurn], stored: StoredSession) -> list[int]:
    """Return the log indices where whole turns can be cut, as in the cache that was saved."""
    if not turns:
        return []
    last = turns[-1]
    starts = [*last.before.turn_starts, last.start]
    ledger = Ledger(list(stored.info.held), len(conversation.log))
    # the pins during the turn: later ones do not bring back what an eviction took
    retention = Retention(len(ledger), conversation.cache.num_sink_tokens, last.before.pins)
    for eviction in stored.evictions:
        if eviction.turn == last.number and eviction.runs:
            starts = starts_after(starts, eviction.runs, retention, ledger)
    return starts


def _reencode(conversation: Conversation, stored: StoredSession) -> tuple[int, CacheSelection]:
    """Encode all texts with this model's tokenizer, and prefill the newest turns that fit.

    Returns:
        The number of prefilled tokens, and what fits.
    """
    cache, log, encoder = conversation.cache, conversation.log, conversation.encoder
    system = log.ids[: conversation.system_tokens]
    log.clear()
    log.append(system)
    pins: list[Run] = [(0, len(system))] if len(system) else []
    starts: list[int] = []
    recent = len(stored.turns) - REACH
    for i, turn in enumerate(stored.turns):
        first = not log.turns
        at = len(log)
        before = TurnStart(_mark_of_full_log(conversation, pins, starts, stored)) if i >= recent else None
        encoded = encoder.encoded(turn.text, first, turn.reply, "." if first else log.turns[-1].reply)
        log.append(encoded.prompt)
        log.append(encoded.reply)
        log.turns.append(
            TurnRecord(
                turn.number,
                at,
                at + encoded.message_start,
                at + encoded.reply_start,
                len(log),
                turn.text,
                turn.reply,
                before,
            )
        )
        starts.append(at)
        if _was_pinned(turn, stored.info.pins, cache.num_sink_tokens):
            pins.append((at, len(log)))
    held = [(0, len(log))] if len(log) else []
    fitted = fit_to_budget(cache, log, held, pins=pins, turn_starts=starts)
    read = conversation.feeder.prefill_runs(fitted.runs, len(log))
    cache.pins, cache.turn_starts = fitted.pins, fitted.turn_starts
    cache.compression_count = stored.info.compressions
    return read, fitted


def _mark_of_full_log(
    conversation: Conversation, pins: Sequence[Run], starts: Sequence[int], stored: StoredSession
) -> CacheMark:
    """Return the bookkeeping of a cache that was fed the whole log."""
    stop = len(conversation.log)
    held = [(0, stop)] if stop else []
    fitted = fit_to_budget(conversation.cache, conversation.log, held, pins=pins, turn_starts=starts)
    return CacheMark(tuple(fitted.runs), fitted.pins, tuple(fitted.turn_starts), stored.info.compressions)


def _was_pinned(turn: StoredTurn, pins: Sequence[Run], num_sink_tokens: int) -> bool:
    stop = turn.start + len(turn.ids)
    return bool(turn.ids) and any(a <= max(turn.start, num_sink_tokens) and stop <= b for a, b in pins)
