"""Suspends this process as a shell's Ctrl+Z does. POSIX only."""

from __future__ import annotations

import os
import signal


def stop_process(group: bool = False) -> None:
    """Stop until SIGCONT; returns then. Does nothing when no shell could continue it, as the system decides.

    Main thread only.

    Args:
        group: Stop all processes of the pipeline, as the key does, and not only this one.
    """
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    try:
        os.kill(0 if group else os.getpid(), signal.SIGTSTP)
    finally:
        signal.signal(signal.SIGTSTP, before)
