"""Files that earlier versions wrote still work. `python -m tools.golden` wrote each set, once; they never change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.eviction_policies import RENAMED_POLICIES
from streamchat.base.requests import Quote, Undo, Unpin
from streamchat.cli import main as cli
from streamchat.config import loader
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import load_from_settings
from streamchat.frontend.typed_history import TypedHistory
from streamchat.models.gguf.convert import CONVERTER
from streamchat.models.staging import MANIFEST, models_dir
from streamchat.sessions.evicted_pages import from_bytes
from streamchat.store.health import examine
from streamchat.store.store import Store
from tests.support.real_engine import running
from tools import golden
from tools.golden_sessions import CONFIG, put_into_hub_cache

SETS = sorted(path for path in golden.FOLDER.iterdir() if path.is_dir())
MACHINE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "weights": "native", "kernels": "torch"}
"""With these settings a cache has the same numbers on every machine, but for rounding."""
RENAMED: dict[str, str] = {}
"""Old name of a setting -> new name."""


@pytest.fixture(params=SETS, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest) -> Path:
    """Each set."""
    path: Path = request.param
    return path


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    """What the files must say."""
    values: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files as STREAMCHAT_HOME, and their model in the Hub cache."""
    home = Path(os.environ["STREAMCHAT_HOME"])
    for name in ("data", "state"):
        shutil.copytree(folder / name, home / name)
    put_into_hub_cache(folder / "model", Path(os.environ["HF_HOME"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["sessions", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_files_are_those_that_were_written_then(tmp_path: Path) -> None:
    assert len(SETS) >= 2
    assert golden.check() == []
    shutil.copytree(SETS[0], tmp_path / "one")
    (tmp_path / golden.DIGESTS).write_text(json.dumps({"one": golden.digest_of(SETS[0]), "two": "0"}))
    assert golden.check(tmp_path) == ["two is missing"]
    (tmp_path / "one" / "state" / "more").write_text("")
    (tmp_path / "three").mkdir()
    assert golden.check(tmp_path) == ["two is missing", "three is not in digests.json", "one was changed"]


def test_the_next_set_will_have_every_setting_with_another_value(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG, encoding="utf-8")
    found = loader.load(config_file=tmp_path / "config.toml", environ={})
    unchanged = [name for name, value in vars(Settings()).items() if getattr(found.settings, name) == value]
    assert unchanged == ["compression_ratio"]  # it excludes cache_size
    assert {name for name in vars(Settings()) if f"\n{name} = " not in CONFIG} == set()


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


ARCHIVED = [path for path in SETS if (path / "data" / "evicted").exists()]


@pytest.mark.parametrize("folder", ARCHIVED, ids=lambda path: path.name)
def test_an_evicted_turn_is_paged_in_from_the_archive(home: Path, expected: dict[str, Any]) -> None:
    database = home / "data" / "streamchat.db"
    with running(load_from_settings, store=database, session=expected["session"], **MACHINE) as chat:
        chat.wait(ev.ConversationResumed)
        conversation: Any = chat.conversation
        [first, *_] = conversation.log.turns
        assert conversation.cache.ledger.count_in(first.start, first.end) < first.end - first.start
        chat.engine.send(Unpin(2))
        chat.engine.send(Quote("that", "I see.", pin=True, turn=1))
        assert chat.wait(ev.TurnPagedIn).tokens > 0
        assert conversation.cache.ledger.count_in(first.start, first.end) == first.end - first.start
        layer, ids = conversation.model.model.layers[0], torch.tensor(conversation.log.ids)
        with torch.inference_mode():  # values of the first layer depend on nothing but the token
            embedded = layer.input_layernorm(conversation.model.get_input_embeddings()(ids))
            values = layer.self_attn.v_proj(embedded).unflatten(-1, (2, -1)).transpose(0, 1)
    with Store(database) as store:
        stored = [each for each in store.evicted.pages(expected["session"]) if each[0].part == "evicted"]
        pages = [(each[0], from_bytes(store.evicted.read(each) or b"")) for each in stored]
    assert len(pages) >= 3
    for page, tokens in pages:
        assert tokens is not None
        indices = [index for run in page.runs for index in range(*run)]
        torch.testing.assert_close(tokens.slots.of(0)["values"][0], values[:, indices], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["exported.jsonl", "exported.json"])
def test_an_exported_file_is_imported(
    name: str, folder: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if not (folder / name).exists():
        pytest.skip("the set has no such export")
    assert "6 turns were imported" in printed(capsys, "import", str(folder / name))
    [session] = map(json.loads, printed(capsys, "list", "--json").splitlines())
    assert session["turns"] == len(expected["messages"])
    if name == "exported.jsonl":
        assert session["title"] == expected["title"]
    assert printed(capsys, "show", session["id"]).count(expected["messages"][-1]) == 1


def test_the_settings_are_read(folder: Path, expected: dict[str, Any]) -> None:
    found = loader.load(config_file=folder / "config.toml", environ={})
    old = {RENAMED.get(name, name): value for name, value in expected["settings"].items()}
    old["evict"] = RENAMED_POLICIES.get(old["evict"], old["evict"])
    assert {name: getattr(found.settings, name) for name in old} == old
    assert found.keys["chat.stop"] == "ctrl+x"


def test_the_input_histories_of_app_and_prompt_are_read(folder: Path, home: Path, expected: dict[str, Any]) -> None:
    """The first version had one for the app and one for the prompt, in which the same was typed."""
    before = [name for name in ("history", "history.jsonl") if (folder / "state" / name).exists()]
    assert TypedHistory.open(wanted=True).entries == expected["typed"] * max(1, len(before))
    for name in before:  # left in place
        assert (home / "state" / name).read_bytes() == (folder / "state" / name).read_bytes()


CONVERTED = [path for path in SETS if (path / "gguf").exists()]


@pytest.mark.parametrize("folder", CONVERTED, ids=lambda path: path.name)
def test_a_converted_model_gives_the_logits_that_it_gave(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["gguf_logits"]
    [made] = (folder / "gguf" / "models").iterdir()
    copy = models_dir() / made.name
    shutil.copytree(made, copy)
    modified = (copy / "tiles.safetensors").stat().st_mtime_ns
    assert golden.logits_of(folder / "gguf" / "tiny.gguf") == pytest.approx(expected, abs=1e-4)
    manifest = json.loads((copy / MANIFEST).read_text()) if copy.exists() else {}
    if manifest.get("converter") == CONVERTER:
        assert (copy / "tiles.safetensors").stat().st_mtime_ns == modified  # not converted again
        assert [path.name for path in models_dir().iterdir() if not path.name.startswith(".")] == [made.name]
    else:  # converted again, and the older copy is removed
        assert not copy.exists()


def test_the_models_of_the_next_set_can_be_written(tmp_path: Path) -> None:
    written = golden.write_models(tmp_path / "gguf")
    assert len(written["gguf_logits"]) > 200
    [manifest] = (tmp_path / "gguf" / "models").glob(f"*/{MANIFEST}")
    assert json.loads(manifest.read_text())["source"] == "/models/tiny.gguf"
