"""Deploys the server on a Ray cluster, and ends it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from streamchat.base import ray_cluster
from streamchat.base.errors import ConfigError, StreamchatError
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.server.cluster.plan import APPLICATION, ClusterPlan


def require_ray() -> None:
    """Check that Ray Serve is installed.

    Raises:
        ConfigError: It is not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports from Ray
    try:
        from ray import serve  # noqa: F401
        from ray.serve.request_router import RequestRouter  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray Serve ({error.name or error} is missing); run: pip install 'streamchat[cluster]'"
        ) from None


@contextmanager
def connected(address: str) -> Iterator[ray_cluster.Cluster]:
    """Context manager: connect to a Ray cluster; end one that was started here.

    Args:
        address: See `ray_cluster.connected`.

    Raises:
        ConfigError: The cluster cannot be reached.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with ray_cluster.connected(address) as cluster:
        yield cluster


@contextmanager
def deployed(cluster: ray_cluster.Cluster, plan: ClusterPlan, load: Load = load_from_settings) -> Iterator[None]:
    """Context manager: serve on the cluster. At the end, the replicas save their sessions.

    Args:
        cluster: The cluster.
        plan: What to serve.
        load: Loads the model; replaceable for tests.

    Raises:
        ClusterLostError: The cluster no longer answers.
        ConfigError: The cluster runs such a server already.
        StreamchatError: A replica cannot start, for example because the model cannot be loaded.
    """
    import ray
    from ray import serve

    from streamchat.server.cluster.deployments import application

    def start() -> None:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": plan.options.host, "port": plan.options.port, "request_timeout_s": None},
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        serve.run(application(plan, load), name=APPLICATION, route_prefix="/")

    def stop() -> None:
        serve.delete(APPLICATION)
        if not serve.status().applications:
            serve.shutdown()

    if APPLICATION in cluster.call(serve.status).applications:
        raise ConfigError("the cluster already runs `streamchat serve`; end that server first")
    try:
        try:
            cluster.call(start)
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise StreamchatError(f"Ray Serve cannot start the server: {_reason(str(error))}") from None
        yield
    finally:
        if cluster.answers:
            with suppress(Exception), ray_cluster.quiet():  # Ray reports that the controller of Ray Serve ended
                cluster.call(stop)
    if not cluster.answers:
        raise ray_cluster.ClusterLostError(
            "the Ray cluster ended before its replicas had saved the caches of their sessions; the turns are saved"
        )


def _reason(text: str) -> str:
    """Return the sentence of the error that ended a replica, from what Ray Serve reports."""
    found = re.findall(r"^streamchat\.[\w.]+Error: (.+)$", text, re.MULTILINE)
    return found[-1] if found else " ".join(text.split())[-300:]
