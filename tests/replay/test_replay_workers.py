"""`streamchat replay --workers` and `--ray`: every conversation is the same wherever it runs, and none is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ExitCode
from streamchat.base.ray_cluster import ClusterLostError
from streamchat.cli import main as cli
from streamchat.commands import replay_workers
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.replay.run import RunFolder
from streamchat.replay.workers.conversation import MARK, ConversationRunner, WorkerPlan
from streamchat.replay.workers.fleet import MAX_LOSSES, Fleet
from streamchat.replay.workers.jobs import FOLDERS, Job, jobs_of, read_jobs
from streamchat.replay.workers.local import LocalWorker
from streamchat.replay.workers.merge import totals_of
from streamchat.replay.workers.messages import JobDone, Message, TurnDone, Violated, WorkerLost
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import tiny_loaded
from tests.support.replay_runs import Ran
from tests.support.replay_runs import replay as replay  # a fixture
from tests.support.replay_runs import tiny as tiny
from tests.support.replay_workers import ScriptedWorker, ids_of, turns_of, wait_for_scripted

# --- jobs -------------------------------------------------------------------------------------------------------

CHATS = [
    json.dumps({"messages": [{"role": "user", "content": f"question {n} {turn} about the sea"} for turn in range(3)]})
    for n in range(4)
]
SETTINGS = Settings(cache_size=96, max_new_tokens=12, seed=1, temperature=1.0, dtype="float32")


def chats(folder: Path, lines: list[str] = CHATS, name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def jobs(folder: Path, *, fresh: bool = True, repeat: int = 1, max_turns: int | None = None) -> list[Job]:
    files = [chats(folder), chats(folder, CHATS[:1], "more.jsonl")]
    found = read_jobs(files, "auto", fresh=fresh, teacher_forced=False, repeat=repeat, max_turns=max_turns)
    assert [step.index for job in found.jobs for step in job.steps] == list(range(found.turns))
    assert [job.number for job in found.jobs] == list(range(1, len(found.jobs) + 1))
    return found.jobs


def test_conversations_are_records_or_files(tmp_path: Path) -> None:
    assert [len(job.steps) for job in jobs(tmp_path)] == [3] * 5
    assert [len(job.steps) for job in jobs(tmp_path, fresh=False)] == [12, 3]
    assert [len(job.steps) for job in jobs(tmp_path, repeat=2)] == [3] * 10
    assert [len(job.steps) for job in jobs(tmp_path, fresh=False, repeat=2)] == [24, 6]
    assert [len(job.steps) for job in jobs(tmp_path, max_turns=7)] == [3, 3, 1]
    assert all(job.steps[0].starts and not any(step.starts for step in job.steps[1:]) for job in jobs(tmp_path))


# --- assigning jobs ---------------------------------------------------------------------------------------------


class Told:
    """A fleet of scripted workers, and what it told."""

    def __init__(self, jobs: list[Job], script: Callable[[Job, int], list[Message | WorkerLost]]) -> None:
        self.rows: list[tuple[int, bool]] = []
        self.sentences: list[str] = []
        self.workers: list[ScriptedWorker] = []
        self.on_turn: Callable[[], None] = lambda: None
        starts: dict[int, int] = {}

        def start() -> ScriptedWorker:
            self.workers.append(ScriptedWorker(script, starts))
            return self.workers[-1]

        self.fleet = Fleet(jobs, start, wait_for_scripted, self._turn, self.sentences.append)

    def _turn(self, row: dict[str, Any], is_known: bool) -> None:
        self.rows.append((row["index"], is_known))
        self.on_turn()


def finishes(job: Job, starts: int) -> list[Message | WorkerLost]:
    return [*turns_of(job), JobDone({}, None)]


def test_every_job_runs_once_and_every_worker_ends(tmp_path: Path) -> None:
    told = Told(jobs(tmp_path), finishes)
    told.fleet.run(2)
    assert len(told.workers) == 2
    assert all(worker.closed for worker in told.workers)
    assert sorted(told.rows) == [(index, False) for index in range(15)]
    assert [[row["index"] for row in outcome.rows] for outcome in told.fleet.outcomes] == [
        list(range(3 * n, 3 * n + 3)) for n in range(5)
    ]
    assert {row["conversation"] for outcome in told.fleet.outcomes for row in outcome.rows} == {1, 2, 3, 4, 5}
    assert totals_of(told.fleet.outcomes).conversations == 5


def test_a_lost_worker_is_replaced_and_its_conversation_continues(tmp_path: Path) -> None:
    def script(job: Job, starts: int) -> list[Message | WorkerLost]:
        if job.number == 2 and starts == 0:
            return [*turns_of(job)[:2], WorkerLost("its process was ended by signal 9")]
        return [*turns_of(job, known=2 * starts), JobDone({}, None)]

    told = Told(jobs(tmp_path), script)
    told.fleet.run(2)
    assert told.sentences == [
        "conversation 2, after 2 turns: the worker was lost (its process was ended by signal 9); another one "
        "continues it"
    ]
    assert len(told.workers) == 3
    assert all(worker.closed for worker in told.workers)
    assert sorted(told.rows) == [(index, False) for index in range(15)]  # none is told twice


def test_a_conversation_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    def script(job: Job, starts: int) -> list[Message | WorkerLost]:
        return [WorkerLost("ended")] if job.number == 1 else finishes(job, starts)

    told = Told(jobs(tmp_path), script)
    told.fleet.run(2)
    assert (
        told.sentences[-1] == f"conversation 1, after 0 turns: {MAX_LOSSES} workers were lost (ended); it is given up"
    )
    assert len(told.sentences) == MAX_LOSSES
    assert sorted(index for index, _ in told.rows) == list(range(3, 15))
    done = told.fleet.outcomes[0].done
    assert done is not None
    assert done.exit_code == ExitCode.FAILURE


def test_what_fails_before_its_first_turn_is_tried_once(tmp_path: Path) -> None:
    told = Told(jobs(tmp_path), lambda job, _: [JobDone({}, None, "no such model", ExitCode.MODEL)])
    told.fleet.run(1)
    assert told.fleet.failure is not None
    assert told.fleet.failure.failure == "no such model"
    assert sum(outcome.done is not None for outcome in told.fleet.outcomes) == 1
    assert all(worker.closed for worker in told.workers)


def test_a_stop_reaches_every_worker_and_starts_no_other_job(tmp_path: Path) -> None:
    told = Told(jobs(tmp_path), lambda job, _: [*turns_of(job), Violated("layer-lengths")])
    told.on_turn = told.fleet.stop.set
    told.fleet.run(2)
    assert [worker.stopped for worker in told.workers] == [True, True]
    assert all(worker.closed for worker in told.workers)
    assert sum(outcome.done is not None for outcome in told.fleet.outcomes) == 2


# --- in a worker ------------------------------------------------------------------------------------------------


def plan_of(folder: Path, *, seen: bool = True, cache_size: int = SETTINGS.cache_size or 0) -> WorkerPlan:
    folder.mkdir(exist_ok=True)
    (folder / MARK).write_text("mark")
    settings = replace(SETTINGS, cache_size=cache_size)
    return WorkerPlan(Configuration(settings), folder, "mark" if seen else "another", 0.25)


def run_all(runner: ConversationRunner, found: list[Job]) -> list[list[dict[str, Any]]]:
    answers = []
    for job in found:
        messages = list(runner.run(job))
        assert isinstance(messages[-1], JobDone)
        assert messages[-1].failure == ""
        answers.append([message.row for message in messages if isinstance(message, TurnDone)])
    return answers


def figures(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a turn was, without times and memory."""
    names = ("index", "turn", "prompt_tokens", "new_tokens", "cache_len", "compressions", "evicted", "failed")
    return [tuple(str(row[name]) for name in names) for row in rows]


@pytest.mark.slow
def test_a_conversation_is_the_same_after_any_other(tmp_path: Path) -> None:
    """One model is loaded; order, and what ran before, change nothing. A run without workers has the same ids."""
    loads: list[int] = []

    def load(*_: Any) -> Any:
        loads.append(1)
        return tiny_loaded()

    found = jobs(tmp_path)[:4]
    one = run_all(ConversationRunner(plan_of(tmp_path / "one"), load), found)
    two = run_all(ConversationRunner(plan_of(tmp_path / "two"), load), found[::-1])
    assert len(loads) == 2
    assert [figures(rows) for rows in one] == [figures(rows) for rows in two[::-1]]
    assert any(row["evicted"] for rows in one for row in rows)
    ids = ids_of(tmp_path / "one")
    assert ids == ids_of(tmp_path / "two")
    assert len({tuple(each) for each in ids.values()}) == 4


@pytest.mark.slow
def test_a_fresh_run_has_the_conversations_of_a_run_on_workers(
    tiny: None, replay: Callable[..., Ran], tmp_path: Path
) -> None:
    """Each conversation is seeded anew, and has its own system prompt, not that of the one before it."""
    messages = [{"role": "system", "content": "Be a sailor."}, {"role": "user", "content": "Who are you?"}]
    lines = [*CHATS[:1], json.dumps({"messages": messages}), *CHATS[1:3]]
    alone = replay(lines, "--fresh", "--temperature", "1", "--dtype", "float32", "--cache-size", "96")
    assert alone.code == 0, alone.out
    found = read_jobs([chats(tmp_path, lines)], "auto", fresh=True, teacher_forced=False, repeat=1, max_turns=None).jobs
    rows = run_all(ConversationRunner(plan_of(tmp_path / "run"), lambda *_: tiny_loaded()), found)
    assert figures([row for each in rows for row in each]) == figures(alone.rows)


@pytest.mark.slow
def test_a_worker_continues_what_another_one_left(tmp_path: Path) -> None:
    """Without evictions, to the id: what is cached is then prefilled again as it was."""

    def runner(name: str) -> ConversationRunner:
        return ConversationRunner(plan_of(tmp_path / name, cache_size=1024), lambda *_: tiny_loaded())

    [job, *_] = jobs(tmp_path, fresh=False)
    whole = run_all(runner("whole"), [job])
    run_all(runner("half"), [replace(job, steps=job.steps[:7])])
    turns = RunFolder(tmp_path / "half" / FOLDERS / job.folder).turns
    lines = turns.read_text().splitlines(keepends=True)
    turns.write_text("".join(lines[:6]) + lines[6][:30])  # the line of the last turn was cut off by a kill
    messages = [message for message in runner("half").run(job) if isinstance(message, TurnDone)]
    assert [message.is_known for message in messages] == [True] * 6 + [False] * 6
    assert figures([message.row for message in messages]) == figures(whole[0])
    assert ids_of(tmp_path / "half") == ids_of(tmp_path / "whole")
    complete = ConversationRunner(plan_of(tmp_path / "half"), lambda *_: pytest.fail("it is complete"))
    assert [message.is_known for message in complete.run(job) if isinstance(message, TurnDone)] == [True] * 12


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_folder_answers_with_everything(tmp_path: Path) -> None:
    [job, *_] = jobs(tmp_path)
    [rows] = run_all(ConversationRunner(plan_of(tmp_path / "run", seen=False), lambda *_: tiny_loaded()), [job])
    [seen] = run_all(ConversationRunner(plan_of(tmp_path / "seen"), lambda *_: tiny_loaded()), [job])
    assert figures(rows) == figures(seen)
    assert not (tmp_path / "run" / FOLDERS).exists()


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    chats(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ["replay", "--model", "model", "--dtype", "float32", "--cache-size", "128", "--max-new-tokens", "12",
             "--seed", "1", "--temperature", "1", "--fresh"]  # fmt: skip


def use_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in this process."""
    monkeypatch.setattr("streamchat.replay.workers.local.LocalWorker", InProcess)
    monkeypatch.setattr("streamchat.replay.workers.local.wait_for_local", wait_for_scripted)


def run_in_this_process(monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """A run on two workers, without other processes."""
    with monkeypatch.context() as patch:
        use_in_process(patch)
        assert cli.main([*ARGUMENTS, "chats.jsonl", "--out", out, "--workers", "2", "--max-drift", "1e9"]) == 0


def report_of(folder: Path) -> tuple[Any, ...]:
    """What a report says, without times, memory and paths."""
    report = json.loads((folder / "report.json").read_text())
    rows = [json.loads(line) for line in (folder / "turns.jsonl").read_text().splitlines()]
    holds = {check["name"]: check["holds"] for check in report["invariants"]}
    return report["verdict"], report["ended"], report["totals"], holds, figures(rows)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_a_worker_that_is_killed_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_this_process(monkeypatch, "whole")
    add = replay_workers._Record.add
    killed: list[int] = []
    workers: list[LocalWorker] = []
    init = LocalWorker.__init__

    def noted(self: LocalWorker, plan: WorkerPlan) -> None:
        init(self, plan)
        workers.append(self)

    def kill(self: Any, row: dict[str, Any], is_known: bool) -> None:
        add(self, row, is_known)
        if row["index"] == 4 and not killed:
            pid = workers[-1]._process.pid
            assert pid is not None
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(LocalWorker, "__init__", noted)
    monkeypatch.setattr(replay_workers._Record, "add", kill)
    assert cli.main([*ARGUMENTS, "chats.jsonl", "--out", "killed", "--workers", "1", "--max-drift", "1e9"]) == 0
    out, err = capsys.readouterr()
    assert len(killed) == 1
    assert "the worker was lost (its process was ended by signal 9); another one continues it" in err
    assert report_of(folder / "killed") == report_of(folder / "whole")
    assert ids_of(folder / "killed") == ids_of(folder / "whole")
    assert "12 turns" in out


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_a_ray_cluster_replays_the_same_and_replaces_an_actor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    from streamchat.replay.workers.ray_actors import RayWorker

    run_in_this_process(monkeypatch, "here")
    add = replay_workers._Record.add
    workers: list[RayWorker] = []
    init = RayWorker.__init__
    killed: list[int] = []

    def noted(self: RayWorker, plan: WorkerPlan, cluster: Any) -> None:
        init(self, plan, cluster)
        workers.append(self)

    def kill(self: Any, row: dict[str, Any], is_known: bool) -> None:
        add(self, row, is_known)
        if row["index"] == 1 and not killed:
            killed.append(1)
            workers[0].close()

    monkeypatch.setattr(RayWorker, "__init__", noted)
    monkeypatch.setattr(replay_workers._Record, "add", kill)
    arguments = [*ARGUMENTS, "chats.jsonl", "--out", "there", "--ray", "local", "--workers", "2", "--max-drift", "1e9"]
    assert cli.main(arguments) == 0
    assert len(workers) == 3
    assert "another one continues it" in capsys.readouterr().err
    assert report_of(folder / "there") == report_of(folder / "here")
    assert ids_of(folder / "there") == ids_of(folder / "here")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_kernels")
def test_a_run_that_was_interrupted_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: Ctrl+C after the fifth turn, then `--resume-run`."""
    run_in_this_process(monkeypatch, "whole")
    use_in_process(monkeypatch)
    add = replay_workers._Record.add

    def interrupt(self: Any, row: dict[str, Any], is_known: bool) -> None:
        add(self, row, is_known)
        if row["index"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(replay_workers._Record, "add", interrupt)
        code = cli.main([*ARGUMENTS, "chats.jsonl", "--out", "parts", "--workers", "1", "--max-drift", "1e9"])
    assert code == ExitCode.INTERRUPTED
    assert "stopping after the running turns" in capsys.readouterr().err
    assert json.loads((folder / "parts" / "report.json").read_text())["ended"] == "stopped by the user"
    assert cli.main(["replay", "--resume-run", "parts", "--workers", "2"]) == 0
    assert report_of(folder / "parts") == report_of(folder / "whole")
    assert ids_of(folder / "parts") == ids_of(folder / "whole")


class InProcess(ScriptedWorker):
    """Runs jobs at once, in this process."""

    def __init__(self, plan: WorkerPlan) -> None:
        super().__init__(lambda job, _: [], {})
        self._runner = ConversationRunner(plan)
        self._messages: Any = iter(())

    def start(self, job: Job) -> None:
        self._messages = self._runner.run(job)
        self.answers.append(next(self._messages))

    def stop(self) -> None:
        self.stopped = True
        self._runner.stop()

    def receive(self) -> Message:
        message = super().receive()
        if not isinstance(message, JobDone):
            self.answers.append(next(self._messages))
        return message


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--workers", "2", "--tui"], "--tui cannot be used with --workers or --ray"),
        (["--workers", "2", "--repeat", "forever"], "--repeat forever cannot be used with --workers or --ray"),
        (["--workers", "2", "--metrics-port", "9100"], "metrics_port = 9100 (--metrics-port) cannot be used with"),
        (["--workers", "2", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_wrong_input(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr("streamchat.replay.workers.local.LocalWorker", Failing)
    monkeypatch.setattr("streamchat.replay.workers.local.wait_for_local", wait_for_scripted)
    code = cli.main([*ARGUMENTS, "chats.jsonl", "--out", "run", *arguments])
    err = capsys.readouterr().err
    assert code == (ExitCode.MODEL if "--model" in arguments else ExitCode.USAGE)
    assert err.count(sentence) == 1
    assert "Traceback" not in err


class Failing(ScriptedWorker):
    """Cannot load its model."""

    def __init__(self, plan: WorkerPlan) -> None:
        sentence = f"{plan.configuration.settings.model} was not found"
        super().__init__(lambda job, _: [JobDone({}, None, sentence, ExitCode.MODEL)], {})


def test_ray_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamchat.base.ray_cluster.find_spec", lambda name: None)
    assert cli.main([*ARGUMENTS, "chats.jsonl", "--out", "run", "--ray", "local"]) == ExitCode.USAGE
    assert "--ray needs Ray; run: pip install ray" in capsys.readouterr().err


def test_a_stop_before_the_first_job(tmp_path: Path) -> None:
    runner = ConversationRunner(plan_of(tmp_path / "run"), lambda *_: pytest.fail("nothing may start"))
    runner.stop()
    assert [type(message) for message in runner.run(jobs(tmp_path)[0])] == [JobDone]
    assert not [thread for thread in threading.enumerate() if thread.name == "streamchat-job"]
    assert jobs_of([], teacher_forced=False, repeat=1, max_turns=None) == []


class OnLostCluster(ScriptedWorker):
    """Its cluster is lost after its first turn."""

    def __init__(self, plan: WorkerPlan) -> None:
        super().__init__(lambda job, _: [TurnDone({"index": job.steps[0].index})], {})


def test_a_cluster_that_is_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray ended the process a minute later, with a message of its own."""

    def wait(workers: Any, seconds: float) -> Any:
        raise ClusterLostError("the Ray cluster at host:1 no longer answers; start it again")

    monkeypatch.setattr("streamchat.replay.workers.local.LocalWorker", OnLostCluster)
    monkeypatch.setattr("streamchat.replay.workers.local.wait_for_local", wait)
    assert cli.main([*ARGUMENTS, "chats.jsonl", "--out", "run", "--workers", "1"]) == ExitCode.FAILURE
    err = capsys.readouterr().err
    assert (
        "host:1 no longer answers; start it again; the finished turns are saved, and `streamchat replay --resume-run"
        in err
    )
    assert "Traceback" not in err
