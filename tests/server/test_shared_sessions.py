"""Replicas of a server on one shared folder, without Ray: takeover, fencing, and finding sessions."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.server.cluster.gateway import Gateway, ReplicaLostError
from streamchat.server.cluster.plan import ClusterPlan, Replicas
from streamchat.server.cluster.replica import Replica
from streamchat.server.cluster.routing import replica_for
from streamchat.server.options import Options
from streamchat.store.shared.folder import SharedFolder
from streamchat.store.shared.log import line_of
from tests.support.api_server import SMALL, serving, session_of
from tests.support.real_engine import tiny_loaded


class Cluster:
    """Replicas in this process behind a gateway, which sends requests as the router of Ray Serve does."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        configuration = Configuration(Settings(**(SMALL | settings)), {})
        self.plan = ClusterPlan(configuration, Options(), "", folder, SharedFolder(folder).identity(), Replicas())
        self.replicas: dict[str, Replica] = {}
        self.route = ""
        """The route of the latest request."""
        self.only = ""
        """A replica that gets all requests, whatever their route."""
        self.app = Gateway(self.plan, self._answer, self._names).app()

    def start(self, name: str) -> Replica:
        """Start a replica."""
        replica = self.replicas[name] = Replica(self.plan, name, lambda *_: tiny_loaded())
        return replica

    def lose(self, name: str) -> Replica:
        """Send no more requests to a replica, which does not know it: as if it was cut off."""
        return self.replicas.pop(name)

    def respond(self, text: str, previous: str | None = None, **fields: Any) -> dict[str, Any]:
        """A response; it must succeed."""
        found = self.post("responses", {"input": text, "previous_response_id": previous} | fields)
        assert found.status_code == 200, found.text
        return dict(found.json())

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The answer to a body that names the model."""

        async def send() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1", timeout=60
            ) as client:
                return await client.post(f"/v1/{path}", json={"model": "tiny"} | body)

        return asyncio.run(send())

    async def _answer(self, scope: dict[str, Any], body: bytes, route: str) -> AsyncIterator[list[dict[str, Any]]]:
        self.route = route
        name = self.only or replica_for(route, self.replicas) or next(iter(self.replicas))
        async for messages in self.replicas[name].answer(scope, body):
            yield messages

    async def _names(self) -> tuple[str, ...]:
        return next(iter(self.replicas.values())).names


@contextmanager
def cluster(folder: Path, *names: str, **settings: Any) -> Iterator[Cluster]:
    """A cluster with these replicas."""
    running = Cluster(folder / "shared", **settings)
    with ExitStack() as stack:
        for name in names:
            stack.callback(running.start(name).close)
        yield running


def output_of(response: dict[str, Any]) -> str:
    """The text of a response."""
    return str(response["output"][-1]["content"][0]["text"])


def chat(send: Any, texts: list[str], previous: str | None = None) -> tuple[list[str], str]:
    """The replies to `texts`, and the id of the last one."""
    replies = []
    for text in texts:
        response = send(text, previous)
        replies.append(output_of(response))
        previous = response["id"]
    assert previous is not None
    return replies, previous


TEXTS = [f"tell me about the number {i}, please, and why it is odd" for i in range(14)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The replies of a server that is not disturbed."""
    with serving(tmp_path_factory.mktemp("one")) as server:
        return chat(server.respond, TEXTS)[0]


@pytest.mark.slow
def test_a_session_goes_on_at_another_replica_with_the_same_ids(tmp_path: Path, undisturbed: list[str]) -> None:
    """Also after evictions, if the cache is saved with each turn."""
    with cluster(tmp_path, "a", "b", snapshot_turns=1) as running:
        replies, previous = chat(running.respond, TEXTS[:9])
        owner = running.route.split()[0]
        running.lose(owner)
        more, previous = chat(running.respond, TEXTS[9:], previous)
        assert running.route.split()[0] != owner
        assert replies + more == undisturbed


@pytest.mark.slow
def test_a_replica_that_lost_a_session_confirms_nothing_more(tmp_path: Path, undisturbed: list[str]) -> None:
    """It writes to a log that nobody reads, and answers with an error."""
    with cluster(tmp_path, "a", "b", snapshot_turns=1) as running:
        running.only = "a"
        replies, previous = chat(running.respond, TEXTS[:2])
        session = session_of(previous)
        stolen = SharedFolder(running.plan.shared, "c")
        live = running.replicas["a"].model.live
        assert live is not None
        seat = next(each for each in live.seats if each.session is not None)
        run, found = seat._turns.run, list[Any]()

        def run_and_lose(*given: Any, **options: Any) -> None:
            found.append(stolen.take_over(session))
            stored = found[0][0]
            stolen.append(session, line_of(stored.info, stored.system_ids, 1, stored.turns, stored.evictions))
            run(*given, **options)

        seat._turns.run = run_and_lose  # type: ignore[method-assign]
        refused = running.post("responses", {"input": TEXTS[2], "previous_response_id": previous})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_saved"
        seat._turns.run = run  # type: ignore[method-assign]
        assert [turn.text for turn in found[0][0].turns] == TEXTS[:2]
        running.only = "b"
        more, _ = chat(running.respond, TEXTS[2:4], previous)
        assert replies + more == undisturbed[:4]


@pytest.mark.slow
def test_a_client_that_sends_its_history_finds_its_session_at_any_replica(tmp_path: Path) -> None:
    with cluster(tmp_path, "a", "b") as running:
        messages = [{"role": "user", "content": "hello"}]
        ids = []
        for i in range(4):
            running.only = "" if i else "a"
            body = running.post("chat/completions", {"messages": messages, "user": "me"}).json()
            ids.append(body["id"])
            messages += [body["choices"][0]["message"], {"role": "user", "content": f"and {i}?"}]
            if i == 1:
                assert running.route.startswith("a ")
                running.lose("a")
        assert len({session_of(each) for each in ids}) == 1
        running.post("chat/completions", {"messages": messages, "user": "you"})
        assert running.route == ""


def test_a_lost_replica_ends_a_stream_with_an_error_and_nothing_else_fails(tmp_path: Path) -> None:
    """A request that has no answer yet is sent again."""
    with cluster(tmp_path, "a") as running:
        answer, lost = running._answer, [0]

        async def lose_first(scope: Any, body: bytes, route: str) -> AsyncIterator[list[dict[str, Any]]]:
            lost[0] += 1
            if lost[0] == 1:
                raise ReplicaLostError
            async for messages in answer(scope, body, route):
                yield messages
                if lost[0] == 3:
                    raise ReplicaLostError

        running.app = Gateway(running.plan, lose_first, running._names).app()
        assert output_of(running.respond("hello"))
        stream = running.post("responses", {"input": "hello", "stream": True}).text
        last = json.loads(stream.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["code"] == "replica_lost"


def folder_of(running: Cluster, id_: str) -> Path:
    """The folder of the session of a reply."""
    session = session_of(id_)
    return running.plan.shared / "sessions" / session[-2:] / session


@pytest.mark.parametrize("only", ["a", "b"])
def test_a_deleted_session(tmp_path: Path, only: str) -> None:
    """Each replica says that it is not found; a client that sends its history gets a new one. It was 'in use'."""
    with cluster(tmp_path, "a", "b") as running:
        running.only = "a"
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
        found = running.post("chat/completions", body).json()
        previous = running.respond("another")["id"]
        for id_ in (found["id"], previous):
            shutil.rmtree(folder_of(running, id_))
        running.only = only
        refused = running.post("responses", {"input": "more", "previous_response_id": previous})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "previous_response_not_found")
        body["messages"] += [found["choices"][0]["message"], {"role": "user", "content": "and?"}]
        answer = running.post("chat/completions", body)
        assert answer.status_code == 200
        assert session_of(answer.json()["id"]) != session_of(found["id"])


def test_a_shared_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A new session was answered as if it was saved; the gateway had an unexpected error."""
    with cluster(tmp_path, "a") as running:
        previous = running.respond("hello")["id"]
        sessions = running.plan.shared / "sessions"
        sessions.rename(sessions.with_name("away"))
        sessions.touch()
        new = running.post("responses", {"input": "hello again"})
        assert (new.status_code, new.json()["error"]["code"]) == (503, "not_saved")
        later = running.post("responses", {"input": "more", "previous_response_id": previous})
        assert (later.status_code, later.json()["error"]["code"]) == (503, "store_failed")
        assert "cannot be read (Not a directory)" in later.json()["error"]["message"]
        sessions.unlink()
        sessions.with_name("away").rename(sessions)
        assert output_of(running.respond("more", previous))


def test_a_damaged_session_is_not_continued_in_part(tmp_path: Path) -> None:
    """Its last turns were confirmed. A client that sends its history continues in a new session."""
    with cluster(tmp_path, "a", "b") as running:
        running.only = "a"
        messages: list[dict[str, str]] = []
        for text in ("hello", "and?", "why?"):
            messages.append({"role": "user", "content": text})
            found = running.post("chat/completions", {"messages": messages}).json()
            messages.append(found["choices"][0]["message"])
        [log] = folder_of(running, found["id"]).glob("log-*")
        data = log.read_bytes()
        log.write_bytes(b"x" + data)
        running.lose("a").close()
        running.only = "b"
        refused = running.post("responses", {"input": "more", "previous_response_id": f"resp_{found['id'][9:]}"})
        assert refused.status_code == 503
        assert "is damaged at line 1 of 3" in refused.json()["error"]["message"]
        answer = running.post("chat/completions", {"messages": [*messages, {"role": "user", "content": "more"}]})
        assert answer.status_code == 200
        assert log.read_bytes() == b"x" + data
