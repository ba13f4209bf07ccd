"""Settings: precedence, and every kind of wrong input answered with one sentence."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamchat.base import paths
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.eviction_policies import POLICIES, RENAMED_POLICIES
from streamchat.config import loader
from streamchat.config.render import render_toml
from streamchat.config.settings import Settings, default_of, setting_fields, settings_by_model, spec_of

HEAD = "[streamchat]\nconfig_version = 1\n"


def write(text: str | bytes, path: Path | str = "streamchat.toml") -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(
    flags: dict[str, Any] | None = None, env: dict[str, str] | None = None, file: str = ""
) -> loader.Configuration:
    """Load with a configuration file of these tables."""
    path = write(HEAD + file) if file else None
    return loader.load(flags, config_file=path, environ=env or {})


def refusal(flags: dict[str, Any] | None = None, env: dict[str, str] | None = None, file: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, env, file)
    assert caught.value.exit_code == ExitCode.USAGE
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the file at the top of the repository --------------------------------------------------------------------


def test_the_documented_file_is_the_one_the_program_writes() -> None:
    assert (Path(__file__).parents[2] / "config.toml").read_text(encoding="utf-8") == render_toml()


def test_the_documented_file_changes_nothing() -> None:
    loaded = loader.load(config_file=Path(__file__).parents[2] / "config.toml", environ={})
    assert loaded.settings == Settings()
    assert not loaded.origins


def test_every_setting_is_in_the_documented_file_with_its_default() -> None:
    text = render_toml()
    for name in settings_by_model():  # comments: a line would overrule the model
        assert f"\n# {name} = " in text
        text = text.replace(f"\n# {name} = ", f"\n{name} = ")
    tables = tomllib.loads(text)
    assert {(section, name) for section, table in tables.items() if section != "streamchat" for name in table} == {
        (spec_of(name).section, name) for name in setting_fields()
    }
    for name in setting_fields():
        default = default_of(name)
        assert tables[spec_of(name).section][name] == (json.loads(default) if spec_of(name).is_table else default)


# --- what a model advises ---------------------------------------------------------------------------------------

ADVICE = {"temperature": 0.2, "top_p": 0.95, "top_k": 20}
ADVICE_ORIGINS = dict.fromkeys(ADVICE, "the catalogue")


@pytest.mark.parametrize("how", ["flag", "variable", "file", "file with the default"])
def test_what_the_user_gave_wins_over_the_model_and_the_rest_is_its_advice(how: str) -> None:
    value = default_of("temperature") if how == "file with the default" else 0.5
    loaded = load(
        {"temperature": value} if how == "flag" else None,
        {"STREAMCHAT_TEMPERATURE": "0.5"} if how == "variable" else None,
        f"[generation]\ntemperature = {value}\n" if how.startswith("file") else "",
    )
    advised = loaded.advised_by(ADVICE, ADVICE_ORIGINS)
    assert (advised.settings.temperature, advised.settings.top_p, advised.settings.top_k) == (value, 0.95, 20)
    assert advised.settings.min_p == default_of("min_p")
    assert advised.origin("temperature") == loaded.origin("temperature") != "the default"
    assert (advised.origin("top_p"), advised.origin("min_p")) == ("the catalogue", "the default")
    assert not advised.is_explicit("top_p")


def test_the_advice_for_another_model_replaces_the_earlier_one() -> None:
    first = load({"top_k": 5}).advised_by(ADVICE, ADVICE_ORIGINS)
    second = first.advised_by({"top_k": 64, "min_p": 0.1}, {"top_k": "its file", "min_p": "its file"})
    assert (second.settings.top_k, second.settings.min_p) == (5, 0.1)
    assert second.settings.temperature == default_of("temperature")
    assert (second.origin("min_p"), second.origin("temperature")) == ("its file", "the default")


def test_a_copy_of_the_printed_file_pins_no_advice() -> None:
    printed = render_toml(load().advised_by(ADVICE, ADVICE_ORIGINS))
    assert "# from the catalogue\n# temperature = 0.2\n" in printed
    assert loader.load(config_file=write(printed, "copy.toml"), environ={}).settings == Settings()
    given = render_toml(load({"temperature": 0.4}).advised_by(ADVICE, ADVICE_ORIGINS))
    assert "# from --temperature\ntemperature = 0.4\n" in given


# --- precedence -----------------------------------------------------------------------------------------------


def test_flag_beats_environment_beats_file_beats_default() -> None:
    file = "[cache]\ncache_size = 100\n[generation]\ntop_k = 1\ntop_p = 0.1\n"
    env = {"STREAMCHAT_CACHE_SIZE": "200", "STREAMCHAT_TOP_K": "2"}
    loaded = load({"cache_size": 300, "seed": None}, env, file)
    assert (loaded.settings.cache_size, loaded.settings.top_k, loaded.settings.top_p) == (300, 2, 0.1)
    assert loaded.settings.temperature == default_of("temperature")
    assert loaded.origin("cache_size") == "--cache-size"
    assert loaded.origin("top_k") == "STREAMCHAT_TOP_K"
    assert loaded.origin("top_p") == "streamchat.toml"
    assert loaded.origin("temperature") == "the default"
    assert not loaded.is_explicit("seed")


def test_file_search_explicit_then_variable_then_local_then_user() -> None:
    def sink_count(config_file: Path | None = None, **env: str) -> int:
        return loader.load(config_file=config_file, environ=env).settings.num_sink_tokens

    assert sink_count() == 4
    write(HEAD + "[cache]\nnum_sink_tokens = 11", paths.config_dir() / "config.toml")
    assert sink_count() == 11
    write(HEAD + "[cache]\nnum_sink_tokens = 12", "config.toml")
    assert sink_count() == 12
    write(HEAD + "[cache]\nnum_sink_tokens = 13", "variable.toml")
    assert sink_count(STREAMCHAT_CONFIG="variable.toml") == 13
    explicit = write(HEAD + "[cache]\nnum_sink_tokens = 14", "explicit.toml")
    assert sink_count(explicit, STREAMCHAT_CONFIG="variable.toml") == 14


@pytest.mark.parametrize(
    "foreign",
    ["[tool]\nname = 'other'\n", "streamchat = 'a word'\n", "not toml at all [", b"\xff\xfe\x00", "a = [" * 3000],
)
def test_a_foreign_config_toml_in_the_working_folder_is_ignored(foreign: str | bytes) -> None:
    write(foreign, "config.toml")
    assert loader.load(environ={}).file is None


def test_a_broken_config_toml_of_ours_is_reported() -> None:
    write("[streamchat]\n[cache\n", "config.toml")
    with pytest.raises(ConfigError, match=r"^config\.toml: not valid TOML: .*line 2"):
        loader.load(environ={})


def test_an_empty_variable_is_not_set() -> None:
    loaded = load(env={"STREAMCHAT_CACHE_SIZE": "", "STREAMCHAT_MODEL": "", "STREAMCHAT_CONFIG": ""})
    assert loaded.settings == Settings()
    assert not loaded.origins


def test_variables_that_are_no_settings_are_left_alone() -> None:
    assert load(env={"STREAMCHAT_HOME": "x", "STREAMCHAT_DEBUG": "1", "PATH": "y"}).settings == Settings()


@pytest.mark.parametrize(("old", "today"), RENAMED_POLICIES.items())
def test_a_choice_under_its_old_name_means_the_same(old: str, today: str) -> None:
    """In a file, the environment and on the command line."""
    user_file = Path("old.toml")
    user_file.write_text(f"[streamchat]\n[cache]\nevict = '{old}'\n")
    assert loader.load(config_file=user_file, environ={}).settings.evict == today
    assert load(env={"STREAMCHAT_EVICT": old}).settings.evict == today
    found = loader.load({"evict": old}, environ={})
    assert (found.settings.evict, found.origin("evict")) == (today, "--evict")


def test_the_policies_to_choose_from_are_those_that_are_registered() -> None:
    with pytest.raises(ConfigError, match="evict = 'newest' is not valid; it must be one of " + ", ".join(POLICIES)):
        load(env={"STREAMCHAT_EVICT": "newest"})
    for name, evicts in POLICIES.items():
        assert load(env={"STREAMCHAT_EVICT": name}).settings.evict == name
        assert f"{name} ({evicts})" in spec_of("evict").help


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False), ("No", False)]
)
def test_booleans_as_text(text: str, value: bool) -> None:
    assert load(env={"STREAMCHAT_PLAIN": text}).settings.plain is value


def test_a_whole_number_is_a_number() -> None:
    value = load(file="[generation]\ntemperature = 1\n").settings.temperature
    assert isinstance(value, float)
    assert value == 1


def test_byte_order_mark_and_windows_lines_are_read() -> None:
    path = write(b"\xef\xbb\xbf[streamchat]\r\n[cache]\r\ncache_size = 64\r\n", "config.toml")
    assert loader.load(environ={}).settings.cache_size == 64
    assert loader.load(config_file=path, environ={}).settings.cache_size == 64


# --- two ways to give the budget ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2048, 1024])  # 1024 is the default, and was still asked for
def test_a_stronger_cache_size_replaces_a_weaker_ratio(size: int) -> None:
    loaded = load({"cache_size": size}, file="[cache]\ncompression_ratio = 0.5\n")
    assert (loaded.settings.cache_size, loaded.settings.compression_ratio) == (size, 0)
    assert not loaded.is_explicit("compression_ratio")


def test_a_stronger_ratio_replaces_a_weaker_cache_size() -> None:
    loaded = load(env={"STREAMCHAT_COMPRESSION_RATIO": "0.5"}, file="[cache]\ncache_size = 64\n")
    assert loaded.settings.compression_ratio == 0.5
    assert not loaded.is_explicit("cache_size")


def test_switching_the_ratio_off_keeps_a_weaker_cache_size() -> None:
    loaded = load({"compression_ratio": 0.0}, file="[cache]\ncache_size = 64\n")
    assert loaded.settings.cache_size == 64


def test_both_in_one_place_are_refused_with_both_places() -> None:
    message = refusal({"cache_size": 512, "compression_ratio": 0.5})
    assert "--cache-size" in message
    assert "--compression-ratio" in message


def test_the_full_file_with_only_the_ratio_changed_is_legal() -> None:
    text = render_toml().replace("compression_ratio = 0.0", "compression_ratio = 0.5")
    loaded = loader.load(config_file=write(text), environ={})
    assert loaded.settings.compression_ratio == 0.5


# --- wrong input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ("[cache]\ncache_sice = 5\n", ["unknown key cache.cache_sice", "did you mean cache_size?"]),
        ("[cach]\ncache_size = 50\n", ["unknown table or key cach", "did you mean cache?"]),
        ("[zzz]\n", ["unknown table or key zzz", "cache, chat, generation, interface, keys, model"]),
        ("[model]\ncache_size = 50\n", ["cache_size belongs in [cache], not in [model]"]),
        ("[cache]\ncache_size = true\n", ["cache_size must be a whole number, at least 16, not true"]),
        ("[cache]\ncache_size = 64.0\n", ["cache_size must be a whole number, at least 16, not 64.0"]),
        ("[cache]\ncache_size = '64'\n", ["cache_size must be a whole number, at least 16, not '64'"]),
        ("[cache]\ncache_size = [64]\n", ["cache_size must be a whole number, at least 16, not [64]"]),
        ("[cache]\ncache_size = 0\n", ["cache_size = 0 is not valid", "at least 16"]),
        ("[cache]\ncache_size = -512\n", ["cache_size = -512 is not valid", "at least 16"]),
        ("[cache]\nnum_sink_tokens = -1\n", ["num_sink_tokens = -1 is not valid", "at least 0"]),
        ("[cache]\ncompression_ratio = 1.0\n", ["compression_ratio = 1.0 is not valid", "below 1"]),
        ("[cache]\ncompression_ratio = nan\n", ["compression_ratio = nan is not valid", "at least 0 and below 1"]),
        ("[generation]\ntemperature = nan\n", ["temperature = nan is not valid", "at least 0 and at most 10"]),
        ("[generation]\ntemperature = inf\n", ["temperature = inf is not valid", "at least 0 and at most 10"]),
        ("[generation]\ntemperature = true\n", ["temperature must be a number, at least 0 and at most 10, not true"]),
        ("[generation]\ntop_p = 0\n", ["top_p = 0.0 is not valid", "above 0 and at most 1"]),
        ("[generation]\nrepetition_penalty = 0.0\n", ["repetition_penalty = 0.0 is not valid", "above 0"]),
        ("[generation]\nmax_new_tokens = 0\n", ["max_new_tokens = 0 is not valid", "at least 1"]),
        ("[generation]\nseed = 99999999999999999999\n", ["seed = 9", "at most 9223372036854775807"]),
        ("[model]\ndevice = 'tpu'\n", ["device = 'tpu' is not valid", "one of auto, cpu, cuda, mps"]),
        ("[model]\ndevice = 1\n", ["device must be one of auto, cpu, cuda, mps, cuda:all, cuda:N[,N], not 1"]),
        ("[interface]\nplain = 1\n", ["plain must be true or false, not 1"]),
        ("[chat]\nsystem_prompt = 2024-01-01\n", ["system_prompt must be text"]),
        ("[cache]\nnum_sink_tokens = 1024\n", ["num_sink_tokens = 1024", "cache_size = 1024", "from 0 to 1023"]),
        ("[cache]\ncache_size = 16\nnum_sink_tokens = 16\n", ["num_sink_tokens = 16", "from 0 to 15"]),
        ("[cache]\ncache_size = 64\ncompression_ratio = 0.5\n", ["cache_size", "compression_ratio", "give one"]),
        ("[cache]\ncache_size = " + "9" * 5000, ["not valid TOML"]),
        ("[cache]\ncache_size = 0x" + "f" * 5000, ["cache_size = a number with too many digits is not valid"]),
        ("[generation]\ntop_k = " + "9" * 30, ["top_k = 9", "must be at most 9223372036854775807"]),
        ("[generation]\ntemperature = " + "9" * 400, ["temperature = inf is not valid", "at most 10"]),
        ("[interface]\ntheme = 0x" + "f" * 5000, ["theme must be text, not a number with too many digits"]),
        ("x = " + "[" * 5000, ["not valid TOML"]),
        ("[cache\n", ["not valid TOML", "line 3"]),
        ("[cache]\na = 1\na = 2\n", ["not valid TOML"]),
    ],
)
def test_a_wrong_file_names_file_key_and_legal_range(tables: str, words: list[str]) -> None:
    message = refusal(file=tables)
    assert "streamchat.toml" in message
    assert len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cache_size = 64\n" + HEAD, ["cache_size belongs in the table [cache]"]),
        ("[streamchat]\nconfig_version = 0x" + "f" * 5000, ["config_version = a number with too many digits"]),
        ("cache = 64\n" + HEAD, ["cache must be a table, [cache], not 64"]),
        ("[cache]\ncache_size = 64\n", ["no", "[streamchat]"]),
        ("streamchat = 1\n", ["[streamchat]"]),
        ("", ["[streamchat]"]),
        ("[streamchat]\nconfig_version = 2\n", ["config_version = 2 is not supported; it must be 1"]),
        ("[streamchat]\nconfig_version = true\n", ["config_version = true"]),
        ("[streamchat]\ncache_size = 64\n", ["unknown key streamchat.cache_size"]),
        (HEAD.encode() + b"# caf\xe9\n", ["not UTF-8 text", "save it as UTF-8"]),
    ],
)
def test_a_file_that_is_no_streamchat_file_is_refused(text: str | bytes, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        loader.load(config_file=write(text), environ={})
    for word in ["streamchat.toml", *words]:
        assert word in str(caught.value)


def test_a_missing_file_a_folder_and_an_unreadable_file_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^none\.toml: no such configuration file$"):
        loader.load(config_file=Path("none.toml"), environ={})
    with pytest.raises(ConfigError, match=r"^\.: cannot read the configuration file \(Is a directory\)$"):
        loader.load(config_file=Path(), environ={})
    if os.geteuid():
        path = write(HEAD)
        path.chmod(0)
        with pytest.raises(ConfigError, match="Permission denied"):
            loader.load(config_file=path, environ={})


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("STREAMCHAT_CACHE_SIZE", "big", ["cache_size must be a whole number, at least 16, not 'big'"]),
        ("STREAMCHAT_CACHE_SIZE", "٦٤", ["cache_size must be a whole number, at least 16, not '٦٤'"]),
        ("STREAMCHAT_TEMPERATURE", "٠.٥", ["temperature must be a"]),
        ("STREAMCHAT_CACHE_SIZE", "64.5", ["cache_size must be a whole number"]),
        ("STREAMCHAT_CACHE_SIZE", "15", ["cache_size = 15 is not valid; it must be at least 16"]),
        ("STREAMCHAT_TEMPERATURE", "nan", ["temperature = nan is not valid"]),
        ("STREAMCHAT_TEMPERATURE", "-0.1", ["temperature = -0.1 is not valid"]),
        ("STREAMCHAT_PLAIN", "maybe", ["plain must be true or false, not 'maybe'"]),
        ("STREAMCHAT_DTYPE", "int8", ["dtype = 'int8' is not valid; it must be one of auto, float32"]),
        ("STREAMCHAT_CACHE_SICE", "64", ["unknown setting; did you mean STREAMCHAT_CACHE_SIZE?"]),
        ("STREAMCHAT_QQQQ", "64", ["unknown setting"]),
        ("STREAMCHAT_SYSTEM_PROMPT", "caf\udce9", ["system_prompt", "not valid UTF-8 text"]),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, words: list[str]) -> None:
    message = refusal(env={variable: text})
    for word in [variable, *words]:
        assert word in message


def test_sinks_and_budget_from_two_places_name_both() -> None:
    message = refusal({"cache_size": 512}, file="[cache]\nnum_sink_tokens = 600\n")
    assert message.startswith("streamchat.toml: num_sink_tokens = 600")
    assert "cache_size = 512 (--cache-size)" in message


def test_long_values_are_shortened() -> None:
    assert len(refusal({"device": "x" * 10_000})) < 300


# --- what is written is what is read --------------------------------------------------------------------------


def value_strategy(name: str) -> st.SearchStrategy[Any]:
    default, spec = default_of(name), spec_of(name)
    if spec.choices:
        return st.sampled_from(spec.choices)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        top = int(spec.maximum) if spec.maximum is not None else None
        return st.integers(int(spec.minimum or 0), top)
    if isinstance(default, float):
        return st.floats(
            spec.minimum,
            spec.maximum,
            exclude_min=spec.above_minimum,
            exclude_max=spec.below_maximum,
        )
    return st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: value_strategy(name) for name in setting_fields()}))
def test_rendered_settings_read_back_the_same(values: dict[str, Any]) -> None:
    try:
        configuration = loader.load(values, environ={})
    except ConfigError:  # two that do not go together
        return
    path = write(render_toml(configuration), "rendered.toml")
    again = loader.load(config_file=path, environ={})
    assert again.settings == configuration.settings


def test_a_rendered_configuration_says_where_values_came_from() -> None:
    text = render_toml(load({"seed": 3}, {"STREAMCHAT_TOP_K": "5"}, "[cache]\ncache_size = 64\n"))
    lines = text.splitlines()
    for origin, line in (
        ("--seed", "seed = 3"),
        ("STREAMCHAT_TOP_K", "top_k = 5"),
        ("streamchat.toml", "cache_size = 64"),
    ):
        assert lines[lines.index(line) - 1] == f"# from {origin}"
    assert text.count("# from ") == 3


def test_a_file_name_with_a_line_break_stays_a_comment() -> None:
    path = write(HEAD + "[cache]\ncache_size = 64\n", "a\n[x].toml")
    text = render_toml(loader.load(config_file=path, environ={}))
    assert tomllib.loads(text)["cache"]["cache_size"] == 64
    assert "x" not in tomllib.loads(text)
