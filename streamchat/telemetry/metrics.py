"""`--metrics-port`: Prometheus metrics of a run, with units in the names as Prometheus recommends."""

from __future__ import annotations

from streamchat.base.errors import ConfigError, reason_of


class Metrics:
    """Serves http://HOST:PORT/metrics until `close`.

    Args:
        host: Address to bind; the default setting is loopback, since the figures are private.
        port: 0 picks a free one; see `port`.

    Raises:
        ConfigError: The port cannot be opened.
    """

    def __init__(self, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

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
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
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

    def set_device_memory(self, allocated: int | None, reserved: int | None) -> None:
        """Set the device memory metrics; None (on a CPU) leaves them unset."""
        if allocated is not None:
            self.device_bytes.set(allocated)
        if reserved is not None:
            self.device_reserved.set(reserved)
