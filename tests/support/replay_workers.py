"""Workers of a replay without processes, and what runs on real ones leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamchat.replay.workers.jobs import FOLDERS, Job
from streamchat.replay.workers.messages import JobDone, Message, TurnDone, WorkerLost
from streamchat.store.store import Store

Script = Callable[[Job, int], list[Message | WorkerLost]]
"""(job, how often it was started before) -> what its worker answers."""


class ScriptedWorker:
    """Answers what a script says, in this process."""

    def __init__(self, script: Script, starts: dict[int, int]) -> None:
        self._script, self._starts = script, starts
        self.answers: deque[Message | WorkerLost] = deque()
        self.stopped = self.closed = False

    def start(self, job: Job) -> None:
        assert not self.answers, "it has a job"
        self.answers.extend(self._script(job, self._starts.get(job.number, 0)))
        self._starts[job.number] = self._starts.get(job.number, 0) + 1

    def stop(self) -> None:
        self.stopped = True
        self.answers = deque([JobDone({}, None)])

    def receive(self) -> Message:
        answer = self.answers.popleft()
        if isinstance(answer, WorkerLost):
            raise answer
        return answer

    def close(self) -> None:
        self.closed = True


def wait_for_scripted(workers: Sequence[ScriptedWorker], timeout_s: float) -> list[ScriptedWorker]:
    """Those with an answer, the last one first."""
    return [worker for worker in reversed(workers) if worker.answers]


def row_of(step: Any, **more: Any) -> dict[str, Any]:
    """The row of a step."""
    zero = dict.fromkeys(
        ("prompt_tokens", "new_tokens", "given_tokens", "compressions", "tokens_evicted", "cache_len"), 0
    )
    return {"index": step.index, "conversation": 1, "session": "s", "turn": 1, "failed": None, **zero, **more}


def turns_of(job: Job, known: int = 0) -> list[TurnDone]:
    """A message for each turn of a job."""
    return [TurnDone(row_of(step), is_known=number < known) for number, step in enumerate(job.steps)]


def ids_of(folder: Path) -> dict[str, list[int]]:
    """The ids of every conversation of a run, by the name of its folder."""
    found = {}
    for each in sorted((folder / FOLDERS).iterdir()):
        with Store(each / "streamchat.db") as store:
            [info] = store.sessions()
            stored = store.load(info.id)
            found[each.name] = [token for turn in stored.turns for token in turn.ids]
    return found
