"""A run: sends one step after the other to the engine, and checks and logs every turn before the next starts."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.atomic_files import write_json, write_text
from streamchat.base.errors import ExitCode
from streamchat.base.requests import Clear, Quote, SetOption, SetSystemPrompt, Submit, Undo
from streamchat.replay.invariants import Inspector, Violation
from streamchat.replay.script import Step
from streamchat.replay.turn_log import TurnLog

if TYPE_CHECKING:
    from streamchat.engine.engine import Engine

_log = logging.getLogger(__name__)
MAX_DUMPS = 10
"""Maximum number of violations that are dumped to a file."""
ROW_KEYS = frozenset({"session", "turn", "conversation", "failed"})
"""What a line of the turns file needs for the run to be resumed after it."""


@dataclass
class RunFolder:
    """Files of a run. A crash leaves only complete files and lines, except for the last line of the turns."""

    path: Path

    @property
    def turns(self) -> Path:
        """One JSON object per turn."""
        return self.path / "turns.jsonl"

    @property
    def about(self) -> Path:
        """Arguments of the run; `--resume-run` reads them."""
        return self.path / "run.json"

    @property
    def invariants(self) -> Path:
        """Verdicts of the invariants so far."""
        return self.path / "invariants.json"

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the verdicts of the invariants atomically; only log a failure, because the next write replaces it."""
        try:
            write_json(self.invariants, state, durable=False)  # `--resume-run` starts the checks anew without it
        except OSError as error:
            _log.warning("%s could not be written: %s", self.invariants, error)

    def read_state(self) -> dict[str, Any]:
        """Return what `save_state` wrote; empty if the file is missing or damaged."""
        try:
            state = json.loads(self.invariants.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        is_state = isinstance(state, dict) and all(isinstance(saved, dict) for saved in state.values())
        return state if is_state else {}

    @property
    def store(self) -> Path:
        """Database with the conversations of the run."""
        return self.path / "streamchat.db"

    def rows(self) -> list[dict[str, Any]]:
        """Return the turns up to the first damaged line, for example one that a crash truncated."""
        rows: list[dict[str, Any]] = []
        try:
            for line in self.turns.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    break
                if not isinstance(row, dict) or not row.keys() >= ROW_KEYS:
                    break
                rows.append(row)
        except FileNotFoundError:
            pass
        return rows

    def truncate_to(self, rows: list[dict[str, Any]]) -> None:
        """Replace the contents of the turns file by `rows`, atomically."""
        write_text(self.turns, "".join(json.dumps(row) + "\n" for row in rows), durable=True)


@dataclass
class Totals:
    """Totals of a run."""

    turns: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    given_tokens: int = 0
    """Tokens of supplied replies."""
    conversations: int = 0
    compressions: int = 0
    tokens_evicted: int = 0

    def __post_init__(self) -> None:
        self._counts = (0, 0)  # compressions and evicted tokens of the conversation so far

    def add(self, row: dict[str, Any]) -> None:
        """Count a turn by its row."""
        self.turns += 1
        if row["conversation"] != self.conversations:
            self.conversations, self._counts = row["conversation"], (0, 0)
        if row["failed"] is not None:
            self.failed += 1
            return
        self.prompt_tokens += row["prompt_tokens"]
        self.new_tokens += row["new_tokens"]
        self.given_tokens += row["given_tokens"]
        compressions, evicted = self._counts
        self.compressions += max(0, row["compressions"] - compressions)
        self.tokens_evicted += max(0, row["tokens_evicted"] - evicted)
        self._counts = (row["compressions"], row["tokens_evicted"])

    @property
    def tokens(self) -> int:
        """Number of tokens that went through the cache."""
        return self.prompt_tokens + self.new_tokens + self.given_tokens


@dataclass
class Run:
    """One run of steps.

    Args:
        engine: An engine that audits and has not been started.
        steps: The turns.
        folder: Folder for the files.
        inspector: Checks of the invariants; its reports come on the engine's thread.
        on_turn: Called after each turn with its row.
        time_limit_s: No turn starts later than this many seconds after the first turn; None = no limit.
    """

    engine: Engine
    steps: Iterator[Step]
    folder: RunFolder
    inspector: Inspector
    on_turn: Callable[[dict[str, Any]], None]
    time_limit_s: float | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    """If set, no further turn starts."""
    totals: Totals = field(default_factory=Totals)
    failure: ev.EngineFailed | None = None
    info: ev.ModelInfo | None = None
    session: str = ""
    elapsed_before_s: float = 0.0
    """Seconds that the earlier processes of the run took."""
    at_end: Callable[[], None] = lambda: None
    """Called after the last turn, before the turns file is closed, which may still lack rows."""
    resumed_at: int | None = None
    """Number of logged turns of the resumed conversation; later turns are undone first."""
    _events: queue.SimpleQueue[ev.Event] = field(default_factory=queue.SimpleQueue)
    _step: Step | None = None
    _system: str = ""
    _first_seed: int = -1
    _evictions: list[tuple[int, int]] = field(default_factory=list)
    _reply_tokens: int = 0
    """Tokens of the running turn after its prompt."""
    _dumps: int = 0
    _began: float = 0.0

    def __post_init__(self) -> None:
        self.engine.subscribe(self._on_event)
        settings = self.engine.settings
        self._system, self._first_seed = settings.system_prompt, settings.seed

    def run(self, *, started: bool = False) -> None:
        """Send all steps; return when they are done or stopped, or the engine has failed.

        Args:
            started: Whether another component starts the engine.
        """
        if not started:
            self.engine.start()
        if self.resumed_at is not None and not self._undo_unlogged(self.resumed_at):
            return
        if self.resumed_at is None and not self._wait_for(ev.ModelReady):
            return
        self._began = time.monotonic()
        with ExitStack() as files:
            log = files.enter_context(closing(TurnLog(self.folder.turns, self._report)))
            files.callback(self.at_end)
            for step in self.steps:
                if self.stop.is_set() or (self.time_limit_s is not None and self._elapsed_s >= self.time_limit_s):
                    return
                is_new = step.starts and (self.totals.turns > 0 or step.system is not None)
                if is_new and not self._start_conversation(step):
                    return
                if not self._seed(step):
                    return
                self._step = step
                if step.reply is None:
                    self.engine.send(Submit(step.text))
                else:
                    self.engine.send(Quote(step.text, step.reply, pin=False))
                finished = self._wait_for(ev.TurnFinished)
                if finished is None:
                    return
                assert isinstance(finished, ev.TurnFinished)
                row = self._row(step, finished)
                log.append(row)  # its turn is on the disk, and only the newest turns can be undone
                self.on_turn(row)

    @property
    def _elapsed_s(self) -> float:
        """Seconds since the first turn of this process; the wall clock may jump."""
        return time.monotonic() - self._began

    def _report(self, text: str, is_warning: bool) -> None:
        self.engine.publish(ev.Notice(text, "warning" if is_warning else "info"))

    def _undo_unlogged(self, turns: int) -> bool:
        """Undo turns that were saved but never logged before a crash."""
        resumed = self._wait_for(ev.ConversationResumed)
        if not isinstance(resumed, ev.ConversationResumed):
            return False
        from streamchat.conversation.rollback import REACH  # deferred: imports torch

        if len(resumed.turns) - turns > REACH:
            self.failure = ev.EngineFailed(
                "The run cannot be resumed",
                f"{self.folder.turns} has {turns} turns of a session with {len(resumed.turns)}, and only the last "
                f"{REACH} can be undone; start a new run",
                ExitCode.FAILURE,
            )
            return False
        for _ in resumed.turns[turns:]:
            self.engine.send(Undo())
            if self._wait_for(ev.TurnUndone) is None:
                return False
        return True

    def _start_conversation(self, step: Step) -> bool:
        """Start a conversation, with the system prompt of the settings if the script has none."""
        prompt = self._system if step.system is None else step.system
        same = prompt == self.engine.settings.system_prompt
        self.engine.send(Clear() if same else SetSystemPrompt(prompt))
        return self._wait_for(ev.ConversationCleared, ev.Notice) is not None

    def _seed(self, step: Step) -> bool:
        """Seed each turn by itself, so that its reply does not depend on what this process has run before."""
        if self._first_seed < 0:
            return True
        self.engine.send(SetOption("seed", (self._first_seed + step.number) % 2**63))
        return self._wait_for(ev.SettingChanged) is not None

    def _wait_for(self, *kinds: type[ev.Event]) -> ev.Event | None:
        """Return the next event of one of these kinds; None if the engine has ended."""
        while True:
            event = self._events.get()
            if isinstance(event, ev.Notice) and event.level != "error":
                continue
            if isinstance(event, kinds):
                return event
            if isinstance(event, ev.EngineClosed):
                self.stop.set()  # the user has quit the app
            if isinstance(event, ev.EngineFailed | ev.EngineClosed):
                return None

    # --- on the engine's thread -----------------------------------------------------------------------------------

    def _on_event(self, event: ev.Event) -> None:
        self.inspector.observe(event)
        match event:
            case ev.ModelReady(info=info):
                self.info = info
            case ev.SessionOpened(session=session):
                self.session = session
            case ev.TurnStarted():
                self._evictions, self._reply_tokens = [], 0
            case ev.TokensEvicted(runs=runs):
                self._evictions += runs
            case ev.CacheAudited(after="turn", turn=turn) if turn is not None and turn.prompt_end is not None:
                self._reply_tokens = (turn.end or 0) - turn.prompt_end
            case ev.EngineFailed():
                self.failure = event
            case _:
                pass
        if not isinstance(event, ev.TextDelta | ev.StatusSampled | ev.PrefillProgress | ev.CacheAudited):
            self._events.put(event)

    # --- files ----------------------------------------------------------------------------------------------------

    def _row(self, step: Step, finished: ev.TurnFinished) -> dict[str, Any]:
        kept = step.reply is not None and not finished.rolled_back
        row = {
            "index": step.index,
            "at": time.time(),
            "elapsed_s": self.elapsed_before_s + self._elapsed_s,
            "place": step.place,
            "conversation": self.totals.conversations + step.starts,
            "session": self.session,
            **finished.stats.as_dict(),
            "given_tokens": self._reply_tokens if kept else 0,
            "evicted": [list(run) for run in self._evictions],
            "failed": finished.message if finished.rolled_back else None,
        }
        self.totals.add(row)
        return row

    def dump(self, violation: Violation) -> Path | None:
        """Write what is needed to reproduce a violation; None if that fails. Runs on the engine's thread, at once."""
        self._dumps += 1
        if self._dumps > MAX_DUMPS:
            return None
        audit, step = self.inspector.audit, self._step
        path = self.folder.path / f"violation-{self._dumps:02}-{violation.name}.json"
        record: dict[str, Any] = {"violation": asdict(violation), "step": None if step is None else asdict(step)}
        record["settings"] = asdict(self.engine.settings)
        if audit is not None:
            record["cache"] = {**asdict(audit), "evicted_by_events": self.inspector.evicted}
            record["ids_held"] = record["cache"].pop("ids")
        record["reproduce"] = "streamchat replay with the arguments in run.json, --max-turns " + str(violation.turn)
        try:
            write_json(path, record, durable=True, indent=1)
        except OSError as error:
            _log.warning("%s could not be written: %s", path, error)
            return None
        return path
