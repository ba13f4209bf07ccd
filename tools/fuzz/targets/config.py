"""Configuration files, with keys, and what is written from them."""

from __future__ import annotations

from pathlib import Path

from streamchat.config import keymap, loader
from streamchat.config.render import render_toml
from streamchat.config.settings import setting_fields
from streamchat.repl.keys import sequences
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Load the file, write the loaded settings, and check that they mean the same."""
    path = Path("config.toml")
    path.write_bytes(data)
    loaded = loader.load(config_file=path, environ={})
    for key in keymap.KEYS:
        sequences(key.id, loaded.keys)
    again = Path("again.toml")
    again.write_text(render_toml(loaded), encoding="utf-8")
    read = loader.load(config_file=again, environ={})
    assert read.settings == loaded.settings
    assert dict(read.keys) == dict(loaded.keys)


def seeds() -> dict[str, bytes]:
    """Settings of several types, keys, and arguments for the template."""
    head = b"[streamchat]\nconfig_version = 1\n"
    return {
        "settings": head + b"[cache]\ncache_size = 512\n[generation]\ntemperature = 0.5\nseed = 3\n",
        "keys": head + b'[keys]\n"chat.stop" = "f2"\n[keys.chat]\ncopy_reply = "ctrl+x,f3"\n',
        "text": head + b'[chat]\nsystem_prompt = """a\nb"""\n[generation.template_args]\na = [1, {b = 1.5}]\n',
        "empty": b"",
    }


WORDS = (
    *b"[cache] [keys] [keys.chat] [[ 1979-05-27 inf ctrl+ \\u0007".split(),
    b'"""',
    b"'\x1b'",
    *(name.encode() for name in setting_fields()),
)
TARGET = Target(
    "config",
    run,
    seeds,
    ("streamchat.config", "streamchat.repl.keys"),
    words=WORDS,
    suite_runs=200,
)
