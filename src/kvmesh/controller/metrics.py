"""Prometheus metrics of the controller, read from registry and feed when asked for. `docs/api.md` lists the names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvmesh import __version__
from kvmesh.controller.feed import Feed
from kvmesh.controller.registry import Registry

_PREFIX = "kvmesh_controller_"


class ControllerMetrics(Collector):
    """Answers scrapes. To be asked in the thread that owns the registry."""

    def __init__(
        self,
        registry: Registry,
        feed: Feed,
        clock: Callable[[], float],
        gauges: Mapping[str, tuple[str, Callable[[], float]]] | None = None,
    ) -> None:
        """`gauges` are those of other parts: meaning and value by name."""
        self._gauges = {} if gauges is None else gauges
        self._registry = registry
        self._feed = feed
        self._clock = clock
        self._collectors = CollectorRegistry(auto_describe=False)
        self._collectors.register(self)
        ProcessCollector(registry=self._collectors)

    def render(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self._collectors)

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: names are fixed here, and nobody else registers."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        yield _gauge("info", "Version of the controller.", 1, {"version": __version__})
        yield from self._members()
        yield from self._fetches()
        yield from self._hit_rates()
        yield from self._registry_counters()
        yield from self._feed_counters()
        for name, (meaning, read) in self._gauges.items():
            yield _gauge(name, meaning, read())

    def _members(self) -> Iterator[Metric]:
        registry, now_s = self._registry, self._clock()
        states = Counter({"up": 0, "suspect": 0})
        states.update(registry.state(instance, now_s) for instance in registry.instances.values())
        instances = GaugeMetricFamily(_PREFIX + "instances", "Members by state.", labels=["state"])
        for state, number in states.items():
            instances.add_metric([state], number)
        yield instances
        replicas = [group.replica.statistics() for group in registry.groups.values()]
        yield _gauge("formats", "Different KV formats among the members.", len(registry.groups))
        yield _gauge("chunks", "Different chunks that somebody holds.", sum(replica.keys for replica in replicas))
        yield _gauge("entries", "Pairs of chunk and holder.", sum(replica.entries for replica in replicas))
        slots = sum(instance.member.slots for instance in registry.instances.values())
        yield _gauge("slots", "Slots of all host pools.", slots)
        behind = sum(instance.downstream.outstanding_bytes for instance in registry.instances.values())
        yield _gauge("outstanding_bytes", "Notices on their way to members.", behind)
        yield _gauge("snapshots_owed", "Inventories that members wait for.", registry.snapshots_owed())
        sizes: Counter[str] = Counter()
        groups: Counter[str] = Counter()
        for group in registry.groups.values():
            sizes[group.format.model_name] += len(group.members)
            groups[group.format.model_name] += 1
        split = sum(sizes[name] for name, number in groups.items() if number > 1)
        yield _gauge(
            "instances_split", "Members whose model name another member serves in an incompatible format.", split
        )

    def _fetches(self) -> Iterator[Metric]:
        activity = self._registry.activity
        totals = activity.totals
        yield _counter("fetches", "Fetches that members have reported.", totals.fetches)
        yield _counter("fetch_chunks_asked", "Chunks that reported fetches asked for.", totals.chunks_asked)
        yield _counter("fetched_chunks", "Chunks that reported fetches got.", totals.chunks_fetched)
        yield _counter("fetched_bytes", "Bytes that reported fetches got.", totals.fetched_bytes)
        yield _counter("fetch_seconds", "Time that reported fetches took.", totals.fetch_seconds)
        misses = CounterMetricFamily(_PREFIX + "fetch_misses", "Chunks not fetched, by reason.", labels=["reason"])
        for reason, chunks in activity.misses.items():
            misses.add_metric([reason], chunks)
        yield misses

    def _hit_rates(self) -> Iterator[Metric]:
        total = self._registry.hit_rates.cluster.total
        yield _counter("requests", "Requests that members' engines have told of.", total.requests)
        chunks = CounterMetricFamily(
            _PREFIX + "prompt_chunks", "Whole chunks of prompts, by where they were found.", labels=["found"]
        )
        nowhere = max(0, total.chunks - total.device_chunks - total.own_chunks - total.peer_chunks)
        for place, number in (
            ("device", total.device_chunks),
            ("own_pool", total.own_chunks),
            ("peer", total.peer_chunks),
            ("nowhere", nowhere),
        ):
            chunks.add_metric([place], number)
        yield chunks
        yield _counter("new_prompt_chunks", "Of these, chunks that nobody had asked for before.", total.new_chunks)
        recent = self._registry.hit_rates.cluster.over(3600.0, self._clock())
        for name, meaning, rate in (
            ("hit_rate", "Share of the prompts' chunks found somewhere, in the last hour.", recent.achieved),
            ("achievable_hit_rate", "The same with unlimited pools and perfect sharing.", recent.achievable),
            ("achievable_alone_hit_rate", "The same with unlimited pools and no sharing.", recent.achievable_alone),
        ):
            if rate is not None:
                yield _gauge(name, meaning, rate)
        yield _gauge("sampled_keys", "Keys in the samples behind them.", self._registry.hit_rates.sampled_keys())

    def _registry_counters(self) -> Iterator[Metric]:
        counters = self._registry.counters
        yield _counter("registrations", "Registrations accepted.", counters.registrations)
        yield _counter("registrations_repeated", "Registrations asked for twice, answered once.", counters.repeated)
        yield _counter("registrations_refused", "Registrations refused.", counters.refused)
        yield _counter("instance_timeouts", "Members dropped because they fell silent.", counters.timeouts)
        yield _counter("resyncs", "Snapshots asked for after a gap.", counters.resyncs)
        yield _counter("stale_events", "Events that were old or had a gap before them.", counters.stale)
        yield _counter("stranger_events", "Events of instances that are no members.", counters.strangers)
        yield _counter("snapshots_sent", "Inventories sent, per receiver.", counters.snapshots_sent)
        yield _counter("changes_held_back", "Changes not sent to a slow member.", counters.held_back)
        yield _counter("members_lost", "Heartbeats answered with: register again, notices were lost.", counters.lost)

    def _feed_counters(self) -> Iterator[Metric]:
        statistics = self._feed.statistics()
        received = CounterMetricFamily(
            _PREFIX + "messages_received", "Messages by socket and kind.", labels=["socket", "kind"]
        )
        for (socket, kind), number in statistics.received.items():
            received.add_metric([socket, kind], number)
        yield received
        malformed = CounterMetricFamily(
            _PREFIX + "malformed_messages", "Messages that could not be read.", labels=["socket"]
        )
        for socket, number in statistics.malformed.items():
            malformed.add_metric([socket], number)
        yield malformed
        refused = CounterMetricFamily(
            _PREFIX + "refused_handshakes", "Connections without our cluster key, refused.", labels=["socket"]
        )
        for socket, number in statistics.refused_handshakes.items():
            refused.add_metric([socket], number)
        yield refused
        failures = CounterMetricFamily(
            _PREFIX + "send_failures", "Frames that a connection did not take.", labels=["reason"]
        )
        for reason, number in statistics.send_failures.items():
            failures.add_metric([reason], number)
        yield failures
        yield _counter("handler_errors", "Messages that ran into an error of ours.", statistics.handler_errors)
        yield _counter("sent_frames", "Frames sent.", statistics.sent_frames)
        yield _counter("sent_bytes", "Bytes sent.", statistics.sent_bytes)


def _gauge(name: str, meaning: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, meaning, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, meaning, value=value)
