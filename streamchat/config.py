"""Finding the settings: flag > environment (`STREAMCHAT_*`) > configuration file > default.

The configuration file is `--config FILE` (or `STREAMCHAT_CONFIG`), else `./config.toml` where that is a streamchat
file (it has a `[streamchat]` table), else `config.toml` in the user's configuration folder. An empty environment
variable counts as not set. Wrong input raises `ConfigError` with one sentence that names the place, the key and the
legal values.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamchat import keys, paths
from streamchat.errors import ConfigError
from streamchat.jsonlines import json_line
from streamchat.settings import Settings, default_of, setting_fields, spec_of

CONFIG_VERSION = 1
ENV_PREFIX = "STREAMCHAT_"
# Environment variables with our prefix that are not settings.
ENV_OTHER = {"STREAMCHAT_HOME", "STREAMCHAT_CONFIG", "STREAMCHAT_DEBUG", "STREAMCHAT_TRACE"}


@dataclass(frozen=True)
class Configuration:
    """The settings of a run and where each value that is not a default came from."""

    settings: Settings = field(default_factory=Settings)
    origins: Mapping[str, str] = field(default_factory=dict)
    """Setting name -> the place, in words for a message: `--cache-size`, `STREAMCHAT_CACHE_SIZE`, a file."""
    file: Path | None = None
    """The configuration file that was read."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """What `[keys]` of the file changes: id of a key (`streamchat.keys`) -> names of keys."""

    def is_explicit(self, name: str) -> bool:
        """Whether the user gave the setting `name` anywhere."""
        return name in self.origins

    def place(self, name: str) -> str:
        """Where the setting `name` came from, for a message."""
        return self.origins.get(name, "the default")


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Configuration:
    """Collect and check all settings.

    Args:
        flags: Setting name -> value from the command line; None values were not given.
        config_file: `--config`; must exist.
        environ: Defaults to `os.environ`.

    Raises:
        ConfigError: A file, key or value is wrong.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def take(given: Mapping[str, Any], places: Mapping[str, str]) -> None:
        checked = {name: check_value(name, value, places[name]) for name, value in given.items()}
        _refuse_two_budgets(checked, places)
        # The two ways to give the budget are one choice: a stronger source replaces the weaker one's.
        for name, other in (("cache_size", "compression_ratio"), ("compression_ratio", "cache_size")):
            if checked.get(name):
                values.pop(other, None)
                origins.pop(other, None)
        for name, value in checked.items():
            values[name], origins[name] = value, places[name]

    file = find_file(config_file, environ)
    changed_keys: dict[str, str] = {}
    if file is not None:
        content, changed_keys = _read_file(file)
        # A file that lists every setting gives only those that it changes.
        given = {
            name: value for name, value in content.items() if check_value(name, value, str(file)) != default_of(name)
        }
        take(given, dict.fromkeys(given, str(file)))
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): name
        for name, text in environ.items()
        if name.startswith(ENV_PREFIX) and name not in ENV_OTHER and text
    }
    for name, variable in variables.items():
        if name not in setting_fields():
            close = difflib.get_close_matches(name, setting_fields(), n=1)
            hint = (
                f"; did you mean {ENV_PREFIX}{close[0].upper()}?" if close else "; `streamchat config` lists them all"
            )
            raise ConfigError(f"{variable}: unknown setting{hint}")
    take({name: parse_text(name, environ[var], var) for name, var in variables.items()}, variables)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    take(given, {name: flag_of(name) for name in given})

    settings = Settings(**values)
    _check_together(settings, origins)
    return Configuration(settings, origins, file, changed_keys)


def flag_of(name: str) -> str:
    """The command line flag of a setting: `cache_size` -> `--cache-size`."""
    return "--" + name.replace("_", "-")


def parse_text(name: str, text: str, place: str) -> Any:
    """Turn text (environment, `/set`) into the type of the setting `name`; raises ConfigError."""
    default = default_of(name)
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False,
                    "off": False}[text.strip().lower()]  # fmt: skip
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{place}: {name} must be {_type_words(name)}, not {_short(text)}") from None
    return text


def check_value(name: str, value: Any, place: str) -> Any:
    """Check one value against its declaration and return it in the declared type; raises ConfigError."""
    default, spec = default_of(name), spec_of(name)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{place}: {name} must be {_type_words(name)}, not {_short(value)}")
    if not spec.allows(value):
        raise ConfigError(f"{place}: {name} = {_short(value)} is not legal; it must be {spec.legal()}")
    if isinstance(value, str) and not _is_unicode(value):
        raise ConfigError(f"{place}: {name} = {_short(value)} is not valid UTF-8 text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = spec.minimum, spec.maximum
        # written so that NaN is refused too
        above = low is None or value > low or (value == low and not spec.above_minimum)
        below = high is None or value < high or (value == high and not spec.below_maximum)
        if not (above and below):
            raise ConfigError(f"{place}: {name} = {_short(value)} is not legal; it must be {spec.legal()}")
    return value


def _short(value: Any) -> str:
    """A value for a message: one line, not long."""
    text = json.dumps(value) if isinstance(value, bool) else repr(value)  # as TOML writes it: true, not True
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def _is_unicode(text: str) -> bool:
    """False for the surrogates that stand for undecodable bytes of a command line or environment."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_two_budgets(values: Mapping[str, Any], places: Mapping[str, str]) -> None:
    if values.get("compression_ratio") and "cache_size" in values:
        raise ConfigError(
            f"cache_size ({places['cache_size']}) and compression_ratio ({places['compression_ratio']}) are two "
            "ways to give the same budget; give one of them"
        )


def _check_together(settings: Settings, origins: Mapping[str, str]) -> None:
    sinks, budget = settings.num_sink_tokens, settings.cache_size
    if not settings.compression_ratio and sinks >= budget:
        place = f"{origins['num_sink_tokens']}: " if "num_sink_tokens" in origins else ""
        other = f" ({origins['cache_size']})" if "cache_size" in origins else ""
        raise ConfigError(
            f"{place}num_sink_tokens = {sinks} does not fit into cache_size = {budget}{other}; it must be from 0 to "
            f"{budget - 1}"
        )


def find_file(explicit: Path | None = None, environ: Mapping[str, str] | None = None) -> Path | None:
    """The configuration file that is read; None where there is none. An explicit one need not exist."""
    environ = os.environ if environ is None else environ
    if explicit is None and environ.get("STREAMCHAT_CONFIG"):
        explicit = Path(environ["STREAMCHAT_CONFIG"])
    if explicit is not None:
        return paths.user_path(explicit)
    local = Path("config.toml")
    if local.is_file() and _is_ours(local):
        return local
    return user_file() if user_file().is_file() else None


def user_file() -> Path:
    """The configuration file of the user, which need not exist."""
    return paths.config_dir() / "config.toml"


def _is_ours(file: Path) -> bool:
    """Whether `file` has a `[streamchat]` table. Broken files of ours count (and are reported when read)."""
    try:
        return isinstance(tomllib.loads(file.read_text(encoding="utf-8-sig")).get("streamchat"), dict)
    except OSError:
        return False
    except (ValueError, RecursionError):
        text = file.read_text(encoding="utf-8", errors="replace")
        return re.search(r"^\s*\[\s*streamchat\s*\]", text, re.MULTILINE) is not None


def _read_tables(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{file}: cannot read the configuration file ({reason})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: the configuration file is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; numbers and nesting beyond Python's limits
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Setting name -> value as the file gives it, unchecked but for names and places; and the keys that it changes."""
    tables = _read_tables(file)
    head = tables.pop("streamchat", None)
    if not isinstance(head, dict):
        raise ConfigError(
            f"{file}: not a streamchat configuration; one begins with the table [streamchat] "
            "(`streamchat config --default` prints a whole one)"
        )
    version = head.pop("config_version", CONFIG_VERSION)
    if type(version) is not int or version != CONFIG_VERSION:
        raise ConfigError(f"{file}: config_version = {_short(version)} is not known here; it must be {CONFIG_VERSION}")
    if head:
        raise ConfigError(f"{file}: unknown key streamchat.{next(iter(head))}; only config_version belongs there")

    changed_keys = _read_keys(file, tables.pop("keys", {}))
    sections = {spec_of(name).section for name in setting_fields()}
    values: dict[str, Any] = {}
    for section, content in tables.items():
        if section in setting_fields() and section not in sections:
            raise ConfigError(f"{file}: {section} belongs in the table [{spec_of(section).section}]")
        if section not in sections:
            known = {*sections, "keys"}
            hint = _did_you_mean(section, known) or f"; the tables are {', '.join(sorted(known))}"
            raise ConfigError(f"{file}: unknown table or key {section}{hint}")
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: {section} must be a table, [{section}], not {_short(content)}")
        for name, value in content.items():
            if name not in setting_fields():
                raise ConfigError(f"{file}: unknown key {section}.{name}{_did_you_mean(name)}")
            belongs = spec_of(name).section
            if belongs != section:
                raise ConfigError(f"{file}: {name} belongs in [{belongs}], not in [{section}]")
            values[name] = value
    return values, changed_keys


def _read_keys(file: Path, table: Any) -> dict[str, str]:
    """The table `[keys]`, checked: names of keys by id."""
    try:
        return keys.checked(table)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def _did_you_mean(name: str, among: set[str] | None = None) -> str:
    close = difflib.get_close_matches(name, among or set(setting_fields()), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _type_words(name: str) -> str:
    default, spec = default_of(name), spec_of(name)
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return f"a whole number, {spec.legal()}"
    if isinstance(default, float):
        return f"a number, {spec.legal()}"
    return spec.legal() if spec.choices else "text"


def render_toml(configuration: Configuration | None = None) -> str:
    """The configuration file as text: every setting with its value and a comment.

    With the default argument this is the `config.toml` at the top of the repository; given a configuration, the
    comments also say where each value came from.
    """
    given = configuration or Configuration()
    lines = [
        "# streamchat configuration. Every setting with its default."
        if configuration is None
        else "# streamchat configuration. Every setting in force; the values without a source are defaults.",
        "# Read from --config FILE, else ./config.toml, else config.toml in the user configuration folder",
        "# (`streamchat config --path` prints it). A flag (--cache-size) or an environment variable",
        "# (STREAMCHAT_CACHE_SIZE) wins over this file.",
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
        if given.is_explicit(name):
            place = " ".join(given.place(name).split())
            lines.append(f"# from {''.join(letter for letter in place if letter.isprintable())}")
        lines.append(f"{name} = {_toml_value(getattr(given.settings, name))}")
    about = (
        "Keys of the full-screen app; several have commas between them. The prompt (--plain) shares prompt.send, "
        "prompt.newline, prompt.edit and chat.interrupt."
    )
    lines += ["", "[keys]", *_wrap_comment(about)]
    for key in keys.KEYS:
        changed = given.keys.get(key.id)
        lines += _wrap_comment(f"{key.help}.")
        lines.append(f"{key.id} = {_toml_value(changed)}" if changed else f"# {key.id} = {_toml_value(key.keys)}")
    return "\n".join(lines) + "\n"


def _wrap_comment(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _toml_value(value: Any) -> str:
    # JSON strings, numbers and booleans are valid TOML where letters are kept as they are.
    return json_line(value)
