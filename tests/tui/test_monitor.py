"""Looking at chats and replays from another process, and the metrics of a run."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.errors import ConfigError, SessionError
from streamchat.base.requests import CountTokens
from streamchat.cli import main as cli
from streamchat.config.settings import Settings
from streamchat.frontend.watch import Watcher, decode_sample, find_monitored, monitored_sessions
from streamchat.store.database import database_path
from streamchat.store.store import Store
from streamchat.telemetry.metrics import Metrics, observe
from streamchat.tui.monitor import MonitorApp
from streamchat.tui.widgets.status_panel import StatusPanel
from streamchat.tui.widgets.text import Verbatim
from tests.support.real_engine import running
from tests.support.replay_runs import TURNS, Ran, after_turn, grow_the_buffers
from tests.support.replay_runs import replay as replay  # a fixture
from tests.support.replay_runs import tiny as tiny
from tests.support.saved_sessions import a_session, a_turn
from tests.support.scripted_engine import ScriptedEngine


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.sessions.recorder.LIVE_S", 0.0)
    monkeypatch.setattr("streamchat.sessions.recorder.LIVE_IDLE_S", 0.0)


def test_a_running_chat_is_followed() -> None:
    """What the watcher shows is what the engine told, also what it learns later."""
    with running(store=database_path(), cache_size=128) as chat:
        for text in TURNS[:3]:
            chat.turn(text)
        [what] = monitored_sessions()
        assert what.running
        watcher = Watcher(what)
        assert watcher.poll()
        assert watcher.board.turns == 3
        chat.turn(TURNS[3])
        chat.engine.send(CountTokens("x"))  # after the last sample of the turn
        chat.wait(ev.TextCounted)
        assert watcher.poll()
        finished = chat.of(ev.TurnFinished)
        board = watcher.board
        assert board.turns == 4
        assert board.prompt_tokens == sum(event.stats.prompt_tokens for event in finished)
        assert board.new_tokens == sum(event.stats.new_tokens for event in finished)
        assert board.cache == chat.of(ev.StatusSampled)[-1].cache
        assert board.cache.compressions > 0
        assert board.info == chat.of(ev.ModelReady)[0].info
        assert len(board.lengths.values) >= 4
        assert find_monitored(what.info.id[:4]).info.id == what.info.id
    watcher.poll()
    assert not watcher.session.running
    assert not watcher.board.busy
    assert watcher.board.turns == 4
    assert not watcher.poll()  # nothing is new


def test_samples_survive_json() -> None:
    engine = ScriptedEngine()
    sample = ev.StatusSampled(engine.cache.state(), ev.MemoryState(5, "cuda:0", 1, 2, 3), 0.1, 20.0, True)
    from dataclasses import asdict

    record = json.loads(json.dumps(asdict(sample) | {"info": asdict(engine._info())}))
    assert decode_sample(record) == (sample, engine._info())


def test_json_has_the_figures_of_speculation() -> None:
    with running(store=database_path(), cache_size=128) as chat:
        chat.turn(TURNS[0])
        watcher = Watcher(monitored_sessions()[0])
        state = ScriptedEngine().cache.state()
        watcher.board.apply(ev.StatusSampled(state, ev.MemoryState(5), proposed_tokens=9, accepted_tokens=4))
        record = watcher.as_dict()
    assert (record["proposed_tokens"], record["accepted_tokens"]) == (9, 4)


def test_nothing_to_watch_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, sentence in (([], "nothing to watch yet"), (["abc"], "no saved session has the id 'abc'")):
        assert cli.main(["monitor", *argv]) == 5
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert sentence in err
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SessionError, match="has no turns yet"):
        find_monitored(str(tmp_path))


def test_once_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with running(store=database_path(), cache_size=128) as chat:
        chat.turn("Tell me of the sea")
        assert cli.main(["monitor", "--once", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["running"], record["turns"], record["violations"]) == (True, 1, [])
        assert record["cache"]["cache_size"] == 128
    assert cli.main(["monitor", "--once"]) == 0
    out = capsys.readouterr().out
    assert "state              not running" in out
    assert "turns              1\n" in out
    assert "uptime" not in out  # that of another process is unknown
    assert cli.main(["monitor", "--list"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("1 turn  Tell me of the sea")


def test_a_replay_with_violations(
    tiny: None,
    replay: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with after_turn(monkeypatch, 6, grow_the_buffers):
        ran: Ran = replay(TURNS[:7])
    watcher = Watcher(find_monitored(str(ran.folder)))
    assert watcher.poll()
    assert watcher.board.turns == 7
    assert [each.split(":")[0] for each in watcher.violations] == ["storage at turn 6", "storage at turn 7"]
    assert cli.main(["monitor", str(ran.folder), "--once"]) == 0
    assert "violated           storage at turn 6: the buffers have" in capsys.readouterr().out


def test_runs_in_the_state_folder_are_found(tiny: None, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("\n".join(TURNS[:2]))
    assert cli.main(["replay", str(tmp_path / "words"), "--cache-size", "128", "--max-new-tokens", "4"]) == 0
    with Store() as store:
        store.write(a_session(store, "A chat"), turns=[a_turn(1, "one")])
    names = {each.name: each.run for each in monitored_sessions()}
    [run] = [run for run in names.values() if run]
    assert run.parent == paths.state_dir() / "runs"
    assert len(names) == 2


async def test_the_app_shows_and_switches() -> None:
    with running(store=database_path(), cache_size=128) as chat:
        chat.turn("Tell me of the sea")
        with Store() as store:
            other = a_session(store, "A [bold] dragon")
            store.write(other, turns=[a_turn(1, "one")])
        [first, second] = monitored_sessions()
        assert (first.running, second.running) == (True, False)
        app = MonitorApp(first)
        async with app.run_test(size=(140, 40)) as pilot:
            await pilot.pause()
            assert app.query_one(DataTable).row_count == 2
            assert "Tell me of the sea" in app.query_one("#title", Verbatim).text
            panel = app.query_one(StatusPanel)
            assert panel.figures("totals")["turns"] == "1"
            assert panel.figures("cache")["cached"].endswith("%")
            chat.turn("And of the dragon")
            app._poll()
            await pilot.pause()
            assert panel.figures("totals")["turns"] == "2"
            await pilot.press("down", "enter")
            await pilot.pause()
            assert f"A [bold] dragon ({other})" in app.query_one("#title", Verbatim).text
            assert app.query_one("#state", Verbatim).text.startswith("not running")
            shown = []
            for size, key in (((80, 24), ""), ((70, 20), ""), ((70, 20), "b"), ((70, 20), "b"), ((50, 20), "b")):
                await pilot.resize_terminal(*size)
                await pilot.press(*key)
                shown.append((panel.display, app.query_one(DataTable).size.width >= 30))
            assert shown == [(True, True), (False, True), (True, True), (False, True), (False, True)]
            await pilot.press("q")
        assert app.return_value == 0


async def test_the_row_that_was_chosen_is_shown_though_the_list_has_changed() -> None:
    with Store() as store:
        names = [a_session(store, title) for title in ("The sea", "A dragon")]
        for name in names:
            store.write(name, turns=[a_turn(1, "one")])
    app = MonitorApp(monitored_sessions()[0])
    async with app.run_test(size=(140, 40)) as pilot:
        table, title = app.query_one(DataTable), app.query_one("#title", Verbatim)
        chosen = app._rows[1].name
        message = DataTable.RowSelected(table, 1, table.ordered_rows[1].key)
        app._rows.reverse()
        app._chosen(message)
        assert chosen in title.text
        app._rows.clear()
        app._chosen(message)
        await pilot.pause()
        assert chosen in title.text


# --- metrics ----------------------------------------------------------------------------------------------------


def fetched(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for name in {line.split("{")[0].split(" ")[0] for line in lines}:
        base = name.removesuffix("_total").removesuffix("_created").removesuffix("_bucket")
        assert f"# HELP {base.removesuffix('_sum').removesuffix('_count')}" in text, name
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_are_what_the_events_say() -> None:
    metrics = Metrics("127.0.0.1", 0)
    try:
        with running(cache_size=128) as chat:
            chat.engine.subscribe(metrics.update)
            for text in TURNS[:5]:
                chat.turn(text)
            chat.engine.send(CountTokens("x"))
            chat.wait(ev.TextCounted)
            figures = fetched(metrics.port)
            finished = [event.stats for event in chat.of(ev.TurnFinished)]
            assert figures["streamchat_turns_total"] == 5
            assert figures["streamchat_generated_tokens_total"] == sum(stats.new_tokens for stats in finished)
            assert figures["streamchat_prompt_tokens_total"] == sum(stats.prompt_tokens for stats in finished)
            assert figures["streamchat_compressions_total"] == finished[-1].compressions > 0
            assert figures["streamchat_evicted_tokens_total"] == finished[-1].tokens_evicted
            assert figures["streamchat_cache_tokens"] == finished[-1].cache_len
            assert figures["streamchat_cache_budget_tokens"] == 128
            assert figures["streamchat_first_token_seconds_count"] == 5
            assert figures["streamchat_failed_turns_total"] == 0
    finally:
        metrics.close()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8"))
    asked = {name for panel in dashboard["panels"] for target in panel["targets"]
             for name in re.findall(r"streamchat_\w+", target["expr"])}  # fmt: skip
    metrics = Metrics("127.0.0.1", 0)
    metrics.violations.labels("storage").inc()
    try:
        served = {name.split("{")[0] for name in fetched(metrics.port)}
    finally:
        metrics.close()
    assert asked <= served
    assert len(asked) > 10


def test_the_port_is_on_loopback_and_a_taken_one_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port {port}: .* cannot be opened .*choose another port"):
            observe(ScriptedEngine().subscribe, Settings(metrics_port=port))
    assert observe(ScriptedEngine().subscribe, Settings()) is None
    assert Settings().metrics_host == "127.0.0.1"
