"""Saved conversations of which any column, or any fact of the snapshot, was tampered with: told, and left out."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from safetensors.torch import save_file

from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError
from streamchat.base.requests import Pin, Undo
from streamchat.cli import main as cli
from streamchat.frontend.watch import Watcher, find_monitored
from streamchat.sessions import snapshot as snapshots
from streamchat.sessions.transcripts.export import export
from streamchat.store.database import database_path
from streamchat.store.health import examine
from streamchat.store.store import Store
from tests.support.real_engine import running

COLUMNS = (
    *(("sessions", name) for name in ("settings", "held", "pins", "compressions", "system_ids", "title", "created")),
    *(("sessions", name) for name in ("updated", "model_name", "dtype", "fingerprint", "tokenizer", "opened_by")),
    *(("turns", name) for name in ("number", "state", "started", "finished", "first", "content", "reply_first")),
    *(("turns", name) for name in ("ids", "before", "stats", "finish_reason", "session")),
    *(("messages", name) for name in ("text", "role", "turn")),
    *(("evictions", name) for name in ("runs", "turn", "at", "cause", "length_before", "length_after")),
    *(("live", name) for name in ("at", "sample")),
    *(("changes", name) for name in ("value", "name")),
)
NASTY: tuple[Any, ...] = (
    *("", "[", "{}", "[]", "null", "7", '"x"', "[1]", "[[1]]", "[[5, 2]]", "[[0, 99999999]]", '[["a", "b"]]'),
    *(
        '{"held": 3}',
        '{"held": [[0, 1000000]]}',
        '{"num_sink_tokens": "x"}',
        '{"turn": "x"}',
        "[" * 3000,
        "\0",
        "é\x1b[2J",
    ),
    *(0, 1, 2, 3, -1, 2**31, 2**62, -(2**62)),
    *(0.0, -1.0, 1e300, float("inf")),
    *(b"", b"\1", b"\1\2\3\4\5", b"\xff\xff\xff\x7f" * 4, b"\xff" * 8, b"\0" * 4000),
    None,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a conversation with evictions, pins, an undone turn and a snapshot."""
    folder = tmp_path_factory.mktemp("saved") / "data"
    with running(store=folder / "streamchat.db", cache_size=96) as chat:
        for text in ("tell me of the sea", "and of a dragon", "and a knight", "why so?", "again"):
            chat.turn(text)
        chat.engine.send(Pin(4))
        chat.engine.send(Undo())
        chat.wait(ev.TurnUndone)
        chat.turn("the hill")
    return folder


@pytest.fixture
def database(saved: Path) -> Path:
    return fresh(saved)


def fresh(saved: Path) -> Path:
    """A copy of it in the user's own place."""
    path = database_path()
    shutil.rmtree(path.parent, ignore_errors=True)
    shutil.copytree(saved, path.parent)
    return path


def tamper(path: Path, table: str, column: str, value: Any, which: int) -> None:
    """Write `value` into a row, past all checks that can be passed."""
    connection = sqlite3.connect(path)
    with connection:
        rows = [row[0] for row in connection.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]
        row = rows[which % len(rows)] if rows else 0
        try:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row))
        except (sqlite3.Error, OverflowError):  # the database refuses it
            connection.rollback()
    connection.close()


def use_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that reads a conversation: no error but of the kind that is one sentence."""
    for command in (["list"], ["list", "--json"], ["list", "sea"], ["show", "last"], ["export", "last"]):
        cli.main(["sessions", *command])
    cli.main(["monitor", "--once", "--json"])
    err = capsys.readouterr().err
    assert "unexpected" not in err, err
    with Store(path) as store:
        for info in store.sessions():
            session = store.load(info.id)
            assert [turn.number for turn in session.turns] == list(range(1, len(session.turns) + 1))
            for kind in ("markdown", "jsonl", "replay"):
                assert export(session, kind)
            Watcher(find_monitored(info.id)).poll()
        store.search("dragon")


Tampering = tuple[str, str, Any, int]


def tamperings(columns: Sequence[tuple[str, str]], count: int, seed: int) -> list[Tampering]:
    """A random choice of columns, values and rows; all of them when there are few."""
    every = [(table, column, value, which) for table, column in columns for value in NASTY for which in (0, 4)]
    return random.Random(seed).sample(every, min(count, len(every)))


@pytest.mark.fuzz
def test_no_column_can_break_reading(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in tamperings(COLUMNS, settings().max_examples, 1):
        path = fresh(saved)
        tamper(path, *where)
        try:
            use_it(path, capsys)
        except StreamchatError:  # one sentence
            pass
        except Exception as error:
            raise AssertionError(f"after {where}") from error


def resumed(path: Path) -> tuple[ev.ConversationResumed | None, list[str], list[int]]:
    """Resume the conversation and go on with it: the event, what was said, and the ids in the cache."""
    with Store(path) as store:
        sessions = store.sessions()
    if not sessions:
        return None, [], []
    with running(store=path, session=sessions[0].id, cache_size=96) as chat:
        end = time.monotonic() + 60
        while not (failed := chat.of(ev.EngineFailed)) and not chat.of(ev.ConversationResumed):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert not failed or failed[0].exit_code == 5, failed
        if failed:
            return None, [failed[0].message], []
        finished = chat.turn("and then?")
        assert not finished.rolled_back, finished
        conversation: Any = chat.conversation
        cache, log = conversation.cache, conversation.log
        assert cache.ledger.next_index == len(log)
        assert cache.lengths == [cache.length] * len(cache.lengths)
        assert [turn.number for turn in log.turns] == list(range(1, len(log.turns) + 1))
        notices = [notice.text for notice in chat.of(ev.Notice)]
        return chat.of(ev.ConversationResumed)[0], notices, log.ids_at(cache.ledger.runs)


@pytest.mark.fuzz
def test_no_column_can_break_resuming(saved: Path) -> None:
    columns = [(table, column) for table, column in COLUMNS if table not in ("live", "changes")]
    went_on = 0
    for where in tamperings(columns, settings().max_examples // 3, 2):
        path = fresh(saved)
        tamper(path, *where)
        try:
            event, _, held = resumed(path)
            if event is None:
                continue
            went_on += 1
            assert held
            # what was damaged was mended, or left out, for good
            again, notices, _ = resumed(path)
            assert again is None or not any("damaged in the database" in text for text in notices), notices
        except Exception as error:
            raise AssertionError(f"after {where}") from error
    assert went_on


def test_what_is_damaged_is_named_and_its_texts_are_kept(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tamper(database, "turns", "ids", b"\1\2\3", 1)
    assert cli.main(["sessions", "show", "last"]) == 0
    out, err = capsys.readouterr()
    assert "are damaged in the database and skipped: the ids of turn 2" in err
    assert "and of a dragon" in out
    event, notices, _ = resumed(database)
    assert event is not None
    assert [turn.text for turn in event.turns][:3] == ["tell me of the sea", "and of a dragon", "and a knight"]
    assert notices[0].startswith("Parts of this session are damaged in the database and were skipped: the ids of t")
    assert any("its saved tokens are damaged and it had to be re-tokenized" in text for text in notices)
    assert event.prefilled > 0


def test_a_lost_turn_leaves_no_gap(database: Path) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("DELETE FROM messages WHERE turn = (SELECT id FROM turns WHERE number = 2 LIMIT 1)")
    connection.close()
    event, notices, _ = resumed(database)
    assert event is not None
    assert [(turn.number, turn.text) for turn in event.turns] == [
        (1, "tell me of the sea"),
        (2, "and a knight"),
        (3, "why so?"),
        (4, "the hill"),
    ]
    assert "turn 2 (no message)" in notices[0]
    with Store(database) as store:
        session = store.load(store.sessions()[0].id)
        assert session.damage == ()
        assert [turn.text for turn in session.turns][1:] == ["and a knight", "why so?", "the hill", "and then?"]
        assert examine(store.path).problems == []


def test_damaged_settings_and_figures_leave_the_cache_as_it_was(database: Path) -> None:
    tamper(database, "sessions", "settings", "null", 0)
    tamper(database, "turns", "stats", "[", 1)
    event, notices, _ = resumed(database)
    assert event is not None
    assert event.prefilled == 0
    assert "skipped: the settings, the figures of turn 2." in notices[0]
    with Store(database) as store:
        assert store.load(store.sessions()[0].id).damage == ()


# --- snapshots --------------------------------------------------------------------------------------------------


def write_snapshot(path: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """With a right checksum."""
    facts.pop("checksum", None)
    facts["checksum"] = snapshots._checksum(tensors, facts)
    save_file(tensors, path, {snapshots._KEY: json.dumps(facts)})


def read_snapshot(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[snapshots._KEY])
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def places(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name,) for name in facts if name != "checksum"] + [("cache", name) for name in facts["cache"]]


def test_no_fact_of_a_snapshot_can_break_resuming(saved: Path) -> None:
    """Under a right checksum each is missing, or something else; without the snapshot the tokens are read again."""
    rng = random.Random(5)
    facts, tensors = read_snapshot(next((saved / "snapshots").iterdir()))
    cases: list[tuple[str, ...]] = [*places(facts), *(("tensor", name) for name in tensors)]
    values: tuple[object, ...] = (None, "x", -1, 10**9, [], {}, [[5, 2]], [1.5], {"a": []})
    for case in cases if settings().max_examples > 100 else rng.sample(cases, 16):
        path = fresh(saved)
        file = next((path.parent / "snapshots").iterdir())
        facts, tensors = read_snapshot(file)
        how = rng.choice(("lost", "changed"))
        value = rng.choice(values)
        if case[0] == "tensor":
            tensor = tensors.pop(case[1])
            if how == "changed":
                tensors[case[1]] = rng.choice((tensor.reshape(-1)[:0].clone(), tensor.float().clone(), torch.zeros(3)))
        else:
            *outer, name = case
            place = facts[outer[0]] if outer else facts
            place.pop(name)
            if how == "changed":
                place[name] = value
        write_snapshot(file, facts, tensors)
        try:
            event, _, held = resumed(path)
            assert event is not None
            assert held
        except Exception as error:
            raise AssertionError(f"after {case} was {how} ({value!r})") from error
