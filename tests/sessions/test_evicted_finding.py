"""The archive of evicted tokens on stand-ins: which pages it writes, which it finds, and what it never serves."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from streamchat.base.errors import StoreError
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.form import Form
from streamchat.cache.layers.slots import CopiedStates
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.sessions import evicted_archive as module
from streamchat.sessions.evicted_archive import EvictedArchive
from streamchat.sessions.evicted_pages import to_bytes
from streamchat.sessions.evicted_writer import Limits
from streamchat.store.evicted import EvictedPage, checksum_of
from streamchat.store.records import ModelIdentity

IDENTITY = ModelIdentity("tiny", "tiny", "float32", "print", "t")
NBYTES = 32


def some(first: int, **changes: Any) -> EvictedTokens:
    """4 tokens of `NBYTES` bytes."""
    states = CopiedStates((("keys", (0,), torch.full((1, 1, 1, 4, 2), float(first))),))
    tokens = EvictedTokens(((first, first + 4),), states, CopiedStates(), 50 + first, form=Form(3, 4))
    return replace(tokens, **changes)


def page_of(tokens: EvictedTokens, turn: int = 2, **changes: Any) -> EvictedPage:
    """The row of tokens whose ids are their log indices."""
    ids = array("i", [index for first, stop in tokens.runs for index in range(first, stop)])
    page = EvictedPage(
        turn, tokens.runs, checksum_of(ids.tobytes()), "print", "float32", "native", tokens.position, tokens.part, 3, 4
    )
    return replace(page, **changes)


class Desk:
    """An archive of a conversation of 2 turns, with pages and a writer that note their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.pages, self.writer, self.tell = Mock(), Mock(), Mock()
        self.pages.pages.return_value = []
        self.pages.read.side_effect = lambda stored: stored[1]
        self.writer.waiting.return_value = []
        self.made = Mock(side_effect=self._make)
        monkeypatch.setattr(module, "EvictedWriter", self.made)
        self.log = TokenLog(array("i", range(100)))
        self.log.turns = [TurnRecord(1, 4, 5, end=50), TurnRecord(2, 50, 51, end=100)]
        chosen = {"archive": "native", "archive_session_mb": 2, "archive_total_mb": 3} | settings
        self.history = SimpleNamespace(on_evicted=None)
        self.conversation: Any = SimpleNamespace(
            log=self.log,
            settings=SimpleNamespace(**chosen),
            cache=SimpleNamespace(history=self.history, croppable=True),
            rollback=SimpleNamespace(find_past=None),
            find_evicted=None,
        )
        self.session: str | None = "s"
        self.archive = EvictedArchive(self.pages, self.tell)

    def _make(self, pages: Any, limits: Limits, tell: Any) -> Any:
        self.writer.limits = limits
        return self.writer

    def attach(self) -> EvictedArchive:
        self.archive.attach(self.conversation, IDENTITY, lambda: self.session)
        return self.archive

    def evict(self, *tokens: EvictedTokens) -> None:
        """The cache evicts these tokens."""
        on_evicted: Any = self.history.on_evicted
        for each in tokens:
            on_evicted(each)

    @property
    def queued(self) -> list[Any]:
        """What the writer got since the last time."""
        found = [each.args for each in self.writer.put.call_args_list]
        self.writer.put.reset_mock()
        return found

    def store(self, *pages: tuple[EvictedPage, Any]) -> None:
        """Put pages with these bytes, or these tokens, into the archive."""
        rows = [(page, to_bytes(data, "native") if isinstance(data, EvictedTokens) else data) for page, data in pages]
        self.pages.pages.return_value = rows

    def found(self, *wanted: tuple[int, int]) -> list[Any]:
        """The runs of what is found."""
        return [tokens.runs for tokens in self.archive.find(wanted or [(0, 100)])]


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(monkeypatch)
    desk.attach()
    return desk


# --- attaching ------------------------------------------------------------------------------------------------------


def test_a_conversation_is_attached_with_its_limits(desk: Desk) -> None:
    desk.made.assert_called_once_with(desk.pages, Limits(2_000_000, 3_000_000), desk.tell)
    assert desk.conversation.find_evicted == desk.archive.find
    assert desk.conversation.rollback.find_past == desk.archive.find_past
    desk.attach()  # the same limits: the same writer
    desk.made.assert_called_once()
    desk.writer.close.assert_not_called()
    desk.conversation.settings.archive_total_mb = 4
    desk.attach()
    desk.writer.close.assert_called_once_with()
    assert desk.made.call_args.args[1] == Limits(2_000_000, 4_000_000)


@pytest.mark.parametrize("reason", ["off", "no history", "not croppable"])
def test_what_cannot_be_archived_is_not(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    desk = Desk(monkeypatch, archive="off" if reason == "off" else "native")
    if reason == "no history":
        desk.conversation.cache.history = None
    desk.conversation.cache.croppable = reason != "not croppable"
    archive = desk.attach()
    assert (desk.history.on_evicted, desk.conversation.find_evicted) == (None, None)
    archive.flush()
    archive.undone(1)
    archive.drain()
    archive.close()
    assert (desk.made.call_count, desk.found()) == (0, [])


def test_another_conversation_forgets_what_was_pending(desk: Desk) -> None:
    desk.evict(some(10))
    desk.attach()
    desk.archive.flush()
    assert desk.queued == []
    desk.evict(some(10))
    desk.conversation.settings.archive = "off"
    desk.attach()
    desk.archive.flush()
    assert desk.queued == []


def test_closing_ends_the_writer_once(desk: Desk) -> None:
    desk.archive.drain()
    desk.writer.drain.assert_called_once_with(module.PATIENCE_S)
    desk.archive.close()
    desk.archive.close()
    desk.archive.drain()
    desk.writer.close.assert_called_once_with()
    desk.writer.drain.assert_called_once()


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["native", "int8"])
def test_tokens_are_written_after_the_turn_that_evicted_them(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    desk = Desk(monkeypatch, archive=kind)
    archive = desk.attach()
    one, two = some(10), some(20, part="moved")
    desk.evict(one, two)
    assert desk.queued == []
    archive.flush()
    assert desk.queued == [
        ("s", page_of(one, kind=kind), one, kind),
        ("s", page_of(two, kind=kind, part="moved"), two, kind),
    ]
    archive.flush()
    assert desk.queued == []


def test_many_tokens_are_written_during_the_turn(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING_BYTES", 2 * NBYTES)
    desk.evict(some(10), some(20))
    assert desk.queued == []
    desk.evict(some(30))
    assert [tokens.runs[0][0] for _, _, tokens, _ in desk.queued] == [10, 20, 30]


@pytest.mark.parametrize("reason", ["no session", "no turn"])
def test_without_a_session_the_newest_tokens_wait(desk: Desk, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(module, "PENDING_BYTES", 2 * NBYTES)
    turns = list(desk.log.turns)
    if reason == "no session":
        desk.session = None
    else:
        desk.log.turns.clear()
    desk.evict(some(10), some(20), some(30))
    desk.archive.flush()
    assert desk.queued == []
    desk.session, desk.log.turns = "s", turns
    desk.archive.flush()
    assert [tokens.runs[0][0] for _, _, tokens, _ in desk.queued] == [20, 30]


def test_an_undo_drops_what_is_pending_and_what_is_written(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.evict(some(10))
    desk.archive.undone(2)
    desk.writer.drop_from.assert_called_once_with("s", 2, module.PATIENCE_S)
    desk.archive.flush()
    assert desk.queued == []
    desk.writer.drop_from.side_effect = StoreError("the disk is full")
    desk.archive.undone(1)
    assert "evicted tokens of turn 1 stay in the archive" in caplog.text
    desk.session = None
    desk.evict(some(10))
    desk.archive.undone(1)
    assert desk.writer.drop_from.call_count == 2
    desk.session = "s"
    desk.archive.flush()
    assert desk.queued == []


# --- finding --------------------------------------------------------------------------------------------------------


def test_what_is_written_waiting_and_pending_is_found_in_this_order(desk: Desk) -> None:
    one, two, three = some(10), some(20), some(30)
    desk.store((page_of(one), one))
    desk.writer.waiting.return_value = [(page_of(two), two)]
    desk.evict(three)
    assert desk.found() == [one.runs, two.runs, three.runs]
    desk.writer.waiting.assert_called_with("s")
    assert desk.found((12, 13)) == [one.runs, three.runs]  # what is pending is not filtered
    assert desk.found((14, 20)) == [three.runs]
    assert desk.found((0, 10), (23, 24)) == [two.runs, three.runs]
    desk.session = None
    assert desk.found() == [three.runs]


def test_what_is_read_back_has_its_part_and_form(desk: Desk) -> None:
    tokens = some(10)
    desk.store((page_of(tokens, part="moved", generation=8, epoch=9), tokens))
    assert desk.found() == []  # it was not evicted
    [found] = desk.archive.find_past([(10, 14)], 8)
    assert (found.part, found.form, found.position) == ("moved", Form(8, 9), 60)
    assert torch.equal(found.slots.of(0)["keys"], tokens.slots.of(0)["keys"])
    assert desk.archive.find_past([(10, 14)], 7) == []


def test_pending_tokens_of_another_part_or_generation_are_not_found(desk: Desk) -> None:
    desk.evict(some(10, part="moved"), some(20))
    assert desk.found() == [((20, 24),)]
    assert [tokens.runs[0][0] for tokens in desk.archive.find_past([(0, 9)], 3)] == [10, 20]
    assert desk.archive.find_past([(0, 9)], 2) == []


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "x"}, {"dtype": "float16"}, {"ids_checksum": "x"}, {"runs": ((10, 13),)}, {"part": "moved"}],
)
def test_pages_of_another_model_or_text_are_not_found(desk: Desk, change: dict[str, Any]) -> None:
    tokens = some(10)
    page = page_of(tokens, **change)
    if "runs" in change:
        page = replace(page, ids_checksum=checksum_of(array("i", range(10, 13)).tobytes()))
    desk.store((page, tokens))
    desk.writer.waiting.return_value = [(page, tokens)] if "runs" not in change else []
    assert desk.found() == []


def test_pages_that_cannot_be_read_are_skipped(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    one, two = some(10), some(20)
    desk.store((page_of(one), None), (page_of(one), b"not tokens"), (page_of(two), two))
    assert desk.found() == [two.runs]
    assert caplog.text.count("archived tokens of turn 2 cannot be read") == 1
    desk.pages.pages.side_effect = StoreError("the database is locked")
    desk.evict(one)
    assert desk.found() == [one.runs]
    assert "the archive of evicted tokens cannot be read" in caplog.text
