"""A chat that is killed at random points loses nothing: see `tools.crash`, which does more of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_thirty_kills() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tools.crash", "--times", "30", "--seed", "7"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("killed 30 times in ")
    assert "from the snapshot" in done.stdout
    assert "read again" in done.stdout
