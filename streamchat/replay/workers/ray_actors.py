"""Workers on a Ray cluster: one actor each, with one CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from streamchat.base.ray_cluster import Cluster, connected
from streamchat.replay.workers.conversation import ConversationRunner, WorkerPlan
from streamchat.replay.workers.jobs import Job
from streamchat.replay.workers.messages import Message, WorkerLost

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Ray's workers have dozens of threads. With an arena of glibc's malloc for each, fragments took 70 MB in 500 turns."""


@contextmanager
def cluster(address: str, workers: int | None) -> Iterator[tuple[Cluster, int]]:
    """Context manager: connect to a Ray cluster; yields it and the number of workers to start.

    Args:
        address: See `connected`.
        workers: The number of workers that the user requested; None for one per CPU of the cluster.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    cpus = {"num_cpus": workers} if workers and address == "local" else {}
    with connected(address, **cpus) as found:
        import ray

        yield found, workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


class RayWorker:
    """An actor that runs one job at a time.

    Args:
        plan: What all jobs have in common.
        cluster: The cluster.

    Raises:
        ClusterLostError: The cluster no longer answers.
    """

    def __init__(self, plan: WorkerPlan, cluster: Cluster) -> None:
        import ray

        self._cluster = cluster
        cluster.check()
        # two calls at a time: a conversation, and `stop`
        made = ray.remote(num_cpus=1, max_concurrency=2, runtime_env={"env_vars": ENVIRONMENT})(ConversationRunner)
        self._actor = made.remote(plan)
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

        if self._cluster.answers:
            ray.kill(self._actor)


def wait_for_actors(cluster: Cluster, workers: Sequence[RayWorker], timeout_s: float) -> list[RayWorker]:
    """Wait for workers that have a message or have ended, and return them; none after `timeout_s` seconds.

    Raises:
        ClusterLostError: The cluster no longer answers.
    """
    import ray

    streams = {worker.stream: worker for worker in workers}
    ready, _ = ray.wait(list(streams), num_returns=1, timeout=timeout_s, fetch_local=False)
    if not ready:
        cluster.check()
    return [streams[stream] for stream in ready]
