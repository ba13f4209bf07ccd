"""Compares two long chats in one process, with and without the archive of evicted turns: speed, memory, and disk.

    python -m tools.archive_soak                                # 100,000 tokens each, at most 64 MB on the disk
    python -m tools.archive_soak --tokens 20000 --archive int8

The chats take turns. They have the same messages and seeds, so that each turn can be compared with the same turn of the
other chat. Times are CPU time of the thread that runs the model, and elapsed time. Both chats are saved. The exit code
is 1 if the archive exceeded its limit, or if pages other than the oldest ones were deleted.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from streamchat.base import events as ev
from streamchat.benchmarks.attached import attached
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble, load_from_settings
from streamchat.models.load import LoadedModel
from streamchat.sessions.archive import Archive
from streamchat.store.evicted import EvictedPage
from streamchat.store.store import Store
from streamchat.telemetry.memory import process_rss
from tools.first_token import finished, message

MEGABYTE = 1_000_000
PARTS = 10
"""Number of times that memory and disk are measured during a run."""


@dataclass
class Figures:
    """Results of a run."""

    cpu: list[float] = field(default_factory=list)
    """For each pair of turns: CPU time per decoded token with the archive, divided by that without."""
    wall: list[float] = field(default_factory=list)
    """The same with elapsed time."""
    tokens: int = 0
    """Tokens of the shorter chat."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the process after each tenth of the tokens."""
    disk: list[int] = field(default_factory=list)
    """Bytes of the archive after each tenth of the tokens."""
    quota: int = 0
    """Limit of the archive in bytes."""
    deleted: int = 0
    """Pages that were deleted because of the limit."""
    left: int = 0
    """Pages that are left at the end."""
    is_oldest_first: bool = True
    """Whether no deleted page is newer than one that is left."""


class SavedChat:
    """A saved conversation whose decoding is timed. Its hook is on the shared model only while one of its turns runs.

    Args:
        configuration: The settings.
        loaded: The model, which both chats share.
        database: Path of its database.
    """

    def __init__(self, configuration: Configuration, loaded: LoadedModel, database: Path) -> None:
        self._decoding_since = (0.0, 0.0)
        self._archive = Archive(lambda: Store(database), lambda event: None)
        self._archive.open(required=True)
        started = assemble(configuration, loaded, self._hear, lambda *_: None)
        self.conversation = started.conversation
        self._archive.start(started)
        self.conversation.close()

    def _hear(self, event: ev.Event) -> None:
        self._archive.record(event)
        if isinstance(event, ev.PrefillProgress) and event.done == event.total:
            self._decoding_since = time.thread_time(), time.perf_counter()

    def turn(self, text: str) -> tuple[float, float]:
        """Run a turn; return CPU seconds and seconds per decoded token."""
        with attached(self.conversation):
            outcome = self.conversation.run_turn(text, lambda: False)
            ends = time.thread_time(), time.perf_counter()
            self._archive.record(finished(outcome, self.conversation))
        cpu, wall = (end - since for end, since in zip(ends, self._decoding_since, strict=True))
        return cpu / max(1, outcome.new_tokens), wall / max(1, outcome.new_tokens)

    def pages(self) -> list[EvictedPage]:
        """Return the pages of its archive, oldest first."""
        session = self._archive.session
        if self._archive.recorder is None or session is None:
            return []
        return [page for page, _ in self._archive.recorder.store.evicted.pages(session)]

    def archive_bytes(self) -> int:
        """Return the size of its archive on the disk."""
        recorder = self._archive.recorder
        return 0 if recorder is None else sum(recorder.store.evicted.sizes().values())

    def close(self) -> None:
        """Write what is still queued, and close the database."""
        self._archive.close()


def soak(loaded: LoadedModel, settings: dict[str, object], tokens: int, folder: Path) -> Figures:
    """Run both chats until each has `tokens` tokens.

    Args:
        loaded: The model.
        settings: Settings of both chats; the second chat has `archive = off`.
        tokens: Minimum tokens of each chat.
        folder: Folder for the databases.
    """
    chosen = Settings(**{"temperature": 0.7, "seed": 1, "loop_guard": "off", "speculation": "off"} | settings)  # type: ignore[arg-type]
    figures = Figures(quota=chosen.archive_session_mb * MEGABYTE)
    with_archive, without = (
        SavedChat(Configuration(each, {"cache_size": "flag"}), loaded, folder / name / "chats.db")
        for name, each in (("on", chosen), ("off", Settings(**vars(chosen) | {"archive": "off"})))
    )
    seen: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
    number = 0
    while len(figures.memory) < PARTS:
        number += 1
        chats = (with_archive, without) if number % 2 else (without, with_archive)
        times = {chat: chat.turn(message(number)) for chat in chats}
        for ratios, on, off in zip((figures.cpu, figures.wall), times[with_archive], times[without], strict=True):
            ratios.append(on / off)
        seen |= {(page.turn, page.runs): page.turn for page in with_archive.pages()}
        figures.tokens = min(len(chat.conversation.log) for chat in chats)
        if figures.tokens >= tokens * (len(figures.memory) + 1) / PARTS:
            figures.memory.append(process_rss())
            figures.disk.append(with_archive.archive_bytes())
            print(f"{figures.tokens:,} tokens", file=sys.stderr, flush=True)
    left = {(page.turn, page.runs) for page in with_archive.pages()}
    gone = [turn for key, turn in seen.items() if key not in left]
    figures.deleted, figures.left = len(gone), len(left)
    figures.is_oldest_first = not gone or not left or max(gone) <= min(turn for turn, _ in left)
    for chat in (with_archive, without):
        chat.close()
    return figures


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the bounds of its 95 % interval; the bounds are two of the values, by binomial ranks."""
    ordered, count = sorted(values), len(values)
    reach = 0.98 * math.sqrt(count)  # 1.96 standard deviations of the number of values below the median
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach) - 1)
    return statistics.median(ordered), ordered[low], ordered[max(high, low)]


def lines_of(figures: Figures) -> list[str]:
    """Return the report."""
    lines = [f"tokens per chat: {figures.tokens:,} in {len(figures.cpu)} turns"]
    for name, ratios in (("CPU time", figures.cpu), ("time", figures.wall)):
        median, low, high = median_interval(ratios)
        lines.append(f"{name} per token, with the archive / without: {median:.3f} (95 %: {low:.3f} to {high:.3f})")
    lines.append("memory after each tenth: " + ", ".join(f"{size / MEGABYTE:.0f}" for size in figures.memory) + " MB")
    lines.append("archive after each tenth: " + ", ".join(f"{size / MEGABYTE:.1f}" for size in figures.disk) + " MB")
    lines.append(f"largest archive: {max(figures.disk) / MEGABYTE:.1f} of {figures.quota / MEGABYTE:.0f} MB")
    order = "the oldest ones" if figures.is_oldest_first else "NOT the oldest ones"
    lines.append(f"pages deleted: {figures.deleted}, {order}; left: {figures.left}")
    return lines


def main() -> int:
    """Run both chats and print the figures; return 1 if the archive exceeded its limit or newer pages were deleted."""
    parser = argparse.ArgumentParser(prog="python -m tools.archive_soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of each chat (default: %(default)s)")
    parser.add_argument("--cache-size", type=int, default=1024)
    parser.add_argument("--reply", type=int, default=128, help="maximum tokens per reply (default: %(default)s)")
    parser.add_argument(
        "--quota", type=int, default=64, metavar="MB", help="limit of the archive in megabytes (default: %(default)s)"
    )
    kinds: tuple[Literal["native", "int8"], ...] = ("native", "int8")
    parser.add_argument("--archive", choices=kinds, default="native")
    args = parser.parse_args()
    settings: dict[str, object] = {
        "model": args.model,
        "cache_size": args.cache_size,
        "max_new_tokens": args.reply,
        "archive": args.archive,
        "archive_session_mb": args.quota,
    }
    loaded = load_from_settings(Configuration(Settings(model=args.model), {}), lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(loaded, settings, args.tokens, Path(folder))
    print("\n".join(lines_of(figures)))
    return 0 if figures.is_oldest_first and max(figures.disk) <= figures.quota else 1


if __name__ == "__main__":
    sys.exit(main())
