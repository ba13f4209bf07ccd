"""A process that uses the database of conversations as it is told to, a JSON line for each command.

    python -m tools.actor DATABASE

It imports `streamchat.store` only, so that it starts and forks quickly. Commands are lists, `["write", "a", "b"]`; each
is answered with `{"done": ...}` or `{"error": ...}`, after one `{"saved": TITLE}` for each conversation that was
committed.
"""

from __future__ import annotations

import json
import sys
import traceback
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from streamchat.base.errors import StoreError
from streamchat.store.health import examine
from streamchat.store.records import ModelIdentity, StoredTurn
from streamchat.store.store import Store

Emit = Callable[[dict[str, Any]], None]


def save_conversation(store: Store, title: str, turn: StoredTurn) -> None:
    """Save a conversation of one turn."""
    session = store.create(title, ModelIdentity("m", "m"), {})
    store.write(session, turns=[turn])


class Actor:
    """Carries out commands on one database.

    Args:
        path: The database.
        emit: Sends an answer.
    """

    def __init__(self, path: Path, emit: Emit) -> None:
        self._path, self._emit = path, emit
        self._store: Store | None = None

    def obey(self, command: list[str]) -> None:
        """Carry out one command and answer it."""
        name, *arguments = command
        try:
            result = getattr(self, f"do_{name}")(*arguments)
        except StoreError as error:
            self._emit({"error": str(error), "traceback": traceback.format_exc()})
        else:
            self._emit({"done": result})

    @property
    def store(self) -> Store:
        """The open store; opened where it is not."""
        self.do_open()
        assert self._store is not None
        return self._store

    def do_open(self) -> None:
        """As a chat does when it starts."""
        if self._store is None:
            self._store = Store(self._path)

    def do_close(self) -> None:
        """As a chat does when it ends."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def do_write(self, *titles: str) -> None:
        """Save a conversation of one turn for each title, in which the word is said."""
        for title in titles:
            save_conversation(
                self.store, title, StoredTurn(1, f"say {title}", f"{title} it is", 0, 1, 2, array("i", [1] * 9))
            )
            self._emit({"saved": title})

    def do_search(self, word: str) -> list[str]:
        """Titles of the conversations that say `word`, through a store of its own: the app's search."""
        with Store(self._path) as store:
            return sorted({found.title for found in store.search(word, limit=10_000)})

    def do_list(self) -> list[str]:
        """All titles, through a store of its own."""
        with Store(self._path) as store:
            return sorted(info.title for info in store.sessions())

    def do_delete(self, title: str) -> bool:
        """Delete the conversation `title`; whether it was there."""
        for info in self.store.sessions():
            if info.title == title:
                self.store.delete(info.id)
                return True
        return False

    def do_check(self) -> str:
        """What is wrong with the file; '' for nothing."""
        with Store(self._path) as store:  # creates the file if it is missing
            return "; ".join(examine(store.path).problems)


def serve(path: Path, lines: Iterable[str], emit: Emit) -> None:
    """Carry out all commands in `lines`."""
    actor = Actor(path, emit)
    for line in lines:
        actor.obey(json.loads(line))


def main() -> int:
    """Commands from stdin, answers to stdout."""

    def emit(answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    serve(Path(sys.argv[1]), sys.stdin, emit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
