"""Workers on a Ray cluster: one actor each, with one CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from importlib.util import find_spec
from typing import Any, cast

from streamchat.base import child_processes
from streamchat.base.errors import ConfigError
from streamchat.replay.workers.conversation import ConversationRunner, WorkerPlan
from streamchat.replay.workers.jobs import Job
from streamchat.replay.workers.messages import Message, WorkerLost


@contextmanager
def cluster(address: str, workers: int | None) -> Iterator[int]:
    """Context manager: connect to a Ray cluster; yields the number of workers to start.

    Args:
        address: Address of the cluster for `ray.init`; 'local' starts a cluster on this machine.
        workers: The number of workers that the user requested; None for one per CPU of the cluster.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray; pip install ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports from Ray
    import ray

    try:
        # Ray adds the current folder to the search path of its workers; ours is already on it
        with child_processes.safe_environment(), chdir(child_processes.FOLDER.parent):
            cpus = {"num_cpus": workers} if workers and address == "local" else {}
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error", **cpus)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--ray {address}: the cluster cannot be reached ({reason})") from None
    try:
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


class RayWorker:
    """An actor that runs one job at a time. It needs a connection to a cluster.

    Args:
        plan: What all jobs have in common.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        import ray

        # two calls at a time: a conversation, and `stop`
        self._actor = ray.remote(num_cpus=1, max_concurrency=2)(ConversationRunner).remote(plan)
        self._stream: Any = None

    def start(self, job: Job) -> None:
        """Start a job."""
        self._stream = self._actor.run.options(num_returns="streaming").remote(job)

    def stop(self) -> None:
        """Stop the running job after its current turn."""
        self._actor.stop.remote()

    @property
    def stream(self) -> Any:
        """References to the messages of the running job."""
        return self._stream

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            WorkerLost: The actor has ended.
        """
        import ray

        try:
            return cast(Message, ray.get(next(self._stream)))
        except (ray.exceptions.RayError, StopIteration) as error:
            raise WorkerLost(" ".join(str(error).split())[:200] or "its actor has ended") from None

    def close(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self._actor)


def wait_for_actors(workers: Sequence[RayWorker], timeout_s: float) -> list[RayWorker]:
    """Wait for workers that have a message or have ended, and return them; none after `timeout_s` seconds."""
    import ray

    streams = {worker.stream: worker for worker in workers}
    ready, _ = ray.wait(list(streams), num_returns=1, timeout=timeout_s, fetch_local=False)
    return [streams[stream] for stream in ready]
