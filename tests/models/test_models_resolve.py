"""What a name means, without asking anybody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from streamchat.base.errors import ModelNotFoundError
from streamchat.models import catalogue
from streamchat.models.hub_cache import cached_models, endpoint, hub_cache_dir, offline_variable
from streamchat.models.load import load_model
from streamchat.models.resolve import resolve
from tests.support.models_help import in_hub_cache, save, tiny_llama, tiny_neox


@pytest.mark.parametrize("name", ["default", "smollm2", "smollm2-135m", "SmolLM2-135M-Instruct"])
def test_names_of_the_bundled_model(name: str) -> None:
    source = resolve(name)
    assert (source.kind, source.name, source.available) == ("bundled", "SmolLM2-135M-Instruct", False)


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("pythia-14m", "EleutherAI/pythia-14m"),
        ("Pythia-410M", "EleutherAI/pythia-410m"),
        ("pythia-12b-deduped", "EleutherAI/pythia-12b-deduped"),
        ("pythia-1.4b", "EleutherAI/pythia-1.4b"),
        ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct"),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("some-body/some_model.v2", "some-body/some_model.v2"),
        ("gpt2", "gpt2"),
    ],
)
def test_aliases_and_hub_ids(name: str, repo_id: str) -> None:
    source = resolve(name)
    assert (source.kind, source.location, source.repo_id, source.available) == ("hub", repo_id, repo_id, False)
    assert source.name == repo_id.rpartition("/")[2]


def test_every_pythia_size_is_an_alias() -> None:
    sizes = ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
    assert all(catalogue.ALIASES[f"pythia-{size}"] == f"EleutherAI/pythia-{size}" for size in sizes)
    assert all(f"pythia-{size}-deduped" in catalogue.ALIASES for size in sizes[2:])


def test_local_folder_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pythia-70m").mkdir()
    assert resolve("pythia-70m").kind == "hub"  # no model in it
    save(tiny_neox(), tmp_path / "pythia-70m")
    source = resolve("pythia-70m")
    assert (source.kind, source.name, source.location) == ("folder", "pythia-70m", str(tmp_path / "pythia-70m"))
    (tmp_path / "default").mkdir()
    assert resolve("default").kind == "bundled"


def test_a_folder_that_hides_an_alias_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pythia-70m", "mine"):
        save(tiny_neox(), tmp_path / name)
    [note] = [note for note in load_model("pythia-70m", device="cpu").notes if "not the model of that name" in note]
    assert str(tmp_path / "pythia-70m") in note
    assert "./pythia-70m" in note
    for plain in ("./pythia-70m", str(tmp_path / "pythia-70m"), "mine"):
        assert not [note for note in load_model(plain, device="cpu").notes if "not the model" in note]


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.GGUF").write_bytes(b"GGUF")
    (tmp_path / "sub").mkdir()
    assert resolve("a.GGUF").kind == "gguf"
    assert resolve("~/a.GGUF").location == str(tmp_path / "a.GGUF")
    assert (resolve("./sub").kind, resolve("./sub").name) == ("folder", "sub")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nothing", "There is no folder 'nothing'"),
        ("/no/such/place", "There is no folder '/no/such/place'"),
        ("nothing.gguf", "There is no file 'nothing.gguf'"),
        ("a/b/c", "There is no folder 'a/b/c'"),
        ("two words", "an alias or a valid Hub id"),
        ("pythia 410m", r"did you mean pythia-410m\?"),
        ("a--b/c", "an alias or a valid Hub id"),
        ("", "The model name is empty"),
    ],
)
def test_names_that_mean_nothing(name: str, words: str) -> None:
    with pytest.raises(ModelNotFoundError, match=words) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelNotFoundError, match="is not a model"):
        resolve(str(tmp_path / "notes.txt"))


def test_hub_cache_comes_before_the_hub() -> None:
    folder = in_hub_cache("EleutherAI/pythia-410m", tiny_neox())
    source = resolve("pythia-410m")
    assert (source.kind, source.location, source.available) == ("hub-cache", str(folder), True)
    assert source.repo_id == "EleutherAI/pythia-410m"
    assert [model.repo_id for model in cached_models()] == ["EleutherAI/pythia-410m"]
    (folder.parents[1] / "refs" / "main").unlink()  # fetched by commit, not by branch
    assert resolve("pythia-410m").location == str(folder)
    (folder / "model.safetensors").unlink()  # an interrupted download
    assert resolve("pythia-410m").kind == "hub"
    assert cached_models() == []


def test_hub_cache_lists_only_causal_language_models() -> None:
    in_hub_cache("a/llama", tiny_llama())
    folder = in_hub_cache("a/bert", tiny_llama())
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "BertForMaskedLM"))
    assert [model.repo_id for model in cached_models()] == ["a/llama"]


def test_environment_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert endpoint() == "https://mirror.example"
    assert offline_variable() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline_variable() == "HF_HUB_OFFLINE"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert hub_cache_dir() == tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pythia-410", "pythia-410m"), ("smolm2", "smollm2"), ("EleutherAI/pythia410m", "pythia-410m"), ("zzz", "")],
)
def test_did_you_mean(typed: str, meant: str) -> None:
    assert catalogue.did_you_mean(typed) == (f"; did you mean {meant}?" if meant else "")


def test_resolving_and_listing_load_no_torch() -> None:
    code = (
        "import sys, streamchat.models.load, streamchat.models.hub, streamchat.commands.models as m\n"
        "m.inventory(); m.describe('pythia-70m'); m.describe('default')\n"
        "print([name for name in ('torch', 'transformers', 'textual') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
