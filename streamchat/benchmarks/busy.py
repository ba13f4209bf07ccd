"""`streamchat bench --busy`: time per token while other processes keep the cores busy."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base import child_processes
from streamchat.base.devices import device_type
from streamchat.base.errors import ConfigError, StreamchatError, short
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.progress import Progress, silent
from streamchat.benchmarks.busy_loops import busy_loops
from streamchat.benchmarks.figures import paired_ratio, spread
from streamchat.benchmarks.loading import about, cache_size, gguf_file, heading
from streamchat.benchmarks.methods.llama_cpp import LlamaCpp, find_peers
from streamchat.benchmarks.methods.registry import make_method, split_list
from streamchat.benchmarks.methods.stream import Stream, open_stream
from streamchat.benchmarks.methods.streaming import Chat
from streamchat.config.loader import Configuration
from streamchat.reports.page import Page, Table

MAX_LOOPS = 64
WARM_UP = 8
"""Untimed tokens of a run, before the loops start."""
OURS, THEIRS = "streamchat", "llama.cpp"
Means = dict[int, dict[str, list[float]]]
"""Busy loops -> method -> mean milliseconds per token of each run."""


@dataclass(frozen=True)
class Run:
    """Result of one run of streamchat in its own process, with what the other runs need."""

    mean_ms: float
    """Mean milliseconds per token."""
    ids: list[int]
    """The prompt, which fills the cache."""
    sinks: int
    gguf: Path | None
    """The model as a GGUF file, if there is one."""
    lines: list[str]
    """Heading of the page."""
    notes: list[str]
    about: dict[str, Any]
    """Model and machine, for JSON."""


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure with each number of busy loops.

    Raises:
        ConfigError: The list of numbers is invalid, or another device is set.
        ModelError: The model cannot be loaded, or cannot stream.
        StreamchatError: A process died.
    """
    loops = _parse(args.busy)
    if device_type(configuration.settings.device) not in ("auto", "cpu"):
        device = configuration.settings.device
        raise ConfigError(f"--busy measures the CPU and device = {device}; add --device cpu")
    progress("Warming up")
    with _new_process() as call:
        first: Run = call(measure_streamchat, configuration, args.new_tokens, 0)
    peers, notes = find_peers(first.gguf, len(first.ids), first.sinks, first.about["threads"])
    means = _measure(first, args, configuration, loops, progress, with_llama_cpp=bool(peers))
    page = Page("bench-busy", "Decoding on a busy machine", first.lines, [_table(means)], notes=[*first.notes, *notes])
    page.lines += [f"{peer.name}: {peer.description}" for peer in peers if peer.name == THEIRS]
    page.lines.append(f"{plural(args.rounds, 'run')} of {plural(args.new_tokens, 'token')} each, taking turns")
    page.data = first.about | {"rounds": args.rounds, "new_tokens": args.new_tokens, "busy": _summary(means)}
    return page


def _parse(text: str) -> list[int]:
    """Return the numbers of busy loops, each once, in order."""
    numbers: list[int] = []
    for word in split_list(text, "--busy"):
        number = parse_whole_number(word)
        if number is None or number > MAX_LOOPS:
            raise ConfigError(f"--busy: {short(word, 80)} is not a number of busy loops (0 to {MAX_LOOPS})")
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def _measure(
    first: Run,
    args: argparse.Namespace,
    configuration: Configuration,
    loops: Sequence[int],
    progress: Progress,
    *,
    with_llama_cpp: bool,
) -> Means:
    """Run every method with every number of loops in turn, so that other load slows all alike."""
    means: Means = {count: {OURS: [], **({THEIRS: []} if with_llama_cpp else {})} for count in loops}
    for number in range(1, args.rounds + 1):
        for count, by_method in means.items():
            for name, found in by_method.items():
                progress(f"Run {number} of {args.rounds}, {plural(count, 'busy loop')}: {name}")
                with _new_process() as call:
                    if name == OURS:
                        found.append(call(measure_streamchat, configuration, args.new_tokens, count).mean_ms)
                    else:
                        found.append(call(measure_llama_cpp, first, args.new_tokens, count))
    return means


@contextmanager
def _new_process() -> Iterator[Callable[..., Any]]:
    """Yield a function that calls another one in a new process."""
    # spawned, because torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, initializer=child_processes.end_with_parent)

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with child_processes.safe_environment():
            future = pool.submit(function, *arguments)
        try:
            return future.result()
        except BrokenProcessPool:
            raise StreamchatError(
                "a process died while it decoded, most often for lack of memory; choose a smaller model or close "
                "other programs"
            ) from None

    try:
        yield call
    finally:
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
            process.join()


def measure_streamchat(configuration: Configuration, tokens: int, loops: int) -> Run:
    """Load the model, fill the cache, and decode `tokens` tokens while `loops` busy loops run.

    Raises:
        ModelError: The model cannot be loaded, or cannot stream.
    """
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.load import load_from_settings
    from streamchat.models.quiet import quiet
    from streamchat.verify.text import help_topic_ids

    settings = configuration.settings
    with quiet():
        loaded = load_from_settings(settings, silent, device="cpu")
        size, note = cache_size(configuration, loaded)
        ids = help_topic_ids(loaded.tokenizer, size)
        ids = (ids * -(-size // len(ids)))[:size]  # the text may be shorter than the budget
        method = make_method(OURS, size, settings.num_sink_tokens)
        stream = open_stream(method, loaded.model, choose_checked_fit(loaded.model))
        if isinstance(stream, Chat):
            stream.evict = settings.evict
        mean = _decode(stream, ids, tokens, loops)
    return Run(
        mean_ms=mean,
        ids=ids,
        sinks=settings.num_sink_tokens,
        gguf=gguf_file(configuration, loaded),
        lines=heading(loaded, f"{size:,} cached tokens"),
        notes=[*loaded.notes, *filter(None, [note])],
        about=about("bench", loaded, cache_size=size, num_sink_tokens=settings.num_sink_tokens),
    )


def measure_llama_cpp(first: Run, tokens: int, loops: int) -> float:
    """Return the mean milliseconds per token of llama.cpp, under the same conditions."""
    assert first.gguf is not None
    stream = LlamaCpp(first.gguf, len(first.ids), first.sinks, first.about["threads"], one_by_one=False)
    return _decode(stream, first.ids, tokens, loops)


def _decode(stream: Stream, ids: Sequence[int], tokens: int, loops: int) -> float:
    with stream:
        token = stream.prefill(ids)
        stream.decode_timed(token, WARM_UP)
        with busy_loops(loops):
            return 1000 * statistics.mean(stream.decode_timed(token, tokens))


def _summary(means: Means) -> dict[str, Any]:
    return {str(loops): {name: _figures(by_method, name) for name in by_method} for loops, by_method in means.items()}


def _figures(by_method: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """Return the figures of a method under one number of loops.

    The worst run is compared with streamchat's own median; ratios to llama.cpp are medians over pairs of one round.
    """
    runs = by_method[name]
    return {
        "mean_ms": list(runs),
        "median_ms": statistics.median(runs),
        "worst_to_our_median": max(runs) / statistics.median(by_method[OURS]),
        "time_to_llama_cpp": paired_ratio(runs, by_method.get(THEIRS, [])),
    }


def _table(means: Means) -> Table:
    rows = []
    for loops, by_method in means.items():
        for name, runs in by_method.items():
            figures = _figures(by_method, name)
            ratio = figures["time_to_llama_cpp"]
            cells = (spread(runs), f"{figures['worst_to_our_median']:.2f} x", f"{ratio:.2f} x" if ratio else "-")
            rows.append((plural(loops, "busy loop"), name, *cells))
    return Table(
        "Time per token",
        ("", "method", "ms per token", "worst run / median of streamchat", "time / llama.cpp"),
        rows,
        "ms per token: the mean of each run; its median over runs, with minimum and maximum.",
    )
