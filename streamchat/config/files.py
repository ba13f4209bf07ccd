"""Read configuration files, and `./config.toml` of the current folder with care.

The current folder is not trusted: it may be a download, a clone or a shared disk. Its file is read once, without
blocking and up to a size limit, so that the bytes that are parsed are those whose trust was checked (see
`streamchat.config.trust`).
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.suggestions import did_you_mean
from streamchat.base.text_files import decode_text
from streamchat.config import keymap, trust
from streamchat.config.settings import setting_fields, spec_of

CONFIG_VERSION = 1
LOCAL = Path("config.toml")
MAX_BYTES = 1_000_000
"""Size limit: far more than a file with every setting and its comments."""
_HEAD = re.compile(r"^\s*\[\s*streamchat\s*\]", re.MULTILINE)


@dataclass(frozen=True)
class FileContent:
    """The contents of a configuration file. Only the names of tables and keys are checked."""

    path: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    """Setting name -> value."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The table `[keys]`: key id -> key names."""


@dataclass(frozen=True)
class LocalFile:
    """The `config.toml` of a folder."""

    path: Path
    """Absolute. Links in the folder's path are resolved; if the file itself is a link, it is not."""
    data: bytes = b""
    is_trusted: bool = False
    problem: str = ""
    """Why the file is ignored, as the predicate of a sentence; '' if it is used."""


def read_file(path: Path) -> FileContent:
    """Read the configuration file `path`.

    Raises:
        ConfigError: The file cannot be read or is not a streamchat configuration.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file ({reason_of(error)})") from None
    return parse(path, data)


def find_local(folder: Path = Path()) -> LocalFile | None:
    """Return the `config.toml` of `folder`, or None if there is none with a `[streamchat]` table.

    A file that is not regular, is too large or belongs to another user has a `problem`.
    """
    given = folder / LOCAL
    try:
        path = folder.resolve() / LOCAL
        if not stat.S_ISREG(given.stat().st_mode):  # a FIFO may never end, and opening a device may have effects
            return LocalFile(path, problem="is not a regular file")
        data, owner = _read_limited(given)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        return LocalFile(given.absolute(), problem=f"cannot be read ({reason_of(error)})")
    if not _has_our_table(data):
        return None
    if len(data) > MAX_BYTES:
        return LocalFile(path, problem=f"is larger than {MAX_BYTES:,} bytes")
    is_trusted = trust.is_trusted(path, data)
    if not is_trusted and not _is_safe_owner(owner):
        return LocalFile(path, data, problem=f"belongs to another user (uid {owner})")
    return LocalFile(path, data, is_trusted)


def _read_limited(path: Path) -> tuple[bytes, int]:
    """Return at most `MAX_BYTES` + 1 bytes of a regular file, and the user id of its owner."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):  # replaced after the check
            raise OSError(0, "not a regular file")
        return file.read(MAX_BYTES + 1), about.st_uid


def _is_safe_owner(owner: int) -> bool:
    """Whether the owner is this user or root, who could change our files as well."""
    return not hasattr(os, "geteuid") or owner in (os.geteuid(), 0)


def _has_our_table(data: bytes) -> bool:
    """Whether `data` has a `[streamchat]` table. A broken file that seems to have one counts: parsing reports it."""
    if len(data) <= MAX_BYTES:
        try:
            return isinstance(tomllib.loads(decode_text(data, "").text).get("streamchat"), dict)
        except (ConfigError, ValueError, RecursionError):
            pass
    return _HEAD.search(data.decode("utf-8", "replace")) is not None


def _tables(file: Path, data: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(decode_text(data, f"{file}: the configuration file").text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; numbers and nesting beyond Python's limits
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def parse(file: Path, data: bytes) -> FileContent:
    """Parse the bytes of the configuration file `file`; raises ConfigError with that name."""
    tables = _tables(file, data)
    head = tables.pop("streamchat", None)
    if not isinstance(head, dict):
        raise ConfigError(
            f"{file}: not a streamchat configuration; it must start with the table [streamchat] "
            "(`streamchat config --default` prints a complete file)"
        )
    version = head.pop("config_version", CONFIG_VERSION)
    if type(version) is not int or version != CONFIG_VERSION:
        raise ConfigError(
            f"{file}: config_version = {short_value(version)} is not supported; it must be {CONFIG_VERSION}"
        )
    if head:
        raise ConfigError(f"{file}: unknown key streamchat.{next(iter(head))}; the table has only config_version")

    changed_keys = _read_keys(file, tables.pop("keys", {}))
    sections = {spec_of(name).section for name in setting_fields()}
    values: dict[str, Any] = {}
    for section, content in tables.items():
        if section in setting_fields() and section not in sections:
            raise ConfigError(f"{file}: {section} belongs in the table [{spec_of(section).section}]")
        if section not in sections:
            known = {*sections, "keys"}
            hint = did_you_mean(section, known) or f"; the tables are {', '.join(sorted(known))}"
            raise ConfigError(f"{file}: unknown table or key {section}{hint}")
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: {section} must be a table, [{section}], not {short_value(content)}")
        for name, value in content.items():
            if name not in setting_fields():
                raise ConfigError(f"{file}: unknown key {section}.{name}{did_you_mean(name, setting_fields())}")
            belongs = spec_of(name).section
            if belongs != section:
                raise ConfigError(f"{file}: {name} belongs in [{belongs}], not in [{section}]")
            values[name] = value
    return FileContent(file, values, changed_keys)


def _read_keys(file: Path, table: Any) -> dict[str, str]:
    """Check the table `[keys]`: key id -> key names."""
    try:
        return keymap.check_keys(table)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def short_value(value: Any) -> str:
    """Format a value for a message, on one line and shortened."""
    try:
        text = json.dumps(value) if isinstance(value, bool) else repr(value)  # as TOML writes it: true, not True
    except ValueError:  # Python writes at most 4,300 digits
        return "a number with too many digits"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
