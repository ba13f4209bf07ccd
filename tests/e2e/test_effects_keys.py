"""Success means effect, for the keys of the app. Real engines, where a key asks for one."""

from __future__ import annotations

import json
from typing import Any

from textual.widgets import OptionList

from streamchat.config import loader
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from streamchat.store.database import database_path
from streamchat.store.store import Store
from streamchat.tui.screens.finder import RecallScreen
from streamchat.tui.screens.settings import SettingsScreen
from tests.support.app_driver import Driver, driving
from tests.support.effects import indices_of_turn, other_process, rows, said
from tests.support.real_engine import conversation_of, tiny_loaded
from tests.support.saved_sessions import stored
from tests.support.scripted_engine import ScriptedEngine


def real_engine(**changes: Any) -> Engine:
    """An engine on a tiny model that saves into the user's own database."""
    settings = Settings(**({"max_new_tokens": 4, "cache_size": 192, "temperature": 0.0, "seed": 1} | changes))
    load: Any = lambda *_: tiny_loaded()  # noqa: E731
    return Engine(Configuration(settings, dict.fromkeys(changes, "flag")), load, open_store=Store)


def session_of(driver: Driver) -> str:
    assert driver.board.session is not None
    return driver.board.session


async def test_a_sent_message_is_in_the_database_and_in_the_cache() -> None:
    engine = real_engine()
    async with driving(engine) as driver:
        await driver.write("the unicorn")
        await driver.pilot.press("enter")
        await driver.answered(1)
        assert said(session_of(driver))[0] == "the unicorn"
        assert indices_of_turn(session_of(driver), 1) <= set(conversation_of(engine).cache.ledger)


async def test_a_stopped_reply_is_saved_as_far_as_the_model_wrote_it() -> None:
    engine = real_engine(max_new_tokens=50_000, loop_guard="off")
    async with driving(engine) as driver:
        await driver.begin("the sea")
        await driver.pilot.press("escape")
        await driver.answered(1)
        conversation = conversation_of(engine)
        [[reason, ids]] = rows("SELECT finish_reason, hex(ids) FROM turns WHERE state = 'done'")
        assert reason == "cancelled"
        written = [int.from_bytes(bytes.fromhex(ids[i : i + 8]), "little") for i in range(0, len(ids), 8)]
        assert list(conversation.log.ids)[-len(written) :] == written
        assert len(written) < 50_000


async def test_a_turn_pinned_in_the_map_is_pinned_in_database_and_cache() -> None:
    engine = real_engine()
    async with driving(engine) as driver:
        await driver.ask("the unicorn")
        await driver.pilot.press("ctrl+t", "p")
        await driver.until(lambda: driver.turns[0].visibility.pinned)
        await driver.pilot.press("escape")
        turn = indices_of_turn(session_of(driver), 1)
        for number in range(6):
            await driver.ask(f"{number} " + "the girl and the dragon of the sea " * 4)
        await driver.until(lambda: driver.board.cache.compressions > 0)
        assert turn <= set(conversation_of(engine).cache.ledger)
        [[pins]] = rows("SELECT pins FROM sessions")
        assert turn <= {index for first, stop in json.loads(pins) for index in range(first, stop)}


async def test_a_result_that_is_kept_is_pinned_in_database_and_cache() -> None:
    stored("the unicorn")
    engine = real_engine()
    async with driving(engine) as driver:
        await driver.enter("/recall unicorn")
        await driver.until(lambda: isinstance(driver.app.screen, RecallScreen))
        await driver.until(lambda: driver.app.screen.query_one(OptionList).option_count > 0)
        await driver.pilot.press("ctrl+k")
        await driver.until(lambda: bool(driver.turns) and driver.turns[0].visibility.pinned)
        turn = indices_of_turn(session_of(driver), 1)
        assert "Tell me about the unicorn" in said(session_of(driver))[0]
        assert turn <= set(conversation_of(engine).cache.ledger)


async def edited(driver: Driver, value: str) -> None:
    """Open the settings at the temperature, and type a value."""
    await driver.pilot.press("f4")
    await driver.until(lambda: driver.shows(SettingsScreen))
    await driver.pilot.press(*"temperature", "enter", "home", "ctrl+k", *value, "enter")
    await driver.pilot.pause()


def in_the_file() -> Any:
    """The temperature in the user's configuration file, as another process reads it."""
    read = "import json, sys, tomllib; print(json.dumps(tomllib.load(open(sys.argv[1], 'rb'))))"
    tables = other_process(read, str(loader.user_file()))
    return next((table["temperature"] for table in tables.values() if "temperature" in table), None)


async def test_a_written_setting_is_in_the_file_and_holds_at_the_next_start() -> None:
    async with driving(ScriptedEngine()) as driver:
        await edited(driver, "0.25")
        await driver.pilot.press("ctrl+s")
        await driver.pilot.pause()
    assert in_the_file() == 0.25
    assert loader.load(environ={}).settings.temperature == 0.25


async def test_a_setting_that_is_reset_is_the_default_for_the_next_turn() -> None:
    engine = real_engine()
    async with driving(engine) as driver:
        await driver.ask("the sea")
        await edited(driver, "0.25")
        await driver.until(lambda: engine.settings.temperature == 0.25)
        await driver.pilot.press("ctrl+r")
        await driver.until(lambda: engine.settings.temperature == Settings().temperature)
    changes = rows("SELECT name, value FROM changes")
    assert changes == [["temperature", "0.25"], ["temperature", json.dumps(Settings().temperature)]]
    assert database_path().exists()
