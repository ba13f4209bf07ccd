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
    """All objects of our classes in memory, and tensors, when the archive has written what was evicted."""
    for _ in range(200):
        gc.collect()
        kinds = [type(each) for each in gc.get_objects()]
        found = Counter(
            kind.__name__ for kind in kinds if kind is Tensor or str(kind.__module__).startswith("streamchat.")
        )
        if not found["_Job"]:
            break
        time.sleep(0.05)
    return found


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
        grown = objects() - before
        log = watched.conversation.log
        assert len(log) > tokens + 40
        assert grown == Counter({TurnRecord.__name__: 10})
        assert log.ids.itemsize == 4
        assert not hasattr(log.turns[0], "__dict__")
