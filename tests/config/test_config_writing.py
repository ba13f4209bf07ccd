"""Settings written into a configuration file: only their lines change, and a file never gets worse."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ConfigError
from streamchat.config.loader import check_value, load
from streamchat.config.render import render_toml
from streamchat.config.settings import default_of, setting_fields, spec_of
from streamchat.config.writing import write_settings

MINE = """# my file
[streamchat]
config_version = 1

[generation]
# not too hot
temperature = 0.9   # for stories
# top_p = 0.9

[chat.template_args]
# a switch
enable_thinking = true  # slow

# the keys come first here
[keys]
chat.stop = "ctrl+x"

[cache]
cache_size = 512
"""


def changed(tmp_path: Path, text: str, changes: dict[str, Any]) -> str:
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode())
    write_settings(file, changes)
    return file.read_bytes().decode()


def test_only_the_lines_of_the_settings_change(tmp_path: Path) -> None:
    after = changed(tmp_path, MINE, {"temperature": 0.25, "cache_size": 2048})
    assert after == MINE.replace("0.9   # for", "0.25   # for").replace("cache_size = 512", "cache_size = 2048")
    removed = changed(tmp_path, MINE, {"temperature": None, "top_k": None})
    assert removed == MINE.replace("temperature = 0.9   # for stories\n", "")


def test_a_new_setting_goes_into_its_table_and_a_new_table_to_the_end(tmp_path: Path) -> None:
    after = changed(tmp_path, MINE, {"top_k": 40, "theme": "nord"})
    assert after == MINE.replace("[generation]\n", "[generation]\ntop_k = 40\n") + '\n[interface]\ntheme = "nord"\n'


def test_line_ends_stay(tmp_path: Path) -> None:
    text = MINE.replace("\n", "\r\n")
    assert changed(tmp_path, text, {"cache_size": 64}) == text.replace("= 512", "= 64")


def test_a_table_changes_by_name(tmp_path: Path) -> None:
    after = changed(tmp_path, MINE, {"template_args": '{"enable_thinking": false, "level": [1, {"a": "b"}]}'})
    lines = 'level = [1, {a = "b"}]\n# a switch\nenable_thinking = false  # slow\n\n# the keys come first here\n[keys]'
    assert lines in after
    cleared = changed(tmp_path, MINE, {"template_args": "{}"})
    assert tomllib.loads(cleared)["chat"] == {"template_args": {}}
    inline = changed(tmp_path, "[streamchat]\n[chat]\ntemplate_args = {a = 1} # x\n", {"template_args": '{"b": true}'})
    assert inline == "[streamchat]\n[chat]\ntemplate_args = {b = true} # x\n"
    null = changed(tmp_path, "[streamchat]\n", {"template_args": '{"a": [null]}'})
    assert tomllib.loads(null)["chat"] == {"template_args": '{"a": [null]}'}


def test_a_file_that_does_not_exist_is_created_for_the_user_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "config.toml"
    write_settings(file, {"temperature": 0.5})
    assert file.read_text() == "[streamchat]\nconfig_version = 1\n\n[generation]\ntemperature = 0.5\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "dotfiles.toml", tmp_path / "config.toml"
    real.write_text(MINE)
    real.chmod(0o644)
    link.symlink_to(real)
    write_settings(link, {"cache_size": 64})
    assert link.is_symlink()
    assert "cache_size = 64" in real.read_text()
    assert stat.S_IMODE(real.stat().st_mode) == 0o644


def test_the_two_settings_of_the_budget_replace_each_other(tmp_path: Path) -> None:
    after = changed(tmp_path, MINE, {"compression_ratio": 0.5})
    assert tomllib.loads(after)["cache"] == {"compression_ratio": 0.5}
    assert tomllib.loads(changed(tmp_path, after, {"cache_size": 128}))["cache"] == {"cache_size": 128}


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        (MINE, {"num_sink_tokens": 512}, "num_sink_tokens = 512 does not fit into cache_size = 512"),
        (MINE, {"temperature": 11.0}, "temperature = 11.0 is not valid"),
        ("[other]\na = 1\n", {"temperature": 1.0}, "not a streamchat configuration"),
        ("generation.top_k = 1\n[streamchat]\n", {"temperature": 1.0}, "too unusual to be changed here"),
        ("[streamchat]\n[generation\n", {"temperature": 1.0}, "not valid TOML"),
        ("[streamchat]\n[generation]\ntop_k = -3\n", {"temperature": 1.0}, r"mine\.toml: top_k = -3 is not valid"),
    ],
)
def test_a_refused_change_leaves_the_file_as_it_is(
    tmp_path: Path, text: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        changed(tmp_path, text, changes)
    assert (tmp_path / "mine.toml").read_text() == text
    assert os.listdir(tmp_path) == ["mine.toml"]


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(link)
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        write_settings(link, {"top_k": 4})


def other_value(name: str) -> Any:
    """A legal value that is not the default."""
    default, spec = default_of(name), spec_of(name)
    if spec.is_table:
        return '{"a": 1}'
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return next((choice for choice in spec.choices if choice != default), 'a "quoted" text\nin two lines')
    near = [0.5, default + 1, default - 1]
    return next(value for value in map(type(default), near) if value != default and is_legal(name, value))


def is_legal(name: str, value: Any) -> bool:
    try:
        check_value(name, value, "")
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", [*setting_fields()])
@pytest.mark.parametrize("start", ["", "printed"])
def test_every_setting_can_be_written_and_removed(tmp_path: Path, name: str, start: str) -> None:
    file = tmp_path / "every.toml"
    file.write_text(render_toml() if start else "[streamchat]\n")
    before = load(config_file=file, environ={}).settings
    write_settings(file, {name: other_value(name)})
    assert getattr(load(config_file=file, environ={}).settings, name) == other_value(name)
    write_settings(file, {name: None})
    assert load(config_file=file, environ={}).settings == before
