"""Looking at a conversation from another process, through the store only: nothing is changed by it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.errors import SessionError, StoreError
from streamchat.base.saved_figures import InvalidFiguresError, load_figures
from streamchat.frontend.status import StatusBoard
from streamchat.store.database import database_path
from streamchat.store.lock import is_open
from streamchat.store.records import SessionInfo
from streamchat.store.store import Store


def runs_dir() -> Path:
    """Where `streamchat replay` puts its runs unless it is told otherwise."""
    return paths.state_dir() / "runs"


def sample_of(record: Mapping[str, Any]) -> tuple[ev.StatusSampled, ev.ModelInfo | None]:
    """The live figures and the model, from what the recorder wrote.

    Raises:
        InvalidFiguresError: They are damaged, or of another version.
    """
    fields = dict(record)
    info = fields.pop("info", None)
    for name, kind in (("cache", ev.CacheState), ("memory", ev.MemoryState)):
        fields[name] = load_figures(kind, fields.get(name))
    return load_figures(ev.StatusSampled, fields), None if info is None else load_figures(ev.ModelInfo, info)


@dataclass(frozen=True)
class Watched:
    """A conversation that can be looked at."""

    store: Path
    info: SessionInfo
    running: bool
    run: Path | None = None
    """The folder of the replay that it is part of."""

    @property
    def name(self) -> str:
        """What `streamchat monitor` takes."""
        return self.info.id if self.run is None else str(self.run)


def everything(limit: int = 50) -> list[Watched]:
    """Chats and replays, the running ones first, then by time."""
    stores: list[tuple[Path, Path | None]] = [(database_path(), None)]
    folder = runs_dir()
    if folder.is_dir():
        stores += [(run / "streamchat.db", run) for run in sorted(folder.iterdir(), reverse=True)[:limit]]
    found: list[Watched] = []
    for path, run in stores:
        if path.exists():
            try:
                found += _in_store(path, run, limit if run is None else 1)
            except StoreError:
                continue
    return sorted(found, key=lambda each: (not each.running, -each.info.updated))[:limit]


def _in_store(path: Path, run: Path | None, limit: int) -> list[Watched]:
    with Store(path) as store:
        return [Watched(path, info, is_open(store.lock_folder, info), run) for info in store.sessions(limit=limit)]


def watched(name: str) -> Watched:
    """The conversation that `name` means: an id, the start of one, 'last', or the folder of a replay.

    Raises:
        SessionError: There is none.
    """
    folder = paths.user_path(name)
    if os.path.exists(folder / "run.json"):  # (Path.exists raises for a name that is too long)
        path = folder / "streamchat.db"
        found = _in_store(path, folder, 1) if path.exists() else []
        if not found:
            raise SessionError(f"the run in {folder} has said nothing yet; try again in a moment")
        return found[0]
    path = database_path()
    with Store(path) as store:
        info = store.find(name)
        return Watched(path, info, is_open(store.lock_folder, info))


@dataclass
class Watcher:
    """A status board that follows a conversation. `look` again and again."""

    what: Watched
    board: StatusBoard = field(default_factory=StatusBoard)
    seen_at: float | None = None
    """When the latest live figures were written, in seconds since 1970."""
    violations: list[str] = field(default_factory=list)
    """What a replay found wrong, a sentence each."""
    _turn: int = 0
    _known: set[str] = field(default_factory=set)

    def look(self) -> bool:
        """Read what is new; returns whether there was anything.

        Raises:
            StoreError: The store cannot be read any more.
        """
        with Store(self.what.store) as store:
            if self.what.run is not None:
                self._follow_the_run(store)
            session = self.what.info.id
            news = store.stats(session, self._turn)
            live = store.live(session)
            saved = store.find(session)
            running = is_open(store.lock_folder, saved)
            self.what = Watched(self.what.store, saved, running, self.what.run)
        self._apply(news)
        fresh = live is not None and live[0] != self.seen_at
        if live is not None and fresh:
            self.seen_at = live[0]
            fresh = self._apply_sample(live[1])
        if not running:
            self.board.busy = False
        return any((news, fresh, self._new_violations()))

    def _apply_sample(self, record: dict[str, Any]) -> bool:
        """Show live figures; False when they cannot be read."""
        try:
            sample, info = sample_of(record)
        except InvalidFiguresError:
            return False
        if info is not None and self.board.info is None:
            self.board.apply(ev.ModelReady(info, 0.0))
        self.board.apply(sample)
        self.board.session = self.what.info.id
        return True

    def _follow_the_run(self, store: Store) -> None:
        """A replay with `--fresh` goes from conversation to conversation."""
        latest = store.sessions(limit=1)
        if latest and latest[0].id != self.what.info.id:
            self.what = Watched(self.what.store, latest[0], True, self.what.run)
            self._turn = 0

    def _apply(self, news: list[dict[str, Any]]) -> None:
        for record in news:
            try:
                stats = load_figures(ev.TurnStats, record)
            except InvalidFiguresError:  # damaged, or of another version
                continue
            self._turn = stats.turn
            self.board.apply(ev.TurnFinished(stats, stats.finish_reason, ""))
            self.board.lengths.add(stats.cache_len)
            if stats.decode_tps is not None:
                self.board.speeds.add(stats.decode_tps)

    def _new_violations(self) -> bool:
        if self.what.run is None:
            return False
        before = len(self.violations)
        for path in sorted(self.what.run.glob("violation-*.json")):
            if path.name in self._known:
                continue
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["violation"]
            except (OSError, ValueError, KeyError):  # it is being written
                continue
            self._known.add(path.name)
            self.violations.append(f"{found['name']} at turn {found['turn']}: {found['detail']}")
        return len(self.violations) > before

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is known now."""
        from dataclasses import asdict

        board, info = self.board, self.what.info
        return {
            "id": info.id,
            "title": info.title,
            "run": None if self.what.run is None else str(self.what.run),
            "running": self.what.running,
            "seconds_since_sample": None if self.seen_at is None else time.time() - self.seen_at,
            "busy": board.busy,
            "turns": board.turns,
            "prompt_tokens": board.prompt_tokens,
            "new_tokens": board.new_tokens,
            "cache": {k: v for k, v in asdict(board.cache).items() if k != "segments"},
            "memory": None if board.memory is None else asdict(board.memory),
            "ttft_s": board.ttft_s,
            "decode_tps": board.decode_tps,
            "violations": self.violations,
        }
