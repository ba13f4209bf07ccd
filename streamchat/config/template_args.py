"""Arguments for chat templates: the setting `template_args`, a table of names and JSON values.

The setting is kept as the text of a JSON object, so that it travels like every other setting. A file may give a table,
a flag gives one `NAME=VALUE`, and a variable or `/set` gives a JSON object or `NAME=VALUE` words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

NONE = "{}"
"""The text of no arguments."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_MAX_CHARACTERS = 20_000
_MAX_DEPTH = 32
"""Tables and lists in each other. Far below what TOML, Jinja, and Python's own recursion limit allow."""
# What transformers' `apply_chat_template` takes or gives to the template itself, what Jinja defines, and our own.
_RESERVED = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "tokenize", "padding"),
        *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "processor_kwargs", "add_generation_prompt", "continue_final_message", "self", "loop"),
        *("raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace", "caller"),
        *("true", "false", "none", "True", "False", "None", "varargs", "kwargs", "streamchat_moment"),
    )
)


def is_reserved(name: str) -> bool:
    """Whether the template gets `name` from the chat itself: messages, tools, special tokens, functions."""
    return name in _RESERVED or name.endswith("_token")


def parse_argument(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`; a value that is not JSON is text. Raises ValueError with the reason."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{_short(text)} is not NAME=VALUE")
    return _checked_name(name.strip()), _json_or_text(value)


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a JSON object or of `NAME=VALUE` words. Raises ValueError with the reason."""
    if not text.lstrip().startswith("{"):
        return dict(parse_argument(word) for word in text.split())
    try:
        return checked(json.loads(text, parse_constant=_refuse_constant, parse_int=_parse_int))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{_short(text)} is not a JSON object ({error.msg.lower()})") from None


def checked(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a table. Raises ValueError if a name or a value cannot be one."""
    return {_checked_name(name): value for name, value in table.items()}


def to_text(table: Mapping[str, Any]) -> str:
    """Return the value of the setting for these arguments. Raises ValueError if one has no JSON form."""
    if _is_deeper(table, _MAX_DEPTH):
        raise ValueError(f"it is nested too deeply; the limit is {_MAX_DEPTH} levels")
    try:
        text = json.dumps(table, ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("its values must be text, numbers, true, false, null, lists, or tables of these") from None
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; the limit is {_MAX_CHARACTERS:,}")
    return text


def from_text(value: str) -> dict[str, Any]:
    """Return the arguments of a checked value of the setting."""
    table = json.loads(value)
    assert isinstance(table, dict)
    return table


def merged(*values: str) -> str:
    """Return the value of the setting with the arguments of all; later values override earlier ones by name."""
    table: dict[str, Any] = {}
    for value in values:
        table |= from_text(value)
    return to_text(table)


def shown(table: Mapping[str, Any]) -> str:
    """Format arguments for a sentence: `enable_thinking=false, level="low"`."""
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in table.items())


def listed(names: Iterable[str]) -> str:
    """Format names for a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{_short(name)} is not a name (letters, digits and _)")
    if is_reserved(name):
        raise ValueError(f"{name} is reserved: the chat itself sets it for the template")
    return name


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether tables and lists are nested in more than `levels` levels."""
    if not isinstance(value, Mapping | list):
        return False
    parts = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _parse_int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError("a number in it has too many digits") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
