"""What Prometheus is told: the engine's own counts, and how requests went."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kivi_jax.generation.engine import Engine

_GAUGES = {
    "slots": "Rows that can be decoded together.",
    "running": "Rows that are decoded now.",
    "reading": "Rows whose prompt is read now.",
    "queued": "Rows that wait for a slot.",
    "cache_bytes": "What the caches of all slots weigh.",
    "full_cache_bytes": "What they would weigh as full caches.",
    "reading_bytes": "What prompts are read into.",
    "prefix_bytes": "What shared beginnings of prompts weigh.",
    "prefix_entries": "Shared beginnings of prompts that are held.",
    "tokens_per_s": "New tokens a second, lately.",
}
_COUNTERS = {
    "requests": "Rows that were accepted.",
    "refused": "Rows that were refused, as there was no room.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were held already.",
    "new_tokens": "Tokens that were generated.",
    "prefix_hits": "Rows whose prompt began with what was held.",
}
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """The metrics of one server."""

    def __init__(self, engine: Engine):
        """Of an engine, which is asked whenever somebody looks."""
        self.engine, self.registry = engine, CollectorRegistry()
        self.registry.register(self)
        own: dict[str, Any] = {"registry": self.registry}
        self.refusals = Counter("kivi_refusals", "Requests that were refused.", ["status"], **own)
        self.seconds = Histogram("kivi_request_seconds", "Until an answer ends.", buckets=_SECONDS, **own)
        self.first = Histogram("kivi_first_token_seconds", "Until its first token.", buckets=_SECONDS, **own)

    def collect(self) -> Iterator[Metric]:
        """The engine's counts at this moment."""
        stats = self.engine.stats()
        for name, meaning in _GAUGES.items():
            yield GaugeMetricFamily(f"kivi_{name}", meaning, value=getattr(stats, name))
        for name, meaning in _COUNTERS.items():
            yield CounterMetricFamily(f"kivi_{name}", meaning, value=getattr(stats, name))
        finished = CounterMetricFamily("kivi_finished", "Rows that ended, and why.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
