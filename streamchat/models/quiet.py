"""Loading without terminal output: progress bars and log lines of libraries are off, and restored afterwards."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

_LOGGERS = ("transformers", "huggingface_hub", "accelerate", "torch", "torchao", "gguf", "filelock")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and huggingface_hub in this block: progress bars, log lines and warnings.

    What a user must know is checked on the loaded model instead of read from log lines.
    """
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    # neither library has precise types here
    hub_utils: Any = utils
    bars: Any = transformers_logging
    bars_on = bars.is_progress_bar_enabled()
    hub_bars_on = not hub_utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bars.disable_progress_bar()
            hub_utils.disable_progress_bars()
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_on:
                bars.enable_progress_bar()
            if hub_bars_on:
                hub_utils.enable_progress_bars()
