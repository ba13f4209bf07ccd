"""`streamchat replay --chaos`: the plan, each kind, what the report says, and a run on the stand-in for a GPU."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from streamchat.cli import main as cli
from streamchat.commands import replay_chaos
from streamchat.replay.chaos import terminal
from streamchat.replay.chaos.check import check_kept
from streamchat.replay.chaos.injector import digest
from streamchat.replay.chaos.kind import Target
from streamchat.replay.chaos.kinds import KINDS
from streamchat.replay.chaos.kinds.clients import Clients
from streamchat.replay.chaos.kinds.clock import ClockJump
from streamchat.replay.chaos.kinds.disk import FullDisk
from streamchat.replay.chaos.kinds.load import Load
from streamchat.replay.chaos.kinds.pause import Pause
from streamchat.replay.chaos.link import Link, messages
from streamchat.replay.chaos.log import ChaosLog, read_log
from streamchat.replay.chaos.plan import FIRST_TURN, moments
from streamchat.replay.chaos.slopes import Slope, slopes
from streamchat.replay.chaos.terminal import Terminal
from streamchat.replay.run import Run
from streamchat.replay.turn_log import TurnLog
from streamchat.telemetry.metrics import Metrics
from tests.support.replay_runs import TURNS, Ran
from tests.support.replay_runs import replay as replay  # a fixture
from tests.support.replay_runs import tiny as tiny
from tests.support.stand_in_replay import start
from tests.support.tiny import tiny_model
from tests.support.toy_tokenizer import CHATML, VOCABULARY, toy_tokenizer

# --- the plan ---------------------------------------------------------------------------------------------------


def plan(seed: int, turns: int = 300) -> list[tuple[Any, ...]]:
    found = [moment for turn in range(1, turns) for moment in moments(seed, turn, KINDS)]
    return [(moment.turn, moment.piece, moment.kind.name, json.dumps(moment.values)) for moment in found]


def test_a_seed_always_gives_the_same_plan() -> None:
    assert plan(7) == plan(7)
    assert plan(7) != plan(8)


def test_every_kind_comes_early_and_often() -> None:
    for seed in range(5):
        early = [name for turn, _, name, _ in plan(seed) if turn < FIRST_TURN + len(KINDS)]
        assert sorted(early) == sorted(kind.name for kind in KINDS)
        names = [name for _, _, name, _ in plan(seed, 2000)]
        for kind in KINDS:
            assert 0.5 < names.count(kind.name) * kind.every / 2000 < 1.6, kind.name


def test_every_drawn_disturbance_is_json_and_described() -> None:
    rng = random.Random(0)
    for kind in KINDS:
        for _ in range(50):
            values = json.loads(json.dumps(kind.draw(rng)))
            assert kind.describe(values)
            assert kind.slow_for_s(values) >= 0


# --- kinds ------------------------------------------------------------------------------------------------------


def target(folder: Path, pid: int = 0, port: int = 0) -> Target:
    return Target(pid, folder / "streamchat.db", folder, port, None, threading.Event())


def test_a_pause_stops_a_process_and_continues_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]) as process:
        seen = psutil.Process(process.pid)
        where = target(tmp_path, process.pid)
        thread = threading.Thread(target=Pause().disturb, args=(where, {"seconds": 30.0}))
        thread.start()
        wait_until(lambda: seen.status() == psutil.STATUS_STOPPED)
        where.ended.set()
        thread.join()
        wait_until(lambda: seen.status() != psutil.STATUS_STOPPED)
        process.kill()


def test_a_clock_jump_ends_with_the_run() -> None:
    kind, before = ClockJump(), time.time
    try:
        kind.apply({"seconds": -3600.0})
        assert before() - time.time() == pytest.approx(3600, abs=60)
        assert before() - time.time_ns() / 1e9 == pytest.approx(3600, abs=60)
        kind.apply({"seconds": 60.0})
        assert time.time() - before() == pytest.approx(60, abs=30)
    finally:
        kind.end()
    assert time.time is before


def test_a_full_disk_refuses_writes_of_sqlite_until_it_ends(tmp_path: Path) -> None:
    kind = FullDisk()
    assert kind.missing() == ""
    with closing(sqlite3.connect(tmp_path / "db")) as connection:
        connection.execute("CREATE TABLE t (x)")
        try:
            kind.apply({"bytes": 4096, "turns": 1})
            (tmp_path / "small").write_bytes(bytes(4096))
            with pytest.raises(OSError, match="File too large"):
                (tmp_path / "large").write_bytes(bytes(4097))
            with pytest.raises(sqlite3.OperationalError):
                connection.execute("INSERT INTO t VALUES (zeroblob(20000))").connection.commit()
        finally:
            kind.end()
        connection.rollback()
        connection.execute("INSERT INTO t VALUES (zeroblob(20000))").connection.commit()


def test_busy_processes_end(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    Load().disturb(target(tmp_path), {"seconds": 0.2, "share": 1.0})
    assert {child.pid for child in psutil.Process().children()} <= before


def test_clients_read_the_metrics_and_leave_no_connection(tmp_path: Path) -> None:
    metrics = Metrics("127.0.0.1", 0)
    try:
        threads = threading.active_count()
        for form in ("scraper", "half scraper"):
            Clients().disturb(target(tmp_path, port=metrics.port), {"form": form, "seconds": 0.05})
        wait_until(lambda: threading.active_count() <= threads)
    finally:
        metrics.close()


def test_the_terminal_of_a_process_is_resized() -> None:
    # A handler would wait for the end of a sleep that begins just after the signal: sigwait cannot miss it.
    code = (
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "print('ready', flush=True)\n"
        "while signal.sigwait([signal.SIGWINCH]): print('size', *os.get_terminal_size(), flush=True)"
    )
    end, other = os.pipe()
    terminal = Terminal([sys.executable, "-I", "-S", "-c", code], dict(os.environ), other)
    os.close(end)
    os.close(other)
    try:
        wait_until(lambda: terminal.last_line == "ready")
        terminal.resize(77, 5)
        wait_until(lambda: terminal.last_line == "size 77 5")
    finally:
        terminal.process.kill()
        terminal.process.wait()
        terminal.close()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- a full disk ------------------------------------------------------------------------------------------------


def test_rows_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ended the run with an unexpected error, and could leave half a row."""
    said: list[tuple[str, bool]] = []
    log = TurnLog(tmp_path / "turns.jsonl", lambda text, is_warning: said.append((text, is_warning)))
    write = os.write
    full = False

    def limited(descriptor: int, data: bytes) -> int:
        if not full:
            return write(descriptor, data)
        if len(data) <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", limited)
    log.append({"turn": 1})
    full = True
    log.append({"turn": 2})
    log.append({"turn": 3})
    assert [is_warning for _, is_warning in said] == [True]
    assert "No space left on device; free some disk space" in said[0][0]
    full = False
    log.append({"turn": 4})
    log.close()
    rows = [json.loads(line)["turn"] for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]
    assert [is_warning for _, is_warning in said] == [True, False]


def test_rows_that_never_find_room_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = TurnLog(tmp_path / "turns.jsonl", lambda text, _: said.append(text))

    def failing(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", failing)
    log.append({"turn": 1})
    log.append({"turn": 2})
    log.close()
    assert said[1].endswith("turns.jsonl lacks the last 2 turns; the session has them")


@pytest.mark.slow
@pytest.mark.parametrize("last", [7, 11])
def test_a_run_survives_a_disk_that_fills_and_empties(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """It ended with an unexpected error at the first row that could not be written. If the disk is emptied only after
    the last turn, the rows are written then; the turns file lacked them."""
    disk, turns = FullDisk(), 0
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal turns
        turns += 1
        if turns == 4:
            disk.apply({"bytes": 0, "turns": 1})
        flush(descriptor)

    append = TurnLog.append

    def appended(self: TurnLog, row: dict[str, Any]) -> None:
        append(self, row)
        if row["index"] == last < len(TURNS) - 1:
            disk.end()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(TurnLog, "append", appended)
    init = Run.__post_init__

    def created(self: Run) -> None:
        init(self)
        self.at_end = disk.end

    monkeypatch.setattr(Run, "__post_init__", created)
    try:
        ran = replay(TURNS)
    finally:
        disk.end()
    assert ran.code == 0, ran.out
    assert "turns.jsonl cannot be written" in ran.err
    assert [row["index"] for row in ran.rows] == list(range(12))


def test_how_long_a_run_took_does_not_follow_the_clock(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was the difference of two times of day, and negative after the clock was set back."""
    now, clock = [time.time()], time.monotonic

    def jumping() -> float:
        now[0] -= 3600
        return now[0]

    began = clock()
    monkeypatch.setattr(time, "time", jumping)
    ran = replay(TURNS[:3])
    assert 0 < ran.report["figures"]["seconds"] <= clock() - began


# --- what was recorded ------------------------------------------------------------------------------------------


def test_messages_reach_the_other_end() -> None:
    end, theirs = os.pipe()
    link = Link(theirs)
    link.send("turn", {"text": "\ud800 ü"})
    link.send("finished", 3)
    os.write(theirs, b'{"turn": {"tex')
    link.close()
    assert list(messages(end)) == [("turn", {"text": "\ud800 ü"}), ("finished", 3)]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="POSIX")
def test_a_process_without_supervisor_ends_in_order() -> None:
    end, theirs = os.pipe()
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        os.close(end)
        link = Link(theirs)
        link.send("finished", 1)
        link.send("finished", 2)
        wait_until(lambda: bool(got))
        link.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def turn(session: str, number: int, reply: str = "r", **more: Any) -> dict[str, Any]:
    values = {"session": session, "turn": number, "text": digest("t"), "reply": digest(reply), "index": number - 1}
    return values | {"disturbed": False, "tokens": 10 * number, "cached": "c"} | more


def test_a_log_of_two_processes(tmp_path: Path) -> None:
    lines: list[tuple[str, Any]] = [
        ("turn", turn("", 1)),
        ("session", "s"),
        ("turn", turn("s", 2)),
        ("turn", turn("s", 3)),
        ("undone", {"session": "s", "turn": 3}),
        ("turn", turn("s", 2, "another", disturbed=True)),
        ("notice", "full"),
        ("notice", "full"),
        ("reopened", {"session": "s", "tokens": 20, "cached": "c"}),
    ]
    path = tmp_path / "chaos.jsonl"
    path.write_text("".join(json.dumps({name: value}) + "\n" for name, value in lines) + '{"turn": {')
    log = read_log(path)
    assert sorted(log.turns) == [("s", 1), ("s", 2)]
    assert log.turns["s", 2]["reply"] == digest("another")
    assert log.disturbed == {1}
    assert log.notices["full"] == 2


def database(folder: Path, replies: dict[int, str]) -> Path:
    path = folder / "db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE turns (id INTEGER PRIMARY KEY, session TEXT, number INTEGER, state TEXT);"
            "CREATE TABLE messages (turn INTEGER, role TEXT, text TEXT);"
        )
        for number, reply in replies.items():
            connection.execute("INSERT INTO turns VALUES (?, 's', ?, 'done')", (number, number))
            connection.execute("INSERT INTO messages VALUES (?, 'user', 't')", (number,))
            if reply:
                connection.execute("INSERT INTO messages VALUES (?, 'assistant', ?)", (number, reply))
        connection.commit()
    return path


OTHER_CACHE = "the cache that a new process restored differs from the cache of the run"


@pytest.mark.parametrize(
    ("stored", "reopened", "fault"),
    [
        ({1: "r", 2: ""}, (20, "c"), ""),
        ({1: "r"}, (20, "c"), "turn 2 of session s is not in the database"),
        ({1: "R", 2: ""}, (20, "c"), "turn 1 of session s has a different text in the database"),
        ({1: "r", 2: ""}, (10, "c"), "a new process has 10 tokens of the session, not 20"),
        (
            {1: "r", 2: ""},
            (20, "d"),
            OTHER_CACHE,
        ),
        ({1: "r", 2: ""}, None, "a new process did not open the session s"),
    ],
)
def test_what_is_lost_is_found(
    tmp_path: Path, stored: dict[int, str], reopened: tuple[int, str] | None, fault: str
) -> None:
    log = ChaosLog(turns={("s", 1): turn("s", 1), ("s", 2): turn("s", 2, "")})
    if reopened is not None:
        log.reopened = {"session": "s", "tokens": reopened[0], "cached": reopened[1]}
    kept = check_kept(log, database(tmp_path, stored))
    assert list(kept.faults) == ([fault] if fault else [])
    assert kept.holds == (not fault)


# --- slopes -----------------------------------------------------------------------------------------------------


def measured(change: Callable[[int], float], disturbed: Callable[[int], bool] = lambda _: False) -> dict[str, Slope]:
    """The slopes of a run of 600 turns whose figures change as `change` says, by turn."""
    rng = random.Random(3)
    rows, log, spent = [], ChaosLog(), 0.0
    for index in range(600):
        factor = change(index) * (1 + 0.02 * rng.gauss(0, 1)) * (50 if disturbed(index) else 1)
        rows.append({"index": index, "prompt_tokens": 40 + index % 7, "ttft_s": 0.1 * factor, "decode_tps": 20 / factor,
                     "given_tokens": 0,
                     "new_tokens": 9, "compressions": 1})  # fmt: skip
        spent += 0.01 * (49 + index % 7) * change(index)
        log.samples.append(
            {"index": index, "processor_s": spent, "memory": 1e8 * factor, "descriptors": 20, "threads": 9, "wal": 4e6}
        )
        log.turns["s", index + 1] = turn("s", index + 1, disturbed=disturbed(index))
    return {slope.name: slope for slope in slopes(log, rows)}


def test_a_constant_figure_has_no_slope_even_with_disturbances() -> None:
    for slope in measured(lambda _: 1.0, lambda index: index % 9 == 0).values():
        assert slope.includes_zero, slope


def test_a_slow_growth_is_found() -> None:
    found = measured(lambda index: 1 + index / 6000, lambda index: index % 9 == 0)
    for name in ("memory", "CPU time per token", "time to first token", "time per token"):
        slope = found[name]
        assert slope.includes_zero is False
        assert slope.change is not None
        assert slope.low is not None
        assert slope.low > 0
    assert found["memory"].change == pytest.approx(1e8 * 500 / 6000, rel=0.3)
    assert found["threads"].includes_zero


def test_a_short_run_has_no_slopes() -> None:
    assert all(slope.includes_zero is None for slope in slopes(ChaosLog(), []))


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [["--tui"], ["--workers", "2"], ["--ray", "local"]])
def test_flags_that_do_not_go_with_chaos(flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script"
    script.write_text("one\ntwo")
    assert cli.main(["replay", str(script), "--out", str(tmp_path / "out"), "--chaos", "1", *flag]) == 2
    assert f"{flag[0]} cannot be used with --chaos" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_chaos_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds once, with a step that is captured on the stand-in for a GPU, and the app on a pseudo-terminal."""
    model = tmp_path / "model"
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(model)
    tokenizer: Any = toy_tokenizer(CHATML)
    tokenizer.save_pretrained(model)
    script, folder = tmp_path / "script", tmp_path / "run"
    script.write_text("\n".join(TURNS))
    monkeypatch.setattr(replay_chaos, "COMMAND", list)
    monkeypatch.setattr(terminal, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    code = cli.main(
        ["replay", str(script), "--out", str(folder), "--model", str(model), "--kernels", "torch", "--cache-size",
         "128", "--max-new-tokens", "10", "--max-turns", "8", "--seed", "1", "--chaos", "118"]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, out + err
    report = json.loads((folder / "report.json").read_text())
    chaos = report["chaos"]
    assert report["verdict"] == "all hold"
    assert report["ended"] == "all turns replayed"
    assert all(kind["count"] or kind["skipped"] for kind in chaos["kinds"])
    assert chaos["kept"] | {"reopened": ""} == {"turns": 8, "faults": [], "reopened": "", "holds": True}
    assert chaos["kept"]["reopened"].endswith("and the same cached tokens")
    names = [each["kind"] for each in chaos["disturbances"]]
    assert names == [moment.kind.name for number in range(1, 9) for moment in moments(118, number, KINDS)]
    assert any("is currently not saved" in text for text in chaos["notices"])
    assert "Nothing lost" in (folder / "report.html").read_text()
    assert len((folder / "turns.jsonl").read_text().splitlines()) == 8
