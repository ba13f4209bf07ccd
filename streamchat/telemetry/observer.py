"""Events to metrics. A subscriber like every other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from streamchat.base import events as ev
from streamchat.config.settings import Settings
from streamchat.telemetry.metrics import Metrics


class Emitter(Protocol):
    """What emits events: an engine."""

    def subscribe(self, listener: Callable[[ev.Event], None]) -> Callable[[], None]: ...


def observe(engine: Emitter, settings: Settings) -> Metrics | None:
    """Serve the figures of `engine` where a port is set; to be closed by the caller.

    Raises:
        ConfigError: The port cannot be had.
    """
    if not settings.metrics_port:
        return None
    metrics = Metrics(settings.metrics_host, settings.metrics_port)
    engine.subscribe(Observed(metrics))
    return metrics


class Observed:
    """Call it with every event."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, event: ev.Event) -> None:
        """Set what `event` says."""
        metrics = self._metrics
        match event:
            case ev.StatusSampled(cache=cache, memory=memory):
                metrics.cache_tokens.set(cache.length)
                metrics.cache_budget_tokens.set(cache.cache_size)
                metrics.kv_bytes.set(cache.kv_bytes)
                metrics.resident_bytes.set(memory.rss_bytes)
                metrics.set_device_memory(memory.allocated_bytes, memory.reserved_bytes)
                metrics.busy.set(event.busy)
                if event.decode_tps is not None:
                    metrics.decode.set(event.decode_tps)
            case ev.TokensEvicted(count=count):
                metrics.compressions.inc()
                metrics.evicted.inc(count)
            case ev.TurnFinished(finish_reason="error"):
                metrics.failed.inc()
            case ev.TurnFinished(rolled_back=False, stats=stats):
                metrics.turns.inc()
                metrics.read.inc(stats.prompt_tokens)
                metrics.written.inc(stats.new_tokens)
                if stats.ttft_s is not None:
                    metrics.first_token.observe(stats.ttft_s)
            case _:
                pass
