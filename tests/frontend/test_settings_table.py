"""What is written from the settings screen, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from streamchat.config import loader
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.frontend.settings_table import SettingsTable
from tests.support.scripted_engine import ScriptedEngine


def table_of(configuration: Configuration, **origins: str) -> SettingsTable:
    engine = ScriptedEngine(settings=configuration.settings)
    engine.origins = {**configuration.origins, **origins}
    return SettingsTable(engine, configuration)


def test_a_value_that_nobody_chose_is_not_written() -> None:
    """It would hide the advice for other models."""
    table = table_of(Configuration(Settings(temperature=0.2)), temperature="the catalogue")
    assert "temperature has its default, and is not set in" in table.write("temperature")
    assert "temperature" not in loader.user_file().read_text()
    table = table_of(Configuration(Settings(temperature=0.2)), temperature="/set")
    assert table.write("temperature") == f"temperature = 0.2 is written to {loader.user_file()}"
    table = table_of(Configuration(), temperature="/set")  # chosen, although it is the default of the program
    assert table.write("temperature").startswith("temperature = 0.7 is written")
    table = table_of(Configuration(), max_new_tokens="/set")
    assert table.write("max_new_tokens").startswith("max_new_tokens has its default")


def test_the_file_is_that_of_the_flag_or_the_users_own(tmp_path: Path) -> None:
    given = tmp_path / "given.toml"
    given.write_text("[streamchat]\n")
    assert table_of(loader.load(config_file=given, environ={})).file() == given
    Path("config.toml").write_text("[streamchat]\n[cache]\ncache_size = 99\n")
    local = loader.load(environ={})
    assert local.settings.cache_size == 99
    table = table_of(local)
    assert table.file() == loader.user_file()
    table.want("cache_size", 128)
    assert "config.toml overrides it in this folder" in table.write("cache_size")
    assert Path("config.toml").read_text().endswith("cache_size = 99\n")  # its trust depends on its contents


def test_a_variable_or_a_flag_that_overrides_the_file_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCHAT_TOP_K", "5")
    assert "the variable STREAMCHAT_TOP_K overrides it" in table_of(loader.load()).write("top_k")
    table = table_of(loader.load({"seed": 7}, environ={}))
    assert table.write("seed") == (
        f"seed = 7 is written to {loader.user_file()}; the flag --seed of this start is not repeated by itself"
    )


def test_the_value_in_use_needs_no_waiting() -> None:
    table = table_of(Configuration())
    table.want("cache_size", 2048)
    assert table.row("cache_size").wanted == "2048"
    table.want("cache_size", 1024)
    assert table.row("cache_size").wanted is None


def test_words_may_be_in_any_part() -> None:
    table = table_of(Configuration(replace(Settings(), theme="nord")), theme="STREAMCHAT_THEME")
    for words in ("theme", "NORD", "color full-screen", "interface streamchat_theme"):
        assert "theme" in [row.name for row in table.rows(words)]
    assert table.rows("nothing of the kind") == []
    assert [table.best_match(words) for words in ("thinking", "max new", "top", "hub id")] == [
        "thinking", "max_new_tokens", "top_p", "",
    ]  # fmt: skip


def test_a_reset_after_a_failure_leaves_the_advice_of_models() -> None:
    """The engine cannot reset it, and the default in the file would hide what a model's makers advise."""
    loader.user_file().parent.mkdir(parents=True, exist_ok=True)
    loader.user_file().write_text("[streamchat]\n[generation]\ntemperature = 0.5\n")
    table = table_of(Configuration(Settings(temperature=0.5)), temperature="/set")
    table.reset("temperature", now=False)
    assert table.row("temperature").wanted == "0.7"
    assert "temperature has its default" in table.write("temperature")
    assert "temperature" not in loader.user_file().read_text()
