"""The model's thread fails: requests are answered, and the server ends with the reason."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.server.options import Options
from streamchat.server.run import ApiServer
from streamchat.store.store import Store
from tests.support.api_server import SMALL
from tests.support.real_engine import tiny_loaded


def test_requests_are_answered_and_the_server_ends(tmp_path: Path) -> None:
    server = ApiServer(
        Configuration(Settings(**SMALL), {}),
        Options(port=0),
        open_store=lambda: Store(tmp_path / "sessions.db"),
        load=lambda *_: tiny_loaded(),
    )
    server.load()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve()
        except BaseException as error:
            failures.append(error)

    def fail(task: Any) -> None:
        raise MemoryError  # as a switch to a greenlet whose stack cannot be saved

    server.model.scheduler._run_slice = fail  # type: ignore[method-assign]
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    body = {"model": "tiny", "input": "hello"}
    answer = httpx.post(f"{server.url}/responses", json=body, timeout=30, trust_env=False)
    assert answer.status_code == 503
    assert "out of memory" in answer.text
    thread.join(30)
    assert not thread.is_alive()
    assert [type(each) for each in failures] == [MemoryError]
