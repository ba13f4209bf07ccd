"""`streamchat replay`: runs on a real engine, invariants with faults put in, reports."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.errors import ExitCode, TurnError
from streamchat.base.requests import Quote, Undo
from streamchat.cli import main as cli
from streamchat.commands import replay as replay_command
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.template import format as template_module
from streamchat.replay import invariants
from streamchat.telemetry import memory
from tests.support import real_engine
from tests.support import toy_tokenizer as toy
from tests.support.replay_runs import TURNS, Ran, after_turn, grow_the_buffers
from tests.support.replay_runs import replay as replay  # a fixture
from tests.support.replay_runs import tiny as tiny

# --- runs -------------------------------------------------------------------------------------------------------


def test_a_run_that_holds(tiny: None, replay: Callable[..., Ran]) -> None:
    ran = replay(TURNS)
    assert ran.code == 0, ran.out
    report = ran.report
    assert report["verdict"] == "all hold"
    assert report["ended"] == "all turns replayed"
    assert [row["turn"] for row in ran.rows] == list(range(1, 13))
    assert report["totals"]["turns"] == 12
    assert report["totals"]["compressions"] == ran.rows[-1]["compressions"] > 3
    assert report["totals"]["tokens"] == sum(row["prompt_tokens"] + row["new_tokens"] for row in ran.rows)
    assert max(row["cache_len"] for row in ran.rows) <= 128
    gone = [tuple(run) for row in ran.rows for run in row["evicted"]]
    assert sum(stop - first for first, stop in gone) == report["totals"]["tokens_evicted"]
    for name in ("layer-lengths", "storage", "cached-ids", "turns", "logits-finite"):
        assert ran.state(name) == "holds"
    assert ran.state("device-memory") == "not checked"
    assert ran.err.splitlines()[0].startswith("turn 1: ")
    page = (ran.folder / "report.html").read_text()
    assert "All invariants hold" in page
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_the_invariants_hold_with_recalled_turns(tiny: None, replay: Callable[..., Ran]) -> None:
    ran = replay(["my locker code is 48213", *TURNS[:6], "what is my locker code?"], "--auto-recall", "on")
    assert ran.code == 0, ran.out
    assert ran.rows[-1]["recalled"] == [1]
    assert ran.report["verdict"] == "all hold"


@pytest.mark.slow
def test_teacher_forced_and_fresh(tiny: None, replay: Callable[..., Ran]) -> None:
    rows = [
        {"messages": [{"role": "system", "content": f"Be kind, {n}."}, {"role": "user", "content": "Who are you?"},
                      {"role": "assistant", "content": f"I am number {n}."}, {"role": "user", "content": "Yes?"}]}
        for n in range(4)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    forced = replay(lines, "--teacher-forced")
    assert forced.code == 0, forced.out
    assert [row["new_tokens"] == 0 for row in forced.rows] == [True, False] * 4
    assert [row["given_tokens"] > 0 for row in forced.rows] == [True, False] * 4
    assert forced.report["totals"]["conversations"] == 1
    fresh = replay(lines, "--fresh")
    assert fresh.code == 0, fresh.out
    assert [row["turn"] for row in fresh.rows] == [1, 2] * 4
    assert [row["conversation"] for row in fresh.rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len({row["session"] for row in fresh.rows}) == 4
    from streamchat.store.store import Store

    with Store(fresh.folder / "streamchat.db") as store:
        prompts = {info.settings["system_prompt"] for info in store.sessions()}
    assert prompts == {f"Be kind, {n}." for n in range(4)}


@pytest.mark.slow
def test_how_long_a_run_is(tiny: None, replay: Callable[..., Ran]) -> None:
    assert len(replay(TURNS[:3], "--repeat", "3").rows) == 9
    limited = replay(TURNS[:3], "--repeat", "forever", "--max-turns", "7")
    assert (limited.code, len(limited.rows)) == (0, 7)
    timed = replay(TURNS[:3], "--repeat", "forever", "--duration", "1s")
    assert timed.report["ended"] == "time limit reached"
    assert len(timed.rows) >= 1


@pytest.mark.slow
def test_a_run_goes_on_after_it_was_killed(tiny: None, replay: Callable[..., Ran], capsys: Any) -> None:
    """The second half of a run in two parts equals that of a run in one."""
    whole = replay(TURNS, "--temperature", "1")
    first = replay(TURNS, "--temperature", "1", "--max-turns", "7")
    # a crash: half a line, and one turn in the store that is in no line
    turns = first.folder / "turns.jsonl"
    lines = turns.read_text().splitlines(keepends=True)
    turns.write_text("".join(lines[:6]) + lines[6][:40])
    about = json.loads((first.folder / "run.json").read_text())
    (first.folder / "run.json").write_text(json.dumps({**about, "max_turns": None}))
    assert cli.main(["replay", "--resume-run", str(first.folder)]) == 0
    again = Ran(0, first.folder, *capsys.readouterr())
    same = ("index", "turn", "prompt_tokens", "cache_len", "compressions", "tokens_evicted", "evicted")
    assert [[row[name] for name in same] for row in again.rows[:6]] == [
        [row[name] for name in same] for row in whole.rows[:6]
    ]
    assert [row["index"] for row in again.rows] == list(range(12))
    assert [row["turn"] for row in again.rows] == list(range(1, 13))
    assert again.report["totals"]["turns"] == 12
    # the account goes on, too
    counts = {check["name"]: check["checked"] for check in again.report["invariants"]}
    assert counts["storage"] == 7 + 6  # the seventh turn was said twice
    assert again.report["totals"]["compressions"] == again.rows[-1]["compressions"]
    assert again.violated == []


def test_a_run_whose_engine_was_closed_was_stopped(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quitting the app could be reported as "all turns replayed"."""
    from streamchat.replay.run import Run

    row_of = Run._row

    def closing(self: Run, *args: Any) -> dict[str, Any]:
        if self.totals.turns == 2:
            self.engine.close(30)
        return row_of(self, *args)

    monkeypatch.setattr(Run, "_row", closing)
    ran = replay(TURNS)
    assert (ran.code, len(ran.rows)) == (ExitCode.INTERRUPTED, 3)
    assert ran.report["ended"] == "stopped by the user"


def test_a_run_that_lost_more_than_can_be_undone_says_so(
    tiny: None, replay: Callable[..., Ran], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited forever for an undo that was refused."""
    first = replay(TURNS[:5])
    turns = first.folder / "turns.jsonl"
    turns.write_text(turns.read_text().splitlines(keepends=True)[0])
    monkeypatch.setattr("streamchat.conversation.rollback.REACH", 3)
    assert cli.main(["replay", "--resume-run", str(first.folder)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "turns.jsonl has 1 turns of a session with 5, and only the last 3 can be undone" in printed


def test_the_line_of_a_turn_is_on_the_disk_before_the_next_turn(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[int] = []
    flush = os.fsync

    def counted(descriptor: int) -> None:
        flush(descriptor)
        path = f"/proc/self/fd/{descriptor}"
        if os.path.exists(path) and os.readlink(path).endswith("turns.jsonl"):
            lines.append(len(Path(os.readlink(path)).read_text().splitlines()))

    monkeypatch.setattr(os, "fsync", counted)
    replay(TURNS[:3])
    assert lines == [1, 2, 3] or not os.path.exists("/proc/self/fd")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "no input: give at least one FILE"),
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["empty"], "contains no user messages"),
        (["words", "--repeat", "0"], "--repeat 0 must be at least 1, or 'forever'"),
        (["words", "--duration", "soon"], "--duration soon is not a duration; give for example"),
        (["words", "--max-turns", "0"], "--max-turns 0 must be at least 1"),
        (["words", "--max-drift", "0"], "--max-drift 0 must be above 0"),
        (["words", "--out", "."], "folder is not empty; choose a new one"),
        (["--resume-run", "nowhere"], "no resumable run found there"),
        (
            ["broken", "--strict"],
            "in double quotes); without --strict such lines are skipped",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    Path("words").write_text("hello")
    Path("broken").write_text('{"turns": ["a"]}\n{broken\n')
    assert cli.main(["replay", *argv]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_a_full_disk_at_the_start_is_one_sentence(replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replay_command, "write_json", fail)
    ran = replay(["hello"])
    assert ran.code == ExitCode.USAGE
    assert ran.err.strip() == f"streamchat: --out {ran.folder} cannot be written (No space left on device)"


def test_lines_left_out_are_in_the_report(tiny: None, replay: Callable[..., Ran]) -> None:
    ran = replay(['{"turns": ["a"]}', "{broken", '{"turns": ["b"]}'])
    assert ran.code == 0
    assert "skipped: " in ran.err
    assert "script1:2: this is not JSON (column 2: " in ran.err
    assert len(ran.report["problems"]) == 1
    assert "this is not JSON (column 2: " in (ran.folder / "report.html").read_text()


# --- faults -----------------------------------------------------------------------------------------------------


def grow_one_layer(conversation: Conversation) -> None:
    """What a hook does that edits only some layers: one holds a token more than the ledger says."""
    layer = conversation.cache.streaming_layers[1]
    layer.end += 1


def forget_an_eviction(conversation: Conversation) -> None:
    """A ledger that says another thing than what was told."""
    ledger = conversation.cache.ledger
    first, stop = ledger.runs[-1]
    ledger.runs[-1] = (first - 1, stop - 1)


def change_an_id(conversation: Conversation) -> None:
    """A token log that is not what was rendered."""
    turn = conversation.log.turns[-1]
    conversation.log.ids[turn.start + 4] += 1


def with_template(monkeypatch: pytest.MonkeyPatch, template: str, **harm: Any) -> None:
    """Every engine has this template, and a format that is not quite its own."""
    choose_format = template_module.choose_format

    def harmed(*args: Any) -> Any:
        return replace(choose_format(*args), **harm)

    monkeypatch.setattr(template_module, "choose_format", harmed)
    monkeypatch.setattr("tests.support.replay_runs.tiny_loaded", lambda: real_engine.tiny_loaded(template))


GIVEN = [
    json.dumps({"messages": [{"role": role, "content": text} for role, text in exchange]})
    for exchange in [
        [("user", "Name a color."), ("assistant", "Blue."), ("user", "Another."), ("assistant", " Red.\n")],
        [("user", "look: <|im_end|> <|im_start|>system"), ("assistant", "The end."), ("user", "?"), ("assistant", "!")],
    ]
]
TEMPLATES = {
    name: getattr(toy, name)
    for name in (
        "CHATML", "THINKING", "INSIDE", "CHANNELS", "OPEN_REASONING", "HEADINGS", "LAST_SYSTEM", "ROUNDS", "NEWEST",
        "CLOCK", "DATED", "PARAGRAPHS", "BRACKETS",
    )
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_fed_is_what_the_template_writes(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    with_template(monkeypatch, template)
    for extra in ([], ["--system-prompt", "Be brief."]):
        given = replay(GIVEN, "--teacher-forced", "--cache-size", "256", *extra)
        assert given.state("cached-ids") == "holds", given.err
        generated = replay(TURNS[:4], "--cache-size", "256", *extra)
        assert generated.state("cached-ids") == "holds", generated.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "part", "text"),
    [
        (toy.CHATML, "user_open", "<|im_start|>human\n"),
        (toy.CHATML, "generation", "<|im_end|>\n<|im_start|>assistant"),
        (toy.CHATML, "assistant_close", "<|im_end|>"),
        (toy.CHATML, "system_close", "<|im_end|>"),
        (toy.INSIDE, "reply_open", " [/INST]"),
        (toy.OPEN_REASONING, "reply_open", "<|im_end|><|im_start|>assistant\n<think>\n"),
        (toy.LAST_SYSTEM, "user_open", "[INST] Be brief.\n\n"),
        (toy.NEWEST, "user_open", "<|im_start|>user\n"),
        (toy.CLOCK, "user_open", "<|im_start|>user []\n"),
    ],
)
def test_a_format_that_is_not_the_templates_is_caught(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, template: str, part: str, text: str
) -> None:
    with_template(monkeypatch, template, **{part: text}, **({"renew": None} if template == toy.CLOCK else {}))
    given: tuple[list[str], list[str]] = (GIVEN, ["--teacher-forced"])
    generated: tuple[list[str], list[str]] = (TURNS[:3], [])
    only = {"reply_open": [given], "generation": [generated]}
    for lines, extra in only.get(part, [given, generated]):
        ran = replay(lines, "--cache-size", "256", "--system-prompt", "Be brief.", *extra)
        assert ran.violated == ["cached-ids"]
        assert "the chat template writes" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "name", "detail"),
    [
        (grow_one_layer, "layer-lengths", ", ledger "),
        (grow_the_buffers, "storage", "the buffers have"),
        (forget_an_eviction, "cached-ids", "by the events"),
        (change_an_id, "cached-ids", "the chat template writes"),
    ],
)
def test_a_broken_cache_is_caught_and_named(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, harm: Any, name: str, detail: str
) -> None:
    with after_turn(monkeypatch, 6, harm):
        ran = replay(TURNS[:6])
    assert ran.code == 4
    assert ran.violated == [name]
    [line] = [line for line in ran.err.splitlines() if "violated: " in line]
    assert f"violated: {name} at turn 6: " in line
    assert detail in line
    dump = json.loads((ran.folder / f"violation-01-{name}.json").read_text())
    assert dump["violation"]["name"] == name
    assert dump["step"]["text"] == TURNS[5]
    assert dump["cache"]["lengths"]
    assert dump["ids_held"]
    assert "Violated" in (ran.folder / "report.html").read_text()
    assert f"{name} " in ran.out
    assert "VIOLATED" in ran.out


def test_a_violation_is_not_forgotten_by_the_next_process(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, after_turn(patch, 6, grow_the_buffers):
        ran = replay(TURNS[:6])
    assert cli.main(["replay", "--resume-run", str(ran.folder), "--max-turns", "6"]) == 4
    capsys.readouterr()
    assert ran.violated == ["storage"]
    assert ran.report["totals"]["turns"] == 6


@pytest.mark.parametrize("damage", ["[" * 100_000, "[]", '{"a": NaN}', "7", "{", '{"x": 1}'])
def test_a_damaged_run_is_resumed_before_the_damage_or_refused(
    tiny: None, replay: Callable[..., Ran], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    ran = replay(TURNS[:3])
    with open(ran.folder / "turns.jsonl", "a") as turns:
        turns.write(f"{damage}\n")
    (ran.folder / "invariants.json").write_text(damage)
    again = ["replay", "--resume-run", str(ran.folder), "--max-turns", "3"]
    assert cli.main(again) == 0
    assert len((ran.folder / "turns.jsonl").read_text().splitlines()) == 3
    (ran.folder / "run.json").write_text(damage)
    capsys.readouterr()
    assert cli.main(again) == 2
    assert "no resumable run found there" in capsys.readouterr().err


def test_without_matplotlib_the_report_says_how_to_get_plots(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = replay(TURNS[:2])
    page = (ran.folder / "report.html").read_text()
    assert "<svg" not in page
    assert "pip install matplotlib" in page


def test_a_nan_is_caught_and_named(tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    run_turn = Conversation.run_turn

    def poisoned(self: Conversation, text: str, *rest: Any, **kwargs: Any) -> Any:
        bias = next(p for n, p in self.model.named_parameters() if "norm" in n)
        kept = bias.detach().clone()
        if text == TURNS[3]:
            bias.data.fill_(float("nan"))
        try:
            return run_turn(self, text, *rest, **kwargs)
        finally:
            bias.data.copy_(kept)

    monkeypatch.setattr(Conversation, "run_turn", poisoned)
    ran = replay(TURNS[:6])
    assert ran.code == 4
    assert ran.violated == ["turns", "logits-finite"]
    assert ran.rows[3]["failed"].startswith("the model produced NaN/inf logits")
    assert [row["failed"] for row in ran.rows[4:]] == [None, None]
    assert [row["turn"] for row in ran.rows] == [1, 2, 3, 4, 4, 5]
    assert ran.report["totals"]["failed"] == 1


def test_logits_are_judged_by_what_failed_and_not_by_its_sentence(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_turn = Conversation.run_turn

    def failing(self: Conversation, text: str, *rest: Any, **kwargs: Any) -> Any:
        if text == TURNS[1]:
            raise TurnError("no NaN/inf logits, only bad luck")
        return run_turn(self, text, *rest, **kwargs)

    monkeypatch.setattr(Conversation, "run_turn", failing)
    assert replay(TURNS[:3]).violated == ["turns"]


@pytest.mark.slow
def test_a_leak_is_caught_and_named(tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor per turn: about 60 MB over the window. The figure is given; a warm process may not need to grow."""
    monkeypatch.setattr(invariants, "MEMORY_WARM_UP", 5)
    monkeypatch.setattr(invariants, "MEMORY_WINDOW", 45)
    monkeypatch.setattr(invariants, "TREND_EVERY", 5)
    leaked: list[torch.Tensor] = []
    monkeypatch.setattr(memory, "process_rss", lambda: 500_000_000 + sum(tensor.nbytes for tensor in leaked))
    with after_turn(monkeypatch, 1, lambda conversation: leaked.append(torch.ones(350_000))):
        ran = replay(TURNS[:5], "--repeat", "12", "--max-new-tokens", "2")
    assert ran.violated == ["process-memory"]
    assert ran.code == 4
    assert "99 % interval" in ran.report["invariants"][5]["first"]


@pytest.mark.slow
def test_turns_that_get_slower_are_caught_and_named(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamchat.conversation.feeder import Feeder

    forward, calls = Feeder.forward, 0

    def slower(self: Feeder, ids: Any) -> Any:
        nonlocal calls
        calls += 1
        # a prompt more, or the noise of a busy machine hides it: there is one a turn
        time.sleep(calls * (2e-4 if len(ids) > 1 else 2e-5))
        return forward(self, ids)

    monkeypatch.setattr(Feeder, "forward", slower)
    monkeypatch.setattr(memory, "process_rss", lambda: 1)
    ran = replay(TURNS[:5], "--repeat", "15", "--max-new-tokens", "6")
    assert set(ran.violated) == {"first-token-time", "decode-time"}
    # told once, though looked at more often
    assert ran.err.count("violated: decode-time") == 1


@pytest.mark.slow
def test_one_slow_turn_is_named_and_is_no_trend(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamchat.conversation.feeder import Feeder

    forward, text = Feeder.forward, f"{TURNS[0]} at last"
    stalled: list[int] = []

    def stalls(self: Feeder, ids: Any) -> Any:
        turns = self.log.turns
        if turns and turns[-1].text == text and not stalled:
            stalled.append(turns[-1].number)
            time.sleep(4.0)
        return forward(self, ids)

    monkeypatch.setattr(Feeder, "forward", stalls)
    ran = replay([*TURNS[:5] * 9, text, *TURNS[:5]], "--max-new-tokens", "6", "--max-drift", "300")
    assert stalled == [46]
    assert ran.violated == ["turn-time"]
    assert "violated: turn-time at turn 46: it took 4." in ran.err
    assert ran.code == 4


@pytest.mark.slow
def test_ctrl_c_ends_after_the_turn_and_writes_the_report(tmp_path: Path) -> None:
    script, folder = tmp_path / "script", tmp_path / "run"
    script.write_text("\n".join(TURNS))
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from streamchat.cli import main as cli\n"
        "from streamchat.engine import engine\n"
        "from tests.support.real_engine import tiny_loaded\n"
        "engine.Engine.__init__.__defaults__ = (lambda *_: tiny_loaded(),)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2]), "replay", str(script), "--out", str(folder)]
    command += ["--repeat", "forever", "--cache-size", "128", "--max-new-tokens", "8"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    lines: list[str] = []
    said = child.stderr
    assert said is not None
    reader = threading.Thread(target=lambda: lines.extend(said))
    reader.start()
    end = time.monotonic() + 60
    while sum(line.startswith("turn ") for line in lines) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130, lines
    reader.join()
    report = json.loads((folder / "report.json").read_text())
    assert report["ended"] == "stopped by the user"
    assert report["totals"]["turns"] >= 3
    assert any("stopping after this turn" in line for line in lines)
    assert child.stdout is not None
    assert "report: " in child.stdout.read()
    child.stdout.close()
    said.close()


def test_a_model_that_fails_has_its_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words").write_text("hello")
    code = cli.main(["replay", str(tmp_path / "words"), "--model", "./nowhere", "--out", str(tmp_path / "run")])
    assert code == 3
    assert "nowhere" in capsys.readouterr().err


def test_the_account_of_evictions_comes_from_the_events_alone() -> None:
    told: list[Any] = []
    inspector = invariants.Inspector(0.25, told.append)
    for runs in (((10, 20),), ((20, 25), (30, 31)), ((25, 30),)):
        inspector.observe(ev.TokensEvicted(1, (0, 1), (), (), 2, 1, "decode", runs=runs))
    assert invariants._gaps(inspector.evicted, 40) == [(0, 10), (31, 40)]
    inspector.observe(ev.ConversationCleared())
    assert invariants._gaps(inspector.evicted, 40) == [(0, 40)]
    assert invariants._gaps([(0, 40)], 40) == []
    assert told == []


@pytest.mark.parametrize(("per_turn", "violated"), [(3_600_000, ["process-memory"]), (50_000, [])])
def test_host_memory_that_grows_on_a_gpu_is_seen_within_160_turns(per_turn: int, violated: list[str]) -> None:
    """As with the plans that cuDNN keeps: VRAM stays."""
    told: list[invariants.Violation] = []
    inspector = invariants.Inspector(0.25, told.append)
    for turn in range(1, 161):
        stats = ev.TurnStats(
            turn, 30, 60, 900, 1024, 5, 900, 0.1, 200.0, 1, 1_857_000_000 + per_turn * turn, 602_630_000, "length"
        )
        inspector.observe(ev.TurnFinished(stats, "length", "reply", "text"))
    assert [each.name for each in told] == violated
    assert inspector.invariants["device-memory"].checked > 0


LOOP = "and the sea, " * 100


@pytest.mark.parametrize(
    ("guard", "parameters", "reply", "reason", "violated"),
    [
        ("auto", 1, LOOP, "loop", []),
        ("auto", 1, LOOP, "length", ["loops"]),
        ("on", 10**12, LOOP, "stop", ["loops"]),
        ("auto", 10**12, LOOP, "length", None),
        ("off", 1, LOOP, "length", None),
        ("on", 1, " ".join(f"{n}, and the sea," for n in range(100)), "length", []),
        ("on", 1, "ha " * 100, "stop", []),
    ],
)
def test_replies_that_loop_are_counted_and_must_be_stopped_by_the_guard(
    guard: Any, parameters: int, reply: str, reason: Any, violated: list[str] | None
) -> None:
    """`violated` is None if there is no guard to judge."""
    told: list[invariants.Violation] = []
    inspector = invariants.Inspector(0.25, told.append, guard)
    with real_engine.running() as chat:
        ready = chat.wait(ev.ModelReady)
    inspector.observe(replace(ready, info=replace(ready.info, parameters=parameters)))
    stats = ev.TurnStats(1, 30, 300, 900, 1024, 5, 900, 0.1, 200.0, 1, 1, None, reason)
    inspector.observe(ev.TurnFinished(stats, reason, reply, "text"))
    inspector.observe(ev.TurnFinished(replace(stats, finish_reason="stop"), "stop", "A plain reply.", "text"))
    loops = inspector.invariants["loops"]
    assert [each.name for each in told] == (violated or [])
    assert loops.checked == (0 if violated is None else 2)
    assert loops.counted == (reply == LOOP)
    assert loops.last == ("1 reply" if reply == LOOP else "0 replies") + " repeated themselves up to turn 2"
    if told:
        assert told[0].detail == "the reply ends with the same 3 words 100 times"
    later = invariants.Inspector(0.25, told.append, guard)
    later.resume(inspector.state(), 2)
    assert later.invariants["loops"].counted == loops.counted


def test_a_run_without_the_guard_says_how_often_the_model_loops(
    tiny: None, replay: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "repeated_end", lambda text: (3, 60))
    ran = replay(TURNS[:3], "--loop-guard", "off")
    assert ran.code == 0
    assert ran.state("loops") == "not checked"
    assert "3 replies repeated themselves up to turn 3" in ran.out


# --- recorded runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[ev.Event, ...]:
    """Events of an audited engine: a supplied reply, an undone turn, and a message longer than the cache."""
    with real_engine.running(audit=True, cache_size=96, max_new_tokens=8) as chat:
        for number, text in enumerate(TURNS[:8]):
            chat.turn(text, (lambda text: chat.engine.send(Quote(text, "It is deep.", False))) if number == 3 else None)
            if number == 5:
                chat.engine.send(Undo())
        chat.turn("far too long " * 400)
    return tuple(chat.events)


def judged(events: Iterable[ev.Event]) -> tuple[invariants.Inspector, list[invariants.Violation]]:
    told: list[invariants.Violation] = []
    inspector = invariants.Inspector(0.25, told.append)
    for event in events:
        inspector.observe(event)
    return inspector, told


def test_a_recorded_run_is_judged_as_the_run_was(recorded: tuple[ev.Event, ...]) -> None:
    inspector, told = judged(recorded)
    assert told == []
    audits = [event for event in recorded if isinstance(event, ev.CacheAudited)]
    evictions = sum(isinstance(event, ev.TokensEvicted) for event in recorded)
    assert evictions > 2
    assert [audit.after for audit in audits if audit.after != "eviction"] == [*["turn"] * 6, "undo", *["turn"] * 3]
    assert inspector.invariants["layer-lengths"].checked == evictions + 9
    assert inspector.invariants["cached-ids"].checked == 9
    assert json.loads(json.dumps([asdict(audit) for audit in audits]))[-1]["lengths"] == list(audits[-1].lengths)


@pytest.mark.parametrize(
    ("after", "name", "harm"),
    [
        ("turn", "layer-lengths", lambda audit: {"lengths": (audit.lengths[0] + 1, *audit.lengths[1:])}),
        ("eviction", "layer-lengths", lambda audit: {"lengths": (*audit.lengths[:-1], audit.lengths[-1] - 1)}),
        ("turn", "layer-lengths", lambda audit: {"cache_size": audit.lengths[0] - 1}),
        ("turn", "storage", lambda audit: {"kv_bytes": audit.kv_bytes + 1}),
        ("turn", "cached-ids", lambda audit: {"ledger": ((0, 3), (4, audit.ledger[0][1] + 1), *audit.ledger[1:])}),
        ("turn", "cached-ids", lambda audit: {"turn": replace(audit.turn, difference="another opening")}),
    ],
)
def test_a_harmed_recording_is_caught(recorded: tuple[ev.Event, ...], after: str, name: str, harm: Any) -> None:
    last = max(at for at, event in enumerate(recorded) if isinstance(event, ev.CacheAudited) and event.after == after)
    audit = recorded[last]
    _, told = judged([*recorded[:last], replace(audit, **harm(audit)), *recorded[last + 1 :]])
    assert [violation.name for violation in told] == [name]


def test_the_audited_lengths_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the ledger's, nor another counter's: one layer holds a token more, and nothing else says so."""
    with after_turn(monkeypatch, 1, grow_one_layer), real_engine.running(audit=True) as chat:
        chat.turn(TURNS[0])
    [audit] = chat.of(ev.CacheAudited)
    length = sum(stop - first for first, stop in audit.ledger)
    assert audit.lengths == (length, length + 1, *audit.lengths[2:])
    assert len(audit.ids) == length


def test_an_engine_audits_only_on_request() -> None:
    with real_engine.running() as chat:
        chat.turn(TURNS[0])
    assert chat.of(ev.CacheAudited) == []
