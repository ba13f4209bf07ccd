"""The sampling settings that a model advises: read from its files or the catalogue, checked, and never in the way."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from streamchat.config.loader import Configuration, check_value
from streamchat.config.settings import Settings, settings_by_model
from streamchat.models.catalogue import SAMPLING, sampling_of
from streamchat.models.gguf.header import HeaderError, read_general
from streamchat.models.load import load_model
from streamchat.models.resolve import Source, resolve
from streamchat.models.sampling import IN_CATALOGUE, IN_GENERATION_CONFIG, IN_GGUF, advised, sampling_advice
from tests.support.models_help import save, tiny_llama, write_gguf

SMOLLM2 = {"temperature": 0.2, "top_p": 0.9}
SAMPLING_KEYS = {
    "general.sampling.temp": 0.9,
    "general.sampling.top_p": 0.8,
    "general.sampling.top_k": 20,
    "general.sampling.min_p": 0.05,
    "general.sampling.penalty_repeat": 1.05,
}


def folder_of(path: Path, content: object) -> Path:
    """A folder with this generation_config."""
    path.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "generation_config.json").write_text(text)
    return path


def advice_of(folder: Path, name: str = "mine") -> dict[str, Any]:
    return dict(sampling_advice(Source("folder", name, str(folder), True), folder).values)


def test_a_generation_config_advises_what_it_lists(tmp_path: Path) -> None:
    given = {"temperature": 1, "top_k": 64, "do_sample": True, "eos_token_id": [1, 2], "min_p": None}
    advice = sampling_advice(Source("folder", "mine", "", True), folder_of(tmp_path, given))
    assert advice.values == {"temperature": 1.0, "top_k": 64}
    assert set(advice.origins.values()) == {IN_GENERATION_CONFIG}
    assert not advice.notes


@pytest.mark.parametrize("value", [-1, 11, "warm", True, [0.5], float("nan")])
def test_a_value_that_is_not_legal_is_ignored_with_a_note(tmp_path: Path, value: object) -> None:
    folder = folder_of(tmp_path, {"temperature": value, "top_p": 0.5})
    advice = sampling_advice(Source("folder", "mine", "", True), folder)
    assert advice.values == {"top_p": 0.5}
    (note,) = advice.notes
    assert note.startswith("the model's generation_config has temperature = ")
    assert note.endswith(", which is not valid, so it is ignored")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "null", "[" * 100_000])
def test_a_file_that_cannot_be_read_advises_nothing(tmp_path: Path, content: str) -> None:
    assert advice_of(folder_of(tmp_path, content)) == {}


def test_the_catalogue_fills_what_the_files_do_not_say(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"temperature": 0.3})
    source = Source("hub-cache", "Qwen3-0.6B", str(folder), True, "Qwen/Qwen3-0.6B")
    advice = sampling_advice(source, folder)
    assert advice.values == {"temperature": 0.3, "top_p": 0.95, "top_k": 20}
    assert advice.origins == {
        "temperature": IN_GENERATION_CONFIG,
        "top_p": IN_CATALOGUE,
        "top_k": IN_CATALOGUE,
    }


@pytest.mark.parametrize(
    "name",
    ["HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-1.7b-instruct-Q4_K_M", "SmolLM2-135M-Instruct.f16",
     "bartowski/SmolLM2-1.7B-Instruct-GGUF", "SmolLM2-135M-Instruct-IQ3_XS"],
)  # fmt: skip
def test_copies_of_known_models_are_recognized(name: str) -> None:
    assert sampling_of(name).items() >= SMOLLM2.items()


@pytest.mark.parametrize("name", ["SmolLM2-135M", "my-SmolLM2-360M-Instruct", "mine", "", "Q4_K_M"])
def test_other_names_are_not_known(name: str) -> None:
    assert sampling_of(name) == {}


def test_all_values_of_the_catalogue_are_legal_settings() -> None:
    for values in SAMPLING.values():
        for name, value in values.items():
            assert name in settings_by_model()
            check_value(name, value, "the catalogue")


def test_the_metadata_of_a_gguf_file_advise(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata=SAMPLING_KEYS | {"general.author": "me"})
    advice = sampling_advice(resolve(str(path)), None)
    assert advice.values == {
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
    }
    assert set(advice.origins.values()) == {IN_GGUF}
    assert read_general(path)["general.author"] == "me"
    assert load_model(str(path), device="cpu").advice == advice


def test_damaged_metadata_advise_nothing(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", metadata=SAMPLING_KEYS).read_bytes()
    path = tmp_path / "cut.gguf"
    end = whole.index(b"tokenizer.ggml.tokens") + 100
    for length in [4, 8, 12, 30, *range(40, end, 97)]:
        path.write_bytes(whole[:length])
        with pytest.raises(HeaderError):
            read_general(path)
        assert sampling_advice(Source("gguf", "cut", str(path), True), None).values == {}
    path.write_bytes(whole[:4] + struct.pack("<I", 99) + whole[8:])
    with pytest.raises(HeaderError, match="known version"):
        read_general(path)
    path.write_bytes(whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:])
    with pytest.raises(HeaderError, match="not possible"):
        read_general(path)


def test_a_loaded_folder_has_its_advice_and_the_notes(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "mine")
    content = json.loads((folder / "generation_config.json").read_text())
    folder_of(folder, content | {"temperature": 0.4, "do_sample": True, "top_k": -5})
    loaded = load_model(str(folder), device="cpu")
    assert loaded.advice.values == {"temperature": 0.4}
    assert "the model's generation_config has top_k = -5, which is not valid, so it is ignored" in loaded.notes
    configuration = advised(Configuration(Settings(model=str(folder)), {"model": "--model"}))
    assert (configuration.settings.temperature, configuration.origin("temperature")) == (0.4, IN_GENERATION_CONFIG)


def test_a_model_that_is_not_here_has_the_advice_of_the_catalogue() -> None:
    configuration = advised(Configuration(Settings(model="qwen3-0.6b"), {"model": "--model"}))
    assert (configuration.settings.top_k, configuration.origin("top_k")) == (20, IN_CATALOGUE)
    assert advised(Configuration(Settings(model="./not here"), {"model": "--model"})).settings.top_k == 0
