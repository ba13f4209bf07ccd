"""Samples cache, speed and memory for status displays, on the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.engine.hosting import ConversationHost
from streamchat.engine.jobs import JobQueue
from streamchat.sessions.archive import Archive
from streamchat.telemetry.memory import memory_state

STATUS_INTERVAL_S = 0.5


class StatusSampler:
    """Publishes the live figures of the active conversation.

    Args:
        host: Has model and conversation.
        jobs: Knows whether a turn is running.
        archive: Publishes the figures for other processes.
        publish: Sends an event to the front ends.
    """

    def __init__(
        self, host: ConversationHost, jobs: JobQueue, archive: Archive, publish: Callable[[ev.Event], None]
    ) -> None:
        self._host, self._jobs, self._archive, self._publish = host, jobs, archive, publish
        self._last = 0.0

    def sample_if_due(self) -> None:
        """Publish the figures if the last ones are old."""
        if time.perf_counter() - self._last >= STATUS_INTERVAL_S:
            self.sample()

    def sample(self) -> None:
        """Publish the figures now; nothing before the first conversation."""
        if self._host.started is None:
            return
        conversation, info = self._host.started.conversation, self._host.started.info
        self._last, step = time.perf_counter(), conversation.recorded_step
        sample = ev.StatusSampled(
            cache=conversation.state(),
            memory=memory_state(info.device),
            ttft_s=conversation.speed.ttft_s,
            decode_tps=conversation.speed.decode_tps,
            busy=self._jobs.running,
            proposed_tokens=conversation.speculator.proposed,
            accepted_tokens=conversation.speculator.accepted,
            decode_step=step.name if step is not None else "",
            decode_reason=step.reason if step is not None else "",
        )
        self._archive.record_status(sample, info)
        self._publish(sample)
