"""Forks in the database: a tree, exports that name the parent, and searches that find a message once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamchat.base.errors import SessionError
from streamchat.sessions.transcripts.export import export
from streamchat.store.evicted import gaps
from streamchat.store.forks import Fork
from streamchat.store.records import CacheMark, SessionInfo
from streamchat.store.store import Store
from streamchat.store.tree import as_tree
from tests.support.saved_sessions import a_session, a_turn


def info(name: str, parent: str | None = None) -> SessionInfo:
    return SessionInfo(name, name, 0, 0, "m", "m", "", "", "", {}, parent=parent, parent_turn=1 if parent else None)


def test_a_tree_has_each_fork_below_its_parent() -> None:
    sessions = [info("d", "b"), info("a"), info("b", "a"), info("c"), info("x", "gone"), info("e", "a")]
    assert [(each.id, depth) for each, depth in as_tree(sessions)] == [
        ("a", 0),
        ("b", 1),
        ("d", 2),
        ("e", 1),
        ("c", 0),
        ("x", 0),
    ]


def test_a_circle_of_a_damaged_database_is_listed_once() -> None:
    sessions = [info("a", "b"), info("b", "a"), info("c", "c")]
    assert sorted(each.id for each, _ in as_tree(sessions)) == ["a", "b", "c"]


def test_gaps() -> None:
    assert gaps([(2, 4), (4, 6), (8, 9)], 12) == [(0, 2), (6, 8), (9, 12)]
    assert gaps([(0, 5)], 5) == []
    # damaged rows: before the file, behind its end, and over each other
    assert gaps([(-9, -4), (2, 2**62)], 5) == [(0, 2)]
    assert gaps([(2**62, 2**62 + 4)], 5) == [(0, 5)]
    assert gaps([(0, 4), (1, 2)], 5) == [(4, 5)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "streamchat.db")


def forked(store: Store) -> tuple[str, str]:
    parent = a_session(store)
    store.write(parent, turns=[a_turn(number, f"question {number}", f"reply {number}") for number in (1, 2, 3)])
    return parent, store.fork(Fork(parent, 2, 2, CacheMark(((0, 4),), ((0, 3),), (), 7)))


def test_a_fork_has_the_turns_and_the_cache_of_then(store: Store) -> None:
    parent, child = forked(store)
    stored = store.load(child)
    assert [(turn.text, turn.reply) for turn in stored.turns] == [
        ("question 1", "reply 1"),
        ("question 2", "reply 2"),
    ]
    assert (stored.info.parent, stored.info.parent_turn) == (parent, 2)
    assert (stored.info.held, stored.info.pins, stored.info.compressions) == (((0, 4),), ((0, 3),), 7)
    assert len(store.load(parent).turns) == 3
    store.write(child, turns=[a_turn(3, "elsewhere", "there")])
    assert store.load(parent).turns[2].text == "question 3"
    with pytest.raises(SessionError, match="has only 3 of 9 turns"):
        store.fork(Fork(parent, 9, 9, CacheMark()))
    store.close()


def test_a_message_that_forks_share_is_found_once(store: Store) -> None:
    parent, child = forked(store)
    assert [hit.session for hit in store.search("question", here=child)].count(child) == 2
    assert len(store.search("question", here=child)) == 3
    store.write(parent, undone_from=2)  # the fork has it as it was
    assert [(hit.session, hit.undone) for hit in store.search("reply", here=parent) if hit.turn == 2] == [
        (child, False)
    ]
    store.close()


def test_an_export_names_the_parent(store: Store) -> None:
    parent, child = forked(store)
    stored, fork = store.load(child), {"session": parent, "turn": 2}
    assert json.loads(export(stored, "replay"))["fork"] == fork
    assert json.loads(export(stored, "jsonl").splitlines()[0])["fork"] == fork
    assert f"Fork of session {parent} at turn 2." in export(stored, "markdown")
    assert f"Fork of session {parent} at turn 2." in export(stored, "html")
    assert "fork" not in json.loads(export(store.load(parent), "replay"))
    store.close()
