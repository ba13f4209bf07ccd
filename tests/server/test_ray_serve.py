"""The server on a local Ray cluster. `tests/server/test_shared_sessions.py` has what needs no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("ray", "fastapi", "grpc")), reason="needs the extra streamchat[cluster]"
)
def test_a_killed_replica_loses_nothing() -> None:
    """A chat through OpenAI's client has the same replies when the owner of its session is killed during one."""
    command = [sys.executable, "-m", "tools.cluster_check", "--replicas", "2", "--turns", "6", "--kills", "1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout)
    assert result["owners"] == 2
    assert result["same_replies"]
    assert result["all_saved"]
