"""`streamchat sweep`: the grid, what is kept of it, where it runs, and what it recommends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import ray_cluster
from streamchat.base.errors import ConfigError, ExitCode, StreamchatError
from streamchat.benchmarks import cell as cells
from streamchat.benchmarks import pools
from streamchat.benchmarks.cell import Cell, ModelChoice, run_cell
from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.sweep import Journal, Row, cells_of, grid, recommend, rows_of
from streamchat.benchmarks.texts import Document
from streamchat.cli import main as cli
from tests.support.models_help import make_tokenizer, save, tiny_llama

TEXT = "The capital of France is Paris. one two three four five " * 12
DOCUMENTS = [Document("a.txt", TEXT), Document("b.txt", TEXT[::-1])]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[::-1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "_loaded_model", [])
    return tmp_path


def spec(folder: Path) -> ModelChoice:
    return ModelChoice(str(folder / "model"), "cpu", "float32", "sdpa")


def in_this_process(monkeypatch: pytest.MonkeyPatch, fail: str = "") -> list[str]:
    """Cells run here, and are noted; those whose name contains `fail` end the 'pool' as Ctrl+C does."""
    ran: list[str] = []

    def run(work: Any, workers: int) -> Any:
        for each, document in work:
            if fail and fail in each.name:
                raise KeyboardInterrupt
            ran.append(each.name)
            yield each, run_cell(each, document, 1)

    monkeypatch.setattr(pools, "run_in_processes", run)
    return ran


def sweep(*arguments: str) -> int:
    sizes = ["--cache-sizes", "32,64", "--sinks", "0,4", "--max-tokens", "150"]
    return cli.main(["sweep", "--model", "model", "--dtype", "float32", "a.txt", "b.txt", *sizes, *arguments])


def test_the_grid() -> None:
    policies = grid(["dense", "window", "sinks"], [64, 128], [0, 4])
    assert [policy.spec for policy in policies] == [
        "dense",
        "window:64",
        "window:128",
        "sinks:64:0",
        "sinks:64:4",
        "sinks:128:0",
        "sinks:128:4",
    ]
    with pytest.raises(ConfigError, match="sinks must be from 0 to 32"):
        grid(["sinks"], [64], [40])


def test_a_cell_is_known_by_its_question(folder: Path) -> None:
    (one, _), (two, _) = cells_of([spec(folder)], [Method("dense")], DOCUMENTS, 100, 16)
    again = cells_of([spec(folder)], [Method("dense")], DOCUMENTS, 100, 16)[0][0]
    changed = cells_of([spec(folder)], [Method("dense")], [Document("a.txt", TEXT + "!")], 100, 16)[0][0]
    longer = cells_of([spec(folder)], [Method("dense")], DOCUMENTS, 200, 16)[0][0]
    assert one.id == again.id
    assert len({one.id, two.id, changed.id, longer.id}) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_processes_run_every_cell(folder: Path) -> None:
    work = cells_of([spec(folder)], grid(["sinks", "dense"], [32], [4]), DOCUMENTS, 150, 8)
    results = dict(pools.run_in_processes(work, 2))
    assert set(results) == {cell for cell, _ in work}
    for cell, document in work:
        here = run_cell(cell, document, 1)
        assert results[cell]["loss"] == pytest.approx(here["loss"], rel=1e-5)
        assert results[cell]["longest_cache"] == (32 if cell.method.kind == "sinks" else 150)
        assert results[cell]["decode_ms"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_a_local_ray_cluster_runs_every_cell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    work = cells_of([spec(folder)], grid(["sinks"], [32], [0, 4]), DOCUMENTS[:1], 150, 8)
    results = dict(pools.run_on_ray(work, "local"))
    assert set(results) == {cell for cell, _ in work}
    for cell, document in work:
        assert results[cell]["loss"] == pytest.approx(run_cell(cell, document, 1)["loss"], rel=1e-5)


def test_ray_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    assert sweep("--ray", "local") == ExitCode.USAGE
    assert "--ray needs Ray; run: pip install ray" in capsys.readouterr().err


def _dies(cell: Cell, document: Document, threads: int) -> dict[str, Any]:
    import os

    os._exit(9)


@pytest.mark.slow
def test_a_process_that_dies_ends_with_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "run_cell", _dies)
    work = cells_of([spec(folder)], grid(["sinks"], [32], [4]), DOCUMENTS, 150, 8)
    with pytest.raises(StreamchatError, match="a worker process died"):
        list(pools.run_in_processes(work, 1))


@pytest.mark.slow
def test_a_cell_that_fails_says_why(folder: Path) -> None:
    nowhere = Cell(ModelChoice("no-such-model", "cpu", "float32", "sdpa"), Method("dense"), "a.txt", "", 100, 16)
    assert "no-such-model" in run_cell(nowhere, DOCUMENTS[0], 0)["error"]
    short = Cell(spec(folder), Method("dense"), "e", "", 100, 16)
    assert run_cell(short, Document("e", ""), 0) == {"error": "e has fewer than two tokens"}


# --- the journal --------------------------------------------------------------------------------------------------


def test_the_journal_lives_through_a_crash(folder: Path) -> None:
    work = cells_of([spec(folder)], grid(["sinks"], [32], [0, 2, 4]), DOCUMENTS[:1], 100, 16)
    (one, _), (two, _), (three, _) = work
    path = folder / "sweep.jsonl"
    journal = Journal(path)
    journal.write(one, {"loss": 1.0})
    journal.write(two, {"error": "broken"})
    with path.open("a") as stream:
        stream.write('{"id": "' + three.id)  # the process was killed while it wrote
    later = Journal(path)
    assert later.result(one) == {"loss": 1.0}
    assert later.result(two) is None  # is tried again
    assert later.result(three) is None
    later.write(three, {"loss": 3.0})
    assert Journal(path).result(three) == {"loss": 3.0}


def test_a_file_that_is_something_else_is_not_written_to(folder: Path) -> None:
    path = folder / "sweep.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(ConfigError, match="is not a journal"):
        Journal(path)
    assert path.read_text() == "my notes\n"


# --- the result ---------------------------------------------------------------------------------------------------


def row(budget: int, sinks: int, value: float, model: str = "m") -> Row:
    policy = Method("sinks", budget, sinks)
    return Row(model, policy, value, 1.0, 100.0, budget, 1000, 1, "float32 on cpu")


def test_the_recommendation_is_the_smallest_that_is_good_enough() -> None:
    rows = [row(256, 0, 40.0), row(256, 4, 20.5), row(512, 1, 20.1), row(512, 4, 20.0), row(1024, 4, 19.8)]
    rows += [row(64, 4, 9.0, "other")]
    found = recommend(rows, 0.02)
    assert [(each.row.model, each.row.method.spec) for each in found] == [("m", "sinks:512:1"), ("other", "sinks:64:4")]
    assert found[0].text == (
        "m: cache_size = 512, num_sink_tokens = 1; perplexity 20.10, 1.5 % above the lowest of the grid (19.80 with "
        "sinks 1024 (4))."
    )
    assert "the lowest of the grid (9.00)." in found[1].text
    assert recommend(rows, 0.05)[0].row.method.spec == "sinks:256:4"
    assert recommend(rows, 0.0)[0].row.method.spec == "sinks:1024:4"
    assert recommend([row(64, 0, 5.0)][:0], 0.1) == []


def test_an_eviction_policy_is_recommended_with_its_setting() -> None:
    rows = [row(512, 4, 20.0), replace(row(256, 4, 20.1), method=Method("key-diversity", 256, 4))]
    (found,) = recommend(rows, 0.02)
    assert found.text.startswith("m: evict = key-diversity, cache_size = 256, num_sink_tokens = 4; perplexity 20.10")
    # other ways to bound the cache are not settings
    assert recommend([replace(rows[0], method=Method("recompute", 512))], 0.02) == []


def test_documents_are_weighed_by_their_tokens(folder: Path) -> None:
    work = cells_of([spec(folder)], [Method("dense")], DOCUMENTS, 100, 16)
    rest = {"decode_ms": 2.0, "tokens": 10, "seconds": 1.0, "kv_bytes": 5, "weight_bytes": 7, "ran_in": ""}
    results = [{"loss": 10.0, "scored": 10, **rest}, {"loss": 60.0, "scored": 30, **rest, "decode_ms": 4.0}]
    (found,) = rows_of((cell, result) for (cell, _), result in zip(work, results, strict=True))
    assert found.perplexity == pytest.approx(math.exp(70 / 40))
    assert (found.score_tps, found.kv_bytes, found.documents) == (10.0, 5, 2)


@pytest.mark.slow
def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = in_this_process(monkeypatch)
    assert sweep("--json", "--charts", "--out", "out") == ExitCode.OK
    assert len(ran) == 8
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    data = json.loads(last)
    assert [found["spec"] for found in data["rows"]] == ["sinks:32:0", "sinks:32:4", "sinks:64:0", "sinks:64:4"]
    ids = make_tokenizer()(TEXT)["input_ids"][:150]
    assert len(ids) == 150
    assert data["recommendations"][0]["cache_size"] in (32, 64)
    for words in ("Recommended for model: cache_size =", "Perplexity, model", "MB of keys and values, model"):
        assert words in text
    assert {"sweep.jsonl", "sweep.json", "sweep.html", "sweep-perplexity.svg", "sweep-time.png"} <= {
        path.name for path in Path("out").iterdir()
    }


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = in_this_process(monkeypatch, fail="sinks 64 (4)")
    assert sweep() == ExitCode.INTERRUPTED
    printed = capsys.readouterr()
    assert "1 combinations are not finished" in printed.out
    assert len(first) == 6
    second = in_this_process(monkeypatch)
    assert sweep() == ExitCode.OK
    assert second == ["model, sinks 64 (4), a.txt", "model, sinks 64 (4), b.txt"]
    assert "6 of 8 already done" in capsys.readouterr().err
    assert sweep() == ExitCode.OK
    assert len(second) == 2


@pytest.mark.slow
def test_a_model_that_is_not_there_does_not_end_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    assert sweep("--models", "model,nowhere.gguf") == ExitCode.FAILURE
    printed = capsys.readouterr()
    assert "Failed: nowhere.gguf, sinks 32 (0), a.txt:" in printed.out
    assert "Recommended for model:" in printed.out
    assert sweep("--models", "nowhere.gguf") == ExitCode.FAILURE
    assert "nothing could be measured: nowhere.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sinks", "a"], "--sinks: a is not a whole number"),
        (["--cache-sizes", "9" * 5000], "is not a whole number of up to 18 digits"),
        (["--cache-sizes", ","], "--cache-sizes is empty"),
        (["--policies", "sinks:64"], "--methods sinks:64: give names only; other flags set budgets and sinks"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--tolerance", "2"], "--tolerance 2.0 must be from 0 to 1"),
        (["--ray", "local", "--workers", "2"], "--workers applies to this machine"),
        (["--sinks", "40"], "sinks:32:40: sinks must be from 0 to 16 for a budget of 32 tokens"),
    ],
)
def test_wrong_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert sweep(*arguments) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert not Path("streamchat-sweep").exists()
