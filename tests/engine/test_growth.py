"""What the engine keeps of each turn: its record in the token log, and nothing else."""

from __future__ import annotations

import gc
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from streamchat.conversation import rollback
from streamchat.conversation.log import TurnRecord
from tests.support.real_engine import running


def objects() -> Counter[str]:
    """All objects of our classes in memory, and tensors."""
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    return Counter(kind.__name__ for kind in kinds if kind is Tensor or str(kind.__module__).startswith("streamchat."))


@pytest.mark.slow
def test_a_turn_leaves_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "REACH", 4)
    settings: dict[str, Any] = {
        "cache_size": 64,
        "max_new_tokens": 4,
        "snapshot_turns": 0,
    }  # a snapshot is written on a thread
    with running(store=tmp_path / "streamchat.db", audit=True, **settings) as watched:
        for _ in range(10):
            watched.turn("one two")
        watched.events.clear()
        before, tokens = objects(), len(watched.conversation.log)
        for _ in range(10):
            watched.turn("one two")
            watched.events.clear()
        expected = Counter({TurnRecord.__name__: 10})
        for _ in range(200):  # the engine's thread ends the turn after its event, and the archive is written behind it
            if (grown := objects() - before) == expected:
                break
            time.sleep(0.05)
        log = watched.conversation.log
        assert len(log) > tokens + 40
        assert grown == expected
        assert log.ids.itemsize == 4
        assert not hasattr(log.turns[0], "__dict__")
