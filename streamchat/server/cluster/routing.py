"""Finds the session that a request continues, and the replica that has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamchat.server.calls import Prompt
from streamchat.server.errors import ApiError
from streamchat.server.known import ReplyId
from streamchat.server.limits import parse_json
from streamchat.server.requests import Served, read_completion, read_response
from streamchat.store.shared.folder import SharedFolder, exchange_name

READERS = {"/v1/chat/completions": read_completion, "/v1/responses": read_response}


class Directory:
    """Looks sessions up in the shared folder. Thread-safe.

    Args:
        folder: The shared folder.
        served: What requests may ask for.
    """

    def __init__(self, folder: SharedFolder, served: Served) -> None:
        self._folder, self._served = folder, served

    def route(self, path: str, body: bytes) -> str:
        """Return the route of a request (see `route_to`); '' if it continues no session, or is not valid."""
        read = READERS.get(path)
        if read is None:
            return ""
        try:
            session = self._session(read(parse_json(body), self._served).prompt)
        except ApiError:  # the replica answers with it
            return ""
        claim = None if session is None else self._folder.claim_of(session)
        return "" if claim is None or session is None else route_to(claim.owner, session)

    def _session(self, prompt: Prompt) -> str | None:
        if prompt.previous:
            parts = ReplyId.parse(prompt.previous)
            return None if parts is None else parts.session
        last = prompt.history[-1] if prompt.history else None
        if last is None or last.message is None:
            return None
        system = self._served.settings.system_prompt if prompt.system is None else prompt.system
        return self._folder.session_after(exchange_name(prompt.scope, system, last.message, last.reply))


def route_to(owner: str, session: str) -> str:
    """Return the text by which the router knows where to send a request."""
    return f"{owner} {session}"


def replica_for(route: str, replicas: Mapping[str, Any]) -> str | None:
    """Return the replica for a route: the owner, or if it is gone, the one that all routers choose in its place.

    Args:
        route: See `route_to`; '' for a request that any replica can answer.
        replicas: The running replicas, by name.
    """
    owner, _, session = route.partition(" ")
    if not session or owner in replicas:
        return owner or None
    return max(replicas, key=lambda name: exchange_name("", "", session, name), default=None)
