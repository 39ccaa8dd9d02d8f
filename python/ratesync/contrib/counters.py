"""What the exporters read: the engine's live counters per limiter and per store, at one moment.

Nothing is counted here and nothing costs a call anything; the engine counts, and this reads. Clones that
`get_or_clone_limiter` made for one identifier are added up under their base, so the number of rows
follows the configuration, never the number of users.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, field

from ratesync import RateLimiterMetrics, get_store, list_limiters, list_stores
from ratesync.errors import ConfigValidationError, RateLimiterError, StoreClosedError

__all__ = ["LimiterRow", "StoreRow", "limiter_rows", "store_rows"]

log = logging.getLogger("ratesync.contrib")

#: Upper bounds of the engine's histogram of waits, in seconds.
WAIT_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_READ_TIMEOUT = 5.0
_SUMMED = (
    "total_acquisitions",
    "timeouts",
    "refused_rate",
    "refused_concurrency",
    "passed_open",
    "cancelled",
    "failed",
    "cas_failures",
    "leases_lost",
    "total_releases",
    "current_concurrent",
)


@dataclass(slots=True)
class LimiterRow:
    """One configured limiter, its clones included.

    Attributes:
        limiter_id: its id.
        store_id: its store.
        engine: the engine of that store.
        values: counters by the names of `RateLimiterMetrics`.
        wait_seconds: seconds that grants waited, summed.
        max_wait_seconds: the longest of these waits.
        wait_counts: grants per bucket of `WAIT_BOUNDS`, and of what waited longer; not cumulative.
    """

    limiter_id: str
    store_id: str
    engine: str
    values: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMMED, 0))
    wait_seconds: float = 0.0
    max_wait_seconds: float = 0.0
    wait_counts: list[int] = field(default_factory=lambda: [0] * (len(WAIT_BOUNDS) + 1))

    def add(self, metrics: RateLimiterMetrics) -> None:
        """Adds the counters of one limiter object."""
        seen = metrics.snapshot()
        for name in _SUMMED:
            self.values[name] += seen[name]
        self.wait_seconds += seen["total_wait_time_ms"] / 1000
        self.max_wait_seconds = max(self.max_wait_seconds, seen["max_wait_time_ms"] / 1000)
        if tuple(seen["wait_bounds"]) == WAIT_BOUNDS:
            self.wait_counts = [
                mine + its for mine, its in zip(self.wait_counts, seen["wait_counts"], strict=True)
            ]


@dataclass(slots=True)
class StoreRow:
    """One store on a server, as this process uses it; `values` are those of `Store.stats()`."""

    store_id: str
    engine: str
    values: dict[str, int]


def limiter_rows() -> list[LimiterRow]:
    """The configured limiters. Empty, and logged, while the discovered configuration is not valid."""
    try:
        stores, limiters = list_stores(), list_limiters()
    except ConfigValidationError as error:
        log.error("no metrics of limiters: %s", error)
        return []
    rows: dict[str, LimiterRow] = {}
    for limiter_id, fields in limiters.items():
        name = limiter_id
        while limiters.get(name, {}).get("base") is not None:
            name = limiters[name]["base"]
        row = rows.get(name)
        if row is None:
            store_id = fields["store"]
            engine = stores.get(store_id, {}).get("engine", "memory")
            row = rows[name] = LimiterRow(name, store_id, engine)
        if fields["metrics"] is not None:
            try:
                row.add(fields["metrics"])
            except StoreClosedError:  # the engine was stopped meanwhile
                continue
    return list(rows.values())


def store_rows() -> list[StoreRow]:
    """The stores on a server that are in use. Works in a thread with a running event loop too."""
    try:
        stores = list_stores()
    except ConfigValidationError:
        return []  # limiter_rows() says why
    used = [
        (store_id, fields["engine"])
        for store_id, fields in stores.items()
        if fields["initialized"] and fields["engine"] != "memory"
    ]
    rows: list[StoreRow] = []

    def read() -> None:
        for store_id, engine in used:
            try:
                rows.append(StoreRow(store_id, engine, dict(get_store(store_id).stats().wait())))
            except RateLimiterError as error:
                log.warning("no metrics of store %r: %s", store_id, error)

    if not used:
        return rows
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        read()
    else:
        # The engine answers within microseconds, but never to a wait() on a loop's thread.
        thread = threading.Thread(target=read, name="ratesync-metrics", daemon=True)
        thread.start()
        thread.join(_READ_TIMEOUT)
    return list(rows)
