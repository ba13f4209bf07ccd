"""Sessions in a shared folder: owners, logs that were cut off, and what former owners write."""

from __future__ import annotations

import os
import threading
import zlib
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from streamchat.base.errors import SessionError, StoreError
from streamchat.store.records import CacheMark, ModelIdentity, SessionInfo, StoredEviction, StoredSession, StoredTurn
from streamchat.store.shared.folder import NEWEST, SessionMovedError, SharedFolder, exchange_name
from streamchat.store.shared.log import line_of, read_log
from streamchat.store.shared.store import ReplicaState, SharedStore

INFO = SessionInfo("abc234", "a title", 1.0, 2.0, "m", "M", "float32", "print", "tok", {"system_prompt": ""})
MARK = CacheMark(((0, 4), (6, 9)), ((0, 4),), (4, 6), 2)


def turn(number: int, text: str = "hello") -> StoredTurn:
    """A finished turn of four ids."""
    ids = array("i", range(4))
    return StoredTurn(number, f"{text} {number}", "hi", 4 * number, 4 * number, 4 * number + 2, ids, MARK, finished=3.0)


def eviction(number: int) -> StoredEviction:
    """An eviction by a turn."""
    return StoredEviction(number, 1.0, "prefill", ((1, 3),), 9, 7)


def whole(*turns: StoredTurn) -> bytes:
    """The first line of a log."""
    return line_of(INFO, array("i", [7, 8]), 1, turns, [eviction(each.number) for each in turns])


def test_a_log_has_what_was_written_and_later_lines_replace_turns() -> None:
    """An undo and the turn in its place are one line."""
    first = whole(turn(1), turn(2), turn(3))
    second = line_of(replace(INFO, title="new", compressions=5), None, 2, [turn(2, "other")], [eviction(2)])
    found = read_log(first + second)
    expected = replace(INFO, title="new", compressions=5, turns=2)
    turns, evictions = (turn(1), turn(2, "other")), (eviction(1), eviction(2))
    assert found == StoredSession(expected, array("i", [7, 8]), turns, evictions)


@pytest.mark.parametrize("cut", [1, 9, 100])
def test_a_line_that_was_cut_off_does_not_count_and_nothing_after_it(cut: int) -> None:
    first, second, third = whole(turn(1)), *(line_of(INFO, None, i, [turn(i)], []) for i in (2, 3))
    assert len((read_log(first + second[:-cut] + third) or read_log(b"")).turns) == 1  # type: ignore[union-attr]
    assert read_log(first[:-cut] + second) is None
    damaged = bytearray(first + second)
    damaged[len(first) + 20] ^= 1
    assert read_log(bytes(damaged)) == read_log(first)


def test_a_log_of_another_version_is_refused_and_not_read_in_part() -> None:
    """The turns in it were confirmed."""
    later = whole(turn(2)).replace(b'"reply"', b'"answer"')[9:-1]
    with pytest.raises(StoreError, match="use the same version on all machines"):
        read_log(whole(turn(1)) + b"%08x %s\n" % (zlib.crc32(later), later))


def test_one_of_many_claims_succeeds(tmp_path: Path) -> None:
    folders = [SharedFolder(tmp_path, f"r{i}") for i in range(8)]
    start, won = threading.Barrier(8), list[bool]()

    def claim(folder: SharedFolder) -> None:
        start.wait()
        won.append(folder.create("abc234"))

    threads = [threading.Thread(target=claim, args=(each,)) for each in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 1
    [owner] = [each for each in folders if each.owns("abc234")]
    claimed = SharedFolder(tmp_path).claim_of("abc234")
    assert claimed is not None
    assert claimed.owner == owner._owner


def test_what_a_former_owner_writes_is_refused_and_never_read(tmp_path: Path) -> None:
    """Also several owners later, when its own file is deleted."""
    old, new, last = (SharedFolder(tmp_path, name) for name in ("old", "new", "last"))
    assert old.create("abc234")
    old.append("abc234", whole(turn(1)))
    found = new.take_over("abc234")
    assert found is not None
    new.append("abc234", whole(turn(1), turn(2)))
    with pytest.raises(SessionMovedError, match="abc234; send the request again"):
        old.append("abc234", whole(turn(1), turn(2, "late")))
    assert not old.owns("abc234")
    found = last.take_over("abc234")
    assert found is not None
    assert [each.text for each in found[0].turns] == ["hello 1", "hello 2"]
    last.append("abc234", whole(*found[0].turns))
    assert not new.owns("abc234")
    assert sorted(os.listdir(tmp_path / "sessions" / "34" / "abc234")) == ["log-000003", "owner-000003"]


def test_a_new_owner_that_wrote_nothing_leaves_the_session_to_the_next(tmp_path: Path) -> None:
    first, lost, last = (SharedFolder(tmp_path, name) for name in ("first", "lost", "last"))
    first.create("abc234")
    first.append("abc234", whole(turn(1)))
    lost.take_over("abc234")
    found = last.take_over("abc234")
    assert found is not None
    assert len(found[0].turns) == 1
    for name in ("nothere", "../../etc", ""):
        with pytest.raises(SessionError, match="no session has the id"):
            last.take_over(name)


def test_a_folder_that_cannot_be_written_is_reported_and_the_session_given_up(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path, "a")
    folder.create("abc234")
    (tmp_path / "sessions" / "34" / "abc234" / "log-000001").mkdir()
    with pytest.raises(StoreError, match=r"cannot be used .* check the folder that is given with --shared"):
        folder.append("abc234", whole(turn(1)))
    assert not folder.owns("abc234")


def test_two_folders_of_one_name_have_other_identities(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path / "a")
    assert folder.identity() == SharedFolder(tmp_path / "a").identity() != SharedFolder(tmp_path / "b").identity()


def test_a_store_reads_the_sessions_of_another_one_and_takes_them_over(tmp_path: Path) -> None:
    """An undo is in the log with the turn that follows; the newest exchanges find the session."""
    stores = [
        SharedStore(tmp_path / name / "sessions.db", ReplicaState(SharedFolder(tmp_path / "shared", name)))
        for name in "ab"
    ]
    with stores[0] as one, stores[1] as two:
        lock = one.create_locked("a title", ModelIdentity("m", "M", "float32", "print", "tok"), {"system_prompt": ""})
        session = lock.session
        for number in range(1, 7):
            one.write(session, turns=[turn(number)], cache=MARK, evictions=[eviction(number)])
        one.write(session, undone_from=6)
        assert [each.number for each in two.load(session).turns] == list(range(1, 7))
        one.write(session, turns=[turn(6, "another")], evictions=[eviction(6)])
        assert two.load(session).turns[-1].text == "another 6"
        assert two.load(session).evictions == one.load(session).evictions
        assert two.session_after("", "", " another 6", "hi ") == session
        assert two.session_after("", "", f"hello {6 - NEWEST}", "hi") is None
        assert two.session_after("someone", "", "another 6", "hi") is None
        info, other = two.lock_session(session)
        assert info.turns == 6
        with pytest.raises(SessionMovedError):
            one.write(session, turns=[turn(7)])
        two.write(session, turns=[turn(7, "here")])
        assert one.load(session).turns[-1].text == "here 7"
        lock.release()
        other.release()


def test_parts_of_an_exchange_do_not_run_together() -> None:
    assert exchange_name("a", "b", "c", "d") != exchange_name("ab", "", "c", "d")
    assert exchange_name("", "", " c ", "<think>why</think>d") == exchange_name("", "", "c", "d\n")
