"""A replica: one loaded model, and the sessions that it owns."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from streamchat.base import paths
from streamchat.base.errors import StoreError
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.server.app import Parts, make_routes
from streamchat.server.cluster.local_folder import LocalFolder
from streamchat.server.cluster.plan import ClusterPlan
from streamchat.server.limits import Admission
from streamchat.server.metrics import ServerMetrics
from streamchat.server.model_thread import ModelThread
from streamchat.server.requests import Served
from streamchat.store.shared.folder import SharedFolder
from streamchat.store.shared.store import ReplicaState, SharedStore

Message = dict[str, Any]
"""A message of ASGI."""


class Replica:
    """Answers requests. `answer` and `names` run on the event loop of the replica.

    Args:
        plan: What all replicas have in common.
        name: Name of this replica.
        load: Loads the model; replaceable for tests.

    Raises:
        StreamchatError: The model cannot be loaded, or the shared folder cannot be used.
    """

    def __init__(self, plan: ClusterPlan, name: str, load: Load = load_from_settings) -> None:
        folder = SharedFolder(plan.shared, name)
        if folder.identity() != plan.shared_id:
            raise StoreError(
                f"the machine {socket.gethostname()} has a different folder at {plan.shared}; mount the shared one"
            )
        self._local = LocalFolder(paths.cache_dir() / "replicas", name)
        state = ReplicaState(folder)
        admission = Admission(plan.options.limits.requests)
        metrics = ServerMetrics(admission)
        self.model = ModelThread(
            plan.configuration,
            plan.options.live,
            load,
            open_store=lambda: SharedStore(self._local.path / "sessions.db", state),
            observe=metrics.update,
            observe_switch=metrics.switch.observe,
            is_shared=True,
        )
        try:
            self.model.start()
        except BaseException:
            self.close()
            raise
        info, settings, limits = self.model.info, plan.configuration.settings, plan.options.limits
        assert info is not None
        self.names = tuple(dict.fromkeys((info.name, settings.model)))
        """The names by which requests may name the model."""
        served = Served(self.names, settings, limits.messages)
        parts = Parts(self.model, served, limits, metrics.text, int(time.time()))
        self._app = make_routes(parts, admission)

    async def answer(self, scope: Message, body: bytes) -> AsyncIterator[list[Message]]:
        """Yield the messages that answer a request, several at a time if they are ready.

        Args:
            scope: Its scope in ASGI.
            body: Its whole body.
        """
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        has_body, gone = iter([{"type": "http.request", "body": body, "more_body": False}]), asyncio.Event()

        async def receive() -> Message:
            if (message := next(has_body, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)  # type: ignore[arg-type] # a message is any mapping
            finally:
                sent.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while True:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                found = [message for message in messages if message is not None]
                if found:
                    yield found
                if messages[-1] is None:
                    await task
                    return
        finally:
            gone.set()
            task.cancel()

    def check_health(self) -> None:
        """Check that the model's thread runs.

        Raises:
            Exception: Why it ended.
        """
        if self.model.failure is not None:
            raise self.model.failure

    def close(self) -> None:
        """Stop the replies, save the sessions, and delete the local files."""
        self.model.close()
        self._local.close()
