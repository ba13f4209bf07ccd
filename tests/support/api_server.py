"""The API on a tiny model, in this process and on a real port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.models.load import LoadedModel
from streamchat.server.options import Options
from streamchat.server.run import ApiServer
from streamchat.store.store import Store
from tests.support.real_engine import tiny_loaded

Message = dict[str, str]
Result = TypeVar("Result")
SMALL: dict[str, Any] = {"max_new_tokens": 12, "seed": 1, "cache_size": 128, "temperature": 0.0}


class Running:
    """A server and a client of it."""

    def __init__(self, server: ApiServer, told: list[str]) -> None:
        self.server = server
        self.told = told
        """Sentences for whoever runs the server."""
        self.base = f"http://127.0.0.1:{server.port}"
        self.http = httpx.Client(base_url=self.base, timeout=60, trust_env=False)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """The answer to a body that names the model."""
        return self.http.post(f"/v1/{path}", json={"model": "tiny"} | body, headers=headers)

    def complete(self, messages: Sequence[Message], **fields: Any) -> dict[str, Any]:
        """A chat completion; it must succeed."""
        answer = self.post("chat/completions", {"messages": list(messages)} | fields)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def respond(self, text: str, previous: str | None = None, **fields: Any) -> dict[str, Any]:
        """A response; it must succeed."""
        answer = self.post("responses", {"input": text, "previous_response_id": previous} | fields)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def on_model_thread(self, function: Callable[[], Result]) -> Result:
        """What `function` returns, called on the thread that owns the model."""
        return self.server.model.scheduler.call(function, 60)


def text_of(completion: dict[str, Any]) -> str:
    """The reply of a chat completion."""
    return str(completion["choices"][0]["message"]["content"])


def prefilled(completion: dict[str, Any]) -> int:
    """The number of tokens of its prompt that were not cached."""
    usage = completion["usage"]
    return int(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])


def session_of(id_: str) -> str:
    """The session that is named in the id of a reply."""
    return id_.partition("_")[2].partition("_")[0] if id_.startswith("resp_") else id_.split("-", 1)[1].split("_")[0]


@contextmanager
def serving(
    folder: Path | None,
    load: Callable[..., LoadedModel] | None = None,
    options: Options | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server that saves into `folder`, with these settings; stopped at the end."""
    chosen = Settings(**(SMALL | settings))
    told: list[str] = []
    server = ApiServer(
        Configuration(chosen, dict.fromkeys(settings, "flag")),
        options or Options(port=0),
        open_store=None if folder is None else lambda: Store(folder / "sessions.db"),
        load=load or (lambda *_: tiny_loaded()),
        tell=told.append,
    )
    server.load()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(server.serve()))
    thread.start()
    running = Running(server, told)
    try:
        yield running
    finally:
        running.http.close()
        server.stop()
        thread.join(60)
        assert results == [True]
