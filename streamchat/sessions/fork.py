"""Saves the start of a conversation as a session of its own, with the cache as it was then."""

from __future__ import annotations

import logging
from array import array
from dataclasses import asdict

from streamchat.base.errors import StoreError
from streamchat.cache import checkpoint
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.conversation.conversation import Conversation
from streamchat.decode.one_thread import calling_thread_only
from streamchat.sessions.snapshot import Snapshot, save
from streamchat.store.forks import Fork
from streamchat.store.records import CacheMark, ModelIdentity
from streamchat.store.store import Store

_log = logging.getLogger(__name__)


def fork(store: Store, session: str, conversation: Conversation, identity: ModelIdentity, at: int, turns: int) -> str:
    """Create a fork of a session that is completely saved, and return its id; see `Archive.fork`.

    The fork is created in one transaction, and its snapshot is written afterwards. If the process is killed in between,
    resuming the fork needs a prefill.

    Raises:
        StoreError: It cannot be created.
    """
    log = conversation.log
    past: CacheCheckpoint | None
    with calling_thread_only():
        if turns == len(log.turns):
            mark, past = conversation.rollback.mark(), checkpoint.capture(conversation.cache)
        else:
            mark = _mark_after(store, session, conversation, turns)
            past = conversation.rollback.rebuilt(mark, log.turns[turns].start)
    created = store.fork(Fork(session, at, turns, mark))
    if past is not None:
        try:
            save(store.snapshot_path(created), _snapshot(created, conversation, identity, past))
        except StoreError:
            _log.warning("the fork %s has no snapshot", created, exc_info=True)
    return created


def captured(session: str, conversation: Conversation, identity: ModelIdentity) -> Snapshot:
    """Return a copy of the cache as it is now, to be saved for a session."""
    with calling_thread_only():
        saved_cache = checkpoint.capture(conversation.cache)
    return _snapshot(session, conversation, identity, saved_cache)


def _snapshot(
    session: str, conversation: Conversation, identity: ModelIdentity, saved_cache: CacheCheckpoint
) -> Snapshot:
    return Snapshot(
        session,
        saved_cache,
        array("i", conversation.log.ids_at(saved_cache.runs)),
        conversation.rng_state,
        identity.fingerprint,
        identity.dtype,
        asdict(conversation.settings),
    )


def _mark_after(store: Store, session: str, conversation: Conversation, turns: int) -> CacheMark:
    """Return the bookkeeping of the cache after the first `turns` turns: of a full cache if it is not known."""
    before = conversation.log.turns[turns].before
    if before is not None and before.cache.held:
        return before.cache
    known = store.marks(session, turns + 1, turns + 1)
    return known.get(turns + 1) or conversation.full_mark(turns)
