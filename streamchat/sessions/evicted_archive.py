"""Archives the evicted tokens of the active conversation, and finds them again."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from streamchat.base.errors import StoreError
from streamchat.cache.evicted import EvictedTokens, Part
from streamchat.cache.eviction.policy import Run
from streamchat.cache.form import Form
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
            self._writer.start()
        self._kind = settings.archive
        self._conversation, self._identity, self._session = conversation, identity, session
        history.on_evicted = self._collect
        conversation.find_evicted = self.find
        conversation.rollback.find_past = self.find_past

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
        pending, self._pending = self._pending, []
        for tokens in pending:
            writer.put(session, self._page(tokens, conversation.log.turns[-1].number), tokens, self._kind)

    def _page(self, tokens: EvictedTokens, turn: int) -> EvictedPage:
        """Return the row of tokens that turn `turn` evicted."""
        assert self._identity is not None
        return EvictedPage(
            turn=turn,
            runs=tokens.runs,
            ids_checksum=self._ids_checksum(tokens.runs),
            fingerprint=self._identity.fingerprint,
            dtype=self._identity.dtype,
            kind=self._kind,
            position=tokens.position,
            part=tokens.part,
            generation=tokens.form.generation,
            epoch=tokens.form.epoch,
        )

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
        """Return the evicted tokens of this conversation with some of the log indices in `wanted`.

        Damaged pages, and pages of another model, dtype, or text, are skipped. What is not written yet is found, too.
        """
        return self._found(lambda page: page.part == "evicted", wanted)

    def find_past(self, wanted: Sequence[Run], generation: int) -> list[EvictedTokens]:
        """Return what was archived of these tokens of one generation of the cache, evicted or not; see `find`."""
        return self._found(lambda page: page.generation == generation, wanted)

    def drain(self) -> None:
        """Wait until what is queued is written, but not for a disk that is much too slow."""
        if self._writer is not None:
            self._writer.drain(PATIENCE_S)

    def _found(self, chosen: Callable[[EvictedPage], bool], wanted: Sequence[Run]) -> list[EvictedTokens]:
        session = self._session()
        pending = [tokens for tokens in self._pending if chosen(self._page(tokens, 0))]
        if self._writer is None or session is None:
            return pending
        waiting = self._writer.waiting(session)  # before the rows are read: what was written since is in both
        try:
            rows = self._pages.pages(session, wanted)
        except StoreError:
            _log.warning("the archive of evicted tokens cannot be read", exc_info=True)
            rows = []
        archived = []
        for stored in rows:
            page = stored[0]
            if chosen(page) and self._suits(page, wanted) and (data := self._pages.read(stored)) is not None:
                tokens = from_bytes(data)
                if tokens is None or tokens.runs != page.runs:
                    _log.warning("archived tokens of turn %d cannot be read", page.turn)
                else:
                    form = Form(page.generation, page.epoch)
                    archived.append(replace(tokens, part=cast(Part, page.part), form=form))
        queued = [tokens for page, tokens in waiting if chosen(page) and self._suits(page, wanted)]
        return [*archived, *queued, *pending]

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
