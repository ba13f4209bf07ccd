"""Keeps the processors busy with other work."""

from __future__ import annotations

import random
import subprocess
import sys

from streamchat.base.formatting import plural
from streamchat.base.processors import usable_processors
from streamchat.replay.chaos.kind import Outside, Target, Values

MAX_PROCESSES = 16
WORK = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


class Load(Outside):
    """Processes that compute for some seconds."""

    name = "load"
    what = "other processes keep all processors busy"
    every = 30

    def draw(self, rng: random.Random) -> Values:
        return {"seconds": round(rng.uniform(0.3, 2.0), 2), "share": rng.choice((0.5, 1.0, 2.0))}

    def describe(self, values: Values) -> str:
        return f"{plural(_count(values), 'process', 'processes')} busy for {values['seconds']:.1f} s"

    def slow_for_s(self, values: Values) -> float:
        return float(values["seconds"]) + 1.0

    def disturb(self, target: Target, values: Values) -> None:
        command = [sys.executable, "-I", "-S", "-c", WORK, str(values["seconds"])]
        started = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(_count(values))]
        target.ended.wait(values["seconds"])
        for each in started:
            each.kill()
            each.wait()


def _count(values: Values) -> int:
    return max(1, min(MAX_PROCESSES, round(float(values["share"]) * usable_processors())))
