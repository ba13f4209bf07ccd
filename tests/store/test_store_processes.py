"""Several processes on one database: nothing that was acknowledged is lost, whoever opens, searches, dies, closes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX file locks, SIGKILL")


class Process:
    """A real process that uses the database; see `tools.actor`."""

    def __init__(self, path: Path) -> None:
        root = Path(__file__).parents[2]
        arguments = [sys.executable, "-m", "tools.actor", str(path)]
        self._child = subprocess.Popen(
            arguments, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )
        self.saved: list[str] = []

    def do(self, *command: str) -> Any:
        """Have it carried out; returns the result."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(command) + "\n")
        for line in self._child.stdout:
            answer = json.loads(line)
            if "saved" in answer:
                self.saved.append(answer["saved"])
            else:
                assert "error" not in answer, answer
                return answer["done"]
        raise AssertionError(f"{command} was not answered")

    def write(self, prefix: str, count: int) -> None:
        """Save `count` conversations."""
        self.do("write", *(f"{prefix}{i}" for i in range(count)))

    def kill(self) -> None:
        """With SIGKILL."""
        self._child.kill()
        self.end()

    def end(self) -> None:
        """Let it end, if it has not."""
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            stream.close()
        self._child.wait(30)


Begin = Callable[[], Process]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


@pytest.fixture
def begin(database: Path) -> Iterator[Begin]:
    begun: list[Process] = []

    def begin() -> Process:
        begun.append(Process(database))
        return begun[-1]

    yield begin
    for process in begun:
        process.end()


def test_a_search_leaves_the_locks_of_the_chat_alone(database: Path, begin: Begin) -> None:
    """The second store of the search drops no lock of the first one: nobody deletes the log under it."""
    chat, other = begin(), begin()
    chat.write("first", 1)
    assert chat.do("search", "first0") == ["first0"]
    other.write("b", 60)
    other.do("close")
    assert database.with_name("streamchat.db-wal").exists()
    chat.write("c", 60)
    other.write("d", 60)
    other.do("close")
    chat.write("e", 60)
    expected = sorted(chat.saved + other.saved)
    assert len(expected) == 241
    assert begin().do("list") == expected
    chat.do("close")
    last = begin()
    assert last.do("list") == expected
    assert last.do("check") == ""


def test_nothing_is_lost_where_the_chat_is_killed_after_a_search(begin: Begin) -> None:
    chat, other = begin(), begin()
    chat.write("first", 1)
    chat.do("search", "first0")
    other.do("list")
    other.do("close")
    chat.write("c", 50)
    chat.kill()
    last = begin()
    assert last.do("list") == sorted(chat.saved)
    assert len(chat.saved) == 51
    assert last.do("check") == ""
