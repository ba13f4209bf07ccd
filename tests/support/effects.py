"""Says commands to a real engine, and looks at what they did by other paths: processes, libraries, the cache itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.frontend.mentions import expand
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext, SlashResult
from streamchat.frontend.status import StatusBoard
from streamchat.models.load import LoadedModel
from streamchat.store.database import database_path
from tests.support.real_engine import Watched, running

LONG = "once upon a time there was a little girl and the dragon of the sea " * 3
_READER = """
import json, sqlite3, sys
connection = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True)
connection.text_factory = lambda data: data.decode("utf-8", "replace")
print(json.dumps(connection.execute(sys.argv[2], sys.argv[3:]).fetchall()))
"""


def other_process(program: str, *arguments: str) -> Any:
    """What a Python program prints as JSON, in a process that cannot import streamchat."""
    command = [sys.executable, "-I", "-S", "-c", program, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def rows(query: str, *parameters: str, database: Path | None = None) -> list[list[Any]]:
    """What another process reads from the database (default: the user's own)."""
    found: list[list[Any]] = other_process(_READER, str(database or database_path()), query, *parameters)
    return found


def said(session: str) -> list[str]:
    """All texts of a session, oldest first, as another process reads them."""
    query = """SELECT messages.text FROM messages JOIN turns ON turns.id = messages.turn
        WHERE turns.session = ? AND turns.state = 'done' ORDER BY turns.number, messages.role DESC"""
    return [text for (text,) in rows(query, session)]


def indices_of_turn(session: str, number: int) -> set[int]:
    """The log indices of a turn, as another process reads them."""
    query = "SELECT first, length(ids) / 4 FROM turns WHERE session = ? AND number = ? AND state = 'done'"
    [[first, count]] = rows(query, session, str(number))
    return set(range(first, first + count))


class Talk:
    """A real engine on a tiny model, whose chat is saved, and the commands of a front end."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.board = StatusBoard()
        watched.engine.subscribe(self.board.apply)
        self.registry = default_registry()
        self.context = SlashContext(watched.engine, self.board)

    def say(self, text: str, then: type[ev.Event] | None = None) -> SlashResult:
        """Run a command, and wait until it is done, or for the next event of a class."""
        done: Callable[[ev.Event], bool] | None = None
        seen = len(self.watched.events)
        result = self.registry.run(self.context, text)
        assert result is not None
        assert not result.error, result.text
        done = result.done_when
        if then is not None:
            done = lambda event: isinstance(event, then)  # noqa: E731
        if done is not None:
            self.watched.until(lambda events: any(done(event) for event in events[seen:]))
        if result.message:
            self.watched.turn(expand(result.message).text)
        return result

    def turn(self, text: str) -> ev.TurnFinished:
        return self.watched.turn(text)

    @property
    def session(self) -> str:
        assert self.board.session is not None
        return self.board.session

    @property
    def cached(self) -> set[int]:
        """The log indices in the cache's ledger."""
        ledger = self.watched.conversation.cache.ledger
        assert set(self.watched.conversation.cache.lengths) == {len(ledger)}
        return set(ledger)

    @property
    def log(self) -> list[int]:
        """The ids of the whole conversation."""
        return list(self.watched.conversation.log.ids)

    def decoded(self, ids: list[int]) -> str:
        text: str = self.watched.conversation.tokenizer.decode(ids)
        return text

    def go_on(self, tokens: int = 1000) -> None:
        """Talk until the conversation has that many more tokens, which is far more than the cache holds."""
        end = len(self.log) + tokens
        while len(self.log) < end:
            self.turn(LONG)
        assert self.watched.conversation.cache.compression_count > 0


@contextmanager
def talking(
    session: str | None = None, load: Callable[..., LoadedModel] | None = None, **settings: Any
) -> Iterator[Talk]:
    """A chat in the user's own database; `session` is resumed."""
    options: dict[str, Any] = {"max_new_tokens": 4, "cache_size": 192, "temperature": 0.0, "loop_guard": "off"}
    with running(load, store=database_path(), session=session, start=False, **(options | settings)) as watched:
        talk = Talk(watched)
        watched.engine.start()
        watched.wait(ev.ModelReady)
        if session is not None:
            watched.wait(ev.ConversationResumed)
        yield talk
