"""`RateLimiter`: one limit, its acquisitions, its state and its counters.

The hot path (`acquire_context`, `async with limiter`) is the compiled base class; this module adds what
is not hot: reading parameters, state and metrics, and releasing by hand. Methods that may have to wait
return a `Pending`: `await` it in asyncio, `.wait()` for it in a plain thread.

Rates are kept by the Generic Cell Rate Algorithm (ITU-T I.371 annex A), a token bucket that needs one
number of state: over any interval T at most `rate * (T + margin) + burst` grants, over all processes.
Windows count instead: at most `limit` units in any `window_seconds` (`sliding_window`), in each calendar
window (`fixed_window`), or by an estimate between the two (`sliding_counter`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from ratesync._engine import CoreStore, Limiter, bound_limiters, log
from ratesync._pending import Done, Pending, script
from ratesync.core import RateLimiter
from ratesync.errors import StoreError

if TYPE_CHECKING:
    from ratesync._schemas import LimiterOptions
    from ratesync.stores import Store

__all__ = ["LimiterReadOnlyConfig", "LimiterState", "RateLimiter", "RateLimiterMetrics", "StoreLimiter"]

N = TypeVar("N")

# reset_all() touches groups one by one; beyond this many it is a job for SQL.
_MAX_RESET = 100_000


@dataclass(frozen=True, slots=True)
class LimiterState:
    """What a limit would answer now; read without charging anything.

    Attributes:
        allowed: whether an acquisition of cost 1 would be granted without waiting.
        remaining: how many such acquisitions would be.
        reset_at: epoch seconds, rounded up, at which the whole burst or window is available again; of a
            window of which nothing is used, one window from now.
        current_usage: units of the burst or window that are used up, or slots held, whichever is more.
        retry_after: seconds until one unit could be had; 0 when `allowed`.
        in_use: concurrency slots held now, in all processes.
        reset_after: seconds until the whole burst or window is available again; 0 when it is.
    """

    allowed: bool
    remaining: int
    reset_at: int
    current_usage: int
    retry_after: float = 0.0
    in_use: int = 0
    reset_after: float = 0.0


@dataclass(frozen=True, slots=True)
class LimiterReadOnlyConfig:
    """The parameters of a limiter, as configured. Times in seconds."""

    id: str
    algorithm: str
    store_id: str
    rate_per_second: float | None = None
    max_concurrent: int | None = None
    timeout: float | None = None
    limit: int | None = None
    window_seconds: float | None = None
    fail_closed: bool = False
    burst: int = 1


class _Counter(Generic[N]):
    """A field of RateLimiterMetrics: read from the engine where there is one, else a plain value."""

    def __init__(self, default: N) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> N: ...
    @overload
    def __get__(self, instance: RateLimiterMetrics, owner: type) -> N: ...
    def __get__(self, instance: RateLimiterMetrics | None, owner: type) -> N:
        if instance is None:
            return self._default  # what @dataclass takes as the field's default
        source = instance.__dict__.get("_source")
        values = instance.__dict__ if source is None else source()
        value: N = values.get(self._name, self._default)
        return value

    def __set__(self, instance: RateLimiterMetrics, value: N) -> None:
        if "_source" in instance.__dict__:
            raise AttributeError(f"{self._name} is counted by the engine and cannot be set")
        instance.__dict__[self._name] = value


@dataclass
class RateLimiterMetrics:
    """Counters of one limiter in this process, since it was built.

    The object that `get_metrics()` returns is live: it reads the engine's counters at each access.
    Constructed directly it is a plain record with the `record_*` methods.
    """

    #: Grants so far.
    total_acquisitions: _Counter[int] = _Counter(0)
    #: Milliseconds spent waiting for grants, summed.
    total_wait_time_ms: _Counter[float] = _Counter(0.0)
    #: Mean wait of a grant in milliseconds.
    avg_wait_time_ms: _Counter[float] = _Counter(0.0)
    #: Longest wait of a grant in milliseconds.
    max_wait_time_ms: _Counter[float] = _Counter(0.0)
    #: Writes that met a newer version and were repeated.
    cas_failures: _Counter[int] = _Counter(0)
    #: Acquisitions that were not granted in time, `try_acquire` included.
    timeouts: _Counter[int] = _Counter(0)
    #: Epoch seconds of the latest grant, None before the first.
    last_acquisition_at: _Counter[float | None] = _Counter(None)
    #: Slots this process holds now.
    current_concurrent: _Counter[int] = _Counter(0)
    #: How often all slots were found in use.
    max_concurrent_reached: _Counter[int] = _Counter(0)
    #: Slots given back.
    total_releases: _Counter[int] = _Counter(0)
    #: Calls that were let pass because the store was out and `fail_closed` is off.
    passed_open: _Counter[int] = _Counter(0)
    #: Slots lost while held, because the lease was not renewed in time.
    leases_lost: _Counter[int] = _Counter(0)
    #: Acquisitions refused because their slot lay beyond the timeout.
    refused_rate: _Counter[int] = _Counter(0)
    #: Acquisitions refused because all slots stayed in use.
    refused_concurrency: _Counter[int] = _Counter(0)
    #: Acquisitions whose caller was cancelled.
    cancelled: _Counter[int] = _Counter(0)
    #: Errors of the store that were raised to callers.
    failed: _Counter[int] = _Counter(0)
    #: Upper bounds, in seconds, of the histogram of waits.
    wait_bounds: _Counter[tuple[float, ...]] = _Counter(())
    #: Grants per bucket of that histogram (not cumulative); the last one is what waited longer.
    wait_counts: _Counter[tuple[int, ...]] = _Counter(())

    @classmethod
    def live(cls, source: Callable[[], Mapping[str, Any]]) -> RateLimiterMetrics:
        """A view that asks `source` at each access."""
        metrics = cls()
        metrics.__dict__["_source"] = source
        return metrics

    def snapshot(self) -> dict[str, Any]:
        """All fields at one moment, by name; for exporters, which read them together.

        Example:
            >>> RateLimiterMetrics().snapshot()["total_acquisitions"]
            0
        """
        source = self.__dict__.get("_source")
        values = self.__dict__ if source is None else source()
        return {field.name: values.get(field.name, getattr(type(self), field.name)) for field in fields(self)}

    def record_acquisition(self, wait_time_ms: float) -> None:
        """Counts a grant after that wait. For records of your own, like all `record_*` methods."""
        self.total_acquisitions += 1
        self.total_wait_time_ms += wait_time_ms
        self.avg_wait_time_ms = self.total_wait_time_ms / self.total_acquisitions
        self.max_wait_time_ms = max(self.max_wait_time_ms, wait_time_ms)
        self.last_acquisition_at = time.time()

    def record_cas_failure(self) -> None:
        """Counts a write that met a newer version."""
        self.cas_failures += 1

    def record_timeout(self) -> None:
        """Counts an acquisition that was not granted in time."""
        self.timeouts += 1

    def record_concurrent_acquire(self) -> None:
        """Counts a slot taken."""
        self.current_concurrent += 1

    def record_concurrent_release(self) -> None:
        """Counts a slot given back."""
        self.current_concurrent = max(0, self.current_concurrent - 1)
        self.total_releases += 1

    def record_max_concurrent_reached(self) -> None:
        """Counts a moment at which all slots were in use."""
        self.max_concurrent_reached += 1


def core_parameters(store: Store, options: LimiterOptions) -> dict[str, Any]:
    """What the compiled Limiter is given, besides its store and its name."""
    return {
        "algorithm": options.algorithm,
        "limit": options.limit,
        "window_seconds": options.window_seconds,
        "rate_per_second": options.rate_per_second,
        "burst": options.burst,
        "max_concurrent": options.max_concurrent,
        "timeout": options.timeout,
        "fail_closed": options.fail_closed,
        "outage_budget": options.outage_budget,
        "lease_seconds": options.lease_seconds,
        "max_hold_seconds": options.max_hold_seconds,
        "timing_margin_ms": store._timing_margin_ms,
    }


class StoreLimiter(Limiter, RateLimiter):
    """A limiter of the compiled engine, on one of its stores; `ratesync.engines` has one class per engine."""

    def __init__(self, store: Store, group_id: str, options: LimiterOptions) -> None:
        super().__init__(store._core, group_id, **core_parameters(store, options))
        self._store = store
        self._group_id = group_id
        self._options = options
        self._initialized = False
        self._stray_release_logged = False
        self._metrics = RateLimiterMetrics.live(self._read_counters)
        store._users.add(self)

    # Acquiring ------------------------------------------------------------------------------------

    def acquire(
        self, timeout: float | None = None, *, cost: int = 1, key: str | None = None
    ) -> Pending[None]:
        return self._acquire_bare(timeout, cost, key)

    def try_acquire(self, timeout: float = 0, *, cost: int = 1, key: str | None = None) -> Pending[bool]:
        return self._try(timeout, cost, key)

    def release(self) -> Pending[bool]:
        released = self._release_bare()
        if not released and self.max_concurrent is not None and not self._stray_release_logged:
            self._stray_release_logged = True
            log.warning(
                "release() of limiter %r without a matching acquire(): nothing was freed (said once)",
                self._group_id,
            )
        return Done(released)

    # State ----------------------------------------------------------------------------------------

    @script
    def peek(self, key: str | None = None) -> Generator[Pending[Any], Any, LimiterState]:
        seen: dict[str, Any] = yield self._peek(key)
        available, in_use = int(seen["available"]), int(seen["in_use"])
        used, reset_after = 0, float(seen["full_after"])
        if self._options.is_window:
            used = int(seen["used"])
        elif self.rate_per_second is not None:  # `available` would also count slots that are not free
            used = min(self.burst, math.ceil(reset_after * self.rate_per_second - 1e-6))
        if self.max_concurrent is not None:
            available = min(available, max(0, self.max_concurrent - in_use))
        return LimiterState(
            allowed=available > 0,
            remaining=max(0, available),
            reset_at=math.ceil(time.time() + (reset_after or self.window_seconds or 0)),
            current_usage=max(0, used, in_use),
            retry_after=float(seen["retry_after"]),
            in_use=in_use,
            reset_after=reset_after,
        )

    def get_state(self, key: str | None = None) -> Pending[LimiterState]:
        return self.peek(key)

    def get_metrics(self) -> RateLimiterMetrics:
        return self._metrics

    def get_config(self) -> LimiterReadOnlyConfig:
        options = self._options
        return LimiterReadOnlyConfig(
            id=self._group_id,
            algorithm=options.algorithm,
            store_id=self._store.store_id,
            rate_per_second=self.rate_per_second,
            max_concurrent=options.max_concurrent,
            timeout=options.timeout,
            limit=self.limit,
            window_seconds=self.window_seconds,
            fail_closed=options.fail_closed,
            burst=options.burst,
        )

    @script
    def reset(self, key: str | None = None) -> Generator[Pending[Any], Any, None]:
        yield self._reset(key)

    @script
    def reset_all(self) -> Generator[Pending[Any], Any, None]:
        core: CoreStore = self._store._core
        listing = yield core.list(_MAX_RESET)
        rows = [*listing["groups"], *listing["holders"]]
        groups = {row["group"] for row in rows} | {self._group_id}
        resets = [Limiter(core, group, max_concurrent=1)._reset(None) for group in sorted(groups)]
        for pending in resets:  # noqa: UP028 - a list's iterator would not take what is sent back
            yield pending
        if listing["truncated"]:
            raise StoreError(
                f"store {self.store_id!r} has more than {_MAX_RESET} groups: the rest was not reset; do it "
                "in the database"
            )

    # Life cycle -----------------------------------------------------------------------------------

    @script
    def initialize(self) -> Generator[Pending[Any], Any, None]:
        yield self._store.initialize()
        self._initialized = True

    @script
    def disconnect(self) -> Generator[Pending[Any], Any, None]:
        self._initialized = False
        self._store._users.discard(self)
        if bound_limiters().get(self._group_id) is self:
            del bound_limiters()[self._group_id]
        if not self._store._users:
            yield self._store.close()

    # Parameters -----------------------------------------------------------------------------------

    @property
    def group_id(self) -> str:
        return self._group_id

    @property
    def store_id(self) -> str:
        return self._store.store_id

    @property
    def algorithm(self) -> str:
        return self._options.algorithm

    @property
    def rate_per_second(self) -> float | None:
        return None if self._options.is_window else self._options.rate_per_second

    @property
    def burst(self) -> int:
        return self._options.burst

    @property
    def max_concurrent(self) -> int | None:
        return self._options.max_concurrent

    @property
    def limit(self) -> int | None:
        return self._options.limit if self._options.is_window else None

    @property
    def window_seconds(self) -> float | None:
        return self._options.window_seconds if self._options.is_window else None

    @property
    def default_timeout(self) -> float | None:
        return self._options.timeout

    @property
    def fail_closed(self) -> bool:
        return self._options.fail_closed

    @property
    def is_initialized(self) -> bool:
        return not self._store._closed and (self._initialized or self._metrics.total_acquisitions > 0)

    def _read_counters(self) -> Mapping[str, Any]:
        counters = self._counters()
        grants, waited_ms = counters["acquisitions"], counters["wait_seconds"] * 1000
        latest = counters["last_acquisition"]  # on the engine's clock
        return {
            "total_acquisitions": grants,
            "total_wait_time_ms": waited_ms,
            "avg_wait_time_ms": waited_ms / grants if grants else 0.0,
            "max_wait_time_ms": counters["max_wait_seconds"] * 1000,
            "cas_failures": counters["cas_failures"],
            "timeouts": counters["timeouts"],
            "last_acquisition_at": time.time() - (self._store._now() - latest) if latest else None,
            "current_concurrent": counters["held"],
            "max_concurrent_reached": counters["refused_concurrency"],
            "total_releases": counters["releases"],
            "passed_open": counters["passed_open"],
            "leases_lost": counters["leases_lost"],
            "refused_rate": counters["refused_rate"],
            "refused_concurrency": counters["refused_concurrency"],
            "cancelled": counters["cancelled"],
            "failed": counters["failed"],
            "wait_bounds": tuple(counters["wait_bounds"]),
            "wait_counts": tuple(counters["wait_counts"]),
        }

    def __repr__(self) -> str:
        parts = [
            f"{name}={value!r}"
            for name, value in (
                ("algorithm", self.algorithm if self._options.is_window else None),
                ("limit", self.limit),
                ("window_seconds", self.window_seconds),
                ("rate_per_second", self.rate_per_second),
                ("max_concurrent", self.max_concurrent),
            )
            if value is not None
        ]
        return f"<ratesync.{type(self).__name__} {self._group_id!r} on {self.store_id!r} {' '.join(parts)}>"
