"""Workers on this machine: one process each."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import cast

from streamchat.base import child_processes
from streamchat.replay.workers.conversation import ConversationRunner, WorkerPlan
from streamchat.replay.workers.jobs import Job
from streamchat.replay.workers.messages import Message, WorkerLost


class LocalWorker:
    """A process that runs one job at a time.

    Args:
        plan: What all jobs have in common.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        # spawned, because torch's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, plan), daemon=True)
        with child_processes.safe_environment():
            self._process.start()
        theirs.close()  # else its end would not be seen

    def start(self, job: Job) -> None:
        """Start a job."""
        self._send(job)

    def stop(self) -> None:
        """Stop the running job after its current turn."""
        self._send(None)

    def _send(self, command: Job | None) -> None:
        with suppress(OSError):  # it has ended; `receive` says so
            self.connection.send(command)

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            WorkerLost: The process has ended.
        """
        try:
            return cast(Message, self.connection.recv())
        except (EOFError, OSError):
            self._process.join(5.0)
            code = self._process.exitcode
            how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise WorkerLost(f"its process {how}") from None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5.0)
        self.connection.close()


def wait_for_local(workers: Sequence[LocalWorker], timeout_s: float) -> list[LocalWorker]:
    """Wait for workers that have a message or have ended, and return them; none after `timeout_s` seconds."""
    ready = wait([worker.connection for worker in workers], timeout_s)
    return [worker for worker in workers if worker.connection in ready]


def _serve(connection: Connection, plan: WorkerPlan) -> None:
    """Run the jobs that arrive, each in a thread, so that a stop can be received at any time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches every process of the terminal; the parent decides
    child_processes.end_with_parent()
    runner = ConversationRunner(plan)

    def work(job: Job) -> None:
        for message in runner.run(job):
            connection.send(message)

    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        if command is None:
            runner.stop()
        else:
            threading.Thread(target=work, args=(command,), daemon=True).start()
