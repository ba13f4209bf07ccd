"""`streamchat bench --serve` on a tiny model and with tiny sizes."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.progress import silent
from streamchat.benchmarks import api_client, serving_runs
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.generation import Generation
from streamchat.store.store import Store
from tests.support.api_server import serving
from tests.support.models_help import save, tiny_llama

pytest.importorskip("uvicorn", reason="needs the extra streamchat[server]")
SIZES = ["--serve-turns=10", "--serve-sessions=2", "--serve-tokens=4", "--rounds=2", "--cache-size=96"]
SCRIPTED_TURNS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(max_position_embeddings=1024), tmp_path_factory.mktemp("models") / "llama")


def bench(folder: Path, *arguments: str) -> int:
    return cli.main(["bench", "--serve", "--model", str(folder), "--dtype", "float32", *SIZES, *arguments])


def test_every_row_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_runs, "SLICES", (1, 8))
    assert bench(folder, "--out", str(tmp_path)) == ExitCode.OK
    text = capsys.readouterr().out
    for part in ("late / early", "difference at the same turns, CPU", "per 100 turns", "other tokens", "p95", " x"):
        assert part in text
    found = json.loads((tmp_path / "bench-serve.json").read_text())
    turns, dropping, switching = found["turns"], found["dropping"], found["switching"]
    assert turns["client"].startswith("openai" if util.find_spec("openai") else "Python")
    for name in ("served", "embedded"):
        assert len(turns[name]) == 10
        assert all(each["elapsed_s"] > 0 and each["cpu_s"] > 0 for each in turns[name])
    assert len(turns["memory"]) == 10
    assert dropping["turns"] == 4
    assert (dropping["others"], dropping["uncounted"]) == (0, 0)
    before, after = dropping["template_text"].split("…")
    assert dropping["template"] == len(before.split()) + len(after.split()) > 2
    assert switching["sessions"] == 2
    assert len(switching["times"]) == 4
    assert [each["steps"] for each in found["slices"]] == [1, 8]
    for each in found["slices"]:
        assert len(each["alone"]) == len(each["both"]) == len(each["later_first_s"]) == 2
        assert all(value > 0 for value in each["later_first_s"])


def test_tokens_that_a_usage_leaves_out_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fed three tokens more than its usage says would be found out."""
    prefill = Generation.prefill

    def too_much(self: Generation, *arguments: Any) -> Any:
        self._feeder.forward([5, 6, 7])
        self._feeder.cut(len(self._feeder.log) - 3)
        return prefill(self, *arguments)

    monkeypatch.setattr(Generation, "prefill", too_much)
    settings = Settings(model=str(folder), dtype="float32", temperature=0.0, speculation="off", cache_size=96)
    found = serving_runs.Bench(Configuration(settings), silent, serving_runs.Sizes(10, 2, 4, 1), "http").dropping()
    assert (found.others, found.uncounted) == (0, 3)


@pytest.mark.parametrize("name", api_client.CLIENTS)
def test_each_client_leads_a_conversation(name: str, tmp_path: Path) -> None:
    if name == "openai" and util.find_spec("openai") is None:
        pytest.skip("the package openai is not installed")
    with serving(tmp_path) as api:
        client, previous, times = api_client.client_named(name, api.server.port, "tiny"), None, []
        for turn in range(SCRIPTED_TURNS):
            timed = client.respond(f"message {turn} about the sea", previous, 4)
            previous = timed.id
            times.append(timed.first_s)
        client.close()
    assert all(each > 0 for each in times)
    with Store(tmp_path / "sessions.db") as store:
        [session] = store.sessions()
        stored = store.load(session.id).turns
    assert [turn.text for turn in stored] == [f"message {turn} about the sea" for turn in range(SCRIPTED_TURNS)]
    prompts = [(turn.stats or {})["prompt_tokens"] for turn in stored]
    assert max(prompts[10:]) <= min(prompts[10:]) + 2  # only the new message, also after evictions
    assert session.compressions > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--serve --serve-turns 1", "--serve-turns 1 must be at least 2"),
        ("--serve --serve-sessions 1", "--serve-sessions 1 must be at least 2"),
        ("--serve-tokens 5", "--serve-tokens needs --serve"),
        ("--decode --serve-client http", "--serve-client needs --serve"),
    ],
)
def test_wrong_flags_are_one_sentence(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments.split()]) == ExitCode.USAGE
    assert sentence in capsys.readouterr().err


def test_a_missing_client_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "find_spec", lambda name: None)
    assert api_client.client_named("", 1, "tiny").name == "Python's http.client"
    with pytest.raises(ConfigError, match="pip install openai"):
        api_client.client_named("openai", 1, "tiny")
