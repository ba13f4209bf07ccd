"""The Hub, played by a server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

COMMIT = "a" * 40


class FakeHub:
    """Serves folders as repositories, in the words of the Hub's API."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.members: set[str] = set()
        """Tokens of people who accepted the terms of the gated repositories."""
        self.tokens: list[str] = []
        """Values of the Authorization header of all requests that had one."""
        self.rejected: set[str] = set()
        """Tokens that are not valid."""
        self.status: int | None = None
        self.fetched: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = urlsplit(self.path).path
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if token:
                    fake.tokens.append(token)
                if token in fake.rejected:
                    self.reply(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
                elif path == "/":
                    self.reply(200, b"")
                elif fake.status:
                    self.reply(fake.status, b"{}")
                elif path.startswith("/api/models/"):
                    self.model_info(path.removeprefix("/api/models/").partition("/revision/")[0])
                else:
                    repo_id, _, name = path[1:].partition(f"/resolve/{'main' if '/main/' in path else COMMIT}/")
                    self.file(repo_id, name, token)

            def model_info(self, repo_id: str) -> None:
                if repo_id not in fake.repositories:
                    self.reply(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
                    return
                files = [
                    {"rfilename": str(path.relative_to(fake.repositories[repo_id])), "size": path.stat().st_size}
                    for path in sorted(fake.repositories[repo_id].rglob("*"))
                    if path.is_file()
                ]
                info = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": files}
                self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

            def file(self, repo_id: str, name: str, token: str) -> None:
                if repo_id in fake.gated and token not in fake.members:
                    self.reply(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
                    return
                path = fake.repositories.get(repo_id, Path("/nowhere")) / name
                if not path.is_file():
                    self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                    return
                if self.command == "GET":
                    fake.fetched.append(name)
                self.reply(200, path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-1"'})

            def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Yield a Hub that `HF_ENDPOINT` points to; for a fixture."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()
