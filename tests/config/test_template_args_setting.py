"""The setting `template_args`, a table: all its sources, and every kind of wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from streamchat.base.errors import ConfigError
from streamchat.cli.main import main
from streamchat.config.loader import Configuration, load
from streamchat.config.render import render_toml
from streamchat.config.settings import Settings

TABLE = "[streamchat]\n[chat.template_args]\na = 1\nnested = { b = [true, 'x'] }\n"


def test_a_table_merges_by_name_over_all_sources(tmp_path: Path) -> None:
    file = tmp_path / "table.toml"
    file.write_text(TABLE)
    environ = {"STREAMCHAT_TEMPLATE_ARGS": '{"a": 2, "c": null}'}
    configuration = load({"template_args": {"d": "text"}}, config_file=file, environ=environ)
    assert json.loads(configuration.settings.template_args) == {
        "a": 2,
        "nested": {"b": [True, "x"]},
        "c": None,
        "d": "text",
    }
    assert configuration.origin("template_args.a") == "STREAMCHAT_TEMPLATE_ARGS"
    assert configuration.origin("template_args.nested") == str(file)
    assert configuration.origin("template_args.d") == "--template-arg"


@pytest.mark.parametrize(
    "value", ['{"a": 1, "nested": {"b c": [true, "x", 1.5]}}', '{"a": null}', '{"a": {"b": null}}', '{"a": []}', "{}"]
)
def test_a_printed_table_reads_back(tmp_path: Path, value: str) -> None:
    file = tmp_path / "printed.toml"
    file.write_text(render_toml(Configuration(Settings(template_args=value))))
    assert json.loads(load(config_file=file, environ={}).settings.template_args) == json.loads(value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[chat]\ntemplate_args = 3", "must be a table of names and values, not 3"),
        ("[chat.template_args]\nbos_token = 'x'", "bos_token is reserved"),
        ("[chat.template_args]\n'a b' = 1", "'a b' is not a name"),
        ("[chat.template_args]\na = 2026-01-01", "its values must be text, numbers"),
        ("[chat.template_args]\na = nan", "its values must be text, numbers"),
        ("[chat]\ntemplate_args = '{'", "is not a JSON object"),
        ('[chat]\ntemplate_args = \'{"a": ' + "9" * 5000 + "}'", "template_args: a number in it has too many digits"),
        ("[chat.template_args]\na = " + "[" * 32 + "]" * 32, "it is nested too deeply; the limit is 32 levels"),
        (
            "[chat]\ntemplate_args = 'a=" + "[" * 900 + "]" * 900 + "'",
            "it is nested too deeply; the limit is 32 levels",
        ),
        ("[template_args]\na = 1", "template_args belongs in the table [chat]"),
    ],
)
def test_a_wrong_table_is_one_sentence_with_the_file(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(f"[streamchat]\n{content}\n")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load(config_file=file, environ={})
    assert str(file) in str(caught.value)


def test_the_flag_of_a_table_is_repeatable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--template-arg", "a=1", "--template-arg", "b=two words", "--template-arg", "a=[2]"]) == 0
    assert 'template_args = { a = [2], b = "two words" }' in capsys.readouterr().out
    for wrong, said in (("tools=[]", "tools is reserved"), ("x", "'x' is not NAME=VALUE")):
        assert main(["config", "--template-arg", wrong]) == 2
        assert f"--template-arg: {said}" in capsys.readouterr().err
