"""A chat that is killed at random points loses nothing: see `tools.crash`, which does more of it."""

from __future__ import annotations

import sys

import pytest

from tests.support.program import run_tool


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_twelve_kills() -> None:
    printed = run_tool("crash", "--times", "12", "--seed", "7")
    assert printed.startswith("killed 12 times in ")
    assert "from the snapshot" in printed
    assert "read again" in printed
