"""Upkeep: what runs, in which order, what it says, and what never reaches the chat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.sessions import upkeep as module
from streamchat.sessions.upkeep import Upkeep

DATABASE = Path("conversations.db")


class Desk:
    """An upkeep and what it did. `failing` raises an error in the first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mark: Path, **options: Any) -> None:
        self.done: list[Any] = []
        self.events: list[ev.Event] = []
        self.sessions = ["a session"]
        self.failing: BaseException | None = None
        monkeypatch.setattr("streamchat.store.scrub.pending_mark", lambda path: mark)
        monkeypatch.setattr("streamchat.store.backup.back_up_daily", self._back_up)
        monkeypatch.setattr("streamchat.store.restore.empty_database_notice", lambda path: f"{path} has a backup.")
        monkeypatch.setattr(time, "strftime", lambda form: "2026-11-27" if form == "%Y-%m-%d" else form)
        store: Any = SimpleNamespace(path=DATABASE, sessions=self._listed, scrub=lambda: self.done.append("scrub"))
        self.upkeep = Upkeep(store, self.events.append)

    def _listed(self, limit: int) -> list[str]:
        assert limit == 1
        if self.failing is not None:
            raise self.failing
        return self.sessions

    def _back_up(self, path: Path, is_stopped: Callable[[], bool]) -> None:
        self.done.append((path, is_stopped()))

    def run(self) -> list[Any]:
        """Start it if it is due, and wait for its end."""
        self.done.clear()
        self.upkeep.start_if_due()
        if self.upkeep._worker is not None:
            self.upkeep._worker.join()
        return list(self.done)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "pending"


def test_deleted_text_is_removed_before_the_backup_and_only_if_there_is_some(
    monkeypatch: pytest.MonkeyPatch, mark: Path
) -> None:
    assert Desk(monkeypatch, mark).run() == [(DATABASE, False)]
    mark.touch()
    assert Desk(monkeypatch, mark).run() == ["scrub", (DATABASE, False)]


def test_it_runs_once_a_day_and_again_if_there_was_nothing_to_save(monkeypatch: pytest.MonkeyPatch, mark: Path) -> None:
    desk = Desk(monkeypatch, mark)
    desk.sessions.clear()
    assert (desk.run(), desk.run()) == ([], [])
    assert desk.events == [ev.Notice("conversations.db has a backup.", "warning")]
    desk.sessions.append("a session")
    assert desk.run() == [(DATABASE, False)]
    assert desk.run() == []
    monkeypatch.setattr(time, "strftime", lambda form: "2026-11-28")
    assert desk.run() == [(DATABASE, False)]


def test_an_empty_database_without_a_backup_is_not_mentioned(monkeypatch: pytest.MonkeyPatch, mark: Path) -> None:
    desk = Desk(monkeypatch, mark)
    desk.sessions.clear()
    monkeypatch.setattr("streamchat.store.restore.empty_database_notice", lambda path: "")
    assert (desk.run(), desk.events) == ([], [])
    monkeypatch.setattr("streamchat.store.restore.empty_database_notice", lambda path: "There is one now.")
    assert (desk.run(), desk.events) == ([], [ev.Notice("There is one now.", "warning")])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StoreError("the disk is full"), [ev.Notice("the disk is full; the chat continues", "warning")]),
        (RuntimeError("anything"), []),
    ],
)
def test_a_failure_never_affects_the_chat(
    monkeypatch: pytest.MonkeyPatch, mark: Path, error: Exception, said: list[ev.Event]
) -> None:
    desk = Desk(monkeypatch, mark)
    desk.failing = error
    assert (desk.run(), desk.events) == ([], said)
    desk.failing = None
    assert desk.run() == []  # not again on the same day


def test_a_running_upkeep_is_not_started_twice_and_stopping_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, mark: Path
) -> None:
    desk, free, waited = Desk(monkeypatch, mark), threading.Event(), list[float | None]()
    join = threading.Thread.join

    def back_up(path: Path, is_stopped: Callable[[], bool]) -> None:
        assert free.wait(30)
        desk.done.append(is_stopped())

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        waited.append(timeout)
        free.set()
        join(thread, timeout)

    monkeypatch.setattr("streamchat.store.backup.back_up_daily", back_up)
    desk.upkeep.start_if_due()
    worker = desk.upkeep._worker
    monkeypatch.setattr(time, "strftime", lambda form: "2026-11-28")
    desk.upkeep.start_if_due()
    assert desk.upkeep._worker is worker
    monkeypatch.setattr(threading.Thread, "join", joined)
    desk.upkeep.stop()
    assert (waited, desk.done) == ([module.LEAVE_S], [True])


def test_stopping_what_never_started_is_nothing(monkeypatch: pytest.MonkeyPatch, mark: Path) -> None:
    desk = Desk(monkeypatch, mark)
    desk.upkeep.stop()
    assert desk.run() == [(DATABASE, True)]
