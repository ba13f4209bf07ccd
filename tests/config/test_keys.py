"""The table of keys, and `[keys]` of the configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base.errors import ConfigError
from streamchat.config import keymap, loader
from streamchat.config.render import render_toml

HEAD = "[streamchat]\nconfig_version = 1\n"


def load(text: str) -> loader.Configuration:
    file = Path("streamchat.toml")
    file.write_text(HEAD + text)
    return loader.load({}, config_file=file, environ={})


def test_the_table_is_consistent() -> None:
    assert len(keymap.BY_ID) == len(keymap.KEYS)
    assert keymap.conflict({}) is None
    for key in keymap.KEYS:
        assert keymap.key_names(key.keys), key
        assert key.label
        assert key.help


def test_keys_are_read_as_dotted_ids() -> None:
    loaded = load('[keys]\nchat.stop = "f9"\nprompt.send = "ctrl+s, f10"\n')
    assert loaded.keys == {"chat.stop": "f9", "prompt.send": "ctrl+s,f10"}
    assert load("").keys == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[keys]\nchat.stp = "f9"', "unknown key keys.chat.stp; did you mean chat.stop?"),
        ('[keys]\nstop = "f9"', "keys.stop must be the id of a key such as chat.stop"),
        ("[keys]\nchat.stop = 9", "keys.chat.stop = 9 must be key names"),
        ('[keys]\nchat.stop = "control-x"', "keys.chat.stop: 'control-x' is not a key name; write it as ctrl+x"),
        ('[keys]\nchat.stop = "f9,,f8"', "keys.chat.stop: '' is not a key name"),
        ('[keys]\nchat.stop = "f9,banana"', "'banana' is not a key name"),
        ('[keys]\nchat.stop = "shift+s"', "S types a character; choose a key such as ctrl+x or f2"),
        ('[keys]\nchat.map = "slash"', "slash types a character"),
        ('[keys]\nchat.stop = ""', "must be key names"),
        ('[keys]\nchat.stop = "Ctrl+I"', "tab would be both keys.prompt.complete and keys.chat.stop"),
        ('[keys]\nchat.stop = "ctrl+y"', "ctrl+y would be both keys.chat.stop and keys.chat.copy_reply"),
        ("keys = 3", "keys must be a table"),
    ],
)
def test_wrong_keys_are_one_sentence(text: str, sentence: str) -> None:
    file = Path("streamchat.toml")
    file.write_text(f"{text}\n{HEAD}" if text.startswith("keys") else HEAD + text)
    with pytest.raises(ConfigError) as error:
        loader.load({}, config_file=file, environ={})
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_may_move_to_where_another_one_was() -> None:
    assert load('[keys]\nchat.stop = "ctrl+y"\nchat.copy_reply = "f8"').keys["chat.stop"] == "ctrl+y"


def test_the_rendered_file_lists_all_and_reads_back() -> None:
    text = render_toml()
    for key in keymap.KEYS:
        assert f'# {key.id} = "{key.keys}"' in text
    changed = load('[keys]\nchat.stop = "f9"\n')
    again = render_toml(changed)
    assert '\nchat.stop = "f9"' in again
    file = Path("again.toml")
    file.write_text(again)
    assert loader.load({}, config_file=file, environ={}).keys == changed.keys


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Ctrl+X", "ctrl+x"),
        ("Esc", "escape"),
        ("Return", "enter"),
        ("shift+ctrl+Z", "ctrl+shift+z"),
        ("shift+a", "A"),
        ("PageUp", "pageup"),
        ("ctrl+m", "enter"),
        ("question_mark", "question_mark"),
        ("ctrl+", None),
        ("f25", None),
        ("?", None),
        ("cmd+x", None),
    ],
)
def test_keys_as_people_write_them(given: str, name: str | None) -> None:
    assert keymap.key_name(given) == name


def test_letters_may_be_keys_where_nothing_is_written() -> None:
    assert load('[keys]\nmap.pin = "k"\n').keys == {"map.pin": "k"}


def test_spoken() -> None:
    assert keymap.display_keys("ctrl+j,shift+enter,f1") == "Ctrl+J, Shift+Enter, F1"
