"""Which settings a resumed session brings, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat.config.loader import ARGUMENT_ORIGIN, SESSION_ORIGIN, Configuration
from streamchat.config.settings import Settings
from streamchat.sessions.settings import (
    foreign_model_notice,
    portable_model_name,
    resumed_configuration,
    sampling_notices,
    valid_settings,
    without_session_sampling,
)
from streamchat.store.records import SessionInfo

SAVED = {
    "model": "saved-model",
    "cache_size": 96,
    "temperature": 0.25,
    "top_k": 7,
    "system_prompt": "Be kind.",
    "device": "cuda",
    "dtype": "float16",
    "save": "none",
    "theme": "x",
    "max_new_tokens": -3,
    "unknown": 1,
}


def info(**settings: Any) -> SessionInfo:
    return SessionInfo("abc", "", 0, 0, "", "Shown", "", "", "", settings)


def test_a_session_brings_its_settings_and_none_of_the_machine() -> None:
    resumed = resumed_configuration(Configuration(), info(**SAVED))
    own = {name for name, origin in resumed.origins.items() if origin == f"{SESSION_ORIGIN}abc"}
    assert own == {"model", "cache_size", "temperature", "top_k", "system_prompt", "adapter"}
    assert all(getattr(resumed.settings, name) == SAVED[name] for name in own - {"adapter"})
    assert resumed.settings.adapter == ""
    assert resumed.settings.device == Settings().device


def test_flags_and_arguments_come_before_the_session() -> None:
    given = Settings(model="given", cache_size=200, temperature=0.5, top_k=3)
    origins = {"model": "--model", "cache_size": ARGUMENT_ORIGIN, "temperature": "config.toml", "top_k": "-k"}
    resumed = resumed_configuration(Configuration(given, origins), info(**SAVED, compression_ratio=0.5, adapter="a"))
    found = resumed.settings
    assert (found.model, found.cache_size, found.temperature, found.top_k) == ("given", 200, 0.25, 3)
    assert found.compression_ratio == Settings().compression_ratio  # the flag chose the other one of the two
    assert found.adapter == ""  # of the model of the session
    assert resumed.origins == {
        "model": "--model",
        "cache_size": ARGUMENT_ORIGIN,
        "temperature": f"{SESSION_ORIGIN}abc",
        "top_k": "-k",
        "system_prompt": f"{SESSION_ORIGIN}abc",
    }


def test_settings_that_are_not_valid_are_ignored() -> None:
    assert valid_settings({"top_k": 7, "temperature": -1, "unknown": 2}, "a file") == {"top_k": 7}


def test_a_session_that_samples_otherwise_is_told() -> None:
    new = Configuration(Settings(temperature=1, top_k=5))
    resumed = resumed_configuration(new, info(temperature=0.25, top_k=5))
    assert sampling_notices(resumed, new) == [
        "This session keeps the sampling settings that it was run with: temperature 0.25; a new chat would use "
        "temperature 1."
    ]
    resumed = resumed_configuration(new, info(temperature=0.25, top_k=9))
    assert sampling_notices(resumed, new) == [
        "This session keeps the sampling settings that it was run with: temperature 0.25, top_k 9; a new chat would "
        "use temperature 1, top_k 5."
    ]
    assert sampling_notices(resumed_configuration(new, info(temperature=1.0)), new) == []
    assert sampling_notices(Configuration(Settings(temperature=0.5)), new) == []  # not by the session


def test_another_model_has_the_sampling_of_the_start() -> None:
    start = Configuration(Settings(temperature=0.75, cache_size=80), {"temperature": "config.toml"})
    resumed = resumed_configuration(start, info(temperature=0.25, top_k=9, cache_size=96))
    other = without_session_sampling(resumed, start)
    assert (other.settings.temperature, other.settings.top_k) == (0.75, Settings().top_k)
    assert other.settings.cache_size == 96
    assert other.origins == {"temperature": "config.toml", "cache_size": f"{SESSION_ORIGIN}abc"}


def test_sampling_that_was_changed_in_the_chat_stays_with_another_model() -> None:
    start = Configuration(Settings(), {})
    resumed = resumed_configuration(start, info(temperature=0.25))
    origins = {**resumed.origins, "min_p": "chat"}
    changed = replace(resumed, settings=replace(resumed.settings, min_p=0.5), origins=origins)
    other = without_session_sampling(changed, start)
    assert (other.settings.min_p, other.settings.temperature) == (0.5, Settings().temperature)
    assert other.origins == {"min_p": "chat"}


def test_the_name_that_a_file_shows_for_a_model_is_told() -> None:
    text = "the imported session abc names the model {}, which was never used for it here"
    assert foreign_model_notice(info(), "hub/model") == text.format("hub/model (displayed as “Shown”)")
    assert foreign_model_notice(info(), "Shown") == text.format("Shown")


def test_a_folder_is_saved_as_an_absolute_path_and_a_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a session resumes in any working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    assert portable_model_name("./mine") == str(tmp_path / "mine")
    assert portable_model_name("mine.gguf") == str(tmp_path / "mine.gguf")
    for name in ("default", "owner/name", "no such model"):
        assert portable_model_name(name) == name
