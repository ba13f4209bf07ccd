"""Sets the wall clock forward and back, as a corrected clock or a restored virtual machine does."""

from __future__ import annotations

import random
import time

from streamchat.base.formatting import human_seconds
from streamchat.replay.chaos.kind import Inside, Values

JUMPS_S = (1.0, 3600.0, 86_400.0, 400 * 86_400.0)


class ClockJump(Inside):
    """An offset of `time.time`."""

    name = "clock"
    what = "the wall clock jumps; simulated: `time.time` of the process has an offset (files keep the system's times)"
    every = 10

    def __init__(self) -> None:
        self._clocks = (time.time, time.time_ns)

    def draw(self, rng: random.Random) -> Values:
        if rng.random() < 0.2:
            return {"seconds": 0.0}
        return {"seconds": rng.choice(JUMPS_S) * rng.choice((-1, 1))}

    def describe(self, values: Values) -> str:
        seconds = values["seconds"]
        if not seconds:
            return "clock corrected"
        return f"clock set {human_seconds(abs(seconds))} {'ahead' if seconds > 0 else 'back'}"

    def slow_for_s(self, values: Values) -> float:
        return 0.0  # no figure of a turn may depend on the wall clock

    def apply(self, values: Values) -> None:
        seconds, (clock, clock_ns) = values["seconds"], self._clocks
        setattr(time, "time", lambda: clock() + seconds)  # noqa: B010 - for mypy
        setattr(time, "time_ns", lambda: clock_ns() + round(seconds * 1e9))  # noqa: B010

    def end(self) -> None:
        setattr(time, "time", self._clocks[0])  # noqa: B010
        setattr(time, "time_ns", self._clocks[1])  # noqa: B010
