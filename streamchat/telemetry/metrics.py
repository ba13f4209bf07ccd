"""`--metrics-port`: the figures of a run for Prometheus, with units in the names as its conventions ask for."""

from __future__ import annotations

from streamchat.base.errors import ConfigError


class Metrics:
    """Serves http://HOST:PORT/metrics until `close`.

    Args:
        host: Loopback unless told otherwise: the figures are not for everybody.
        port: 0 takes a free one; see `port`.

    Raises:
        ConfigError: The port cannot be had.
    """

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"streamchat_{name}", text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"streamchat_{name}", text, registry=registry)

        self.cache_tokens = gauge("cache_tokens", "Tokens that every layer of the cache holds now.")
        self.cache_budget_tokens = gauge("cache_budget_tokens", "Tokens that the cache may hold at most.")
        self.kv_bytes = gauge("kv_bytes", "Bytes of the key and value buffers.")
        self.resident_bytes = gauge("resident_memory_bytes", "Resident memory of the process.")
        self.device_bytes = gauge("device_memory_allocated_bytes", "Device memory in live tensors; absent on a CPU.")
        self.device_reserved = gauge("device_memory_reserved_bytes", "Device memory held by torch's allocator.")
        self.busy = gauge("busy", "1 while a turn runs.")
        self.decode = gauge("decode_tokens_per_second", "Decode speed of the running or latest reply.")
        self.turns = counter("turns", "Turns that came to their end.")
        self.failed = counter("failed_turns", "Turns that failed and were taken back.")
        self.read = counter("prompt_tokens", "Tokens read in prompts.")
        self.written = counter("generated_tokens", "Tokens written in replies.")
        self.compressions = counter("compressions", "Evictions; one counts once for all layers.")
        self.evicted = counter("evicted_tokens", "Tokens that left the cache.")
        self.violations = Counter(
            "streamchat_violations", "Invariants that did not hold, by name.", ["invariant"], registry=registry
        )
        self.first_token = Histogram(
            "streamchat_first_token_seconds",
            "Time from a message to the first token of its reply.",
            registry=registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"--metrics-port {port}: http://{host}:{port} cannot be served ({reason}); take another port"
            ) from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def set_device_memory(self, allocated: int | None, reserved: int | None) -> None:
        """Of a GPU; nothing is set on a CPU."""
        if allocated is not None:
            self.device_bytes.set(allocated)
        if reserved is not None:
            self.device_reserved.set(reserved)
