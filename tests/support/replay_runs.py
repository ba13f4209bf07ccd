"""Runs of `streamchat replay` on a tiny model, and faults put into them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.cli import main as cli
from streamchat.conversation.conversation import Conversation
from tests.support.real_engine import tiny_loaded

TURNS = [f"question {n} about the sea and the dragon" for n in range(12)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine loads a tiny random model."""
    monkeypatch.setattr("streamchat.engine.engine.load_from_settings", lambda *_: tiny_loaded())
    from streamchat.engine.engine import Engine

    init = Engine.__init__

    def patched(self: Any, configuration: Any, load: Any = lambda *_: tiny_loaded(), **rest: Any) -> None:
        init(self, configuration, load, **rest)

    monkeypatch.setattr(Engine, "__init__", patched)


class Ran:
    """What a run left."""

    def __init__(self, code: int, folder: Path, out: str, err: str) -> None:
        self.code, self.folder, self.out, self.err = code, folder, out, err

    @property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return loaded

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "turns.jsonl").read_text().splitlines()]

    def state(self, name: str) -> str:
        [check] = [check for check in self.report["invariants"] if check["name"] == name]
        return "holds" if check["holds"] and check["checked"] else "violated" if not check["holds"] else "not checked"

    @property
    def violated(self) -> list[str]:
        return [check["name"] for check in self.report["invariants"] if not check["holds"]]


@pytest.fixture
def replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command on a script of plain text or JSON lines."""
    count = 0

    def run(lines: list[str], *argv: str) -> Ran:
        nonlocal count
        count += 1
        script, folder = tmp_path / f"script{count}", tmp_path / f"run{count}"
        script.write_text("\n".join(lines))
        code = cli.main(
            ["replay", str(script), "--out", str(folder), "--cache-size", "128", "--max-new-tokens", "12",
             "--seed", "1", *argv]
        )  # fmt: skip
        out, err = capsys.readouterr()
        return Ran(code, folder, out, err)

    return run


@contextmanager
def after_turn(monkeypatch: pytest.MonkeyPatch, number: int, harm: Callable[[Conversation], None]) -> Iterator[None]:
    """Do `harm` at the end of turn `number`, and of all later ones."""
    run_turn = Conversation.run_turn

    def harmed(self: Conversation, *args: Any, **kwargs: Any) -> Any:
        outcome = run_turn(self, *args, **kwargs)
        if outcome.turn >= number:
            harm(self)
        return outcome

    monkeypatch.setattr(Conversation, "run_turn", harmed)
    yield


def grow_the_buffers(conversation: Conversation) -> None:
    """A cache that allocates with every turn."""
    layer = conversation.cache.streaming_layers[0]
    assert layer.storage is not None
    layer.storage.select(lambda buffer: torch.cat([buffer, buffer[:, :, :8]], dim=2))
