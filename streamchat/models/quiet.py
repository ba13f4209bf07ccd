"""Loading without terminal output: progress bars and log lines of libraries are off, and restored afterwards."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_LOGGERS = ("transformers", "huggingface_hub", "accelerate", "torch", "torchao", "gguf", "filelock")


class _Silence:
    """What all blocks of `quiet` share: the first one silences the libraries, and the last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._restore = contextlib.ExitStack()

    def begin(self) -> None:
        """Enter a block."""
        with self._lock:
            if not self._blocks:
                self._restore = _silenced()
            self._blocks += 1

    def end(self) -> None:
        """Leave a block."""
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self._restore.close()


_silence = _Silence()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and huggingface_hub in this block: progress bars, log lines and warnings.

    What a user must know is checked on the loaded model instead of read from log lines. Two threads may be in such a
    block at once: one loads a model and another fetches one.
    """
    _silence.begin()
    try:
        yield
    finally:
        _silence.end()


def _silenced() -> contextlib.ExitStack:
    """Silence the libraries; closing the result restores them."""
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    # neither library has precise types here
    hub_utils: Any = utils
    bars: Any = transformers_logging
    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    for logger in map(logging.getLogger, _LOGGERS):
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
    if bars.is_progress_bar_enabled():
        stack.callback(bars.enable_progress_bar)
        bars.disable_progress_bar()
    if not hub_utils.are_progress_bars_disabled():
        stack.callback(hub_utils.enable_progress_bars)
        hub_utils.disable_progress_bars()
    return stack
