"""A short run of `tools.schedules`; the long one is `python -m tools.schedules --schedules 1000`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.program import run_tool
from tools.schedules import Loss, Oracle


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_forty_schedules(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # where it is there, nobody waits for the disk
    folder = str(memory if memory.is_dir() else tmp_path)
    printed = run_tool("schedules", "--schedules", "40", "--seed", "7", "--folder", folder)
    assert printed.startswith("40 schedules in ")
    assert "none lost, none extra, all found, no fault in any file" in printed


def test_the_oracle_finds_each_kind_of_loss() -> None:
    oracle = Oracle()
    oracle.heard(("write", "a", "b"), [{"saved": "a"}, {"saved": "b"}, {"done": None}], killed=False)
    oracle.heard(("write", "c", "d"), [{"saved": "c"}], killed=True)
    oracle.heard(("delete", "b"), [{"done": True}], killed=False)
    for titles in (["a", "c"], ["a", "c", "d"]):
        oracle.compare(titles, titles, "")
    with pytest.raises(Loss, match="1 of 2 saved conversations are lost, 0 are extra"):
        oracle.compare(["a"], ["a"], "")
    with pytest.raises(Loss, match="0 of 2 saved conversations are lost, 1 are extra"):
        oracle.compare(["a", "b", "c"], ["a", "b", "c"], "")
    with pytest.raises(Loss, match="the search does not find 1 of 2"):
        oracle.compare(["a", "c"], ["a"], "")
    with pytest.raises(Loss, match="the database is damaged: row 3 missing"):
        oracle.compare(["a", "c"], ["a", "c"], "row 3 missing")
    with pytest.raises(Loss, match="was not carried out"):
        oracle.heard(("list",), [], killed=False)
    with pytest.raises(Loss, match="no such table"):
        oracle.heard(("list",), [{"error": "no such table"}], killed=False)
