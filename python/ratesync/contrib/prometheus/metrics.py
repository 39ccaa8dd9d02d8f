"""The collector, and recorders for code of your own that limits by other means.

What the engine counts is read from it at each scrape. What is recorded by hand is added to the series of
the same name, so one dashboard shows both.
"""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ratesync.contrib.counters import WAIT_BOUNDS, limiter_rows, store_rows

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = [
    "NAMESPACE",
    "Collector",
    "record_acquisition",
    "record_fallback_activation",
    "record_redis_operation",
    "record_timeout",
    "set_circuit_breaker_state",
]

NAMESPACE = "ratesync"
REDIS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_BY_ENGINE = ("group_id", "engine")
# metric, what RateLimiterMetrics calls it, help
_COUNTERS = (
    ("acquisitions", "total_acquisitions", "Grants."),
    ("timeouts", "timeouts", "Acquisitions refused because their turn would have come too late."),
    ("cas_failures", "cas_failures", "Lost races for a limiter's row that were repeated."),
    ("cancelled", "cancelled", "Acquisitions whose caller was cancelled."),
    ("errors", "failed", "Errors of the store raised to callers."),
    ("releases", "total_releases", "Concurrency slots given back."),
    ("leases_lost", "leases_lost", "Concurrency slots lost because their lease was not renewed in time."),
)
_STORE_COUNTERS = (
    ("round_trips", "Round trips to the store."),
    ("statements", "Statements in those round trips."),
    ("batched_ops", "Operations carried by those round trips; per round trip, the batch size."),
    ("conflicts", "Lost races that were repeated."),
    ("reconnects", "Connections made anew."),
    ("leases_lost", "Leases lost."),
)


class _Histogram:
    """Counts per bucket, not cumulative, and the sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Recorded:
    """What was recorded by hand, by labels."""

    def __init__(self) -> None:
        self.durations: dict[tuple[str, str], _Histogram] = defaultdict(lambda: _Histogram(WAIT_BOUNDS))
        self.timeouts: dict[tuple[str, str], int] = defaultdict(int)
        self.fallbacks: dict[str, int] = defaultdict(int)
        self.redis: dict[tuple[str, str], _Histogram] = defaultdict(lambda: _Histogram(REDIS_BOUNDS))
        self.breakers: dict[str, float] = {}


_lock = threading.Lock()  # guards the three below
_recorded = _Recorded()
_collector: Collector | None = None
_registry: CollectorRegistry | None = None


class Collector:
    """Reads all counters at each scrape. For a registry of your own: `registry.register(Collector())`."""

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: registering must not read a configuration or start an engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of this process at this moment."""
        with _lock:
            families = [*_limiters(_recorded), *_by_hand(_recorded)]
        yield from families
        yield from _stores()


def _limiters(recorded: _Recorded) -> list[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    rows = limiter_rows()
    families: list[Metric] = []
    for name, source, text in _COUNTERS:
        family = CounterMetricFamily(f"{NAMESPACE}_{name}", text, labels=_BY_ENGINE)
        values: dict[tuple[str, str], float] = {
            (row.limiter_id, row.engine): row.values[source] for row in rows
        }
        if name == "acquisitions":
            for labels, histogram in recorded.durations.items():
                values[labels] = values.get(labels, 0) + sum(histogram.counts)
        elif name == "timeouts":
            for labels, count in recorded.timeouts.items():
                values[labels] = values.get(labels, 0) + count
        for labels, value in values.items():
            family.add_metric(labels, value)
        families.append(family)

    denials = CounterMetricFamily(
        f"{NAMESPACE}_denials", "Refused acquisitions by reason.", labels=(*_BY_ENGINE, "reason")
    )
    fallbacks = CounterMetricFamily(
        f"{NAMESPACE}_fallback_activations",
        "Calls let pass because the store was out and fail_closed is off.",
        labels=("group_id",),
    )
    slots = GaugeMetricFamily(
        f"{NAMESPACE}_slots_held", "Concurrency slots that this process holds.", labels=_BY_ENGINE
    )
    longest = GaugeMetricFamily(
        f"{NAMESPACE}_wait_max_seconds", "Longest wait of a grant.", labels=_BY_ENGINE
    )
    passed = dict(recorded.fallbacks)
    for row in rows:
        labels = (row.limiter_id, row.engine)
        denials.add_metric((*labels, "rate"), row.values["refused_rate"])
        denials.add_metric((*labels, "concurrency"), row.values["refused_concurrency"])
        passed[row.limiter_id] = passed.get(row.limiter_id, 0) + row.values["passed_open"]
        slots.add_metric(labels, row.values["current_concurrent"])
        longest.add_metric(labels, row.max_wait_seconds)
    for group_id, count in passed.items():
        fallbacks.add_metric((group_id,), count)

    durations = {labels: (list(h.counts), h.sum) for labels, h in recorded.durations.items()}
    for row in rows:
        counts, total = durations.get((row.limiter_id, row.engine), ([0] * len(row.wait_counts), 0.0))
        added = [mine + its for mine, its in zip(counts, row.wait_counts, strict=True)]
        durations[row.limiter_id, row.engine] = (added, total + row.wait_seconds)
    waits = _histogram_family(
        "acquisition_duration_seconds", "Wait of grants.", _BY_ENGINE, WAIT_BOUNDS, durations
    )
    return [*families, denials, fallbacks, slots, longest, waits]


def _by_hand(recorded: _Recorded) -> list[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    families: list[Metric] = []
    if recorded.redis:
        redis = {labels: (list(h.counts), h.sum) for labels, h in recorded.redis.items()}
        labels = ("group_id", "operation")
        families.append(
            _histogram_family(
                "redis_operation_duration_seconds", "Redis operations.", labels, REDIS_BOUNDS, redis
            )
        )
    if recorded.breakers:
        breakers = GaugeMetricFamily(
            f"{NAMESPACE}_circuit_breaker_state", "State of a circuit breaker.", labels=("group_id",)
        )
        for group_id, state in recorded.breakers.items():
            breakers.add_metric((group_id,), state)
        families.append(breakers)
    return families


def _stores() -> list[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    rows = store_rows()
    labels = ("store", "engine")
    families: list[Metric] = []
    for name, text in _STORE_COUNTERS:
        counter = CounterMetricFamily(f"{NAMESPACE}_store_{name}", text, labels=labels)
        for row in rows:
            counter.add_metric((row.store_id, row.engine), row.values.get(name, 0))
        families.append(counter)
    pool = GaugeMetricFamily(
        f"{NAMESPACE}_store_connections", "Connections of the pool.", labels=(*labels, "state")
    )
    waiting = GaugeMetricFamily(
        f"{NAMESPACE}_store_connections_waiting", "Operations waiting for a connection.", labels=labels
    )
    for row in rows:
        for state in ("open", "in_use"):
            pool.add_metric((row.store_id, row.engine, state), row.values.get(f"connections_{state}", 0))
        waiting.add_metric((row.store_id, row.engine), row.values.get("connections_waiting", 0))
    return [*families, pool, waiting]


def _histogram_family(
    name: str,
    text: str,
    labels: tuple[str, ...],
    bounds: tuple[float, ...],
    values: dict[tuple[str, str], tuple[list[int], float]],
) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(f"{NAMESPACE}_{name}", text, labels=labels)
    for key, (counts, total) in values.items():
        cumulative, so_far = [], 0
        for bound, count in zip([*bounds, float("inf")], counts, strict=True):
            so_far += count
            cumulative.append(("+Inf" if bound == float("inf") else str(bound), so_far))
        family.add_metric(key, buckets=cumulative, sum_value=total)
    return family


# Switch -------------------------------------------------------------------------------------------


def enable(registry: CollectorRegistry | None = None) -> None:
    """Registers one collector for this process, once."""
    global _collector, _registry
    if registry is None:
        from prometheus_client import REGISTRY

        registry = REGISTRY
    with _lock:
        if _collector is not None:
            return
        _collector, _registry = Collector(), registry
    registry.register(_collector)


def disable() -> None:
    """Undoes `enable`."""
    global _collector, _registry, _recorded
    with _lock:
        collector, registry = _collector, _registry
        _collector = _registry = None
        _recorded = _Recorded()
    if collector is not None and registry is not None:
        registry.unregister(collector)


def is_enabled() -> bool:
    """Whether the collector is registered."""
    return _collector is not None


# Recorders ----------------------------------------------------------------------------------------


def _record(what: Any) -> None:
    if _collector is not None:
        with _lock:
            what(_recorded)


def record_acquisition(group_id: str, engine: str, duration_seconds: float) -> None:
    """Adds a grant of a limiter of your own. Like all recorders, nothing before `enable_metrics`."""
    _record(lambda recorded: recorded.durations[group_id, engine].observe(duration_seconds))


def record_timeout(group_id: str, engine: str) -> None:
    """Adds an acquisition that was not granted in time."""

    def add(recorded: _Recorded) -> None:
        recorded.timeouts[group_id, engine] += 1

    _record(add)


def record_redis_operation(group_id: str, operation: str, duration_seconds: float) -> None:
    """Adds an operation on Redis."""
    _record(lambda recorded: recorded.redis[group_id, operation].observe(duration_seconds))


def set_circuit_breaker_state(group_id: str, state: float) -> None:
    """Sets the state of a circuit breaker of your own: 0 closed, 1 open, 2 half-open."""

    def put(recorded: _Recorded) -> None:
        recorded.breakers[group_id] = float(state)

    _record(put)


def record_fallback_activation(group_id: str) -> None:
    """Adds a call that was let pass without a decision."""

    def add(recorded: _Recorded) -> None:
        recorded.fallbacks[group_id] += 1

    _record(add)
