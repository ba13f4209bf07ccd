"""The metrics of a server: those of a chat, summed over its live sessions, those of requests, and of the process.

Names and units follow the rules of Prometheus and, if there is one, OpenTelemetry's names for generative AI.
"""

from __future__ import annotations

from streamchat.base import events as ev
from streamchat.server.known import KnownSession
from streamchat.server.limits import Admission
from streamchat.telemetry.metrics import MetricSet

FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
SWITCH_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class ServerMetrics:
    """Counts what a server does. `update` is called on the model's thread, `text` on that of the event loop.

    Args:
        admission: Counts the requests.
    """

    def __init__(self, admission: Admission) -> None:
        from prometheus_client import Gauge, Histogram, ProcessCollector
        from prometheus_client.core import CounterMetricFamily

        self._admission, self._set = admission, MetricSet()
        registry = self._set.registry
        ProcessCollector(registry=registry)
        self._samples: dict[KnownSession, ev.StatusSampled] = {}
        """The latest figures of each live session."""
        self._requests = Gauge("streamchat_server_requests", "Requests that run or wait.", registry=registry)
        self._live = Gauge("streamchat_server_live_sessions", "Sessions whose cache is in memory.", registry=registry)
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from the start of a turn to the first token of its reply.",
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per token of a reply after its first one.",
            buckets=TOKEN_S,
            registry=registry,
        )

        self.switch = Histogram(
            "streamchat_server_switch_seconds",
            "Time to put a saved session into memory, in place of another one.",
            buckets=SWITCH_S,
            registry=registry,
        )

        class Refused:
            """The count of the admission, read when the metrics are."""

            def collect(self) -> list[CounterMetricFamily]:
                text = "Requests refused because too many ran or waited."
                return [CounterMetricFamily("streamchat_server_refused_requests", text, value=admission.refused)]

        registry.register(Refused())

    def update(self, session: KnownSession, event: ev.Event) -> None:
        """Update the metrics from an event of a session."""
        self._set.update(event)
        match event:
            case ev.StatusSampled():
                self._samples = {each: sample for each, sample in self._samples.items() if each.is_live}
                self._samples[session] = event
            case ev.TurnFinished(stats=stats, rolled_back=False) if stats.new_tokens:
                if stats.ttft_s is not None:
                    self._first_token.observe(stats.ttft_s)
                if stats.decode_tps:
                    self._token.observe(1 / stats.decode_tps)
            case _:
                pass

    def text(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' format, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        samples = [sample for session, sample in self._samples.items() if session.is_live]
        self._live.set(len(samples))
        self._requests.set(self._admission.running)
        self._set.cache_tokens.set(sum(sample.cache.length for sample in samples))
        self._set.cache_budget_tokens.set(sum(sample.cache.cache_size for sample in samples))
        self._set.kv_bytes.set(sum(sample.cache.kv_bytes for sample in samples))
        self._set.busy.set(any(session.is_busy for session in self._samples))
        return generate_latest(self._set.registry), CONTENT_TYPE_LATEST
