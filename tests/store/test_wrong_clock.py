"""The order of sessions after the clock was wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from streamchat.base.formatting import human_when
from streamchat.frontend.watch import monitored_sessions
from streamchat.store.database import database_path
from streamchat.store.store import Store
from tests.support.saved_sessions import a_session, a_turn

YEAR_S = 365 * 86_400.0


@pytest.mark.parametrize("seconds", [YEAR_S, -YEAR_S])
def test_the_last_session_is_the_one_that_was_written_last(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A clock that was a year ahead is corrected, or one that starts a year back is not corrected yet."""
    clock = time.time
    with Store() as store:
        monkeypatch.setattr(time, "time", lambda: clock() + max(seconds, 0.0))
        ids = [a_session(store, "first"), a_session(store, "second")]
        store.write(ids[0], turns=[a_turn(1, "hello", "hello")])
        monkeypatch.setattr(time, "time", lambda: clock() + min(seconds, 0.0))
        ids.append(a_session(store, "third"))
        store.write(ids[2], turns=[a_turn(1, "hello", "hello")])
        newest_first = [ids[2], ids[0], ids[1]]
        assert store.find("last").id == ids[2]
        assert [info.id for info in store.sessions()] == newest_first
        assert [info.id for info in store.sessions("hello")] == [ids[2], ids[0]]
        assert store.sessions_with_message("hello", 8) == [ids[2], ids[0]]
        assert [info.is_ahead for info in store.sessions()] == [False, True, True]
    assert database_path() == Path(store.path)
    assert [each.info.id for each in monitored_sessions()] == newest_first


def test_clocks_that_differ_a_little_do_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is corrected by seconds all the time, and by hours if two systems on one machine disagree."""
    clock = time.time
    with Store() as store:
        monkeypatch.setattr(time, "time", lambda: clock() + 5.0)
        newest = a_session(store, "newest")
        monkeypatch.setattr(time, "time", clock)
        assert [store.find("last").id, store.sessions()[0].is_ahead] == [newest, False]


@pytest.mark.parametrize(("ahead", "shown"), [(5.0, "just now"), (86_400.0, "just now"), (YEAR_S, "1971-01-0")])
def test_a_time_of_a_wrong_clock_is_shown_as_a_date(ahead: float, shown: str) -> None:
    assert human_when(86_400.0 * 4 + ahead, 86_400.0 * 4).startswith(shown)
