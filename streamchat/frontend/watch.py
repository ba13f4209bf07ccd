"""Read-only view of a conversation from another process, via the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.errors import SessionError, StoreError, WireError
from streamchat.base.wire import from_record
from streamchat.frontend.status import StatusBoard
from streamchat.store.database import database_path
from streamchat.store.lock import is_open
from streamchat.store.records import SessionInfo
from streamchat.store.store import Store


def runs_dir() -> Path:
    """Default folder of `streamchat replay` runs."""
    return paths.state_dir() / "runs"


def decode_sample(record: Mapping[str, Any]) -> tuple[ev.StatusSampled, ev.ModelInfo | None]:
    """Decode the live figures and the model info that the recorder wrote.

    Raises:
        WireError: The record is damaged or from another version.
    """
    fields = dict(record)
    info = fields.pop("info", None)
    return from_record(ev.StatusSampled, fields), None if info is None else from_record(ev.ModelInfo, info)


@dataclass(frozen=True)
class MonitoredSession:
    """A conversation that `streamchat monitor` can show."""

    store: Path
    info: SessionInfo
    running: bool
    run: Path | None = None
    """Folder of the replay run; None for a chat."""

    @property
    def name(self) -> str:
        """The argument of `streamchat monitor` that selects it."""
        return self.info.id if self.run is None else str(self.run)


def monitored_sessions(limit: int = 50) -> list[MonitoredSession]:
    """All chats and replays: running ones first, then the most recent."""
    stores: list[tuple[Path, Path | None]] = [(database_path(), None)]
    folder = runs_dir()
    if folder.is_dir():
        stores += [(run / "streamchat.db", run) for run in sorted(folder.iterdir(), reverse=True)[:limit]]
    found: list[MonitoredSession] = []
    for path, run in stores:
        if path.exists():
            try:
                found += _in_store(path, run, limit if run is None else 1)
            except StoreError:
                continue
    return sorted(found, key=lambda each: (not each.running, each.info.is_ahead, -each.info.updated))[:limit]


def _in_store(path: Path, run: Path | None, limit: int) -> list[MonitoredSession]:
    with Store(path) as store:
        return [
            MonitoredSession(path, info, is_open(store.lock_folder, info), run) for info in store.sessions(limit=limit)
        ]


def find_monitored(name: str) -> MonitoredSession:
    """Find a conversation by session id, id prefix, 'last', or the folder of a replay.

    Raises:
        SessionError: No match.
    """
    folder = paths.user_path(name)
    if os.path.exists(folder / "run.json"):  # Path.exists raises if the name is too long
        path = folder / "streamchat.db"
        found = _in_store(path, folder, 1) if path.exists() else []
        if not found:
            raise SessionError(f"the run in {folder} has no turns yet; try again in a moment")
        return found[0]
    path = database_path()
    with Store(path) as store:
        info = store.find(name)
        return MonitoredSession(path, info, is_open(store.lock_folder, info))


@dataclass
class Watcher:
    """A status board that follows a conversation; call `poll` repeatedly."""

    session: MonitoredSession
    board: StatusBoard = field(default_factory=StatusBoard)
    sampled_at: float | None = None
    """Time of the latest live figures, in seconds since 1970."""
    violations: list[str] = field(default_factory=list)
    """Invariant violations of a replay, one sentence each."""
    _turn: int = 0
    _known: set[str] = field(default_factory=set)

    def poll(self) -> bool:
        """Read new records; returns whether there were any.

        Raises:
            StoreError: The store is not readable.
        """
        with Store(self.session.store) as store:
            if self.session.run is not None:
                self._follow_run(store)
            session = self.session.info.id
            news = store.stats(session, self._turn)
            live = store.live(session)
            saved = store.find(session)
            running = is_open(store.lock_folder, saved)
            self.session = MonitoredSession(self.session.store, saved, running, self.session.run)
        self._apply(news)
        fresh = live is not None and live[0] != self.sampled_at
        if live is not None and fresh:
            self.sampled_at = live[0]
            fresh = self._apply_sample(live[1])
        if not running:
            self.board.busy = False
        return any((news, fresh, self._new_violations()))

    def _apply_sample(self, record: dict[str, Any]) -> bool:
        """Apply live figures; False if they are not readable."""
        try:
            sample, info = decode_sample(record)
        except WireError:
            return False
        if info is not None:
            self.board.info = info  # no `ModelReady`: the uptime is that of the other process
        self.board.apply(sample)
        self.board.session = self.session.info.id
        return True

    def _follow_run(self, store: Store) -> None:
        """Follow a replay with `--fresh` to its newest conversation."""
        latest = store.sessions(limit=1)
        if latest and latest[0].id != self.session.info.id:
            self.session = MonitoredSession(self.session.store, latest[0], True, self.session.run)
            self._turn = 0

    def _apply(self, news: list[dict[str, Any]]) -> None:
        for record in news:
            try:
                stats = from_record(ev.TurnStats, record)
            except WireError:  # damaged or from another version
                continue
            self._turn = stats.turn
            self.board.apply(ev.TurnFinished(stats, stats.finish_reason, ""))
            self.board.lengths.add(stats.cache_len)
            if stats.decode_tps is not None:
                self.board.speeds.add(stats.decode_tps)

    def _new_violations(self) -> bool:
        if self.session.run is None:
            return False
        before = len(self.violations)
        for path in sorted(self.session.run.glob("violation-*.json")):
            if path.name in self._known:
                continue
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["violation"]
            except (OSError, ValueError, KeyError):  # still being written
                continue
            self._known.add(path.name)
            self.violations.append(f"{found['name']} at turn {found['turn']}: {found['detail']}")
        return len(self.violations) > before

    def as_dict(self) -> dict[str, Any]:
        """The current figures, for JSON."""
        board, info = self.board, self.session.info
        return {
            "id": info.id,
            "title": info.title,
            "run": None if self.session.run is None else str(self.session.run),
            "running": self.session.running,
            "seconds_since_sample": None if self.sampled_at is None else time.time() - self.sampled_at,
            "busy": board.busy,
            "turns": board.turns,
            "prompt_tokens": board.prompt_tokens,
            "new_tokens": board.new_tokens,
            "cache": {k: v for k, v in asdict(board.cache).items() if k != "segments"},
            "memory": None if board.memory is None else asdict(board.memory),
            "ttft_s": board.ttft_s,
            "decode_tps": board.decode_tps,
            "proposed_tokens": board.proposed_tokens,
            "accepted_tokens": board.accepted_tokens,
            "violations": self.violations,
        }
