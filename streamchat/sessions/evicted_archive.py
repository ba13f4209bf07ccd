"""Archives the evicted tokens of the active conversation, and finds them again."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streamchat.base.errors import StoreError
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.policy import Run
from streamchat.cache.paging import can_page_in
from streamchat.sessions.evicted_pages import Kind, from_bytes
from streamchat.sessions.evicted_writer import EvictedWriter, Limits
from streamchat.store.evicted import EvictedPage, EvictedPages, checksum_of

if TYPE_CHECKING:
    from streamchat.conversation.conversation import Conversation
    from streamchat.store.records import ModelIdentity

_log = logging.getLogger(__name__)
PENDING_BYTES = 32 << 20
"""Memory for evicted tokens that wait for the end of the turn; beyond it, they go to the writer during the turn."""
MEGABYTE = 1_000_000
PATIENCE_S = 10.0
"""Maximum time to wait for a page that is being written while its turn is undone."""


class EvictedArchive:
    """The archive of one conversation at a time. All methods run on the engine's thread.

    Args:
        pages: The archive of all sessions.
        tell: Called with notices for the user, on another thread.
    """

    def __init__(self, pages: EvictedPages, tell: Callable[[str], None]) -> None:
        self._pages, self._tell = pages, tell
        self._conversation: Conversation | None = None
        self._identity: ModelIdentity | None = None
        self._session: Callable[[], str | None] = lambda: None
        self._pending: list[EvictedTokens] = []
        self._writer: EvictedWriter | None = None
        self._kind: Kind = "native"

    def attach(self, conversation: Conversation, identity: ModelIdentity, session: Callable[[], str | None]) -> None:
        """Archive tokens that `conversation` evicts from now on, unless the setting is off or they cannot be paged in.

        Args:
            conversation: The active conversation.
            identity: The identity of its model.
            session: Returns the id of its session; None until it has one.
        """
        self._pending = []
        settings, history = conversation.settings, conversation.cache.history
        if settings.archive == "off" or history is None or not can_page_in(conversation.cache):
            self._conversation = None
            return
        limits = Limits(settings.archive_session_mb * MEGABYTE, settings.archive_total_mb * MEGABYTE)
        if self._writer is None or self._writer.limits != limits:
            self.close()
            self._writer = EvictedWriter(self._pages, limits, self._tell)
        self._kind = settings.archive
        self._conversation, self._identity, self._session = conversation, identity, session
        history.on_evicted = self._collect
        conversation.find_evicted = self.find

    def close(self) -> None:
        """Write the tokens that are waiting, and end the writer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- writing ------------------------------------------------------------------------------------------------

    def _collect(self, tokens: EvictedTokens) -> None:
        self._pending.append(tokens)
        if sum(each.nbytes for each in self._pending) > PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Pass the tokens that the newest turn evicted to the writer. Called after its reply."""
        conversation, writer, session = self._conversation, self._writer, self._session()
        if conversation is None or writer is None or session is None or not conversation.log.turns:
            while sum(each.nbytes for each in self._pending) > PENDING_BYTES:
                del self._pending[0]
            return
        assert self._identity is not None
        pending, self._pending = self._pending, []
        for tokens in pending:
            page = EvictedPage(
                turn=conversation.log.turns[-1].number,
                runs=tokens.runs,
                ids_checksum=self._ids_checksum(tokens.runs),
                fingerprint=self._identity.fingerprint,
                dtype=self._identity.dtype,
                kind=self._kind,
                position=tokens.position,
            )
            writer.put(session, page, tokens, self._kind)

    def undone(self, turn: int) -> None:
        """Drop the tokens that turn `turn` and later ones evicted. Called before these turns are recorded as undone."""
        self._pending = []
        session = self._session()
        if self._conversation is None or self._writer is None or session is None:
            return
        try:
            # also what was queued: the same indices will be other tokens'
            self._writer.drop_from(session, turn, PATIENCE_S)
        except StoreError:
            _log.warning("evicted tokens of turn %d stay in the archive", turn, exc_info=True)

    # --- finding ------------------------------------------------------------------------------------------------

    def find(self, wanted: Sequence[Run]) -> list[EvictedTokens]:
        """Return the archived tokens of this conversation with some of the log indices in `wanted`.

        Damaged pages, and pages of another model, dtype, or text, are skipped. What is not written yet is found, too.
        """
        session, found = self._session(), list(self._pending)
        if self._writer is None or session is None:
            return found
        waiting = self._writer.waiting(session)  # before the rows are read: what was written since is in both
        try:
            rows = self._pages.pages(session)
        except StoreError:
            _log.warning("the archive of evicted tokens cannot be read", exc_info=True)
            rows = []
        archived = []
        for stored in rows:
            if self._suits(stored[0], wanted) and (data := self._pages.read(session, stored)) is not None:
                tokens = from_bytes(data)
                if tokens is None or tokens.runs != stored[0].runs:
                    _log.warning("archived tokens of turn %d cannot be read", stored[0].turn)
                else:
                    archived.append(tokens)
        return [*archived, *(tokens for page, tokens in waiting if self._suits(page, wanted)), *found]

    def _suits(self, page: EvictedPage, wanted: Sequence[Run]) -> bool:
        """Return whether a page has some of the log indices in `wanted`, of this model, dtype, and text."""
        identity = self._identity
        return (
            identity is not None
            and (page.fingerprint, page.dtype) == (identity.fingerprint, identity.dtype)
            and any(a < stop and first < b for first, stop in page.runs for a, b in wanted)
            and page.ids_checksum == self._ids_checksum(page.runs)
        )

    def _ids_checksum(self, runs: Sequence[Run]) -> str:
        assert self._conversation is not None
        return checksum_of(array("i", self._conversation.log.ids_at(runs)).tobytes())
