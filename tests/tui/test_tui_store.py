"""The app and other programs on one database: nothing that anybody said is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import OptionList

from streamchat.base import events as ev
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from streamchat.store.backup import backups
from streamchat.store.database import database_path
from streamchat.store.health import examine
from streamchat.store.store import Store
from streamchat.tui.app import StreamchatApp
from streamchat.tui.screens.finder import RecallScreen
from tests.support.app_driver import Driver
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import tiny_loaded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def program(*arguments: str, said: str = "") -> str:
    """Another streamchat, from start to end; returns what it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "streamchat", *arguments],
        input=said,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file locks")
@pytest.mark.usefixtures("compiled_kernels")
async def test_a_search_in_the_app_and_other_programs_lose_nothing(tmp_path: Path) -> None:
    model = save(tiny_llama(), tmp_path / "model")
    settings = Settings(max_new_tokens=4, seed=1, cache_size=128)
    engine: Any = Engine(Configuration(settings), lambda *_: tiny_loaded(), open_store=Store)
    app = StreamchatApp(engine, Configuration(settings))
    async with app.run_test(size=(140, 40)) as pilot:
        driver = Driver(app, engine, pilot)
        await driver.ready()
        await driver.ask("the first turn")
        for _ in range(2):
            await pilot.press("ctrl+r")
            await driver.until(lambda: isinstance(app.screen, RecallScreen))
            await pilot.press(*"first")
            await driver.until(lambda: app.screen.query_one(OptionList).option_count > 0)
            await pilot.press("escape")
            await driver.until(lambda: not isinstance(app.screen, RecallScreen))
        assert "the first turn" in program("sessions")
        assert Path(f"{database_path()}-wal").exists()  # this chat still has it open
        await driver.ask("the second turn")
        await driver.ask("the third turn")
        program("--model", str(model), "--save", "always", "--max-new-tokens", "2", said="from a pipe\n")
        await driver.ask("the fourth turn")
        await pilot.press("ctrl+q")
    assert engine.close(60)
    with Store() as store:
        assert examine(store.path).problems == []
        texts = {info.title: [turn.text for turn in store.load(info.id).turns] for info in store.sessions()}
    assert texts == {
        "the first turn": ["the first turn", "the second turn", "the third turn", "the fourth turn"],
        "from a pipe": ["from a pipe"],
    }
    [backup] = backups(database_path())  # made when the chats began, of what was there
    assert backup.is_daily


async def test_a_database_that_is_deleted_under_the_app_is_said_in_one_sentence() -> None:
    settings = Settings(max_new_tokens=4, seed=1, cache_size=128)
    engine: Any = Engine(Configuration(settings), lambda *_: tiny_loaded(), open_store=Store)
    notices: list[str] = []
    engine.subscribe(lambda event: notices.append(event.text) if isinstance(event, ev.Notice) else None)
    app = StreamchatApp(engine, Configuration(settings))
    async with app.run_test(size=(140, 40)) as pilot:
        driver = Driver(app, engine, pilot)
        await driver.ready()
        await driver.ask("one")
        end = time.monotonic() + 20
        while not backups(database_path()) and time.monotonic() < end:
            await pilot.pause(0.05)
        for file in database_path().parent.glob("streamchat.db*"):
            file.unlink()
        for text in ("two", "three"):
            await driver.ask(text)
        said = [text for text in notices if "was deleted or replaced while streamchat had it open" in text]
        assert len(said) == 1
        assert said[0].endswith("so nothing more is saved; quit and start streamchat again")
        assert not database_path().exists()
    assert engine.close(60)
