"""Updates the metrics from events, as an ordinary subscriber."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from streamchat.base import events as ev
from streamchat.config.settings import Settings
from streamchat.telemetry.metrics import Metrics


class Emitter(Protocol):
    """An emitter of events, such as an engine."""

    def subscribe(self, listener: Callable[[ev.Event], None]) -> Callable[[], None]: ...


def observe(engine: Emitter, settings: Settings) -> Metrics | None:
    """Serve metrics of `engine` if a port is set. The caller closes them.

    Raises:
        ConfigError: The port cannot be opened.
    """
    if not settings.metrics_port:
        return None
    metrics = Metrics(settings.metrics_host, settings.metrics_port)
    engine.subscribe(MetricsObserver(metrics))
    return metrics


class MetricsObserver:
    """An event listener that sets the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, event: ev.Event) -> None:
        """Update the metrics from `event`."""
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
                metrics.prefilled.inc(stats.prompt_tokens)
                metrics.generated.inc(stats.new_tokens)
                if stats.ttft_s is not None:
                    metrics.first_token.observe(stats.ttft_s)
            case _:
                pass
