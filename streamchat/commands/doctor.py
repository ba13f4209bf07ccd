"""`streamchat doctor`: report on the installation, the machine, files, and what a chat would use."""

from __future__ import annotations

import argparse
import json
import locale
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streamchat.base import paths
from streamchat.base.devices import ATTENTION_ON_GPUS
from streamchat.base.errors import ExitCode, StreamchatError, describe_unexpected, limit_reached
from streamchat.base.formatting import human_bytes, plural
from streamchat.base.sanitize import printable
from streamchat.cli import flags
from streamchat.cli.front_ends import choose_front_end
from streamchat.commands.doctor_versions import remedy, versions
from streamchat.config import loader
from streamchat.config.loader import Configuration
from streamchat.config.settings import default_of, setting_fields
from streamchat.models.limits import check_start

if TYPE_CHECKING:
    from streamchat.models.folder import Contents

Rows = dict[str, Any]
LABELS = {"face": "front end", "conversations": "sessions"}
"""How keys of the JSON report are displayed, if differently."""
HELP = "print versions, device, terminal, files, and what a chat would use"
DESCRIPTION = (
    "Check the installation and this machine: versions, devices and dtypes, the terminal, location and "
    "size of files, and which model and device a chat would use and why. Nothing is fetched or loaded. Exit code 1 "
    "if there is a problem."
)


@dataclass
class Report:
    """Result of all checks: sections of rows, and problems."""

    sections: dict[str, Rows] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """One sentence each."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    names = ("model", "adapter", "device", "dtype", "kernels", "decode", "cache_size", "kv_dtype", "plain")
    flags.add_setting_flags(parser, names)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    report = examine(args)
    text = json.dumps({**report.sections, "problems": report.problems}, indent=1) if args.json else as_text(report)
    sys.stdout.write(printable(text) + "\n")
    return ExitCode.FAILURE if report.problems else ExitCode.OK


def examine(args: argparse.Namespace) -> Report:
    """Run all checks. A check that fails is reported as a problem; the others still run."""
    report = Report()
    configuration = Configuration()

    def section(name: str, check: Callable[[Report], Rows]) -> None:
        try:
            report.sections[name] = check(report)
        except StreamchatError as error:
            report.problems.append(f"{name}: {error}")
        except ModuleNotFoundError as error:
            report.problems.append(f"{name}: {error.name} is not installed; {remedy()}")
        except Exception as error:  # whatever is broken, the rest is still shown
            report.problems.append(f"{name}: {limit_reached(error) or describe_unexpected(error)}")

    def settings(report: Report) -> Rows:
        nonlocal configuration
        configuration = flags.configuration_of(args, announce=False)
        from streamchat.models.sampling import advised

        return _settings(advised(configuration))

    section("versions", lambda report: versions(report.problems))
    section("settings", settings)
    section("device", lambda report: _device(configuration))
    section("terminal", lambda report: _terminal(configuration))
    section("files", _files)
    section("chat", lambda report: _chat(configuration))
    return report


def as_text(report: Report) -> str:
    """Format the report for people."""
    lines: list[str] = []
    for name, rows in report.sections.items():
        lines += [name, *(_row(label, value) for label, value in rows.items()), ""]
    lines += [f"problem: {problem}" for problem in report.problems] or ["no problems found"]
    return "\n".join(lines)


def _row(label: str, value: Any) -> str:
    return f"  {LABELS.get(label, label).removesuffix(' bytes'):<21} {_format_value(label, value)}".rstrip()


def _format_value(label: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and label.endswith("bytes"):
        return human_bytes(value)
    if isinstance(value, dict) and "path" in value:
        size = f"  ({human_bytes(value['bytes'])})" if value["bytes"] is not None else "  (does not exist yet)"
        return f"{value['path']}{size}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value)


# --- the sections --------------------------------------------------------------------------------------------------


def _settings(configuration: Configuration) -> Rows:
    file = configuration.file
    rows: Rows = {"file": str(file) if file else f"none; {loader.user_file()} would be read"}
    if configuration.local_notice:
        rows["./config.toml"] = configuration.local_notice
    for name in setting_fields():
        value = getattr(configuration.settings, name)
        if value != default_of(name):
            rows[name] = f"{value}  (from {configuration.origin(name)})"
    return rows


def _device(configuration: Configuration) -> Rows:
    check_start()
    import psutil
    import torch

    from streamchat.models import device as devices

    rows: Rows = {
        "devices": devices.available_devices(),
        "cpu": platform.processor() or platform.machine(),
        "processors": _processors(),
        "threads of torch": torch.get_num_threads(),
        "memory bytes": int(psutil.virtual_memory().total),
        "free bytes": devices.free_memory("cpu"),
        "bfloat16 on cpu": devices.cpu_has_bfloat16(),
        "cpu kernels": _kernels(configuration),
    }
    for name in devices.gpus() if torch.cuda.is_available() else ():
        about = torch.cuda.get_device_properties(name)
        rows[name] = f"{about.name}, {_free_of(devices.free_memory(name), about.total_memory)}"
        rows[f"bfloat16 on {name}"] = devices.choose_dtype("auto", name)[0] == "bfloat16"
    if torch.cuda.is_available():
        rows["attention on GPUs"] = ATTENTION_ON_GPUS
    if torch.backends.mps.is_available():
        # the maximum that Apple recommends, of memory shared with the CPU
        rows["mps"] = _free_of(devices.free_memory("mps"), torch.mps.recommended_max_memory())
    return rows


def _processors() -> str:
    """Describe how many processors streamchat uses, and why not all."""
    from streamchat.base import processors

    usable, there, quota = processors.usable_processors(), os.cpu_count() or 1, processors.processor_quota()
    allowed, cores, fast = processors.allowed_processors(), processors.allowed_cores(), processors.performance_cores()
    reasons = []
    if allowed < there:
        reasons.append(f"may run on {allowed}")
    if cores < allowed:
        reasons.append(f"uses one hyperthread of each of {cores} cores")
    if fast < cores:
        reasons.append(f"uses {plural(fast, 'performance core')} of {cores} cores")
    if quota is not None and quota < fast:
        reasons.append(f"has a quota of {quota:g} (cgroup)")
    return f"{usable} of {there}: this process {' and '.join(reasons)}" if reasons else str(usable)


def _kernels(configuration: Configuration) -> str:
    """Describe the CPU decode kernels. They are compiled when a model is loaded, not here."""
    from streamchat.kernels import build

    reason = _no_kernels(configuration)
    if reason:
        return f"PyTorch: {reason}"
    compiler, made = build.find_compiler(), build.library_path()
    return (
        f"compiled, {made}" if made.is_file() else f"not compiled yet; {compiler[0]} compiles them at the first start"
    )


def _no_kernels(configuration: Configuration) -> str:
    """Return why there are no compiled kernels; '' if there are, or if the first start can compile them."""
    from streamchat.kernels import build

    if configuration.settings.kernels == "torch":
        return f"kernels = torch ({configuration.origin('kernels')})"
    try:
        build.library_path()
    except build.KernelsUnavailableError as error:
        return str(error)
    return ""


def _free_of(free: int | None, total: int) -> str:
    return f"{human_bytes(free or 0)} free of {human_bytes(total)}"


def _terminal(configuration: Configuration) -> Rows:
    size = shutil.get_terminal_size()
    variables = (
        "TERM",
        "COLORTERM",
        "NO_COLOR",
        "FORCE_COLOR",
        "TERM_PROGRAM",
        "TMUX",
        "SSH_CONNECTION",
        "LC_ALL",
        "LC_CTYPE",
        "LANG",
    )
    rows: Rows = {
        "stdin": _stream_kind(sys.stdin),
        "stdout": _stream_kind(sys.stdout),
        "size": f"{size.columns} x {size.lines}",
        "encoding": f"{getattr(sys.stdout, 'encoding', None)} (locale {locale.getpreferredencoding(False)})",
        "face": choose_front_end(configuration.settings.plain, sys.stdin, sys.stdout, os.environ),
    }
    return rows | {name: os.environ[name] for name in variables if os.environ.get(name)}


def _stream_kind(stream: IO[str] | None) -> str:
    return "terminal" if stream is not None and stream.isatty() else "not a terminal"


def _files(report: Report) -> Rows:
    from streamchat.commands.doctor_store import examine_database
    from streamchat.models.hub_cache import hub_cache_dir
    from streamchat.models.staging import models_dir
    from streamchat.store.database import database_path
    from streamchat.telemetry.log_file import log_path

    database, snapshots = database_path(), paths.data_dir() / "snapshots"
    rows: Rows = {
        "models": _path_and_size(models_dir()),
        "hub cache": _path_and_size(hub_cache_dir()),
        "conversations": _path_and_size(database),
        "saved caches": _path_and_size(snapshots),
        "log": _path_and_size(log_path()),
        "replays": _path_and_size(paths.state_dir() / "runs"),
    }
    for folder in (paths.cache_dir(), paths.data_dir(), paths.state_dir()):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            report.problems.append(f"{folder} cannot be written; make it writable, or set STREAMCHAT_HOME")
    for private in (paths.data_dir(), database, paths.state_dir()):
        if os.name == "posix" and private.exists() and stat.S_IMODE(private.stat().st_mode) & 0o077:
            report.problems.append(f"{private} can be read by other users; chmod go= {private}")
    rows |= examine_database(report.problems)
    cache = paths.cache_dir()
    rows["free disk bytes"] = shutil.disk_usage(next(each for each in (cache, *cache.parents) if each.exists())).free
    return rows


def _path_and_size(path: Path) -> dict[str, Any]:
    """Return a path and its size in bytes, None if it does not exist."""
    if not path.exists():
        return {"path": str(path), "bytes": None}
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file() and not each.is_symlink()]
    return {"path": str(path), "bytes": sum(each.stat().st_size for each in files)}


def _chat(configuration: Configuration) -> Rows:
    """Describe what `streamchat` would use now, and why."""
    check_start()
    from streamchat.decode.steps import COMPILED, FUSED, expected_step
    from streamchat.models import device as devices
    from streamchat.models.folder import inspect
    from streamchat.models.resolve import resolve

    settings, here = configuration.settings, ", ".join(devices.available_devices())
    source = resolve(settings.model)
    device = devices.choose_device(settings.device)
    dtype, notes = devices.choose_dtype(settings.dtype, device)
    contents = inspect(Path(source.location)) if source.available and source.kind != "gguf" else None
    if contents is not None and settings.device == "auto" and device == "cuda":
        device = devices.device_with_room(contents.parameters, dtype, source.name)
    origin = configuration.origin("model")
    asked = "" if origin == "the default" else f"{settings.model}, "
    where = source.location if source.available else f"{source.location}, not fetched yet; the first start fetches it"
    rows: Rows = {
        "model": f"{source.name} ({asked}{origin})",
        "from": where,
        "device": f"{device} ({_why(configuration, 'device', f'best of {here}')})",
        "dtype": f"{dtype} ({_why(configuration, 'dtype', 'safe and fast on this device')})",
        "cache": f"{plural(settings.cache_size, 'token')} ({configuration.origin('cache_size')})",
    }
    step = expected_step(device, settings.decode, _no_kernels(configuration) if device == "cpu" else "")
    rows["decode step"] = f"{step.text} ({_why(configuration, 'decode', 'the fastest that supports the model')})"
    if device == "cpu":
        cached = devices.choose_cache_dtype(settings.dtype, dtype, device, compiled=step.name == COMPILED)
        # whether the kernels support the model is known when it is loaded
        rows["cached keys"] = cached if cached == dtype else f"{cached} if compiled kernels decode, else {dtype}"
        if settings.kv_dtype == "auto" and settings.dtype != "float32" and step.name == COMPILED:
            rows["cached keys"] = f"int8 if it is as good and as fast here, else {rows['cached keys']}"
    elif settings.kv_dtype == "auto" and settings.dtype != "float32" and step.name == FUSED:
        rows["cached keys"] = f"int8 if it is as good and as fast here, else {dtype}"
    if settings.kv_dtype not in ("auto", "native"):
        rows["cached keys"] = settings.kv_dtype
    if settings.adapter:
        from streamchat.models.adapters import find_adapters

        rows["adapter"] = ", ".join(str(adapter.folder) for adapter in find_adapters(settings.adapter))
    if contents is not None:
        rows |= _weights(configuration, contents, device, dtype, source.name)
    if notes:
        rows["note"] = " ".join(notes)
    return rows


def _weights(configuration: Configuration, contents: Contents, device: str, dtype: str, name: str) -> Rows:
    """Return the size of the weights in memory and their precision; require enough memory."""
    from streamchat.models import device as devices
    from streamchat.models.plan import serves_tiles

    settings = configuration.settings
    compiled = device == "cpu" and not _no_kernels(configuration)
    if compiled and contents.kinds and serves_tiles(contents, settings.weights, settings.dtype):
        devices.check_served_memory(contents.file_bytes, name)
        return {"weights bytes": contents.file_bytes, "precision": " and ".join(sorted(contents.kinds))}
    devices.check_memory(contents.parameters, dtype, device, name)
    return {"weights bytes": contents.bytes_as(devices.BYTES[dtype])}


def _why(configuration: Configuration, name: str, automatic: str) -> str:
    if getattr(configuration.settings, name) == "auto":
        return f"auto: {automatic}"
    return f"from {configuration.origin(name)}"
