"""Changes settings in a configuration file; comments, order, and everything else in it stay as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamchat.base.atomic_files import PRIVATE, advice_on, atomic_write
from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.text_files import decode_text
from streamchat.config.files import CONFIG_VERSION, parse
from streamchat.config.loader import check_file, check_value
from streamchat.config.settings import spec_of
from streamchat.config.template_args import from_text

_NEW = f"[streamchat]\nconfig_version = {CONFIG_VERSION}\n"
_SAME_BUDGET = {"cache_size": "compression_ratio", "compression_ratio": "cache_size"}


def write_settings(file: Path, changes: Mapping[str, Any]) -> None:
    """Write settings into the configuration file `file`, which is created if it does not exist.

    Args:
        file: The file. If it is a link, the file that it points to is written.
        changes: Setting name -> value; None removes the setting. `cache_size` and `compression_ratio` replace each
            other.

    Raises:
        ConfigError: The file is not a streamchat configuration, the settings do not fit those in it, or it cannot be
            written. It is unchanged then.
    """
    target = Path(os.path.realpath(file))  # `Path.resolve` raises on a link to itself
    before, line_end, mode = _read(target)
    values = {name: None if value is None else check_value(name, value, str(file)) for name, value in changes.items()}
    for name, other in _SAME_BUDGET.items():
        if values.get(name):
            values.setdefault(other, None)
    expected = {**parse(file, before.encode()).values, **values}
    after = _changed(before, values)
    try:
        written = parse(file, after.encode()).values
    except ConfigError:
        written = {}
    if any(_checked(name, written.get(name), file) != _checked(name, value, file) for name, value in expected.items()):
        raise ConfigError(f"{file}: its form is too unusual to be changed here; edit it by hand")
    check_file(file, written)
    try:
        with atomic_write(target, durable=True, mode=mode) as partial:
            partial.write_bytes(after.replace("\n", line_end).encode())
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({reason_of(error)}); {advice_on(error.errno)}") from error


def _read(target: Path) -> tuple[str, str, int]:
    """Return text, line ending and permissions of a file; those of a new one if it does not exist."""
    try:
        data = target.read_bytes()
        mode = target.stat().st_mode & 0o777
    except FileNotFoundError:
        return _NEW, "\n", PRIVATE
    except OSError as error:
        raise ConfigError(f"{target}: cannot read the configuration file ({reason_of(error)})") from None
    line_end = "\r\n" if 2 * data.count(b"\r\n") > data.count(b"\n") else "\n"
    return decode_text(data, f"{target}: the configuration file").text, line_end, mode


def _changed(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a file with other values; None removes a setting."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError
    from tomlkit.items import Table

    new: list[tuple[str, str, Any]] = []
    """Table, name and value of lines that are not in the file yet."""
    try:
        document = tomlkit.parse(text)
        for name, value in values.items():
            spec = spec_of(name)
            table: Any = document.get(spec.section, {})
            if name not in table:
                if value is not None:
                    new.append((spec.section, name, _as_toml(value) if spec.is_table else value))
            elif value is None:
                del table[name]
            elif spec.is_table and isinstance(table[name], Table):  # it has lines of its own: [chat.template_args]
                wanted = from_text(value)
                for key in [key for key in table[name] if key not in wanted]:
                    del table[name][key]
                for key, each in wanted.items():
                    if key in table[name]:
                        table[name][key] = each
                    else:
                        new.append((f"{spec.section}.{name}", key, each))
            else:
                table[name] = _as_toml(value) if spec.is_table else value
        text = tomlkit.dumps(document)
    except TOMLKitError as error:
        raise ConfigError(f"the configuration file cannot be changed ({error}); edit it by hand") from None
    for section, name, value in new:
        text = _with_line(text, section, f"{name} = {tomlkit.item(value).as_string()}\n")
    return text


def _with_line(text: str, section: str, line: str) -> str:
    """Add a line as the first of a table: comments at the end of a table often belong to the next one."""
    header = re.search(rf"^[ \t]*\[[ \t]*{re.escape(section)}[ \t]*\][ \t]*(#.*)?(\n|\Z)", text, re.MULTILINE)
    if header is None:
        text = text.rstrip("\n") + "\n"
        return f"{text}\n[{section}]\n{line}"
    start = text[: header.end()]
    return (start if start.endswith("\n") else start + "\n") + line + text[header.end() :]


def _as_toml(value: str) -> Any:
    """Return the value of a table for tomlkit: an inline table, or its text if it has a null, which TOML has not."""
    import tomlkit

    wanted = from_text(value)
    if _has_null(wanted):
        return value
    table = tomlkit.inline_table()
    table.update(wanted)
    return table


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping | list):
        return any(map(_has_null, value.values() if isinstance(value, Mapping) else value))
    return value is None


def _checked(name: str, value: Any, file: Path) -> Any:
    return None if value is None else check_value(name, value, str(file))
