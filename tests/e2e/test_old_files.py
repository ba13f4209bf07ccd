"""Files that earlier versions wrote still work. `tools.old_sessions` wrote them, once; they never change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import tests
from streamchat.base import events as ev
from streamchat.base.eviction_policies import RENAMED_POLICIES
from streamchat.base.requests import Undo
from streamchat.cli import main as cli
from streamchat.config import loader
from streamchat.conversation.assemble import load_from_settings
from streamchat.frontend.typed_history import TypedHistory
from streamchat.store.health import examine
from streamchat.store.store import Store
from tests.support.real_engine import running
from tools.old_sessions import put_into_hub_cache

FOLDER = Path(tests.__path__[0]) / "data" / "version-0.1"
DIGEST = "db5288afe6bc0cbd2877716444e3b2e6b6e5239d2da805e110ed6ea1fe7a54c2"
"""SHA-256 of all files. To test a newer format, add a folder; do not write this one again."""
MACHINE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "weights": "native", "kernels": "torch"}
"""With these settings a cache has the same numbers on every machine, but for rounding."""
RENAMED: dict[str, str] = {}
"""Old name of a setting -> new name."""


@pytest.fixture
def expected() -> dict[str, Any]:
    """What the files must say."""
    values: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files as STREAMCHAT_HOME, and their model in the Hub cache."""
    home = Path(os.environ["STREAMCHAT_HOME"])
    for name in ("data", "state"):
        shutil.copytree(FOLDER / name, home / name)
    put_into_hub_cache(FOLDER / "model", Path(os.environ["HF_HOME"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["sessions", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_files_are_those_that_were_written_then() -> None:
    digest = hashlib.sha256()
    for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(FOLDER).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    assert digest.hexdigest() == DIGEST, "files in tests/data changed, or are missing"


def test_the_database_is_listed(home: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    listed = {each["id"]: each for each in map(json.loads, printed(capsys, "list", "--json").splitlines())}
    session = listed.pop(expected["session"])
    [imported] = listed.values()
    assert session["title"] == expected["title"]
    assert (session["turns"], session["model"]) == (len(expected["messages"]), "example/tiny")
    assert session["tokens_held"] == len(expected["cached_ids"])
    assert session["compressions"] > 0
    assert session["snapshot_bytes"] > 0
    assert not session["imported"]
    assert not session["open"]
    assert (imported["turns"], imported["imported"]) == (1, True)
    with Store() as store:
        assert examine(store.path).problems == []


def test_a_conversation_is_shown(home: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "show", expected["session"])
    assert expected["title"] in shown
    for message in expected["messages"]:
        assert f"\n{message}\n" in shown
    assert expected["undone"] not in shown
    assert "1. you (evicted)" in shown
    assert f"{expected['pinned']}. you\n" in shown  # pinned, so the model still sees it


@pytest.mark.parametrize(("words", "count"), [("dragon", 1), ("harbor", 1), ("sea", 1), ("tram", 0)])
def test_the_search_finds(home: Path, words: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(printed(capsys, "list", "--json", words).splitlines()) == count
    with Store() as store:
        assert len({found.session for found in store.search(words)}) == count


@pytest.mark.smoke
def test_resuming_continues_exactly(home: Path, expected: dict[str, Any]) -> None:
    session = expected["session"]
    with running(load_from_settings, store=home / "data" / "streamchat.db", session=session, **MACHINE) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert (resumed.session, resumed.prefilled) == (session, 0)
        assert [turn.text for turn in resumed.turns] == expected["messages"]
        conversation: Any = chat.conversation
        assert conversation.log.ids_at(conversation.cache.ledger.runs) == expected["cached_ids"]
        for message in expected["next"]:
            chat.turn(message)
        assert conversation.log.ids_at(conversation.cache.ledger.runs) == expected["next_cached_ids"]
    with Store() as store:
        turns = store.load(session).turns[-len(expected["next"]) :]
    assert [turn.ids.tolist() for turn in turns] == expected["next_turn_ids"]


def test_the_last_turn_can_be_undone_after_resuming(home: Path, expected: dict[str, Any]) -> None:
    database = home / "data" / "streamchat.db"
    with running(load_from_settings, store=database, session=expected["session"], **MACHINE) as chat:
        chat.wait(ev.ConversationResumed)
        chat.engine.send(Undo())
        assert chat.wait(ev.TurnUndone).text == expected["messages"][-1]


def test_an_exported_file_is_imported(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "6 turns were imported" in printed(capsys, "import", str(FOLDER / "exported.jsonl"))
    [session] = map(json.loads, printed(capsys, "list", "--json").splitlines())
    assert (session["title"], session["turns"]) == (expected["title"], len(expected["messages"]))


def test_the_settings_are_read(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = loader.load(config_file=FOLDER / "config.toml", environ={})
    old = {RENAMED.get(name, name): value for name, value in expected["settings"].items()}
    old["evict"] = RENAMED_POLICIES[old["evict"]]
    assert {name: getattr(found.settings, name) for name in old} == old
    assert found.keys["chat.stop"] == "ctrl+x"


def test_the_input_histories_of_app_and_prompt_are_read(home: Path, expected: dict[str, Any]) -> None:
    """The same was typed in both, so the order of the two does not depend on the time zone of the test."""
    assert TypedHistory.open(wanted=True).entries == expected["typed"] * 2
    for name in ("history", "history.jsonl"):  # left in place
        assert (home / "state" / name).read_bytes() == (FOLDER / "state" / name).read_bytes()
