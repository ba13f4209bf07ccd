"""A session that leaves its seat is saved behind: nobody waits for it, and nothing else may open it meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import SessionError, StoreError
from streamchat.server.options import Options
from streamchat.sessions import snapshot as snapshots
from streamchat.store.lock import SessionLock, is_open
from streamchat.store.store import Store
from tests.support.api_server import serving, session_of

ONE_SEAT = Options(port=0, live=1)


def cached(response: dict[str, Any]) -> int:
    return int(response["usage"]["input_tokens_details"]["cached_tokens"])


def test_a_session_leaves_its_seat_while_its_cache_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, save = threading.Event(), snapshots.save

    def save_later(*arguments: Any) -> int:
        assert may_write.wait(60)
        return save(*arguments)

    monkeypatch.setattr(snapshots, "save", save_later)
    with serving(tmp_path, options=ONE_SEAT) as api, Store(tmp_path / "sessions.db") as store:
        first = api.respond("one")
        other = api.respond("two")  # takes the seat, although the cache of the first session is not on the disk yet
        left = session_of(first["id"])
        assert not store.snapshot_path(left).exists()
        assert is_open(store.lock_folder, store.find(left))
        with pytest.raises(SessionError, match="is open in another streamchat process"):
            SessionLock(store.lock_folder, left, patience_s=0)
        may_write.set()
        again = api.respond("three", first["id"])
        assert cached(again) > 0
        assert session_of(again["id"]) == left
        api.respond("four", other["id"])
    with Store(tmp_path / "sessions.db") as store:
        infos = store.sessions()
        assert [info.opened_by for info in infos] == [None, None]
        for info in infos:
            SessionLock(store.lock_folder, info.id, patience_s=0).release()


def test_a_session_whose_cache_cannot_be_written_is_closed_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with serving(tmp_path, options=ONE_SEAT) as api, Store(tmp_path / "sessions.db") as store:
        first = api.respond("one")
        monkeypatch.setattr(snapshots, "save", fail)
        api.respond("two")
        again = api.respond("three", first["id"])  # prefilled again
        assert cached(again) == 0
        assert session_of(again["id"]) == session_of(first["id"])
        assert store.find(session_of(again["id"])).turns == 2
    with Store(tmp_path / "sessions.db") as store:
        assert [info.opened_by for info in store.sessions()] == [None, None]


def test_a_completion_says_whether_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise StoreError("the disk is full")

    said: list[Any] = [{"role": "user", "content": "one"}]
    with serving(tmp_path) as api:
        assert [api.complete(said, **more)["store"] for more in ({}, {"store": False})] == [True, False]
        monkeypatch.setattr(Store, "write", refuse)
        assert api.complete(said)["store"] is False
        answer = api.post("chat/completions", {"messages": said, "stream": True})
    pieces = [
        json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line.startswith("data: {")
    ]
    assert [piece["store"] for piece in pieces if "store" in piece] == [False]
    assert pieces[-1]["store"] is False


def test_whoever_runs_the_server_is_told_that_sessions_are_not_saved_and_when_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise StoreError("the disk is full")

    with serving(tmp_path) as api:
        first = api.respond("one")
        assert api.told == []
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", refuse)
            second = api.respond("two", first["id"])
            [told] = api.told
        third = api.respond("three", second["id"])
    assert [each["store"] for each in (first, second, third)] == [True, False, True]
    assert told.startswith("sessions are currently not saved; the reason is in ")
    assert told.endswith("streamchat.log")
    assert api.told == [told, "sessions are saved again"]
