"""What a user is told about a resumed session, and how often a day upkeep runs."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.sessions.resume import ResumeResult
from streamchat.sessions.resumed_event import resume_notices
from streamchat.sessions.upkeep import Upkeep
from streamchat.store.records import SessionInfo, StoredSession

SESSION = StoredSession(SessionInfo("a", "", 0, 0, "", "", "", "", "", {}), array("i"), ())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (ResumeResult(1), []),
        (
            ResumeResult(1.25, read_again=1234, reason="no cache was saved"),
            ["1,234 tokens were prefilled again in 1.2 s, because no cache was saved."],
        ),
        (
            ResumeResult(1, cut_turn=3),
            ["streamchat exited while turn 3 was being generated; the saved part of the reply was kept."],
        ),
        (
            ResumeResult(1, message_back="Hello"),
            ["streamchat exited before replying to your last message; it was not added to the conversation."],
        ),
        (
            ResumeResult(1, unpinned=(2, 3)),
            [
                "Turns 2, 3 are no longer pinned: with cache_size = 64, pinned tokens would leave fewer than 8 for the "
                "conversation."
            ],
        ),
    ],
)
def test_what_is_said_about_a_resumed_session(result: ResumeResult, expected: list[str]) -> None:
    assert resume_notices(SESSION, result, 64) == expected


class FakeStore:
    """A store with or without sessions."""

    path = Path("conversations.db")

    def __init__(self, sessions: list[str]) -> None:
        self.kept = sessions

    def sessions(self, limit: int) -> list[str]:
        return self.kept[:limit]


def runs_of(store: FakeStore, monkeypatch: pytest.MonkeyPatch, days: list[str]) -> tuple[int, list[ev.Event]]:
    """Call `start_if_due` on each of these days; return the number of backups, and the events."""
    backups, events = list[Path](), list[ev.Event]()
    monkeypatch.setattr("streamchat.store.scrub.pending_mark", lambda path: Path("/nowhere"))
    monkeypatch.setattr("streamchat.store.backup.back_up_daily", lambda path, is_stopped: backups.append(path))
    monkeypatch.setattr("streamchat.store.restore.empty_database_notice", lambda path: "There is a backup.")
    work: Any = Upkeep(store, events.append)  # type: ignore[arg-type]
    for day in days:
        monkeypatch.setattr("time.strftime", lambda form, day=day: day)
        work.start_if_due()
        work.stop()
    return len(backups), events


def test_a_backup_is_due_once_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    days = ["2026-11-26", "2026-11-26", "2026-11-27", "2026-11-27"]
    assert runs_of(FakeStore(["a", "b"]), monkeypatch, days) == (2, [])


def test_an_empty_database_is_told_once_and_backed_up_after_its_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore([])
    assert runs_of(store, monkeypatch, ["2026-11-27"] * 3) == (0, [ev.Notice("There is a backup.", "warning")])
