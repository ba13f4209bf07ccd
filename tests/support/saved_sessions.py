"""Conversations in the store, made without an engine."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamchat.store.records import CacheMark, ModelIdentity, StoredTurn
from streamchat.store.store import Store

IDENTITY = ModelIdentity("default", "SmolLM2", "float32", "f", "t")
SETTINGS = {"cache_size": 64, "num_sink_tokens": 4}


def a_session(store: Store, title: str = "The sea", settings: Mapping[str, Any] = SETTINGS) -> str:
    """The id of a new session without turns; its system prompt has the log indices 0 to 2."""
    return store.create(title, IDENTITY, settings, [1, 2, 3])


def a_turn(number: int, text: str, reply: str = "", **changes: Any) -> StoredTurn:
    """Turn `number` with the log indices 3 + 10 (number - 1) and following."""
    first = 3 + 10 * (number - 1)
    turn = StoredTurn(number, text, reply, first, first + 2, first + 5, array("i", range(first, first + 10)))
    return replace(turn, started=1000.0 + number, **changes)


def stored(title: str = "The sea") -> str:
    """A session of one turn about `title` in the user's own store."""
    with Store() as store:
        session = a_session(store, title)
        store.write(session, turns=[a_turn(1, f"Tell me about {title}", "It is\nvery green")])
    return session


def saved(title: str = "The sea", turns: int = 3, held: tuple[tuple[int, int], ...] = ((0, 4), (14, 34))) -> str:
    """A session in the user's own store; turn n has log indices 4 + 10 (n - 1) and following."""
    with Store() as store:
        settings = {"num_sink_tokens": 4, "system_prompt": "Be kind.", "temperature": 0.5}
        session = store.create(title, IDENTITY, settings, [1, 2, 3, 4])
        said = [
            StoredTurn(
                n,
                f"question {n}",
                f"answer *{n}*",
                4 + 10 * (n - 1),
                5 + 10 * (n - 1),
                9 + 10 * (n - 1),
                array("i", [7] * 10),
                started=1e9 + n,
                finish_reason="stop",
            )
            for n in range(1, turns + 1)
        ]
        store.write(session, turns=said, cache=CacheMark(held, ((0, 4),), (), 1))
    return session


def filled(path: Path, *titles: str) -> list[str]:
    """A database with a conversation for each title, which has a word of its own."""
    with Store(path) as store:
        ids = [a_session(store, title) for title in titles]
        for session, title in zip(ids, titles, strict=True):
            store.write(session, turns=[a_turn(1, f"about {title}", f"the {title}word")])
    return ids
