"""`streamchat sweep`: perplexity, speed and memory over a grid of sinks, budgets, methods and models."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ConfigError, ExitCode, StreamchatError, short
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.benchmarks.loading import machine
from streamchat.benchmarks.methods.registry import SCORED, parse_kinds, split_list
from streamchat.cli import flags
from streamchat.cli.output import add_output_flags, output_folder, print_page
from streamchat.cli.scoring import add_methods_flag, add_text_flags, require_at_least
from streamchat.reports.machine import machine_line

if TYPE_CHECKING:
    from pathlib import Path

    from streamchat.benchmarks.pools import Work

DEFAULT_OUT = "streamchat-sweep"
DEFAULT_TOKENS = 2048

HELP = "measure perplexity, speed and memory over sinks x budgets x methods x models"
DESCRIPTION = (
    "Score texts under every combination in worker processes, and recommend a budget and a number of "
    "sinks. Results are saved in --out as they arrive: the same command continues a stopped run."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    flags.add_setting_flags(parser, ("model", "device", "dtype", "attention", "kernels"))
    grid = parser.add_argument_group("grid (comma-separated lists)")
    grid.add_argument("--models", metavar="LIST", help="model names (default: the value of --model)")
    add_methods_flag(grid, "sinks", "any", SCORED)
    grid.add_argument("--sinks", default="0,1,4", metavar="LIST", help="sink counts (default: 0,1,4)")
    grid.add_argument(
        "--cache-sizes", default="256,512,1024", metavar="LIST", help="budgets in tokens (default: 256,512,1024)"
    )
    own = parser.add_argument_group("sweep")
    add_text_flags(parser, own, DEFAULT_TOKENS)
    own.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="recommend the smallest budget within this relative tolerance of the best perplexity (default: 0.02)",
    )
    own.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes, each with its own model (default: half the processors)",
    )
    own.add_argument(
        "--ray", metavar="ADDRESS", help="run on this Ray cluster instead; 'local' starts one here (needs ray)"
    )
    add_output_flags(own)
    parser.set_defaults(out=DEFAULT_OUT)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code, 1 if a combination failed.

    Raises:
        ConfigError: A list, file or folder is invalid, or the cluster cannot be reached.
        StreamchatError: A worker process died.
    """
    from streamchat.benchmarks.sweep import Journal

    work = _work(args)
    folder = output_folder(args)
    assert folder is not None  # it has a default
    journal = Journal(folder / "sweep.jsonl")
    missing = [(cell, document) for cell, document in work if journal.result(cell) is None]
    if len(missing) < len(work):
        print(f"streamchat: {len(work) - len(missing)} of {len(work)} already done", file=sys.stderr)
    stopped = False
    failed: StreamchatError | None = None
    failures: dict[str, str] = {}
    try:
        failures = _run_missing(args, missing, journal)
    except KeyboardInterrupt:
        stopped = True
    except ConfigError:
        raise
    except StreamchatError as error:
        failed = error
    _print(args, work, journal, folder, [f"{name}: {why}" for name, why in failures.items()], stopped)
    if failed is not None:
        raise failed
    return ExitCode.INTERRUPTED if stopped else ExitCode.FAILURE if failures else ExitCode.OK


def _work(args: argparse.Namespace) -> Work:
    from streamchat.benchmarks.cell import ModelChoice
    from streamchat.benchmarks.sweep import cells_of, grid
    from streamchat.benchmarks.texts import read_documents

    settings = flags.configuration_of(args).settings
    require_at_least(args, max_tokens=0, chunk=1, workers=1)
    if not 0 <= args.tolerance <= 1:
        raise ConfigError(f"--tolerance {args.tolerance} must be from 0 to 1")
    if args.ray and args.workers:
        raise ConfigError("--workers applies to this machine; --ray uses the workers of its cluster; give one of them")
    names = split_list(args.models, "--models") if args.models else [settings.model]
    models = [
        ModelChoice(name, settings.device, settings.dtype, settings.attention, settings.kernels) for name in names
    ]
    kinds, budgets = parse_kinds(args.methods), _numbers(args.cache_sizes, "--cache-sizes")
    methods = grid(kinds, budgets, _numbers(args.sinks, "--sinks"))
    return cells_of(models, methods, read_documents(args.files), args.max_tokens, args.chunk)


def _numbers(text: str, flag: str) -> list[int]:
    words = split_list(text, flag)
    if wrong := [word for word in words if parse_whole_number(word) is None]:
        raise ConfigError(f"{flag}: {short(wrong[0], 80)} is not a whole number of up to 18 digits")
    return [int(word) for word in words]


def _run_missing(args: argparse.Namespace, missing: Work, journal: Any) -> dict[str, str]:
    """Run the missing cells; return the reason of each cell that failed."""
    from streamchat.benchmarks.pools import default_workers, run_in_processes, run_on_ray
    from streamchat.cli.progress_bar import Bar

    if not missing:
        return {}
    results = (
        run_on_ray(missing, args.ray)
        if args.ray is not None
        else run_in_processes(missing, args.workers or default_workers())
    )
    failures = {}
    with Bar(sys.stderr, len(missing)) as bar:
        bar.advance(f"{len(missing)} to run")
        for cell, result in results:
            journal.write(cell, result)
            bar.advance(cell.name, 1)
            if "error" in result:
                failures[cell.name] = result["error"]
    return failures


def _print(
    args: argparse.Namespace, work: Work, journal: Any, folder: Path, problems: list[str], stopped: bool
) -> None:
    from streamchat.benchmarks.sweep import recommend, rows_of
    from streamchat.benchmarks.sweep_page import make_page

    known = [(cell, result) for cell, _ in work if (result := journal.result(cell)) is not None]
    whole = {cell for cell, _ in known}
    # a mean over some documents is not comparable with a mean over all
    partial = {(cell.model, cell.method) for cell, _ in work if cell not in whole}
    rows = rows_of((cell, result) for cell, result in known if (cell.model, cell.method) not in partial)
    if not rows:
        for problem in problems[:1]:
            raise StreamchatError(f"nothing could be measured: {problem}")
        if stopped:
            raise KeyboardInterrupt
        return
    documents = list(dict.fromkeys(document.name for _, document in work))
    lines = [
        f"{plural(len(documents), 'document')} ({', '.join(documents)}), at most "
        f"{args.max_tokens:,} tokens of each, {args.chunk} tokens per forward pass for bounded methods"
        if args.max_tokens
        else f"{len(documents)} whole documents ({', '.join(documents)}), {args.chunk} tokens per forward pass",
        machine_line(),
    ]
    notes = [f"Failed: {problem}" for problem in problems]
    if partial:
        notes.append(f"{len(partial)} combinations are not finished; the same command continues them.")
    about = {
        "command": "sweep",
        "documents": documents,
        "max_tokens": args.max_tokens,
        "chunk": args.chunk,
        "tolerance": args.tolerance,
        "failed": problems,
        "finished": len(known),
        "of": len(work),
        **machine(),
    }
    print_page(make_page(rows, recommend(rows, args.tolerance), lines, notes, about), args, folder)
