"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from streamchat.telemetry import memory
from streamchat.telemetry.memory import FreedMemory
from tests.support.real_engine import running

HOLES = """
from streamchat.telemetry.memory import FreedMemory, process_rss
freed = FreedMemory()
freed.return_if_grown()
start = process_rss()
blocks = [b"a" * 100_000 for _ in range(1000)]
kept = blocks[::10]
del blocks
holes = process_rss()
freed.return_if_grown()
print(holes - start, process_rss() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return freed memory themselves")
def test_holes_between_blocks_are_returned() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 90_000_000
    assert after < 30_000_000


def test_it_is_returned_when_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, returned = [0], []

    def give_back() -> None:
        returned.append(sizes[0])
        sizes[0] -= 10_000_000

    monkeypatch.setattr(memory, "process_rss", lambda: sizes[0])
    monkeypatch.setattr(memory, "return_freed", give_back)
    freed = FreedMemory()
    for sizes[0] in (500, 505, 499, 480, 495, 497, 2_000, 2_029, 2_031):
        sizes[0] *= 1_000_000
        freed.return_if_grown()
    # at first; 16 MB above 480 MB; grown to more; not 2 % (40 MB) above 1,990 MB, but above that
    assert returned == [500_000_000, 497_000_000, 2_000_000_000, 2_031_000_000]


def test_it_is_returned_after_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(FreedMemory, "return_if_grown", lambda _self: calls.append("returned"))
    with running(max_new_tokens=4, on_full="stop") as watched:
        watched.turn("one")
        assert watched.turn("x " * 1000).rolled_back
    assert calls == ["returned"] * 2
