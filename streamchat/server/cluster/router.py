"""The request router of Ray Serve: a session goes to the replica with its cache. Imported in Ray's processes."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import RequestRouter

from streamchat.server.cluster.routing import replica_for


class SessionRouter(RequestRouter):  # type: ignore[misc] # Ray is not checked
    """Sends a request with a session id (`streamchat.server.cluster.routing.route_to`) to the owner of the session.

    A request that continues no session goes to the less busy one of two random replicas.
    """

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Return the replicas to try. As none of them may be free, Ray Serve waits and calls this again."""
        if not candidate_replicas or pending_request is None:
            return []
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        name = replica_for(pending_request.metadata.session_id, by_name)
        if name is not None:
            return [[by_name[name]]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
