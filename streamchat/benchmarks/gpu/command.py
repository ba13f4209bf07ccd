"""`streamchat bench --gpu`: speed of one GPU against the limit of its memory and against transformers' `generate`.

Each new token reads every weight and every cached key and value once, so at most as many tokens per second are possible
as the bandwidth allows. The bandwidth is measured in the same run, by copying.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from streamchat.base import child_processes, paths
from streamchat.base.devices import device_type, is_spread
from streamchat.base.errors import ConfigError, StreamchatError, reason_of
from streamchat.base.progress import Progress
from streamchat.benchmarks.gpu.cases import KINDS, MODEL, SHAPES, cases_of, parse_names
from streamchat.benchmarks.gpu.page import tables_of
from streamchat.benchmarks.gpu.supervisor import Results, Supervisor
from streamchat.benchmarks.loading import machine
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.reports.machine import machine_line
from streamchat.reports.page import Page

ROWS = "bench-gpu.jsonl"
"""The file with one JSON object per row, in `--out` or the state folder."""
WORKER = ("-m", "streamchat.benchmarks.gpu.worker")


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure one GPU.

    Raises:
        ConfigError: There is no GPU, another device or quantized weights are set, or a name is not known.
        ModelError: There is no model of that name.
        StreamchatError: Nothing could be measured.
    """
    from streamchat.benchmarks.gpu.measure import Sizes
    from streamchat.benchmarks.gpu.worker import Job

    settings = configuration.settings
    shapes = parse_names(args.shapes or ",".join(SHAPES), SHAPES, "--shapes")
    kinds = parse_names(args.kinds or ",".join(KINDS), KINDS, "--kinds")
    if settings.weights not in ("auto", "native"):
        raise ConfigError(f"--gpu measures native weights and weights = {settings.weights}; add --weights native")
    device = cuda_device(settings.device)
    sizes = Sizes(settings.cache_size, settings.num_sink_tokens, settings.evict, args.new_tokens, args.rounds)
    named = _with_absolute_model(settings) if MODEL in shapes else settings
    cases, tokens = cases_of(shapes, kinds, settings.kv_dtype), args.flat or 0
    job = Job(asdict(named), device, cases, 0, sizes, args.time_limit, tokens=tokens, flat_shape=shapes[0])
    file = rows_file(args.out)
    try:
        if args.out is None:
            paths.private_dir(file.parent)
        supervisor = Supervisor(job, child_processes.python(*WORKER), file, lambda name: progress(f"Measuring {name}"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({reason_of(error)})") from None
    results = supervisor.run()
    if all(row.tps is None for row in results.rows) and not results.tenths:
        raise StreamchatError(f"nothing could be measured; {results.rows[0].case.name}: {results.rows[0].error}")
    lines = [f"{results.gpu}, {settings.dtype if settings.dtype != 'auto' else 'bfloat16'}", machine_line()]
    tables = tables_of(results, sizes.cache_size, job.tokens)
    notes = [f"Each row was written to {file} when it was measured."]
    return Page("bench-gpu", "One GPU", lines, tables, notes=notes, data=_data(results, job.sizes.cache_size))


def _with_absolute_model(settings: Settings) -> Settings:
    """Return the settings with a model name that is valid in a process with another folder.

    Raises:
        ModelNotFoundError: There is no such model.
    """
    from streamchat.models.resolve import resolve

    source = resolve(settings.model)
    return replace(settings, model=source.location) if source.kind in ("folder", "gguf") else settings


def cuda_device(device: str) -> str:
    """Return the GPU for `--gpu`: the first one for `auto`.

    Raises:
        ConfigError: PyTorch finds no GPU, or the setting names another device or several.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--gpu measures a GPU and PyTorch finds none here; use --decode to measure the CPU")
    if device != "auto" and device_type(device) != "cuda":
        raise ConfigError(f"--gpu measures a GPU and device = {device}; add --device cuda")
    if is_spread(device):
        raise ConfigError(f"--gpu measures one GPU and device = {device}; choose one, such as --device cuda:0")
    return "cuda" if device == "auto" else device


def rows_file(out: str | None) -> Path:
    """Return the file for the rows."""
    return (paths.state_dir() if out is None else paths.user_path(out)) / ROWS


def _data(results: Results, cache_size: int) -> dict[str, Any]:
    rows = [{**asdict(row.case), **_without_case(asdict(row))} for row in results.rows]
    return {
        "command": "bench",
        "gpu": results.gpu,
        "cache_size": cache_size,
        "bandwidth": results.bandwidth,
        "rows": rows,
        "tenths": [asdict(tenth) for tenth in results.tenths],
        "flat_error": results.flat_error,
        **machine(),
    }


def _without_case(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "case"}
