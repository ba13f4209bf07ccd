"""Sessions in a shared folder: owners, logs that were cut off, and what former owners write."""

from __future__ import annotations

import os
import shutil
import threading
import zlib
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from streamchat.base.errors import SessionError, StoreError
from streamchat.store.records import CacheMark, ModelIdentity, SessionInfo, StoredEviction, StoredSession, StoredTurn
from streamchat.store.shared.folder import NEWEST, Claim, SessionMovedError, SharedFolder, exchange_name
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
def test_a_last_line_that_was_cut_off_does_not_count(cut: int) -> None:
    first, second = whole(turn(1)), line_of(INFO, None, 2, [turn(2)], [])
    assert read_log(first + second[:-cut]) == read_log(first)
    assert read_log(first[:-cut]) is None
    damaged = bytearray(first + second)
    damaged[len(first) + 20] ^= 1
    assert read_log(bytes(damaged)) == read_log(first)


def test_any_damage_before_the_last_line_is_an_error() -> None:
    """Confirmed turns were dropped without a word, and the next owner deleted the log that had them."""
    first, second, third = whole(turn(1)), *(line_of(INFO, None, i, [turn(i)], []) for i in (2, 3))
    for at in range(0, len(first) + len(second) - 1, 7):  # without a line end, its line is the last one
        damaged = bytearray(first + second + third)
        damaged[at] ^= 1
        with pytest.raises(
            StoreError, match=r"a\.log is damaged at line [12] of [234].*restore the file from a backup"
        ):
            read_log(bytes(damaged), "a.log")


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


def owners_of(folder: Path, *names: str) -> list[SharedFolder]:
    """Replicas that owned one session, one after the other; the last one owns it."""
    owners = [SharedFolder(folder, name) for name in names]
    owners[0].create("abc234")
    owners[0].append("abc234", whole(turn(1)))
    for number, owner in enumerate(owners[1:], 2):
        assert owner.take_over("abc234") is not None
        owner.append("abc234", whole(*map(turn, range(1, number + 1))))
    return owners


def test_a_new_session_never_gets_the_name_of_one_whose_first_owner_is_gone(tmp_path: Path) -> None:
    """Names are random. The file of the first owner is deleted, so that its name was free again."""
    *_, owner = owners_of(tmp_path, "a", "b", "c")
    assert not SharedFolder(tmp_path, "new").create("abc234")
    owner.append("abc234", line_of(INFO, None, 4, [turn(4)], []))


def test_a_program_that_was_stopped_during_a_claim_cannot_claim_an_old_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It confirmed turns that nobody reads: the files of the generations that it knew, and of later ones, were gone."""
    stopped = SharedFolder(tmp_path, "stopped")
    owners_of(tmp_path, "a", "b", "c", "d")
    seen = [Claim(1, "a")]
    with monkeypatch.context() as patch:
        patch.setattr(
            stopped, "claim_of", lambda session: seen.pop() if seen else SharedFolder.claim_of(stopped, session)
        )
        found = stopped.take_over("abc234")
    assert found is not None
    assert len(found[0].turns) == 4
    assert stopped.ownership("abc234").generation == 5


def test_a_former_owner_does_not_take_the_file_of_another_one_for_its_own(tmp_path: Path) -> None:
    """A program that claims an old generation, and is killed then, leaves a file with its own name."""
    owners = owners_of(tmp_path, "a", "b", "c", "d")
    (tmp_path / "sessions" / "34" / "abc234" / "owner-000002").write_text("killed")
    assert [each.owns("abc234") for each in owners] == [False, False, False, True]


def test_files_of_other_programs_change_nothing(tmp_path: Path) -> None:
    [folder] = owners_of(tmp_path, "a")
    names = ["owner-²", "log-²", "owner-7", "log-9999999999999", "log-000002~", "owner-000001 (copy)", ".nfs0001", "x"]
    for name in names:
        (tmp_path / "sessions" / "34" / "abc234" / name).write_bytes(b"\xff")
    assert folder.owns("abc234")
    assert folder.version("abc234") is not None
    assert SharedFolder(tmp_path, "b").take_over("abc234") is not None


def test_a_session_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    """The replica owned it from then on, and would have continued what it had of it before."""
    _, owner = owners_of(tmp_path, "a", "b")
    log = tmp_path / "sessions" / "34" / "abc234" / "log-000002"
    data = log.read_bytes()
    log.write_bytes(b"x" + data + data)
    new = SharedFolder(tmp_path, "c")
    for _ in range(2):
        with pytest.raises(StoreError, match="log-000002 is damaged at line 1"):
            new.take_over("abc234")
        assert not new.owns("abc234")
    log.write_bytes(data)
    found = new.take_over("abc234")
    assert found is not None
    assert len(found[0].turns) == 2
    assert not owner.owns("abc234")


def test_a_session_whose_copy_cannot_be_written_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example on a full local disk."""
    owners_of(tmp_path / "shared", "a", "b")
    with SharedStore(tmp_path / "sessions.db", ReplicaState(SharedFolder(tmp_path / "shared", "c"))) as store:
        with monkeypatch.context() as patch:
            patch.setattr(
                "streamchat.store.shared.store.replace_session", lambda *_: (_ for _ in ()).throw(StoreError("full"))
            )
            with pytest.raises(StoreError, match="full"):
                store.lock_session("abc234")
        info, lock = store.lock_session("abc234")
        assert info.turns == 2
        lock.release()


def test_an_exchange_of_a_deleted_session_leads_to_a_later_one(tmp_path: Path) -> None:
    [folder] = owners_of(tmp_path, "a")
    folder.add_exchange("abc234", "0" * 40)
    folder.create("def567")
    folder.add_exchange("def567", "0" * 40)
    assert folder.session_after("0" * 40) == "abc234"
    shutil.rmtree(tmp_path / "sessions" / "34")
    folder.add_exchange("def567", "0" * 40)
    assert folder.session_after("0" * 40) == "def567"


def test_a_deleted_session_gets_no_more_turns(tmp_path: Path) -> None:
    [folder] = owners_of(tmp_path, "a")
    shutil.rmtree(tmp_path / "sessions")
    with pytest.raises(SessionMovedError):
        folder.append("abc234", line_of(INFO, None, 2, [turn(2)], []))
    assert not folder.owns("abc234")


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
