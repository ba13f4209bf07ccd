"""Each command, key and API call that claims an effect has a test that looks at it by another path."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from streamchat.cli.parser import build_parser
from streamchat.config.keymap import BY_ID
from streamchat.frontend.slash.commands import default_registry
from streamchat.server import app as server_app
from tests.support import effect_table as table
from tests.support.api_server import serving
from tests.support.app_driver import driving
from tests.support.scripted_engine import ScriptedEngine

TESTS = sorted({*table.SLASH.values(), *table.COMMANDS.values(), *table.CALLS.values(), *table.KEYS.values()})


async def test_every_slash_command_has_an_entry() -> None:
    async with driving(ScriptedEngine()) as driver:
        names = {command.name for command in driver.chat.state.registry}
    assert names | {command.name for command in default_registry()} == set(table.SLASH) | set(table.SLASH_SHOWS)
    assert not set(table.SLASH) & set(table.SLASH_SHOWS)


def commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    """The names of all commands below a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield f"{prefix}{name}"
                yield from commands(below, f"{prefix}{name} ")


def test_every_command_has_an_entry() -> None:
    assert set(commands(build_parser()[0])) == set(table.COMMANDS) | set(table.COMMANDS_SHOW)
    assert not set(table.COMMANDS) & set(table.COMMANDS_SHOW)


def test_every_call_of_the_api_has_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def noted(path: str, endpoint: Any, methods: tuple[str, ...] = ("GET",)) -> Route:
        calls.extend(f"{method} {path}" for method in methods)
        return Route(path, endpoint, methods=list(methods))

    monkeypatch.setattr(server_app, "Route", noted)
    with serving(tmp_path):
        assert set(calls) == set(table.CALLS) | set(table.CALLS_SHOW)
    assert not set(table.CALLS) & set(table.CALLS_SHOW)


def test_every_key_has_an_entry() -> None:
    assert set(BY_ID) == set(table.KEYS) | table.KEYS_SHOW
    assert not set(table.KEYS) & table.KEYS_SHOW


@pytest.mark.parametrize("name", TESTS)
def test_the_tests_exist(name: str) -> None:
    path, _, test = name.partition("::")
    tree = ast.parse((Path(__file__).parents[1] / path).read_text(encoding="utf-8"))
    assert test in {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
