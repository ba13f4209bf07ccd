"""The archive of evicted turns: written behind the reply, found again, limited, deleted, and never served torn."""

from __future__ import annotations

import sqlite3
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.requests import Quote, Undo
from streamchat.cache import checkpoint
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.layers.slots import CopiedStates
from streamchat.conversation.recall import page_in_turn
from streamchat.sessions.evicted_pages import from_bytes, to_bytes
from streamchat.sessions.evicted_writer import EvictedWriter, Limits
from streamchat.store.evicted import EvictedPage, EvictedPages
from streamchat.store.store import Store
from tests.support.real_engine import Watched, running, tiny_loaded
from tests.support.saved_sessions import a_session, a_turn

pytestmark = pytest.mark.smoke
TURNS = 9


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


def talk(chat: Watched, turns: int = TURNS) -> None:
    for number in range(turns):
        chat.turn(f"question number {number}, please")


def cached_turns(chat: Watched) -> set[int]:
    return {segment.turn for segment in chat.conversation.state().segments if segment.turn}


def keep(chat: Watched, turn: int) -> None:
    chat.engine.send(Quote("quoted text", "I see.", pin=True, turn=turn))


def wait_for_writer(chat: Watched) -> None:
    """Until all that was evicted is on the disk."""
    archive: Any = chat.engine._owner.archive
    assert archive._evicted._writer.drain(60)


def session_of(database: Path) -> str:
    with Store(database) as store:
        return store.find("last").id


def test_keep_pages_an_archived_turn_in_and_what_follows_knows_it(database: Path) -> None:
    with running(store=database, audit=True, cache_size=192) as chat:
        talk(chat)
        assert 2 not in cached_turns(chat)
        turns = len(chat.conversation.log.turns)
        keep(chat, 2)
        event = chat.wait(ev.TurnPagedIn)
        assert (event.turn, len(chat.conversation.log.turns)) == (2, turns)
        turn = chat.conversation.log.turns[1]
        assert turn.end is not None
        assert event.tokens == turn.end - turn.start
        pinned = [segment for segment in event.cache.segments if segment.turn == 2]
        assert pinned
        assert all(segment.pinned and segment.tokens == segment.total for segment in pinned)
        order = [segment.turn for segment in event.cache.segments]
        assert order == sorted(order)
        chat.until(lambda events: any(isinstance(e, ev.CacheAudited) and e.after == "page_in" for e in events))
        keep(chat, 2)  # it is there already: the text is quoted
        chat.wait(ev.TurnFinished, TURNS + 1)
        assert any("turn 2 is in context already" in notice.text for notice in chat.of(ev.Notice))
        talk(chat, 3)
        assert 2 in cached_turns(chat)
        wanted = chat.conversation.next_logits().clone()
    with running(store=database, session="last", cache_size=192) as chat:  # by the snapshot
        chat.wait(ev.ConversationResumed)
        assert 2 in cached_turns(chat)
        assert torch.equal(chat.conversation.next_logits(), wanted)


def test_a_turn_comes_back_from_the_disk_of_an_earlier_process_as_it_was(database: Path) -> None:
    with running(store=database) as chat:
        talk(chat)
        history = chat.conversation.cache.history
        assert history is not None
        turn = chat.conversation.log.turns[1]
        assert turn.end is not None
        page_in_turn(chat.conversation.cache, chat.conversation.log, 2, lambda wanted: ())
        wanted = checkpoint.capture(chat.conversation.cache)
        chat.conversation.undo()  # so that the snapshot is without it
    with running(store=database, session="last") as chat:
        chat.wait(ev.ConversationResumed)
        assert 2 not in cached_turns(chat)
        keep(chat, 2)
        chat.wait(ev.TurnPagedIn)
        found = checkpoint.capture(chat.conversation.cache)
    slots = {index: slot for slot, index in enumerate(i for run in wanted.runs for i in range(*run))}
    mine = {index: slot for slot, index in enumerate(i for run in found.runs for i in range(*run))}
    for index in range(turn.start, turn.end):
        for name in ("0.original_keys", "2.original_values"):
            assert torch.equal(wanted.tensors[name][:, :, slots[index]], found.tensors[name][:, :, mine[index]]), (
                name,
                index,
            )


def test_undo_drops_what_the_undone_turns_archived(database: Path) -> None:
    with running(store=database) as chat:
        talk(chat)
        with Store(database) as store:
            session = store.find("last").id
            chat.engine.send(Undo())
            chat.wait(ev.TurnUndone)
            chat.turn("another question instead, and a longer one")
    with Store(database) as store:
        pages = [page for page, _ in store.evicted.pages(session) if page.part == "evicted"]
        indices = [i for page in pages for run in page.runs for i in range(*run)]
        assert len(indices) == len(set(indices))
        assert set(indices) == {i for e in store.load(session).evictions for run in e.runs for i in range(*run)}


@pytest.mark.parametrize("setting", ["int8", "off"])
def test_the_setting_decides_what_is_archived(database: Path, setting: str) -> None:
    with running(store=database, archive=setting) as chat:
        talk(chat)
        kept = chat.conversation.find_evicted([(0, 60)])
        if setting != "off":
            wait_for_writer(chat)
        with Store(database) as store:
            pages = store.evicted.pages(store.find("last").id)
    assert {page.kind for page, _ in pages} == ({"int8"} if setting == "int8" else set())
    assert bool(kept) == (setting == "int8")
    assert (database.parent / "evicted").exists() == (setting == "int8")


def test_a_hidden_turn_and_a_turn_that_is_rolled_back_leave_nothing(database: Path) -> None:
    with running(store=database) as chat:
        talk(chat)
        before = _rows(database, chat)
        with chat.conversation.muted(chat.conversation.settings):
            chat.conversation.run_turn("hidden " * 8, lambda: False)
            chat.conversation.undo()
        assert _rows(database, chat) == before
        chat.turn("what comes next")
    with Store(database) as store:
        session = store.find("last").id
        pages = [page for page, _ in store.evicted.pages(session) if page.part == "evicted"]
        archived = [i for page in pages for run in page.runs for i in range(*run)]
        evicted = [i for event in store.load(session).evictions for run in event.runs for i in range(*run)]
    assert sorted(archived) == sorted(evicted)


def _rows(database: Path, chat: Watched) -> list[Any]:
    wait_for_writer(chat)
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT turn, runs FROM evicted").fetchall()


@pytest.mark.parametrize("damage", ["torn", "changed", "missing", "other model", "other ids", "row"])
def test_damaged_and_foreign_pages_count_as_absent(database: Path, damage: str) -> None:
    with running(store=database) as chat:
        talk(chat)
    (file,) = (database.parent / "evicted" / session_of(database)).iterdir()
    data = file.read_bytes()
    with sqlite3.connect(database) as connection:
        match damage:
            case "torn":
                file.write_bytes(data[:100])
            case "changed":
                changed = bytearray(data)
                for start, length in connection.execute("SELECT start, length FROM evicted").fetchall():
                    changed[start + length // 2] ^= 1  # one bit of a value
                file.write_bytes(changed)
            case "missing":
                file.unlink()
            case "other model":
                connection.execute("UPDATE evicted SET fingerprint = 'x'")
            case "other ids":
                connection.execute("UPDATE evicted SET ids_checksum = 'x'")
            case "row":
                connection.execute("UPDATE evicted SET runs = '[[1'")
    connection.close()
    with running(store=database, session="last") as chat:
        chat.wait(ev.ConversationResumed)
        before = len(chat.conversation.log.turns)
        keep(chat, 2)
        chat.wait(ev.TurnFinished)
        assert len(chat.conversation.log.turns) == before + 1  # the text was quoted
        assert any("turn 2 are not archived; the message is quoted" in each.text for each in chat.of(ev.Notice))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("length", value) for value in (-5, 0, 2**40, 2**62, 2**63 - 1, -(2**63))),
        *(("start", value) for value in (-1, 2**40, 2**63 - 1, -(2**63))),
        *(("file", value) for value in (-1, 0, 2**63 - 1)),
        *(("runs", value) for value in ("", "[5]", "[[0, 1e999]]", "[[1e999, 4]]", "[[NaN, 4]]", '[["a", 4]]')),
        *(("owner", value) for value in ("\0", "..", "../..", ".", "a/b", "x" * 5000)),
    ],
)
def test_a_row_with_impossible_values_counts_as_absent(database: Path, column: str, value: object) -> None:
    with Store(database) as store:
        session = a_session(store)
        store.evicted.append(session, EvictedPage(2, ((0, 4),), "ids", "model", "float32", "native", 0), b"x" * 100)
        with store._open.write() as connection:
            connection.execute(f"UPDATE evicted SET {column} = ?", (value,))
        found = store.evicted.pages(session)
        assert [store.evicted.read(stored) for stored in found] in ([], [None])


def test_files_are_private_and_go_with_the_session(database: Path) -> None:
    with running(store=database) as chat:
        talk(chat)
    session = session_of(database)
    folder = database.parent / "evicted" / session
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    (folder.parent / "left01").mkdir()  # of a deletion that was interrupted
    with Store(database) as store:
        store.delete(session)
        assert store.evicted.pages(session) == []
    assert list(folder.parent.iterdir()) == []


def a_page(turn: int) -> EvictedPage:
    return EvictedPage(turn, ((10 * turn, 10 * turn + 4),), "i", "f", "float32", "native", 3)


def test_the_oldest_files_are_deleted_beyond_the_limits(database: Path) -> None:
    with Store(database) as store:
        one, other = a_session(store, "one"), a_session(store, "other")
        for session in (other, one):
            store.write(session, turns=[a_turn(1, "text", "reply")])
            for turn in range(1, 11):
                store.evicted.append(session, a_page(turn), bytes([turn]) * 1000, file_bytes=1500)
        pages = store.evicted
        assert pages.sizes() == {one: 10_000, other: 10_000}
        assert pages.limit(one, 6_000, 100_000) == 4
        assert pages.sizes()[one] == 6_000
        assert [page.turn for page, _ in pages.pages(one)] == [5, 6, 7, 8, 9, 10]
        assert all(pages.read(page) == bytes([page[0].turn]) * 1000 for page in pages.pages(one))
        assert pages.limit(one, 6_000, 9_000) == 0  # the other session's are older
        assert pages.sizes() == {one: 6_000, other: 2_000}
        assert pages.limit(one, 1, 1, file_bytes=3_000) > 0  # the files to which pages are appended stay
        assert pages.sizes() == {one: 2_000, other: 2_000}
        assert [page.turn for page, _ in pages.pages(one)] == [9, 10]
        assert pages.limit(one, 1, 1, file_bytes=2_000) == 10  # now they are full
        assert pages.sizes() == {one: 0, other: 0}


def test_the_archive_never_exceeds_its_limits(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.sessions.evicted_archive.MEGABYTE", 20_000)
    append, sizes = EvictedPages.append, list[int]()

    def watched(pages: EvictedPages, *args: Any) -> None:
        append(pages, *args)
        sizes.append(sum(pages.sizes().values()))

    monkeypatch.setattr(EvictedPages, "append", watched)
    with running(store=database, archive_session_mb=4, archive_total_mb=3) as chat:
        talk(chat, 20)
        wait_for_writer(chat)
    assert 40_000 < max(sizes) <= 60_000


def some(turn: int, nbytes: int) -> EvictedTokens:
    states = CopiedStates((("keys", (0,), torch.zeros(1, 1, 1, 4, nbytes // 16)),))
    return EvictedTokens(a_page(turn).runs, states, CopiedStates(), 3)


@pytest.mark.parametrize(("nbytes", "least", "told"), [(100_000, 7, 0), (300_000, 2, 0), (1_500_000, 0, 1)])
def test_the_smallest_limit_holds_with_pages_of_any_size(database: Path, nbytes: int, least: int, told: int) -> None:
    notices, most = list[str](), 0
    with Store(database) as store:
        session = a_session(store)
        store.write(session, turns=[a_turn(1, "text", "reply")])
        writer = EvictedWriter(store.evicted, Limits(1_000_000, 10**9), notices.append)
        for turn in range(1, 13):
            writer.put(session, a_page(turn), some(turn, nbytes), "native")
            writer.drain()
            most = max(most, sum(store.evicted.sizes().values()))
        writer.close()
        written = [page.turn for page, _ in store.evicted.pages(session)]
    assert most <= 1_000_000
    assert len(written) >= least
    assert written == list(range(13 - len(written), 13))
    assert [("they need 1.5 MB" in notice) for notice in notices if "were not archived" in notice] == [True] * told


def test_other_files_in_the_folder_change_nothing(database: Path) -> None:
    with Store(database) as store:
        session = a_session(store)
        folder = store.evicted.folder(session)
        folder.mkdir(parents=True)
        names = ["²³.pages", f"{10**23}.pages", "000_10.pages", "-00005.pages", "x.pages"]
        for name in names:
            (folder / name).write_bytes(b"something else")
        store.evicted.append(session, a_page(1), b"data")
        assert store.evicted.sizes() == {session: 4}
        assert (folder / "000001.pages").read_bytes() == b"data"
        assert store.evicted.limit(session, 0, 0, file_bytes=1) == 1
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_file_that_cannot_be_deleted_is_told(database: Path) -> None:
    told = list[str]()
    with Store(database) as store:
        session = a_session(store)
        store.evicted.append(session, a_page(1), b"data")
        path = store.evicted.folder(session) / "000001.pages"
        path.unlink()
        path.mkdir()
        (path / "file").write_bytes(b"data")
        writer = EvictedWriter(store.evicted, Limits(2_000, 10**9), told.append)
        for turn in (2, 3):
            writer.put(session, a_page(turn), some(turn, 16), "native")
        writer.close()
    assert len(told) == 1
    assert "evicted tokens were not archived: the limits are reached" in told[0]
    assert "000001.pages could not be deleted: " in told[0]


def test_the_limit_of_a_session_is_told_once(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.sessions.evicted_archive.MEGABYTE", 20_000)
    with running(store=database, archive_session_mb=2) as chat:
        talk(chat, 20)
        wait_for_writer(chat)
        talk(chat, 1)
        told = [notice.text for notice in chat.of(ev.Notice) if "archive of this conversation" in notice.text]
        assert len(told) == 1
        assert "were deleted" in told[0]


def test_a_page_without_its_session_is_not_written(database: Path) -> None:
    with Store(database) as store:
        store.evicted.append("nobody", a_page(1), b"data")
        assert store.evicted.pages("nobody") == []
        assert not store.evicted.folder("nobody").exists()  # it was deleted while its page waited


def test_a_session_that_begins_during_a_deletion_keeps_its_pages(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(database) as store, Store(database) as other:
        gone, sizes, begun = a_session(store, "gone"), EvictedPages.sizes, list[str]()

        def meanwhile(pages: EvictedPages) -> dict[str, int]:
            if not begun:
                begun.append(a_session(other, "new"))
                other.evicted.append(begun[0], a_page(1), b"data")
            return sizes(pages)

        monkeypatch.setattr(EvictedPages, "sizes", meanwhile)
        store.delete(gone)
        (page,) = store.evicted.pages(begun[0])
        assert store.evicted.read(page) == b"data"


def test_a_write_that_fails_is_told_and_the_next_one_starts_a_new_file(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(database) as store:
        session = a_session(store)
        pages: EvictedPages = store.evicted
        pages.append(session, a_page(1), b"first")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(Exception, match=r"could not be archived in .*free some disk space"):
                pages.append(session, a_page(2), b"second, which is torn")
        pages.append(session, a_page(3), b"third")
        stored = pages.pages(session)
        assert [(page.turn, pages.read((page, place))) for page, place in stored] == [
            (1, b"first"),
            (3, b"third"),
        ]
        assert len(list(pages.folder(session).iterdir())) == 2


def test_pages_are_found_by_the_tokens_that_they_have(database: Path) -> None:
    with Store(database) as store:
        session, pages = a_session(store), store.evicted
        for turn in range(1, 7):
            page = replace(a_page(turn), runs=((turn * 10, turn * 10 + 4), (turn * 10 + 6, turn * 10 + 8)))
            pages.append(session, page, b"data")

        def turns(*wanted: tuple[int, int]) -> list[int]:
            return [page.turn for page, _ in pages.pages(session, wanted)]

        assert turns((13, 20)) == [1]
        assert turns((14, 16)) == turns((18, 20)) == turns((68, 99)) == turns() == []
        assert turns((17, 18), (33, 47)) == [1, 3, 4]
        assert turns(*((at, at + 1) for at in range(20, 200))) == [2, 3, 4, 5, 6]
        # damaged rows are skipped, whatever they have
        for turn, runs in enumerate(("", "[[1", "5", '["a"]', '[["a", {}]]', "[[1]]", "{}", "null"), 1):
            with store.evicted._write() as connection:
                connection.execute("UPDATE evicted SET runs = ? WHERE turn = ?", (runs, turn))
        assert turns((0, 1000)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_the_same_tokens(dtype: torch.dtype) -> None:
    stack = torch.randn(3, 1, 2, 5, 8).to(dtype)
    states = CopiedStates((("keys", (0, 1, 2), stack), ("values", (0, 1, 2), stack * 3)))
    originals = CopiedStates((("original_keys", (0, 1, 2), stack[..., :2, :].float()),))
    tokens = EvictedTokens(((3, 6), (9, 11)), states, originals, 77, moved=2)
    back = from_bytes(to_bytes(tokens, "native"))
    assert back is not None
    assert (back.runs, back.position, back.moved) == (tokens.runs, 77, 2)
    assert torch.equal(back.slots.of(1)["values"], states.of(1)["values"])
    assert torch.equal(back.originals.of(2)["original_keys"], originals.of(2)["original_keys"])
    small = from_bytes(to_bytes(tokens, "int8"))
    assert small is not None
    assert small.slots.of(1)["values"].dtype == dtype
    error = (small.slots.of(1)["values"].float() - states.of(1)["values"].float()).abs().max()
    assert 0 < error < 0.05
    assert len(to_bytes(tokens, "int8")) < len(to_bytes(tokens, "native"))


def test_other_bytes_are_no_tokens() -> None:
    for data in (b"", b"x" * 100, to_bytes(EvictedTokens((), CopiedStates(), CopiedStates(), 0), "native")[:-1]):
        assert from_bytes(data) is None


def test_a_model_with_a_state_reads_the_text_again(database: Path) -> None:
    with running(lambda *_: tiny_loaded(family="gpt2"), store=database) as chat:
        talk(chat)
        keep(chat, 2)
        chat.wait(ev.TurnFinished, TURNS + 1)
        assert any("into this model's cache; the message is quoted" in each.text for each in chat.of(ev.Notice))
    assert not (database.parent / "evicted").exists()
