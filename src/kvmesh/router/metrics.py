"""The router's counters, and how Prometheus reads them. Owned by the event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvmesh.router.backends import Fleet
from kvmesh.router.upstream import UpstreamStatistics

_PREFIX = "kvmesh_router_"
GONE = "gone"
"""Label of all backends that are no more."""
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class RouterMetrics:
    """Everything that is counted."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.requests: Counter[tuple[str, str]] = Counter()
        """Answered requests by backend (empty: by the router itself) and status."""
        self.choices: Counter[str] = Counter()
        """By the policy's reason."""
        self.retries: Counter[str] = Counter()
        """Requests sent to another backend, by what went wrong at the first one."""
        self.errors: Counter[str] = Counter()
        """Answers of the router's own, by code."""
        self.overlap_tokens: Counter[str] = Counter()
        """Prompt tokens of the policy `kv`: held by the chosen backend or its peers, or to be computed."""
        self.client_disconnects = 0
        self.broken_streams = 0
        self.inflight = 0
        self.buffered_bytes = 0
        self.backends_added = 0
        self.backends_removed = 0
        self.relists = 0
        self.discovery_connected = True
        self.directory_connected: bool | None = None
        """None: no policy asks it."""
        self.registry = CollectorRegistry()
        self.first_byte_s = Histogram(
            _PREFIX + "first_byte_seconds",
            "From a request to the first byte of its answer's body.",
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.request_s = Histogram(
            _PREFIX + "request_seconds",
            "From a request to the end of its answer.",
            buckets=_BUCKETS_S,
            registry=self.registry,
        )

    def forget(self, label: str) -> None:
        """A backend is gone for good: pods come and go for ever, and each would leave its counters behind."""
        for key in [key for key in self.requests if key[0] == label]:
            self.requests[GONE, key[1]] += self.requests.pop(key)

    def watch(self, fleet: Fleet, upstream: Callable[[], UpstreamStatistics], clock: Callable[[], float]) -> None:
        """Also export what these know."""
        self.registry.register(_Collector(self, fleet, upstream, clock))

    def render(self) -> bytes:
        """The `/metrics` page."""
        return generate_latest(self.registry)


_Labels = TypeVar("_Labels", bound=tuple[str, ...])


class _Collector(Collector):
    def __init__(
        self,
        metrics: RouterMetrics,
        fleet: Fleet,
        upstream: Callable[[], UpstreamStatistics],
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._fleet = fleet
        self._upstream = upstream
        self._clock = clock

    def collect(self) -> Iterable[Metric]:
        now = self._metrics
        yield _counters(
            "requests", "Answered requests; backend is empty for the router's own.", ("backend", "status"), now.requests
        )
        choices = {(now.policy, reason): count for reason, count in now.choices.items()}
        yield _counters("choices", "Requests given to a backend, by reason.", ("policy", "reason"), choices)
        yield _counters(
            "retries", "Requests sent again elsewhere.", ("reason",), {(key,): n for key, n in now.retries.items()}
        )
        yield _counters(
            "errors", "Answers of the router's own.", ("code",), {(key,): n for key, n in now.errors.items()}
        )
        tokens = {(kind,): count for kind, count in now.overlap_tokens.items()}
        yield _counters("overlap_tokens", "Prompt tokens that were cached or not, as expected.", ("kind",), tokens)
        upstream = self._upstream()
        for name, text, count in (
            ("client_disconnects", "Requests whose client went away first.", now.client_disconnects),
            ("broken_streams", "Answers that a backend broke off after their first byte.", now.broken_streams),
            ("backends_added", "Backends that discovery has added.", now.backends_added),
            ("backends_removed", "Backends that discovery has removed.", now.backends_removed),
            ("relists", "Times that the pods were listed anew.", now.relists),
            ("connections_opened", "Connections opened to backends.", upstream.opened),
            ("connections_reused", "Requests sent on kept connections.", upstream.reused),
            ("connections_stale", "Kept connections found closed by a request.", upstream.stale),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value=count)
        for name, text, value in (
            ("inflight_requests", "Requests under way.", now.inflight),
            ("buffered_bytes", "Request bodies in memory.", now.buffered_bytes),
            ("connections_idle", "Kept connections.", upstream.idle),
            ("discovery_connected", "1 while the list of backends is up to date.", int(now.discovery_connected)),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
        if now.directory_connected is not None:
            text = "1 while the directory answers."
            yield GaugeMetricFamily(_PREFIX + "directory_connected", text, value=int(now.directory_connected))
        yield from self._backends()

    def _backends(self) -> Iterable[Metric]:
        now_s = self._clock()
        families = {
            name: GaugeMetricFamily(_PREFIX + name, text, labels=["backend"])
            for name, text in (
                ("backend_up", "1 while the backend answers its health checks."),
                ("backend_inflight_requests", "Requests under way at the backend."),
                ("backend_waiting_tokens", "Prefill given to the backend and not answered yet, about."),
                ("backend_recent_tokens", "Prefill given to the backend lately, fading."),
            )
        }
        for state in self._fleet:
            load, label = state.load, [state.backend.label]
            families["backend_up"].add_metric(label, int(state.healthy))
            families["backend_inflight_requests"].add_metric(label, load.inflight)
            families["backend_waiting_tokens"].add_metric(label, load.waiting_tokens)
            families["backend_recent_tokens"].add_metric(label, load.recent_tokens(now_s))
        return families.values()


def _counters(name: str, text: str, labels: tuple[str, ...], values: Mapping[_Labels, int]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=list(labels))
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family
