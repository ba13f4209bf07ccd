"""A forked process in place of one that `subprocess` starts: it needs no 5 s of CPU time to import everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class ForkedProcess:
    """What the supervisor of a run with chaos uses of `subprocess.Popen`. All open files are inherited.

    Args:
        main: Called in the process with the arguments; its result is the exit code.
        command: The arguments.
        stdin, stdout, stderr: Descriptors or open files.
        env: The environment.
        start_new_session: Whether the process gets a session of its own.
    """

    def __init__(
        self,
        main: Callable[[list[str]], int],
        command: Sequence[str],
        *,
        stdin: Any,
        stdout: Any,
        stderr: Any,
        env: Mapping[str, str],
        start_new_session: bool,
        pass_fds: Sequence[int],
    ) -> None:
        del pass_fds
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                if start_new_session:
                    os.setsid()
                for number, file in enumerate((stdin, stdout, stderr)):
                    os.dup2(_descriptor(file), number)
                os.environ.clear()
                os.environ.update(env)
                sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in enumerate("rww"))  # noqa: SIM115
                code = main(list(command))
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for the end; return the exit code, or minus the signal."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


def _descriptor(file: Any) -> int:
    if file == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR)
    return file if isinstance(file, int) else int(file.fileno())
