"""The queue of evicted tokens: its memory, its limits, what an undo takes out of it, and what failures say."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from streamchat.base.errors import StoreError
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.layers.slots import CopiedStates
from streamchat.sessions import evicted_writer as module
from streamchat.sessions.evicted_pages import from_bytes
from streamchat.sessions.evicted_writer import EvictedWriter, Limits
from streamchat.store.evicted import FILE_BYTES, EvictedPage

NBYTES = 1 * 2 * 4 * 8 * 4
MIB = 1 << 20


def some(turn: int) -> tuple[EvictedPage, EvictedTokens]:
    """Tokens of `NBYTES` bytes."""
    runs = ((10 * turn, 10 * turn + 4),)
    states = CopiedStates((("keys", (0,), torch.full((1, 1, 2, 4, 8), float(turn))),))
    return EvictedPage(turn, runs, "i", "f", "float32", "native", 3), EvictedTokens(runs, states, CopiedStates(), 3)


class Pages:
    """Notes what is written; writes only while `free` is set."""

    def __init__(self) -> None:
        self.free, self.begun = threading.Event(), threading.Event()
        self.free.set()
        self.written: list[tuple[str, int]] = []
        self.limits: list[tuple[Any, ...]] = []
        self.room: dict[str, tuple[int, int, int]] = {}
        self.dropped: list[tuple[str, int]] = []
        self.deleted_to = 0
        self.error: Exception | None = None

    def append(self, session: str, page: EvictedPage, data: bytes, file_bytes: int) -> None:
        self.begun.set()
        assert self.free.wait(30)
        if self.error is not None:
            raise self.error
        tokens = from_bytes(data)
        assert tokens is not None
        assert tokens.runs == page.runs
        self.written.append((session, page.turn))
        of_session, in_all, of_file = self.room.pop(session)
        assert of_file == file_bytes
        self.limits.append((session, file_bytes, of_session + len(data), in_all + len(data)))

    def limit(self, session: str, of_session: int, in_all: int, file_bytes: int) -> int:
        """Called before a page is written, with the limits less its size."""
        self.room[session] = of_session, in_all, file_bytes
        return self.deleted_to

    def drop_from(self, session: str, turn: int) -> None:
        self.dropped.append((session, turn))


class Desk:
    """A writer, what it wrote, and what it told."""

    def __init__(self) -> None:
        self.pages, self.told, limits = Pages(), list[str](), Limits(64 * MIB, 96 * MIB)
        self.writer = EvictedWriter(self.pages, limits, self.told.append)  # type: ignore[arg-type]

    def put(self, *turns: int, session: str = "s") -> None:
        for turn in turns:
            self.writer.put(session, *some(turn), "native")

    def hold(self, *turns: int, session: str = "s") -> None:
        """Queue these turns; the first one is being written until `free` is set."""
        self.pages.free.clear()
        self.pages.begun.clear()
        self.put(*turns, session=session)
        assert self.pages.begun.wait(30)

    def release(self) -> list[tuple[str, int]]:
        self.pages.free.set()
        assert self.writer.drain(30)
        return self.pages.written


@pytest.mark.parametrize(
    ("session", "in_all", "file"),
    [
        (64 * MIB, 96 * MIB, 8 * MIB),
        (96 * MIB, 64 * MIB, 8 * MIB),
        (1_000_000, 96 * MIB, 125_000),  # however small
        (9 * MIB, 96 * MIB, 9 * MIB // 8),
        (1 << 50, 1 << 50, FILE_BYTES),  # not larger
    ],
)
def test_a_file_is_an_eighth_of_the_smaller_limit(session: int, in_all: int, file: int) -> None:
    assert Limits(session, in_all).file == file


def test_pages_are_written_in_order_and_within_the_limits() -> None:
    desk = Desk()
    desk.put(3, 4, 5)
    desk.writer.close()
    assert desk.pages.written == [("s", 3), ("s", 4), ("s", 5)]
    assert set(desk.pages.limits) == {("s", 8 * MIB, 64 * MIB, 96 * MIB)}
    assert (desk.told, desk.writer._bytes, desk.writer._thread) == ([], 0, None)


def test_a_closed_writer_starts_again() -> None:
    desk = Desk()
    desk.put(3)
    desk.writer.close()
    desk.put(4)
    thread = desk.writer._thread
    assert thread is not None
    assert thread.name == "evicted tokens"
    assert thread.daemon
    desk.writer.close()
    assert not thread.is_alive()
    assert desk.pages.written == [("s", 3), ("s", 4)]
    desk.writer.close()


def test_beyond_its_memory_tokens_are_dropped_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 3 * NBYTES)
    desk = Desk()
    desk.hold(1, 2, 3)
    assert not caplog.records
    desk.put(4)
    assert "4 evicted tokens of turn 4 are not archived" in caplog.text
    assert desk.release() == [("s", 1), ("s", 2), ("s", 3)]
    desk.put(5)  # there is room again
    assert desk.release()[-1] == ("s", 5)
    desk.writer.close()


def test_what_waits_is_that_of_the_session_with_what_is_being_written() -> None:
    desk = Desk()
    desk.hold(1, 2)
    desk.put(3, session="other")
    assert [(page.turn, tokens.runs) for page, tokens in desk.writer.waiting("s")] == [
        (1, ((10, 14),)),
        (2, ((20, 24),)),
    ]
    assert [page.turn for page, _ in desk.writer.waiting("other")] == [3]
    assert not desk.writer.drain(0.01)
    desk.release()
    assert desk.writer.waiting("s") == []
    desk.writer.close()


def test_an_undo_takes_the_waiting_pages_of_its_session_and_turns() -> None:
    desk = Desk()
    desk.hold(1, 2, 5, 6)
    desk.put(7, session="other")
    desk.writer.drop_from("s", 5, 0.0)
    assert desk.writer._bytes == 3 * NBYTES
    assert desk.pages.dropped == [("s", 5)]
    assert desk.release() == [("s", 1), ("s", 2), ("other", 7)]
    assert desk.pages.dropped == [("s", 5)]  # nothing was being written of those turns
    assert desk.writer._dropped == {}
    desk.writer.close()


def test_a_page_that_is_being_written_is_dropped_when_it_is_there() -> None:
    desk = Desk()
    desk.hold(5, 6)
    desk.writer.drop_from("s", 5, 0.0)
    desk.writer.drop_from("s", 6, 0.0)
    desk.writer.drop_from("s", 3, 0.0)
    desk.writer.drop_from("s", 4, 0.0)
    assert desk.writer._dropped == {"s": 3}
    desk.pages.dropped.clear()
    assert desk.release() == [("s", 5)]
    desk.writer.close()
    assert desk.pages.dropped == [("s", 3)]


def test_a_page_of_another_session_or_an_older_turn_that_is_being_written_stays() -> None:
    desk = Desk()
    desk.hold(5)
    desk.writer.drop_from("s", 6, 0.0)
    desk.writer.drop_from("other", 1, 0.0)
    assert desk.writer._dropped == {}
    desk.release()
    desk.writer.close()
    assert desk.pages.dropped == [("s", 6), ("other", 1)]


def test_an_undo_waits_for_what_is_being_written() -> None:
    desk = Desk()
    desk.hold(5)
    threading.Timer(0.02, desk.pages.free.set).start()
    desk.writer.drop_from("s", 5, 30)
    assert desk.pages.written == [("s", 5)]
    desk.writer.close()


def test_a_page_that_cannot_be_dropped_later_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    desk.hold(5)
    desk.writer.drop_from("s", 5, 0.0)

    def fail(session: str, turn: int) -> None:
        raise StoreError("the disk is full")

    desk.pages.drop_from = fail  # type: ignore[method-assign]
    desk.release()
    desk.put(6)
    desk.writer.close()
    assert "evicted tokens of turn 5 stay in the archive" in caplog.text
    assert desk.pages.written == [("s", 5), ("s", 6)]


def test_a_failing_disk_is_told_once_until_it_works_again() -> None:
    desk = Desk()
    desk.pages.error = StoreError("no space is left")
    desk.put(1, 2)
    desk.release()
    assert desk.told == ["no space is left."]
    desk.pages.error = None
    desk.put(3)
    desk.release()
    desk.pages.error = StoreError("it is full again")
    desk.put(4)
    desk.writer.close()
    assert desk.told == ["no space is left.", "it is full again."]
    assert desk.pages.written == [("s", 3)]


def test_another_failure_is_only_logged_and_the_next_page_is_written(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    desk.pages.error = ValueError("anything")
    desk.put(1)
    desk.release()
    desk.pages.error = None
    desk.put(2)
    desk.writer.close()
    assert "evicted tokens were not archived" in caplog.text
    assert (desk.told, desk.pages.written) == ([], [("s", 2)])


def test_telling_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()

    def fail(text: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(desk.writer, "_tell", fail)
    desk.pages.error = StoreError("no space is left")
    desk.put(1)
    desk.release()
    desk.pages.error = None
    desk.put(2)
    desk.writer.close()
    assert desk.pages.written == [("s", 2)]


def test_a_full_archive_is_told_once_with_the_last_turn_that_was_deleted() -> None:
    desk = Desk()
    desk.put(1)
    desk.release()
    assert desk.told == []
    desk.pages.deleted_to = 7
    desk.put(2, 3)
    desk.writer.close()
    assert desk.told == [
        "The archive of this conversation's evicted turns is full; its oldest tokens, up to those evicted in turn 7, "
        "were deleted. Raise archive_session_mb or archive_total_mb to keep more."
    ]
