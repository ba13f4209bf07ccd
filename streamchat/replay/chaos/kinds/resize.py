"""Changes the size of the terminal many times in a row, as a window manager does while a border is dragged."""

from __future__ import annotations

import importlib.util
import random

from streamchat.base.formatting import plural
from streamchat.replay.chaos.kind import Outside, Target, Values

USUAL = (100, 30)
"""Columns and rows of the terminal between two disturbances."""
SMALL, LARGE = (20, 6), (300, 100)
"""Columns and rows; a quarter of all sizes is at most `SMALL`, and the least is 1 x 1."""


class Resize(Outside):
    """Many sizes in a row. The app runs on a pseudo-terminal in the measured process."""

    name = "resize"
    what = "the app's terminal changes its size many times in a row, down to 1 x 1; simulated: on a pseudo-terminal"
    every = 12

    def missing(self) -> str:
        return "" if importlib.util.find_spec("termios") else "this system has no pseudo-terminals"

    def draw(self, rng: random.Random) -> Values:
        sizes = [_size(rng) for _ in range(rng.randint(4, 30))]
        return {"sizes": sizes, "pause_s": round(rng.uniform(0.0, 0.03), 4)}

    def describe(self, values: Values) -> str:
        return f"{plural(len(values['sizes']), 'size')} of the terminal, {1000 * values['pause_s']:.0f} ms apart"

    def slow_for_s(self, values: Values) -> float:
        return float(len(values["sizes"]) * values["pause_s"]) + 1.0

    def disturb(self, target: Target, values: Values) -> None:
        if target.screen is None:
            return
        for columns, rows in [*values["sizes"], USUAL]:
            target.screen.resize(columns, rows)
            target.ended.wait(values["pause_s"])


def _size(rng: random.Random) -> list[int]:
    largest = SMALL if rng.random() < 0.25 else LARGE
    return [rng.randint(1, limit) for limit in largest]
