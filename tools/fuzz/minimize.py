"""Makes an input with a fault smaller while the fault stays the same."""

from __future__ import annotations

import time

from tools.fuzz.check import Fault, find_fault
from tools.fuzz.target import Target

MAX_RUNS, MAX_SECONDS = 2_000, 20.0


def minimized(target: Target, data: bytes, fault: Fault) -> bytes:
    """Return a smaller input with the same fault: remove spans, then replace bytes by the letter `a`."""
    end, runs = time.monotonic() + MAX_SECONDS, 0

    def keeps(candidate: bytes) -> bool:
        nonlocal runs
        runs += 1
        found = find_fault(target, candidate)
        return found is not None and found.identity == fault.identity

    def may_go_on() -> bool:
        return runs < MAX_RUNS and time.monotonic() < end

    size = max(1, len(data) // 2)
    while size and may_go_on():
        at = 0
        while at < len(data) and may_go_on():
            candidate = data[:at] + data[at + size :]
            if keeps(candidate):
                data = candidate
            else:
                at += size
        size //= 2
    for at in range(len(data)):
        if not may_go_on():
            break
        candidate = data[:at] + b"a" + data[at + 1 :]
        if data[at] != ord("a") and keeps(candidate):
            data = candidate
    return data
