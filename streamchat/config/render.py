"""Renders settings and keys as a configuration file, each with a comment."""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from streamchat.base.jsonlines import json_line
from streamchat.config import keymap
from streamchat.config.files import CONFIG_VERSION
from streamchat.config.loader import Configuration
from streamchat.config.settings import default_of, setting_fields, spec_of
from streamchat.config.template_args import from_text


def render_toml(configuration: Configuration | None = None) -> str:
    """Return a configuration file: every setting with its value and a comment.

    Without an argument this is the `config.toml` at the top of the repository. With a configuration, the comments also
    name the origin of each value.
    """
    given = configuration or Configuration()
    lines = [
        "# streamchat configuration. Every setting with its default."
        if configuration is None
        else "# streamchat configuration. The settings in use; values without a source are defaults.",
        "# Read from --config FILE, else from ./config.toml and config.toml in the user configuration folder",
        "# (`streamchat config --path` prints the one that takes precedence). Flags (--cache-size) and environment",
        "# variables (STREAMCHAT_CACHE_SIZE) override both.",
        *_wrap_comment(_safe(given.local_notice)),
        "",
        "[streamchat]",
        f"config_version = {CONFIG_VERSION}",
    ]
    section = ""
    for name in setting_fields():
        spec = spec_of(name)
        if spec.section != section:
            section = spec.section
            lines += ["", f"[{section}]"]
        legal = "" if spec.legal() == "any value" else f" ({spec.legal()})"
        lines += _wrap_comment(f"{spec.help}{legal}.")
        if spec.by_model:
            lines += _wrap_comment(f"Without this line: what the model's makers advise, else {default_of(name)}.")
        if given.is_explicit(name) or name in given.advice_origins:
            lines.append(f"# from {_safe(given.origin(name))}")
        # as a comment, so that a copy of the file does not set it for other models
        mark = "# " if spec.by_model and not given.is_explicit(name) else ""
        value = getattr(given.settings, name)
        lines.append(f"{mark}{name} = {_toml_table(value) if spec.is_table else _toml_value(value)}")
    about = (
        "Keys of the full-screen app; separate several keys with commas. The prompt (--plain) shares prompt.send, "
        "prompt.newline, prompt.edit and chat.interrupt."
    )
    lines += ["", "[keys]", *_wrap_comment(about)]
    for key in keymap.KEYS:
        changed = given.keys.get(key.id)
        lines += _wrap_comment(f"{key.help}.")
        lines.append(f"{key.id} = {_toml_value(changed)}" if changed else f"# {key.id} = {_toml_value(key.keys)}")
    return "\n".join(lines) + "\n"


def _safe(text: str) -> str:
    """Return `text` on one line without control characters, which file names may contain."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _wrap_comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{json_line(name)} = {_toml_value(each)}' for name, each in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON strings, numbers and booleans are valid TOML if non-ASCII letters are not escaped.
    return json_line(value)


def _toml_table(value: str) -> str:
    """Return the text of a JSON object as an inline table, or as a string if TOML has no such values: null."""
    table = from_text(value)
    inner = ", ".join(f"{name} = {_toml_value(each)}" for name, each in table.items())
    text = f"{{ {inner} }}" if inner else "{}"
    with suppress(ValueError):
        if tomllib.loads(f"table = {text}")["table"] == table:
            return text
    return _toml_value(value)
