"""`streamchat bench --resume`: restoring a saved cache compared with prefilling its tokens again."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from streamchat.base.formatting import human_bytes, plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.figures import median_ms, paired_ratio, sample_rounds
from streamchat.benchmarks.loading import about, heading, load_in_thread
from streamchat.cache import checkpoint
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import assemble
from streamchat.conversation.conversation import Conversation
from streamchat.models.load import LoadedModel
from streamchat.reports.page import Page, facts
from streamchat.sessions.snapshot import Snapshot, load, save
from streamchat.store.records import CacheMark, ModelIdentity, StoredTurn
from streamchat.store.store import Store

TRANSCRIPT_TURNS = 1000
SENTENCE = "The keeper of the lighthouse wrote down every ship, its flag, its course and the colour of the sky. "


@dataclass(frozen=True)
class ResumeFigures:
    """Result of one run. Medians, in milliseconds."""

    tokens: int
    """Tokens in the cache, which was full and had evicted."""
    snapshot_bytes: int
    save_ms: float
    """Copying the cache and writing the file, flushed to disk."""
    resume_ms: float
    """Reading the file, checking it, and restoring the cache."""
    prefill_ms: float
    """Prefilling the same tokens again, in the chunks that a chat uses."""
    ratio: float
    """Median of prefill / resume, one pair per round."""
    same_logits: bool
    """Whether the next-token logits after resuming are bitwise equal to those before."""
    transcript_ms: float
    """Loading `TRANSCRIPT_TURNS` saved turns from the store; only this grows with the number of turns."""
    rounds: int


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure resuming a full cache.

    Raises:
        ModelError: The model cannot be loaded, or cannot stream.
    """
    loaded = load_in_thread(configuration, progress)
    figures = measure_resume(configuration, loaded, args.rounds, progress)
    same = "bit-identical" if figures.same_logits else "NOT identical"
    table = facts(
        "Resuming a saved cache",
        {
            "saving": f"{figures.save_ms:.0f} ms, {human_bytes(figures.snapshot_bytes)}",
            "resuming": f"{figures.resume_ms:.0f} ms; the next logits are {same}",
            "prefill of the same tokens": f"{figures.prefill_ms:.0f} ms",
            "prefill / resuming": f"{figures.ratio:.1f}",
            "the transcript, in addition": f"{figures.transcript_ms:.0f} ms for {TRANSCRIPT_TURNS:,} turns",
        },
    )
    lines = heading(loaded, f"{figures.tokens:,} tokens in the cache", plural(figures.rounds, "round"))
    data = about("bench", loaded) | asdict(figures)
    return Page("bench-resume", "Resuming", lines, [table], notes=[*loaded.notes], data=data)


def measure_resume(
    configuration: Configuration, loaded: LoadedModel, rounds: int, progress: Callable[[str], None]
) -> ResumeFigures:
    """Fill a cache past its budget, then save, resume and prefill it in each round.

    Args:
        configuration: All settings; `cache_size` is the measured size.
        loaded: The model.
        rounds: Number of measured rounds, after one to warm up.
        progress: Called with progress messages.

    Raises:
        StreamchatError: The settings do not fit the model.
    """
    assembled = assemble(configuration, loaded, lambda event: None, lambda stage, *_: progress(stage))
    conversation = assembled.conversation
    cache = conversation.cache
    progress("Filling the cache")
    reply = SENTENCE * max(2, cache.cache_size // 100)
    while cache.compression_count < 3:
        conversation.run_turn("Go on with the log book, please.", lambda: False, reply=reply)
    runs, length = tuple(cache.ledger.runs), len(conversation.log)
    same, size = True, 0

    def save_resume_and_prefill() -> dict[str, float]:
        nonlocal same, size
        started = time.perf_counter()
        size = save(path, _snapshot(conversation))
        saved = time.perf_counter()
        before = _logits(conversation)
        cache.reset()
        resumed_from = time.perf_counter()
        checkpoint.restore(cache, load(path).checkpoint)
        resumed = time.perf_counter()
        same = same and torch.equal(_logits(conversation), before)
        prefill_from = time.perf_counter()
        conversation.feeder.prefill_runs(runs, length)
        done = time.perf_counter()
        # restore the cache: after prefilling again, its values lack the influence of the evicted tokens
        checkpoint.restore(cache, load(path).checkpoint)
        return {"save": saved - started, "resume": resumed - resumed_from, "prefill": done - prefill_from}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        samples = sample_rounds(save_resume_and_prefill, rounds, progress)
    conversation.close()
    return ResumeFigures(
        tokens=cache.length,
        snapshot_bytes=size,
        save_ms=median_ms(samples["save"]),
        resume_ms=median_ms(samples["resume"]),
        prefill_ms=median_ms(samples["prefill"]),
        ratio=paired_ratio(samples["prefill"], samples["resume"]) or 0.0,
        same_logits=same,
        transcript_ms=1000 * _transcript_s(rounds),
        rounds=rounds,
    )


def _transcript_s(rounds: int) -> float:
    """Return the median seconds of loading a long conversation from a temporary store."""
    mark = CacheMark(((0, 4), (99_004, 100_004)), ((0, 4),), tuple(range(99_004, 100_004, 100)), 90)
    turns = [
        StoredTurn(n, SENTENCE, SENTENCE * 4, 4 + 100 * n, 8 + 100 * n, 30 + 100 * n, array("i", range(100)), mark)
        for n in range(TRANSCRIPT_TURNS)
    ]
    times = []
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "bench.db") as store:
        session = store.create("bench", ModelIdentity("", ""), {}, range(4))
        store.write(session, turns=turns, cache=mark)
        for _ in range(rounds):
            started = time.perf_counter()
            store.load(session)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _snapshot(conversation: Conversation) -> Snapshot:
    taken = checkpoint.capture(conversation.cache)
    ids = array("i", conversation.log.ids_at(taken.runs))
    return Snapshot("bench", taken, ids, conversation.rng_state, "", "", {})


def _logits(conversation: Conversation) -> torch.Tensor:
    """Return the next-token logits; the cache is unchanged afterwards."""
    kept = checkpoint.capture(conversation.cache)
    logits = conversation.next_logits().clone()
    checkpoint.restore(conversation.cache, kept)
    return logits
