"""A client of the API on this machine, that measures; with the standard library only."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamchat.base.errors import StreamchatError


@dataclass(frozen=True)
class Timed:
    """A response."""

    id: str
    first_s: float
    """Time from the request to the first text."""


class ApiClient:
    """Sends requests, each on a connection of its own.

    Args:
        port: Port of the server on this machine.
        model: Name of the model.
    """

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model

    def respond(self, text: str, previous: str | None, tokens: int) -> Timed:
        """Return the response to a text, streamed.

        Args:
            text: The new message.
            previous: Id of the response before it; None to start a session.
            tokens: Maximum tokens of the reply.
        """
        body = {"input": text, "previous_response_id": previous, "max_output_tokens": tokens, "stream": True}
        started, first_s, id_ = time.perf_counter(), 0.0, ""
        for line in self._post("responses", body):
            if line.startswith(b"data: ") and (event := json.loads(line[6:])):
                if event["type"] == "response.output_text.delta" and not first_s:
                    first_s = time.perf_counter() - started
                id_ = event.get("response", {}).get("id", id_)
        return Timed(id_, first_s or time.perf_counter() - started)

    def complete(self, messages: Sequence[dict[str, str]], tokens: int) -> tuple[str, int]:
        """Return the reply to the newest of all messages, and the number of tokens that were prefilled for it."""
        [line] = self._post("chat/completions", {"messages": list(messages), "max_tokens": tokens})
        found = json.loads(line)
        usage = found["usage"]
        prefilled = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        return str(found["choices"][0]["message"]["content"]), int(prefilled)

    def _post(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        """Yield the lines of an answer as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request("POST", f"/v1/{path}", json.dumps({"model": self._model} | body))
            answer = connection.getresponse()
            if answer.status != 200:
                raise StreamchatError(f"the server answered {answer.status}: {answer.read(200)!r}")
            while line := answer.readline():
                yield line
        finally:
            connection.close()
