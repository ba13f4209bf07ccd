"""Clients of the API on this machine that measure: one of the standard library, and OpenAI's own package."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from streamchat.base.errors import ConfigError, StreamchatError

CLIENTS = ("openai", "http")
"""Names of clients: that of OpenAI's package, and that of the standard library."""


@dataclass(frozen=True)
class Timed:
    """A response."""

    id: str
    first_s: float
    """Time from the request to the first text."""


class Client(Protocol):
    """Leads conversations of which it sends the new messages only."""

    name: str

    def respond(self, text: str, previous: str | None, tokens: int) -> Timed:
        """Return the response to a text, streamed; see `ApiClient.respond`."""
        ...

    def close(self) -> None:
        """Close its connections."""
        ...


def client_named(name: str, port: int, model: str) -> Client:
    """Return a client of the server at this port.

    Args:
        name: One of `CLIENTS`; '' for the first one that is installed.
        port: Port of the server on this machine.
        model: Name of the model.

    Raises:
        ConfigError: Its package is missing.
    """
    is_installed = find_spec("openai") is not None
    if name == "http" or (not name and not is_installed):
        return ApiClient(port, model)
    if not is_installed:
        raise ConfigError("--serve-client openai needs the package openai; run: pip install openai")
    return OpenAiClient(port, model)


class OpenAiClient:
    """The client of the package `openai`, as its users have it.

    Args:
        port: Port of the server on this machine.
        model: Name of the model.
    """

    def __init__(self, port: int, model: str) -> None:
        import openai

        self.name = f"openai {openai.__version__}"
        self._model = model
        self._client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def respond(self, text: str, previous: str | None, tokens: int) -> Timed:
        """Return the response to a text, streamed; see `ApiClient.respond`."""
        more: dict[str, Any] = {"previous_response_id": previous} if previous else {}
        started, first_s, id_ = time.perf_counter(), 0.0, ""
        for event in self._client.responses.create(
            model=self._model, input=text, max_output_tokens=tokens, stream=True, **more
        ):
            if event.type == "response.output_text.delta" and not first_s:
                first_s = time.perf_counter() - started
            elif event.type in ("response.completed", "response.incomplete"):
                id_ = event.response.id
        if not id_:
            raise StreamchatError("the stream of a response ended before its last event")
        return Timed(id_, first_s or time.perf_counter() - started)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


class ApiClient:
    """Sends requests, each on a connection of its own.

    Args:
        port: Port of the server on this machine.
        model: Name of the model.
    """

    name = "Python's http.client"

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model

    def respond(self, text: str, previous: str | None, tokens: int, *, store: bool = True) -> Timed:
        """Return the response to a text, streamed.

        Args:
            text: The new message.
            previous: Id of the response before it; None to start a session.
            tokens: Maximum tokens of the reply.
            store: Whether the session is kept.
        """
        body = {
            "input": text,
            "previous_response_id": previous,
            "max_output_tokens": tokens,
            "stream": True,
            "store": store,
        }
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

    def close(self) -> None:
        """Nothing is open."""

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
