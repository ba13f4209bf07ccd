"""Signal handlers for the length of a block."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_signals(numbers: tuple[int, ...], action: Callable[[int], None]) -> Iterator[None]:
    """Call `action` with the signal number, in the main thread, for each of `numbers` that arrives inside the block."""

    def handler(number: int, frame: FrameType | None) -> None:
        action(number)

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
