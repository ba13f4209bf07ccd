"""Suspend this process, like Ctrl+Z in a shell. POSIX only."""

from __future__ import annotations

import os
import signal


def stop_process(group: bool = False) -> None:
    """Stop the process and return after SIGCONT. The system ignores it if no shell could continue the process.

    Main thread only.

    Args:
        group: Stop the whole process group (the pipeline), as Ctrl+Z does.
    """
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    try:
        os.kill(0 if group else os.getpid(), signal.SIGTSTP)
    finally:
        signal.signal(signal.SIGTSTP, before)
