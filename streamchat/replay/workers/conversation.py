"""Runs conversations in a worker process, one after the other, with one loaded model."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ExitCode, describe_unexpected
from streamchat.base.paths import user_path
from streamchat.base.progress import Progress
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.replay.checked_run import CheckedRun, Reports
from streamchat.replay.invariants import Inspector
from streamchat.replay.run import RunFolder
from streamchat.replay.workers.jobs import FOLDERS, Job
from streamchat.replay.workers.messages import JobDone, Message, TurnDone, Violated

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.models.load import LoadedModel


@dataclass(frozen=True)
class WorkerPlan:
    """What all conversations of a run have in common."""

    configuration: Configuration
    folder: Path
    """Folder of the run."""
    mark: str
    """Content of its file `MARK`. A worker that reads it sees this folder, not another one of the same name."""
    drift: float


def with_absolute_paths(configuration: Configuration) -> Configuration:
    """Return the configuration with absolute paths, for processes with another current folder."""
    settings = configuration.settings
    found = {name: user_path(getattr(settings, name)) for name in ("model", "adapter") if getattr(settings, name)}
    absolute: dict[str, Any] = {name: str(path.absolute()) for name, path in found.items() if os.path.exists(path)}
    return replace(configuration, settings=replace(settings, **absolute))


MARK = "run-id"
"""File by which a worker recognizes the run's folder."""


class ConversationRunner:
    """Runs jobs. `stop` may be called from any thread.

    Args:
        plan: What all jobs have in common.
        load: Loads the model. Called once.
    """

    def __init__(self, plan: WorkerPlan, load: Load = load_from_settings) -> None:
        self._plan, self._load = plan, load
        self._loaded: LoadedModel | None = None
        self._inspector: Inspector | None = None
        self._stopped = threading.Event()
        self._running: CheckedRun | None = None

    def stop(self) -> None:
        """Stop the running conversation after its current turn, and start no other one."""
        self._stopped.set()
        if (running := self._running) is not None:
            running.run.stop.set()

    def run(self, job: Job) -> Iterator[Message]:
        """Run a conversation, or the rest of it, in a thread; yield its messages as they come, `JobDone` last."""
        messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, args=(job, messages.put), daemon=True, name="streamchat-job")
        thread.start()
        while True:
            message = messages.get()
            yield message
            if isinstance(message, JobDone):
                thread.join()
                return

    def _run(self, job: Job, send: Callable[[Message], None]) -> None:
        try:
            if self._sees_folder():
                send(self._run_in(RunFolder(self._plan.folder / FOLDERS / job.folder), job, send))
            else:
                with tempfile.TemporaryDirectory(prefix="streamchat-") as folder:
                    send(self._run_in(RunFolder(Path(folder)), job, send))
        except Exception as error:
            send(JobDone({}, None, f"unexpected {describe_unexpected(error)}", ExitCode.FAILURE))

    def _sees_folder(self) -> bool:
        """Return whether this machine sees the folder of the run. If not, a lost conversation starts again."""
        try:
            return (self._plan.folder / MARK).read_text(encoding="utf-8") == self._plan.mark
        except (OSError, ValueError):
            return False

    def _run_in(self, folder: RunFolder, job: Job, send: Callable[[Message], None]) -> JobDone:
        folder.path.mkdir(parents=True, exist_ok=True)
        rows = folder.rows()
        folder.truncate_to(rows)
        for row in rows:
            send(TurnDone(row, is_known=True))
        checked = CheckedRun(
            self._plan.configuration,
            folder,
            rows,
            iter(job.steps[len(rows) :]),
            Reports(lambda row, _: send(TurnDone(row)), lambda text: send(Violated(text))),
            drift=self._plan.drift,
            load=self._load_once,
        )
        if self._inspector is not None:
            checked.inspector.continue_process(self._inspector)
        self._running = checked
        if self._stopped.is_set():
            checked.run.stop.set()
        if len(rows) < len(job.steps) and not checked.run.stop.is_set():
            checked.run.run()
        checked.close()
        self._running, self._inspector = None, checked.inspector
        failure = checked.run.failure
        return JobDone(
            checked.inspector.state(),
            checked.run.info,
            "" if failure is None else failure.message,
            0 if failure is None else failure.exit_code,
        )

    def _load_once(self, configuration: Configuration, progress: Progress) -> LoadedModel:
        if self._loaded is None:
            import torch

            torch.set_num_threads(1)  # the replies do not depend on the number of workers
            self._loaded = self._load(configuration, progress)
        return self._loaded
