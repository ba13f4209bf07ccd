"""Load the settings: flag > environment (`STREAMCHAT_*`) > configuration files > the model's advice > default.

The configuration file is `--config FILE` (or `STREAMCHAT_CONFIG`). Without it, `config.toml` in the user's
configuration folder is read, then `./config.toml` if it has a `[streamchat]` table; the latter overrides the former,
but sets some settings only if the user trusts it (`streamchat.config.trust`). An empty environment variable counts as
unset. Invalid input raises `ConfigError` with one sentence that names the origin, the key and the legal values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamchat.base import paths
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import parse_float, parse_int
from streamchat.base.suggestions import did_you_mean
from streamchat.config.files import (
    LOCAL,
    FileContent,
    LocalFile,
    find_local,
    parse,
    read_file,
    short_value,
)
from streamchat.config.settings import Settings, default_of, setting_fields, settings_by_model, spec_of
from streamchat.config.template_args import checked, from_text, merged, parse_arguments, to_text

ENV_PREFIX = "STREAMCHAT_"
# Environment variables with this prefix that are not settings.
ENV_OTHER = {"STREAMCHAT_HOME", "STREAMCHAT_CONFIG", "STREAMCHAT_DEBUG", "STREAMCHAT_TRACE"}

LARGEST = 2**63 - 1
"""Largest whole number of a setting: numbers of SQLite and torch have 64 bits."""
SESSION_ORIGIN = "session "
"""Prefix of the origin of a setting that a resumed session brings."""
ARGUMENT_ORIGIN = "argument "
"""Prefix of the origin of a setting that a Python program gives."""


@dataclass(frozen=True)
class LocalUse:
    """How `./config.toml` is used."""

    file: LocalFile
    used: tuple[str, ...] = ()
    """Settings (and `keys`) that the file changes."""
    ignored: tuple[str, ...] = ()
    """Those that it would change if it were trusted."""

    @property
    def notice(self) -> str:
        """One sentence for the user; '' if the file changes nothing."""
        path = self.file.path
        if self.file.problem:
            return f"{path} {self.file.problem} and is ignored; `--config FILE` reads it anyway"
        need = f"{', '.join(self.ignored)}; review the file, then run `streamchat config --trust` to allow it"
        if self.used and self.ignored:
            return f"{path} sets {', '.join(self.used)}, but is not trusted to set {need}"
        if self.ignored:
            return f"{path} is not trusted to set {need}"
        return f"{path} sets {', '.join(self.used)}" if self.used else ""


@dataclass(frozen=True)
class Configuration:
    """The settings of a run, with the origin of each value that was given."""

    settings: Settings = field(default_factory=Settings)
    origins: Mapping[str, str] = field(default_factory=dict)
    """Setting name -> origin, for messages: `--cache-size`, `STREAMCHAT_CACHE_SIZE`, a file. The parts of a table have
    their own: `template_args.enable_thinking`."""
    file: Path | None = None
    """The configuration file that was read; of two, the one that takes precedence."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Changes by `[keys]` of the files: key id (`streamchat.config.keymap`) -> key names."""
    local: LocalUse | None = None
    """How `./config.toml` is used; None without a streamchat configuration there."""
    advice_origins: Mapping[str, str] = field(default_factory=dict)
    """Setting name -> origin of a value that the model's makers advise, and the user did not give."""

    @property
    def local_notice(self) -> str:
        """A sentence about `./config.toml` for the user; '' if there is nothing to say."""
        return "" if self.local is None else self.local.notice

    def is_explicit(self, name: str) -> bool:
        """Whether the user set `name` anywhere."""
        return name in self.origins

    def origin(self, name: str) -> str:
        """Return where the setting `name` came from, for messages."""
        return self.origins.get(name) or self.advice_origins.get(name, "the default")

    def with_origin(self, name: str, origin: str) -> Configuration:
        """Return the configuration with another origin of the setting `name`, which counts as given from now on."""
        return replace(self, origins={**self.origins, name: origin})

    def without(self, name: str) -> Configuration:
        """Return the configuration with the default of the setting `name`."""
        origins = {key: origin for key, origin in self.origins.items() if key.partition(".")[0] != name}
        default: dict[str, Any] = {name: default_of(name)}
        return replace(self, settings=replace(self.settings, **default), origins=origins)

    def advised_by(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> Configuration:
        """Return the configuration for a model: what the user did not give is the model's advice, or the default.

        Args:
            values: Setting name -> legal value that the model's makers advise.
            origins: Setting name -> where the advice came from, for each of `values`.
        """
        free = [name for name in settings_by_model() if self._is_free(name)]
        chosen = {name: values.get(name, default_of(name)) for name in free}
        advised = {name: origins[name] for name in free if name in values}
        return replace(self, settings=replace(self.settings, **chosen), advice_origins=advised)

    def _is_free(self, name: str) -> bool:
        """Whether nobody chose the value: it is the default or a model's advice. Programs may set it without origin."""
        is_default = name in self.advice_origins or getattr(self.settings, name) == default_of(name)
        return is_default and not self.is_explicit(name)


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Configuration:
    """Collect and check all settings.

    Args:
        flags: Setting name -> value from the command line; None if not given.
        config_file: Value of `--config`; the file must exist.
        environ: Defaults to `os.environ`.

    Raises:
        ConfigError: A file, key or value is wrong.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def apply(given: Mapping[str, Any], sources: Mapping[str, str]) -> None:
        checked_values = {name: check_value(name, value, sources[name]) for name, value in given.items()}
        _refuse_two_budgets(checked_values, sources)
        # Both settings mean the same budget, so a later source replaces the other one as well.
        for name, other in (("cache_size", "compression_ratio"), ("compression_ratio", "cache_size")):
            if checked_values.get(name):
                values.pop(other, None)
                origins.pop(other, None)
        for name in [name for name in checked_values if spec_of(name).is_table]:
            origins.update({f"{name}.{each}": sources[name] for each in from_text(checked_values[name])})
            checked_values[name] = merged(values.get(name, default_of(name)), checked_values[name])
        for name, value in checked_values.items():
            values[name], origins[name] = value, sources[name]

    files: list[Path] = []
    changed_keys: dict[str, str] = {}
    explicit = _explicit_file(config_file, environ)
    local = None if explicit else _local_file()
    own = explicit or (user_file() if user_file().is_file() else None)
    if own is not None:
        content = read_file(own)
        files.append(own)
        changed_keys = dict(content.keys)
        given = effective_values(content.values, own)
        apply(given, dict.fromkeys(given, str(own)))
    use, content = _use_local(local)
    if local is not None and not local.problem:
        files.append(content.path)
        changed_keys = dict(content.keys or changed_keys)  # not merged: conflicts are checked within one table only
        apply(content.values, dict.fromkeys(content.values, str(content.path)))
    variables = {
        name.removeprefix(ENV_PREFIX).lower(): name
        for name, text in environ.items()
        if name.startswith(ENV_PREFIX) and name not in ENV_OTHER and text
    }
    for name, variable in variables.items():
        if name not in setting_fields():
            hint = did_you_mean(name, setting_fields(), show=lambda known: ENV_PREFIX + known.upper())
            raise ConfigError(f"{variable}: unknown setting{hint or '; `streamchat config` lists them all'}")
    apply({name: parse_text(name, environ[var], var) for name, var in variables.items()}, variables)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    apply(given, {name: flag_of(name) for name in given})

    settings = Settings(**values)
    _check_together(settings, origins)
    return Configuration(settings, origins, files[-1] if files else None, changed_keys, use)


def from_arguments(given: Mapping[str, Any]) -> Configuration:
    """Check settings that a Python program gives; files and the environment are not read.

    Raises:
        ConfigError: A setting is unknown, or its value is wrong.
    """
    origins = {name: f"{ARGUMENT_ORIGIN}{name}" for name in given}
    for name in given:
        if name not in setting_fields():
            hint = did_you_mean(name, setting_fields())
            raise ConfigError(f"{origins[name][:80]}: unknown setting{hint or '; `streamchat config` lists them all'}")
    values = {name: check_value(name, value, origins[name]) for name, value in given.items()}
    _refuse_two_budgets(values, origins)
    settings = Settings(**values)
    _check_together(settings, origins)
    return Configuration(settings, origins)


def flag_of(name: str) -> str:
    """Return the command line flag of a setting: `cache_size` -> `--cache-size`."""
    return spec_of(name).flag or "--" + name.replace("_", "-")


def parse_text(name: str, text: str, source: str) -> Any:
    """Convert text (environment, `/set`) to the type of the setting `name`; raises ConfigError."""
    default = default_of(name)
    if spec_of(name).is_table:
        return _table_text(name, text, source)
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False,
                    "off": False}[text.strip().lower()]  # fmt: skip
        if isinstance(default, int):
            return parse_int(text)
        if isinstance(default, float):
            return parse_float(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{source}: {name} must be {_describe_type(name)}, not {short_value(text)}") from None
    return text


def check_live(name: str) -> None:
    """Check that a setting can change during a chat; raises ConfigError."""
    if name not in setting_fields():
        raise ConfigError(f"{name[:80]} is not a setting; /set lists the settings you can change here")
    if not spec_of(name).live:
        raise ConfigError(f"{name} cannot change during a chat; start with {flag_of(name)} or set it in config.toml")


def check_value(name: str, value: Any, source: str) -> Any:
    """Check one value against its declaration and return it in the declared type; raises ConfigError.

    A choice that was renamed is returned under today's name.
    """
    default, spec = default_of(name), spec_of(name)
    if spec.is_table:
        return _table_text(name, value, source)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{source}: {name} must be {_describe_type(name)}, not {short_value(value)}")
    if isinstance(value, str):
        value = spec.renamed.get(value, value)
    if not spec.allows(value):
        raise ConfigError(f"{source}: {name} = {short_value(value)} is not valid; it must be {spec.legal()}")
    if isinstance(value, str) and not _is_unicode(value):
        raise ConfigError(f"{source}: {name} = {short_value(value)} is not valid UTF-8 text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = spec.minimum, spec.maximum
        # also rejects NaN
        above = low is None or value > low or (value == low and not spec.above_minimum)
        below = high is None or value < high or (value == high and not spec.below_maximum)
        if not (above and below):
            raise ConfigError(f"{source}: {name} = {short_value(value)} is not valid; it must be {spec.legal()}")
        if isinstance(value, int) and value > LARGEST:
            raise ConfigError(f"{source}: {name} = {short_value(value)} is not valid; it must be at most {LARGEST}")
    return value


def _as_float(value: int) -> float:
    """Return a whole number as a float: infinity, which no setting allows, if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _table_text(name: str, value: Any, source: str) -> str:
    """Return the text of a table that a file, a flag, a variable or `/set` gives; raises ConfigError."""
    try:
        if isinstance(value, str):
            return to_text(parse_arguments(value))
        if isinstance(value, Mapping):
            return to_text(checked(value))
    except ValueError as error:
        raise ConfigError(f"{source}: {name}: {error}") from None
    raise ConfigError(f"{source}: {name} must be {_describe_type(name)}, not {short_value(value)}")


def _is_unicode(text: str) -> bool:
    """Whether `text` has no surrogates, which stand for undecodable bytes of the command line or environment."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_two_budgets(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    if values.get("compression_ratio") and "cache_size" in values:
        raise ConfigError(
            f"cache_size ({sources['cache_size']}) and compression_ratio ({sources['compression_ratio']}) both set the "
            "cache budget; give one of them"
        )


def _check_together(settings: Settings, origins: Mapping[str, str]) -> None:
    sinks, budget = settings.num_sink_tokens, settings.cache_size
    if not settings.compression_ratio and sinks >= budget:
        origin = f"{origins['num_sink_tokens']}: " if "num_sink_tokens" in origins else ""
        other = f" ({origins['cache_size']})" if "cache_size" in origins else ""
        raise ConfigError(
            f"{origin}num_sink_tokens = {sinks} does not fit into cache_size = {budget}{other}; it must be from 0 to "
            f"{budget - 1}"
        )


def check_file(file: Path, values: Mapping[str, Any]) -> None:
    """Check all values of a file, on their own and together; raises ConfigError."""
    given = effective_values(values, file)
    origins = dict.fromkeys(given, str(file))
    _refuse_two_budgets(given, origins)
    _check_together(Settings(**given), origins)


def effective_values(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Check the values of a file; return those that differ from the defaults, and those that a model may replace."""
    checked = {name: check_value(name, value, str(file)) for name, value in values.items()}
    return {name: value for name, value in checked.items() if value != default_of(name) or spec_of(name).by_model}


def _local_file() -> LocalFile | None:
    """Return `./config.toml`, unless it is the file in the user's configuration folder."""
    try:
        if user_file().samefile(LOCAL):
            return None
    except OSError:  # one of them does not exist
        pass
    return find_local()


def _use_local(local: LocalFile | None) -> tuple[LocalUse | None, FileContent]:
    """Return how `./config.toml` is used, and the part of its contents that applies."""
    if local is None or local.problem:
        return (None if local is None else LocalUse(local)), FileContent(LOCAL)
    content = parse(LOCAL, local.data)
    given = effective_values(content.values, LOCAL)
    need = [name for name in given if spec_of(name).needs_trust] + (["keys"] if content.keys else [])
    ignored = () if local.is_trusted else tuple(need)
    used = {name: value for name, value in given.items() if name not in ignored}
    changed_keys = {} if "keys" in ignored else content.keys
    return LocalUse(local, (*used, *(["keys"] if changed_keys else [])), ignored), FileContent(
        LOCAL, used, changed_keys
    )


def find_file(explicit: Path | None = None, environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the configuration file that takes precedence, or None. An explicit one need not exist."""
    if found := _explicit_file(explicit, os.environ if environ is None else environ):
        return found
    local = _local_file()
    if local is not None and not local.problem:
        return LOCAL
    return user_file() if user_file().is_file() else None


def _explicit_file(explicit: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Return the file named by `--config` or in the environment."""
    if explicit is None and environ.get("STREAMCHAT_CONFIG"):
        explicit = Path(environ["STREAMCHAT_CONFIG"])
    return None if explicit is None else paths.user_path(explicit)


def user_file() -> Path:
    """Return `config.toml` in the user's configuration folder. It may not exist."""
    return paths.config_dir() / "config.toml"


def _describe_type(name: str) -> str:
    default, spec = default_of(name), spec_of(name)
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return f"a whole number, {spec.legal()}"
    if isinstance(default, float):
        return f"a number, {spec.legal()}"
    return spec.legal() if spec.choices or spec.is_table else "text"
