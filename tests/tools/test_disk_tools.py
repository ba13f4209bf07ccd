"""Short runs of `tools.power_loss` and `tools.failing_calls`, which do more by one command."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.program import run_tool
from tools.disk import shim

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shim.compiler() is None, reason="needs Linux and a C compiler"),
]


def test_power_failures_at_any_moment_lose_nothing_that_was_promised() -> None:
    printed = run_tool("power_loss", "--draws", "250", "--seed", "1")
    found = re.match(r"(\d+) states of the disk .* in a chat of (\d+) changes, .*: 0 faults\n", printed)
    assert found, printed
    assert int(found[1]) > 100
    assert int(found[2]) > 500
    assert "cache equal to the bit" in printed
    assert "cache prefilled again, and told" in printed


def test_a_call_that_fails_leaves_nothing_half_done() -> None:
    printed = run_tool("failing_calls", "--cases", "6", "--seed", "1")
    found = re.match(r"6 runs of a chat in .*, (\d+) of them with a call that failed .*: 0 faults\n", printed)
    assert found, printed
    assert int(found[1]) >= 3
