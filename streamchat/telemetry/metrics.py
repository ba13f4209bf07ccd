"""`--metrics-port`: Prometheus metrics of a run, with units in the names as Prometheus recommends."""

from __future__ import annotations

from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.host_names import resolve
from streamchat.config.settings import Settings


class MetricSet:
    """Metrics of a run, updated from its events."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"streamchat_{name}", text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"streamchat_{name}", text, registry=registry)

        self.cache_tokens = gauge("cache_tokens", "Cached tokens per layer.")
        self.cache_budget_tokens = gauge("cache_budget_tokens", "Cache budget in tokens.")
        self.kv_bytes = gauge("kv_bytes", "Bytes of the key and value buffers.")
        self.resident_bytes = gauge("resident_memory_bytes", "Resident memory of the process.")
        self.device_bytes = gauge("device_memory_allocated_bytes", "Device memory in live tensors; absent on a CPU.")
        self.device_reserved = gauge("device_memory_reserved_bytes", "Device memory reserved by torch's allocator.")
        self.busy = gauge("busy", "1 while a turn runs.")
        self.decode = gauge("decode_tokens_per_second", "Decode speed of the current or last reply.")
        self.turns = counter("turns", "Completed turns.")
        self.failed = counter("failed_turns", "Turns that failed and were rolled back.")
        self.prefilled = counter("prompt_tokens", "Prefilled prompt tokens.")
        self.generated = counter("generated_tokens", "Generated reply tokens.")
        self.compressions = counter("compressions", "Evictions; one eviction counts once for all layers.")
        self.evicted = counter("evicted_tokens", "Evicted tokens.")
        self.violations = Counter(
            "streamchat_violations", "Violations of invariants, by name.", ["invariant"], registry=registry
        )
        self.first_token = Histogram(
            "streamchat_first_token_seconds",
            "Time from a message to the first token of its reply.",
            registry=registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )

    def update(self, event: ev.Event) -> None:
        """Update the metrics from `event`. Device memory stays unset on a CPU."""
        match event:
            case ev.StatusSampled(cache=cache, memory=memory):
                self.cache_tokens.set(cache.length)
                self.cache_budget_tokens.set(cache.cache_size)
                self.kv_bytes.set(cache.kv_bytes)
                self.resident_bytes.set(memory.rss_bytes)
                if memory.allocated_bytes is not None:
                    self.device_bytes.set(memory.allocated_bytes)
                if memory.reserved_bytes is not None:
                    self.device_reserved.set(memory.reserved_bytes)
                self.busy.set(event.busy)
                if event.decode_tps is not None:
                    self.decode.set(event.decode_tps)
            case ev.TokensEvicted(count=count):
                self.compressions.inc()
                self.evicted.inc(count)
            case ev.TurnFinished(finish_reason="error"):
                self.failed.inc()
            case ev.TurnFinished(rolled_back=False, stats=stats):
                self.turns.inc()
                self.prefilled.inc(stats.prompt_tokens)
                self.generated.inc(stats.new_tokens)
                if stats.ttft_s is not None:
                    self.first_token.observe(stats.ttft_s)
            case _:
                pass


class Metrics(MetricSet):
    """Serves http://HOST:PORT/metrics until `close`.

    Args:
        host: Address to bind; the default setting is loopback, since the figures are private.
        port: 0 picks a free one; see `port`.

    Raises:
        ConfigError: The port cannot be opened.
    """

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        super().__init__()
        try:
            resolve(host, port)
            self._server, self._thread = start_http_server(port, addr=host, registry=self.registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--metrics-port {port}: http://{host}:{port} cannot be opened ({reason_of(error)}); "
                "choose another port"
            ) from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def observe(subscribe: Callable[[Callable[[ev.Event], None]], object], settings: Settings) -> Metrics | None:
    """Serve metrics if a port is set, updated from the events that `subscribe` delivers. The caller closes them.

    Raises:
        ConfigError: The port cannot be opened.
    """
    if not settings.metrics_port:
        return None
    metrics = Metrics(settings.metrics_host, settings.metrics_port)
    subscribe(metrics.update)
    return metrics
