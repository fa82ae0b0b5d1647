"""The metrics for Prometheus at ``/metrics``: the times of requests, and the state of the replicas.

Tests: ``tests/serving/test_api.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .table import Table

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
#: the requests that are measured
PATHS = ("/v1/completions", "/v1/chat/completions")
#: the metrics of each replica, by the names in its state
GAUGES = {"rows_in_use": "Rows with a request", "waiting": "Requests in the queue"}
COUNTERS = {"requests": "Answers begun", "prompt_tokens": "Tokens of prompts", "tokens": "Tokens of answers"}
COUNTERS |= {"swaps": "Adapters written into a row"}


class Metrics:
    """The metrics of one application. It has a registry of its own, so two applications in a process don't mix."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        self.state: list[Metric] = []
        own: dict[str, Any] = dict(namespace="hotswap_lab", registry=self.registry, unit="seconds", buckets=BUCKETS)
        self.whole: Histogram = Histogram("request", "From the request to the answer's end", ("path", "status"), **own)
        self.first: Histogram = Histogram("first_token", "From the request to the first token, of streams", **own)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the state. A registry calls this."""
        yield from self.state

    def text(self, states: Sequence[Mapping[str, Any]], table: Table) -> bytes:
        """Return all metrics in the format of Prometheus."""
        self.state = [CounterMetricFamily("hotswap_lab_changes", "Changes of adapters", table.number)]
        versions = GaugeMetricFamily("hotswap_lab_adapter_version", "The live version", labels=["adapter"])
        for name, version in table.versions.items():
            versions.add_metric([name], version.number)
        self.state.append(versions)
        for kind, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, meaning in names.items():
                family = kind(f"hotswap_lab_{name}", meaning, labels=["replica"])
                for state in states:
                    family.add_metric([state.get("replica", "")], state[name])
                self.state.append(family)
        return generate_latest(self.registry)
