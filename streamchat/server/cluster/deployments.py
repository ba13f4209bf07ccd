"""The deployments of Ray Serve: a gateway, and replicas of the model. Imported in Ray's processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.server.cluster.gateway import Gateway, ReplicaLostError
from streamchat.server.cluster.plan import ClusterPlan
from streamchat.server.cluster.replica import Replica
from streamchat.telemetry.log_file import start_logging

GATEWAY_REQUESTS = 10_000
"""Requests at a time per gateway, which only passes messages on."""
HEALTH_S = 5.0
SHUTDOWN_S = 60.0
"""Time for a replica to save its sessions."""


class ModelDeployment:
    """A replica of the model in Ray Serve.

    Args:
        plan: What all replicas have in common.
        load: Loads the model; replaceable for tests.
    """

    def __init__(self, plan: ClusterPlan, load: Load = load_from_settings) -> None:
        start_logging()
        self._replica = Replica(plan, serve.get_replica_context().replica_id.unique_id, load)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[dict[str, Any]]]:
        """See `Replica.answer`."""
        async for messages in self._replica.answer(scope, body):
            yield messages

    async def names(self) -> tuple[str, ...]:
        """Return the names of the model."""
        return self._replica.names

    def check_health(self) -> None:
        """See `Replica.check_health`; Ray Serve replaces a replica that fails."""
        self._replica.check_health()

    def __del__(self) -> None:
        if (replica := getattr(self, "_replica", None)) is not None:
            del self._replica
            replica.close()


class GatewayDeployment:
    """A gateway in Ray Serve.

    Args:
        plan: What all parts have in common.
        model: Handle of the replicas.
    """

    def __init__(self, plan: ClusterPlan, model: Any) -> None:
        start_logging()
        self._model = model
        self._gateway = Gateway(plan, self._answer, lambda: model.names.remote())

    def __serve_build_asgi_app__(self) -> Any:
        return self._gateway.app()

    async def _answer(self, scope: dict[str, Any], body: bytes, route: str) -> AsyncIterator[list[dict[str, Any]]]:
        call = self._model.options(stream=True, session_id=route).answer.remote(scope, body)
        try:
            async for messages in call:
                yield messages
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError, RayServeException) as error:
            raise ReplicaLostError(" ".join(str(error).split())[:200]) from None
        finally:
            call.cancel()


def application(plan: ClusterPlan, load: Load = load_from_settings) -> Any:
    """Return the application for `serve.run`."""
    replicas, limits = plan.replicas, plan.options.limits
    options: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        options = {"autoscaling_config": {"min_replicas": replicas.least, "max_replicas": replicas.most}}
    model = serve.deployment(ModelDeployment).options(
        name="model",
        max_ongoing_requests=limits.requests,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class="streamchat.server.cluster.router:SessionRouter"
        ),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        **options,
    )
    gateway = serve.deployment(serve.ingress()(GatewayDeployment)).options(
        name="gateway", max_ongoing_requests=GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(plan, model.bind(plan, load))
