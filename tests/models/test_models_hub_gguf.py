"""GGUF files by their name on the Hub: what a name means, what is fetched, and what is refused in one sentence."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from streamchat.base.errors import ExitCode, ModelError, ModelNotFoundError, UnsupportedModelError
from streamchat.benchmarks.loading import gguf_file
from streamchat.commands import models as command
from streamchat.config.loader import Configuration
from streamchat.models.hub_cache import cached_ggufs, hub_cache_dir
from streamchat.models.hub_gguf import GgufName, choose_file, matches, parse_gguf_name
from streamchat.models.load import load_model
from streamchat.models.resolve import is_local, resolve
from streamchat.sessions.settings import portable_model_name
from tests.support.fake_hub import FakeHub, serve_hub
from tests.support.models_help import write_gguf

FILES = [
    "README.md",
    "m-BF16.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-q8_0.gguf",
    "m-UD-Q4_K_XL.gguf",
    "mmproj-F16.gguf",
    "Q6_K/m-Q6_K-00001-of-00003.gguf",
    "Q6_K/m-Q6_K-00002-of-00003.gguf",
    "Q6_K/m-Q6_K-00003-of-00003.gguf",
]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    yield from serve_hub(monkeypatch)


@pytest.fixture
def quantized(fake_hub: FakeHub, tmp_path: Path) -> Path:
    """The repository `a/tiny-GGUF`: two whole files, and one that is split."""
    folder = tmp_path / "repository"
    (folder / "Q6_K").mkdir(parents=True)
    write_gguf(folder / "tiny-Q4_K_M.gguf")
    write_gguf(folder / "tiny-Q8_0.gguf", rope_theta=20000.0)
    for part in (1, 2, 3):
        (folder / "Q6_K" / f"tiny-Q6_K-0000{part}-of-00003.gguf").write_bytes(b"GGUF")
    fake_hub.repositories["a/tiny-GGUF"] = folder
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b:Q4_K_M", GgufName("a/b", tag="Q4_K_M")),
        ("a/b:ud-q4_k_xl", GgufName("a/b", tag="ud-q4_k_xl")),
        ("a/b/c.gguf", GgufName("a/b", path="c.gguf")),
        ("a/b/d/c.GGUF", GgufName("a/b", path="d/c.GGUF")),
        ("a/b", None),
        ("b:Q4", None),
        ("a/b:", None),
        ("a/b:Q4/x", None),
        ("a/c.gguf", None),
        ("./a/b/c.gguf", None),
        ("/a/b/c.gguf", None),
        ("~/a/b/c.gguf", None),
        ("../a/b/c.gguf", None),
        ("a/b/../c.gguf", None),
        ("a--x/b:Q4", None),
        (r"C:\a\b\c.gguf", None),
        ("C:/a/b/c.gguf", None),
    ],
)
def test_names(text: str, name: GgufName | None) -> None:
    assert parse_gguf_name(text) == name
    if name is not None:
        assert str(name) == text


@pytest.mark.parametrize(
    ("tag", "first"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q8_0", "m-q8_0.gguf"),
        ("Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("bf16", "m-BF16.gguf"),
        ("Q6_K", "Q6_K/m-Q6_K-00001-of-00003.gguf"),
        ("Q4_K", None),
        ("K_M", None),
        ("F16", None),  # a projector for images
    ],
)
def test_a_tag_finds_its_file(tag: str, first: str | None) -> None:
    assert next(iter(matches(GgufName("a/b", tag=tag), FILES)), None) == first


def test_without_a_tag_the_file_is_the_one_that_llama_cpp_takes() -> None:
    name = GgufName("a/b")
    assert matches(name, FILES)[0] == "m-Q4_K_M.gguf"
    rest = [path for path in FILES if "Q4_K_M" not in path]
    assert matches(name, rest)[0] == "m-q8_0.gguf"
    assert matches(name, [path for path in rest if "q8" not in path])[0] == "Q6_K/m-Q6_K-00001-of-00003.gguf"
    assert choose_file(name, [path for path in rest if "q8" not in path], "hub") == "m-BF16.gguf"  # a whole one


def test_a_tag_is_fetched_converted_and_then_found_locally(
    fake_hub: FakeHub, quantized: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = resolve("a/tiny-GGUF:q8_0")
    assert (source.kind, source.name, source.available, source.repo_id) == (
        "hub",
        "tiny-GGUF:q8_0",
        False,
        "a/tiny-GGUF",
    )
    capfd.readouterr()
    seen: list[tuple[str, int, int, str]] = []
    loaded = load_model("a/tiny-GGUF:q8_0", device="cpu", kernels="torch", progress=lambda *step: seen.append(step))
    assert (loaded.name, loaded.source) == ("tiny-Q8_0", "a/tiny-GGUF/tiny-Q8_0.gguf")
    assert loaded.model.config.rope_parameters["rope_theta"] == 20000.0
    assert set(fake_hub.fetched) == {"tiny-Q8_0.gguf"}
    size = (quantized / "tiny-Q8_0.gguf").stat().st_size
    assert ("Fetching a/tiny-GGUF", size, size, "bytes") in seen
    assert capfd.readouterr() == ("", "")
    assert gguf_file(Configuration(), loaded) == Path(resolve("a/tiny-GGUF:q8_0").location)  # for llama.cpp
    # the local copy is enough from now on, by each of its names; it has the cache's layout
    fake_hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("a/tiny-GGUF:Q8_0", "a/tiny-GGUF/tiny-Q8_0.gguf", "a/tiny-GGUF"):
        found = resolve(name)
        assert (found.kind, found.available, found.origin) == ("gguf", True, "a/tiny-GGUF/tiny-Q8_0.gguf")
        assert load_model(name, device="cpu", kernels="torch").name == "tiny-Q8_0"
        assert portable_model_name(name) == name  # a session names it so on every machine
        assert not is_local(name)
    assert [each.file for each in cached_ggufs()] == ["tiny-Q8_0.gguf"]


def test_repository_of_gguf_files_alone(fake_hub: FakeHub, quantized: Path) -> None:
    assert load_model("a/tiny-GGUF", device="cpu", kernels="torch").name == "tiny-Q4_K_M"
    assert set(fake_hub.fetched) == {"tiny-Q4_K_M.gguf"}


def test_one_file_in_a_folder_of_the_repository(fake_hub: FakeHub, quantized: Path) -> None:
    shutil.move(quantized / "tiny-Q8_0.gguf", quantized / "Q6_K" / "whole-Q8_0.gguf")
    name = "a/tiny-GGUF/Q6_K/whole-Q8_0.gguf"
    assert load_model(name, device="cpu", kernels="torch").source == name
    assert resolve(name).available


def test_a_mirror_of_the_cache_needs_no_hub(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = hub_cache_dir() / "models--b--other-GGUF"
    blob = repository / "blobs" / ("d" * 64)
    blob.parent.mkdir(parents=True)
    shutil.copy(quantized / "tiny-Q4_K_M.gguf", blob)
    for commit in ("old", "new"):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "x.Q4_K_M.gguf").symlink_to(blob)
    (repository / "snapshots" / "new" / "x.Q5_K_M.gguf").symlink_to(repository / "blobs" / "missing")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("new")
    assert resolve("b/other-GGUF:q4_k_m").location == str(repository / "snapshots" / "new" / "x.Q4_K_M.gguf")
    assert load_model("b/other-GGUF:Q4_K_M", device="cpu", kernels="torch").name == "x.Q4_K_M"
    assert refusal("b/other-GGUF:Q5_K_M").endswith("or the default model (--model default)")
    assert [(each.repo_id, each.file) for each in cached_ggufs()] == [("b/other-GGUF", "x.Q4_K_M.gguf")]


def test_a_local_file_of_that_path_wins(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quantized, tmp_path / "a" / "tiny-GGUF")
    source = resolve("a/tiny-GGUF/tiny-Q8_0.gguf")
    assert (source.kind, source.repo_id) == ("gguf", "")
    assert source.location == str(tmp_path / "a" / "tiny-GGUF" / "tiny-Q8_0.gguf")
    assert is_local("a/tiny-GGUF/tiny-Q8_0.gguf")


def test_a_cancelled_fetch_leaves_nothing_that_looks_complete(fake_hub: FakeHub, quantized: Path) -> None:
    class CancelledError(Exception):
        pass

    def cancel(_stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        if unit and done:
            raise CancelledError

    with pytest.raises(CancelledError):
        load_model("a/tiny-GGUF:Q8_0", device="cpu", kernels="torch", progress=cancel)
    assert resolve("a/tiny-GGUF:Q8_0").kind == "hub"
    assert cached_ggufs() == []


def refusal(name: str) -> str:
    with pytest.raises((ModelNotFoundError, UnsupportedModelError)) as caught:
        load_model(name, device="cpu", kernels="torch")
    assert caught.value.exit_code == ExitCode.MODEL
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "a/tiny-GGUF:Q5_K_M",
            "has no GGUF file with the tag Q5_K_M; choose from Q4_K_M, Q8_0; did you mean Q4_K_M?",
        ),
        ("a/tiny-GGUF/tiny-Q9.gguf", "has no file tiny-Q9.gguf; choose from Q4_K_M, Q8_0; did you mean tiny-Q"),
        ("a/tiny-GGUF:Q6_K", "is one of 3 parts, which streamchat does not read; choose from Q4_K_M, Q8_0, or join"),
        ("a/nothing:Q4_K_M", "There is no model a/nothing on 127.0.0.1"),
    ],
)
def test_what_the_repository_does_not_have(fake_hub: FakeHub, quantized: Path, name: str, words: str) -> None:
    assert words in refusal(name)
    assert fake_hub.fetched == []


def test_repository_without_any_model(fake_hub: FakeHub, quantized: Path) -> None:
    for file in quantized.rglob("*.gguf"):
        file.unlink()
    (quantized / "mmproj-F16.gguf").write_bytes(b"GGUF")
    assert "has no config.json and no GGUF files" in refusal("a/tiny-GGUF")
    assert "choose another model, because it has no other GGUF file" in refusal("a/tiny-GGUF:F16")


def test_gated_forbidden_unreachable_and_full(
    fake_hub: FakeHub, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a/tiny-GGUF:Q8_0"
    fake_hub.gated.add("a/tiny-GGUF")
    assert f"accept them on {fake_hub.url}/a/tiny-GGUF, then set HF_TOKEN" in refusal(name)
    fake_hub.gated.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=1000))
        assert "1.0 kB are free; make room, or set HF_HOME" in refusal(name)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE forbids asking the Hub" in refusal(name)
    fake_hub.close()
    assert "cannot be reached (Connection refused)" in refusal(name)


@pytest.mark.parametrize(
    ("number", "words"),
    [(28, "(the disk is full); make room, or set HF_HOME"), (13, "(Permission denied); make it writable, or set HF_H")],
)
def test_a_disk_that_fails_during_the_fetch(
    fake_hub: FakeHub, quantized: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    import os

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert words in refusal("a/tiny-GGUF:Q8_0")


def test_models_command(fake_hub: FakeHub, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        parser = argparse.ArgumentParser()
        command.add_flags(parser)
        assert command.run(parser.parse_args(words)) == 0
        return capsys.readouterr().out

    assert "a GGUF file on the Hub, not fetched yet" in run("a/tiny-GGUF:Q8_0")
    load_model("a/tiny-GGUF:Q8_0", device="cpu", kernels="torch")
    text = run()
    assert "GGUF files in the local Hub cache" in text
    assert "  a/tiny-GGUF/tiny-Q8_0.gguf " in text
    [listed] = json.loads(run("--json"))["hub_ggufs"]
    assert (listed["name"], listed["bytes"]) == (
        "a/tiny-GGUF/tiny-Q8_0.gguf",
        (quantized / "tiny-Q8_0.gguf").stat().st_size,
    )
    found = json.loads(run("a/tiny-GGUF:Q8_0", "--json"))
    assert (found["kind"], found["id"], found["here"], found["to_do"]) == ("gguf", "a/tiny-GGUF", True, None)
    assert "a GGUF file of the Hub, in the local Hub cache" in run("a/tiny-GGUF:Q8_0")
    with pytest.raises(ModelError):
        run("a/b:c:d")
