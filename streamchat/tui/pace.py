"""Decides when to draw: the more a frame costs, the fewer frames, so that the cores are free for decoding."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

FRAME_S = 1 / 15
"""Minimum seconds between two frames. A model slower than this has each of its tokens shown at once."""
MAX_FRAME_S = 0.25
"""Maximum seconds between two frames, however expensive they are."""
FAST_TPS, MAX_FAST_FRAME_S = 100.0, 1 / 3
"""Tokens per second from which nobody reads along, and the maximum seconds between two frames then."""
SHARE = 0.05
"""Share of one core that frames may use before there are fewer of them, while text comes faster than people read."""
READING_TPS, READING_SHARE = 20.0, 0.1
"""Tokens per second up to which the share is larger, so that each token is shown soon, and that share."""
FIGURES_S = 0.5
"""Minimum seconds between two updates of the status figures while a reply streams."""
FULL_COLLECTIONS = 200
"""Collections of the middle generation before a full one, while a reply streams; Python's default is 10."""


class FramePace:
    """Measures frames on the thread that draws them.

    Args:
        clock: Elapsed seconds.
        cpu_time: CPU seconds of the calling thread.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_time: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._cpu_time = clock, cpu_time
        self._spent: float | None = None
        self._cost = 0.0
        self._frame_at = self._figures_at = -math.inf

    def interval(self, tps: float | None = None) -> float:
        """Return the seconds from this frame to the next; call it once per frame.

        The cost of a frame is all CPU time of the thread since the last one, as layout and painting follow the events.

        Args:
            tps: Tokens per second of the reply; None if unknown.
        """
        spent = self._cpu_time()
        if self._spent is not None:
            self._cost += (spent - self._spent - self._cost) / 4
        self._spent, self._frame_at = spent, self._clock()
        share = READING_SHARE if tps is None or tps <= READING_TPS else SHARE
        most = MAX_FRAME_S if tps is None or tps < FAST_TPS else MAX_FAST_FRAME_S
        return min(most, max(FRAME_S, self._cost / share))

    def wait(self) -> float:
        """Return the seconds until an urgent frame may be drawn; 0 if it may be drawn now."""
        return max(0.0, self._frame_at + FRAME_S - self._clock())

    def figures_due(self, now: bool) -> bool:
        """Return whether to show the figures with this frame; always True if `now`."""
        time_ = self._clock()
        if not now and time_ - self._figures_at < FIGURES_S:
            return False
        self._figures_at = time_
        return True

    def pause(self) -> None:
        """Stop measuring until the next frame: there is nothing to draw."""
        self._spent = None


class CollectionPace:
    """Delays full garbage collections while a reply streams.

    A full collection stops both threads, for about 0.1 s in a long conversation. It is delayed until the reply ends,
    but not for more than about 2,500 tokens.
    """

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None

    def delay(self) -> None:
        """Delay full collections from now on."""
        if self._before is None:
            self._before = gc.get_threshold()
            gc.set_threshold(*self._before[:2], max(self._before[2], FULL_COLLECTIONS))

    def resume(self) -> None:
        """Restore the thresholds of Python."""
        if self._before is not None:
            gc.set_threshold(*self._before)
            self._before = None
