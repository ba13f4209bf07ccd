"""Stops the process and continues it later, as a laptop's lid or a debugger does."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress

from streamchat.replay.chaos.kind import Outside, Target, Values


class Pause(Outside):
    """SIGSTOP, then SIGCONT."""

    name = "pause"
    what = "SIGSTOP stops the process, and SIGCONT continues it later"
    every = 12

    def missing(self) -> str:
        return "" if hasattr(signal, "SIGSTOP") else "this system cannot stop a process"

    def draw(self, rng: random.Random) -> Values:
        return {"seconds": round(rng.uniform(0.5, 1.5) if rng.random() < 0.1 else rng.uniform(0.01, 0.1), 3)}

    def describe(self, values: Values) -> str:
        return f"stopped for {values['seconds']:.2f} s"

    def slow_for_s(self, values: Values) -> float:
        return float(values["seconds"]) + 0.5

    def disturb(self, target: Target, values: Values) -> None:
        with suppress(ProcessLookupError):
            os.kill(target.pid, signal.SIGSTOP)
            try:
                target.ended.wait(values["seconds"])
            finally:
                os.kill(target.pid, signal.SIGCONT)
