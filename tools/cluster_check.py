"""`python -m tools.cluster_check`: chats with a server on a Ray cluster while its replicas are killed.

Deploys the tiny model of the tests, chats through OpenAI's client without a disturbance, then has the same chat again
and kills the replica that owns the session during some of the replies. Prints a JSON object; exits with 1 if a reply
differs or a confirmed turn is missing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.server.cluster.deploy import connected, deployed, require_ray
from streamchat.server.cluster.plan import APPLICATION, ClusterPlan, Replicas
from streamchat.server.options import Options
from streamchat.store.shared.folder import SharedFolder
from tests.support.api_server import SMALL, session_of
from tests.support.cluster import load_tiny
from tests.support.tiny_process import free_port

PATIENCE_S = 300.0


class Chat:
    """A chat through OpenAI's client.

    Args:
        port: Port of the server.
        folder: Its shared folder.
    """

    def __init__(self, port: int, folder: SharedFolder) -> None:
        from openai import OpenAI

        self._client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0)
        self._folder = folder
        self.replies: list[str] = []
        self.owners: list[str] = []
        self.previous: str | None = None
        self.repeated = 0

    def send(self, text: str, *, kill: bool = False) -> None:
        """Send a message until the reply is confirmed; kill the owner of the session during the first attempt."""
        from openai import APIError

        while True:
            try:
                reply = self._stream(text, kill)
            except APIError:  # also a stream that ends with an error
                self.repeated, kill = self.repeated + 1, False
                continue
            self.replies.append(reply.output_text)
            self.previous = reply.id
            self.owners.append(self._owner)
            return

    def _stream(self, text: str, kill: bool) -> Any:
        from openai import APIError

        options: dict[str, Any] = {} if self.previous is None else {"previous_response_id": self.previous}
        for event in self._client.responses.create(model="tiny", input=text, stream=True, **options):
            if kill and event.type == "response.output_text.delta":
                kill_replica(self._owner)
                kill = False
            if event.type in ("response.completed", "response.incomplete"):
                return event.response
        raise APIError("the stream ended early", request=None, body=None)  # type: ignore[arg-type]

    @property
    def _owner(self) -> str:
        assert self.previous is not None
        claim = self._folder.claim_of(session_of(self.previous))
        assert claim is not None
        return claim.owner

    def saved_replies(self) -> list[str]:
        """The replies in the shared folder."""
        assert self.previous is not None
        found = self._folder.read(session_of(self.previous))
        assert found is not None
        return [turn.reply for turn in found[0].turns]


def kill_replica(name: str) -> None:
    """End the process of a replica at once."""
    import ray

    ray.kill(ray.get_actor(f"SERVE_REPLICA::{APPLICATION}#model#{name}", namespace="serve"))


def check(address: str, replicas: int, turns: int, kills: int) -> dict[str, Any]:
    """Run both chats; return what was found."""
    require_ray()
    kill_at = {turns * (i + 1) // (kills + 1) for i in range(kills)}
    texts = [f"message {i}: tell me more about it, please" for i in range(turns)]
    with tempfile.TemporaryDirectory() as root, connected(address) as cluster:
        folder, port = SharedFolder(Path(root)), free_port()
        configuration = Configuration(Settings(**(SMALL | {"snapshot_turns": 1})), {})
        share = Replicas(replicas, replicas, cpus=0.25)
        plan = ClusterPlan(configuration, Options(port=port), "", Path(root), folder.identity(), share)
        with deployed(cluster, plan, load_tiny):
            undisturbed, disturbed = Chat(port, folder), Chat(port, folder)
            started = time.perf_counter()
            for text in texts:
                undisturbed.send(text)
            elapsed = time.perf_counter() - started
            for i, text in enumerate(texts):
                disturbed.send(text, kill=i in kill_at)
            return {
                "turns": turns,
                "replicas": replicas,
                "killed": len(kill_at),
                "owners": len(set(disturbed.owners)),
                "repeated_requests": disturbed.repeated,
                "same_replies": disturbed.replies == undisturbed.replies,
                "all_saved": disturbed.saved_replies() == disturbed.replies,
                "stays_at_its_replica": len(set(undisturbed.owners)) == 1,
                "ms_per_turn": round(1000 * elapsed / turns, 1),
            }


def main() -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.cluster_check", description=__doc__)
    parser.add_argument("--ray", default="local", metavar="ADDRESS", help="cluster (default: a new one)")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--kills", type=int, default=2)
    args = parser.parse_args()
    found = check(args.ray, args.replicas, args.turns, args.kills)
    print(json.dumps(found))
    return 0 if found["same_replies"] and found["all_saved"] and found["stays_at_its_replica"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
