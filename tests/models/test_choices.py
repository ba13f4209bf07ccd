"""The models that can be chosen: which are listed, with which figures, and within which bounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from streamchat.base.progress import silent
from streamchat.models import catalogue, choices
from streamchat.models.choices import ModelChoice, free_memory, model_choices
from streamchat.models.gguf.convert import converted_copy
from streamchat.models.hub_cache import hub_cache_dir
from streamchat.models.resolve import resolve
from tests.support.models_help import in_hub_cache, save, tiny_llama, tiny_neox, write_gguf


def listed(local_files: bool = True) -> dict[str, ModelChoice]:
    return {each.name: each for each in model_choices(local_files=local_files)}


def test_every_alias_has_figures() -> None:
    assert set(catalogue.FACTS) == {catalogue.DEFAULT, *catalogue.ALIASES}
    found = listed()
    assert set(found) == set(catalogue.FACTS)
    assert all(each.size_bytes and each.memory_bytes and each.context_length for each in found.values())
    assert not any(each.is_here for each in found.values())
    alias = found["pythia-410m"]
    assert (alias.label, alias.source, alias.place) == ("EleutherAI/pythia-410m", "EleutherAI/pythia-410m", "hub")
    assert alias.context_length == 2048
    assert round(alias.memory_bytes / 1e9, 1) == 1.7
    half = {each.name: each for each in model_choices(dtype="bfloat16")}["pythia-410m"]
    assert half.memory_bytes == pytest.approx(alias.memory_bytes / 2)


def test_what_is_in_the_hub_cache_comes_first_with_its_own_figures() -> None:
    in_hub_cache("EleutherAI/pythia-70m", tiny_neox())
    in_hub_cache("someone/own", tiny_llama())
    snapshot = hub_cache_dir() / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    size = write_gguf(snapshot / "b-Q8_0.gguf").stat().st_size
    names = list(listed())
    assert names[:4] == ["default", "pythia-70m", "someone/own", "a/b/b-Q8_0.gguf"]
    assert names.count("pythia-70m") == 1
    found = listed()
    assert found["pythia-70m"].is_here
    assert (found["pythia-70m"].context_length, found["pythia-70m"].source) == (128, "EleutherAI/pythia-70m")
    gguf = found["a/b/b-Q8_0.gguf"]
    assert (gguf.size_bytes, gguf.context_length, gguf.place, gguf.is_here) == (size, 128, "hub-cache", True)
    parameters = sum(weight.numel() for weight in tiny_llama().parameters())
    assert found["someone/own"].memory_bytes == int(4 * parameters * choices.HEADROOM)


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "deep" / "deeper", home / ".hidden", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.chdir(home)
    save(tiny_neox(), home / "mine")
    for path in ("a.gguf", "deep/b.GGUF", "deep/deeper/c.gguf", ".hidden/d.gguf", "mmproj-a.gguf"):
        write_gguf(home / path)
    (home / "not.gguf").mkdir()
    (home / "broken.gguf").write_bytes(b"GGUF")
    converted_copy(write_gguf(elsewhere / "used.gguf", rope_theta=5.0), progress=silent)
    found = {name: each for name, each in listed().items() if each.place == "here"}
    assert set(found) == {"./a.gguf", "./broken.gguf", "./deep/b.GGUF", "./mine", str(elsewhere / "used.gguf")}
    assert found["./a.gguf"].context_length == found["./mine"].context_length == 128
    assert found["./broken.gguf"].context_length == 0
    for each in found.values():
        assert resolve(each.name).location == each.source  # as the loaded model names it
    assert not [name for name, each in listed(local_files=False).items() if each.place == "here"]


def test_broken_links_do_not_end_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, target in (("loop.gguf", "loop.gguf"), ("loop", "loop"), ("gone.gguf", "gone"), ("long.gguf", "n" * 300)):
        (tmp_path / name).symlink_to(target)
    write_gguf(tmp_path / "model.gguf")
    assert [name for name, each in listed().items() if each.place == "here"] == ["./model.gguf"]


@pytest.mark.parametrize("index", ["[" * 100_000, '{"weight_map": ' + "[" * 100_000, "[]", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_does_not_end_the_list(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tiny_llama(), tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").unlink()
    (tmp_path / "mine" / "model.safetensors.index.json").write_text(index)
    assert not [name for name, each in listed().items() if each.place == "here"]


def test_the_search_of_the_current_folder_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "MAX_ENTRIES", 10)
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    for number in range(30):
        (tmp_path / f"{number:02}.gguf").write_bytes(b"GGUF")
    assert 9 <= len([each for each in listed().values() if each.place == "here"]) <= 10


def test_a_damaged_cache_does_not_end_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = in_hub_cache("a/b", tiny_llama())
    (folder / "config.json").write_text("{")
    assert "a/b" not in listed()
    assert "pythia-70m" in listed()


def test_free_memory_asks_the_device() -> None:
    assert (free_memory("cpu") or 0) > 0
    assert free_memory("cpu") == pytest.approx(free_memory(""), rel=0.5)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from streamchat.frontend.model_list import find_models, models_text\n"
        "assert 'pythia-70m' in models_text(find_models(None))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
