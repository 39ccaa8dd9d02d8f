"""OpenTelemetry: metrics of limiters and stores, and spans around acquisitions that ask for one.

    from ratesync.contrib.otel import instrument_metrics, traced_acquire

    instrument_metrics()                       # observable instruments of the global meter provider
    async with traced_acquire("api"):          # a span "acquire api" around the wait
        ...

Instruments read the engine's counters when they are collected, and only `traced_acquire` makes spans: a
plain `acquire` costs what it cost. Needs `pip install "ratesync[otel]"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ratesync
from ratesync.contrib.counters import LimiterRow, StoreRow, limiter_rows, store_rows
from ratesync.errors import RateLimiterAcquisitionError

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.trace import Span, Tracer, TracerProvider

__all__ = ["OTEL_AVAILABLE", "TracedAcquire", "instrument_metrics", "traced_acquire"]

try:
    from opentelemetry import metrics as otel_metrics
    from opentelemetry import trace as otel_trace

    #: Whether opentelemetry-api is installed.
    OTEL_AVAILABLE = True
except ModuleNotFoundError:
    OTEL_AVAILABLE = False

_SCOPE = "ratesync"

# name, unit, description, field of LimiterRow.values
_COUNTERS = (
    ("ratesync.limiter.acquisitions", "{grant}", "Grants.", "total_acquisitions"),
    ("ratesync.limiter.timeouts", "{acquisition}", "Acquisitions refused as too late.", "timeouts"),
    ("ratesync.limiter.passed_open", "{call}", "Calls let pass while the store was out.", "passed_open"),
    ("ratesync.limiter.cancelled", "{acquisition}", "Acquisitions that were cancelled.", "cancelled"),
    ("ratesync.limiter.errors", "{error}", "Errors of the store raised to callers.", "failed"),
    ("ratesync.limiter.cas_failures", "{race}", "Lost races that were repeated.", "cas_failures"),
    ("ratesync.limiter.leases_lost", "{slot}", "Slots whose lease was lost.", "leases_lost"),
    ("ratesync.limiter.releases", "{slot}", "Slots given back.", "total_releases"),
)
_STORE_COUNTERS = (
    ("ratesync.store.round_trips", "{round_trip}", "Round trips to the store.", "round_trips"),
    ("ratesync.store.statements", "{statement}", "Statements sent.", "statements"),
    ("ratesync.store.operations", "{operation}", "Operations carried by the round trips.", "batched_ops"),
    ("ratesync.store.conflicts", "{race}", "Lost races that were repeated.", "conflicts"),
    ("ratesync.store.reconnects", "{connection}", "Connections made anew.", "reconnects"),
    ("ratesync.store.leases_lost", "{lease}", "Leases lost.", "leases_lost"),
)


def _require() -> None:
    if not OTEL_AVAILABLE:
        raise RuntimeError("ratesync.contrib.otel needs OpenTelemetry: pip install ratesync[otel]")


def instrument_metrics(meter_provider: MeterProvider | None = None) -> None:
    """Creates observable instruments that read the counters of this process when they are collected.

    Attributes of each observation: `ratesync.limiter` (the limiter's id, never a key or a clone for one
    identifier), `ratesync.store` and `ratesync.engine`; `ratesync.reason` of denials.

    Args:
        meter_provider: None takes the global one. Call it once per provider: a second call makes the same
            instruments again.

    Raises:
        RuntimeError: opentelemetry-api is not installed.
    """
    _require()
    meter = otel_metrics.get_meter(_SCOPE, ratesync.__version__, meter_provider)
    for name, unit, text, source in _COUNTERS:
        meter.create_observable_counter(name, [_of_limiters(_value_of(source))], unit=unit, description=text)
    _create_limiter_instruments(meter)
    for name, unit, text, source in _STORE_COUNTERS:
        meter.create_observable_counter(name, [_of_stores(source)], unit=unit, description=text)
    meter.create_observable_up_down_counter(
        "ratesync.store.connections",
        [_connections],
        unit="{connection}",
        description="Connections of the pool, by state.",
    )
    meter.create_observable_up_down_counter(
        "ratesync.store.connection_waiters",
        [_of_stores("connections_waiting")],
        unit="{operation}",
        description="Operations waiting for a connection.",
    )


def _create_limiter_instruments(meter: Meter) -> None:
    meter.create_observable_counter(
        "ratesync.limiter.wait",
        [_of_limiters(lambda row: row.wait_seconds)],
        unit="s",
        description="Time that grants waited, summed.",
    )
    meter.create_observable_gauge(
        "ratesync.limiter.wait.max",
        [_of_limiters(lambda row: row.max_wait_seconds)],
        unit="s",
        description="Longest wait of a grant.",
    )
    meter.create_observable_up_down_counter(
        "ratesync.limiter.slots_held",
        [_of_limiters(_value_of("current_concurrent"))],
        unit="{slot}",
        description="Concurrency slots that this process holds.",
    )
    meter.create_observable_counter(
        "ratesync.limiter.denials",
        [_denials],
        unit="{acquisition}",
        description="Refused acquisitions by reason.",
    )


Callback = Callable[["CallbackOptions"], Iterable["Observation"]]


def _value_of(source: str) -> Callable[[LimiterRow], float]:
    return lambda row: row.values[source]


def _of_limiters(value: Callable[[LimiterRow], float]) -> Callback:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [otel_metrics.Observation(value(row), _attributes(row)) for row in limiter_rows()]

    return observe


def _of_stores(source: str) -> Callback:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [otel_metrics.Observation(row.values.get(source, 0), _attributes(row)) for row in store_rows()]

    return observe


def _denials(_: CallbackOptions) -> Iterable[Observation]:
    return [
        otel_metrics.Observation(row.values[source], {**_attributes(row), "ratesync.reason": reason})
        for row in limiter_rows()
        for reason, source in (("rate_limited", "refused_rate"), ("concurrency_full", "refused_concurrency"))
    ]


def _connections(_: CallbackOptions) -> Iterable[Observation]:
    return [
        otel_metrics.Observation(row.values.get(source, 0), {**_attributes(row), "ratesync.state": state})
        for row in store_rows()
        for state, source in (("open", "connections_open"), ("in_use", "connections_in_use"))
    ]


def _attributes(row: LimiterRow | StoreRow) -> dict[str, str]:
    found = {"ratesync.store": row.store_id, "ratesync.engine": row.engine}
    if isinstance(row, LimiterRow):
        found["ratesync.limiter"] = row.limiter_id
    return found


# Spans --------------------------------------------------------------------------------------------


def traced_acquire(
    limiter_id: str,
    timeout: float | None = None,
    *,
    cost: int = 1,
    key: str | None = None,
    record_key: bool = False,
    tracer_provider: TracerProvider | None = None,
) -> TracedAcquire:
    """`acquire` with a span around the wait; the body is not part of it.

    The span `acquire <limiter>` has the attributes `ratesync.limiter`, `ratesync.cost`,
    `ratesync.outcome` (`granted`, `refused`, `passed_open` or `error`), `ratesync.wait` in seconds and
    `ratesync.remaining` when granted, `ratesync.reason` and `ratesync.retry_after` when refused, and
    `error.type`. A refusal is an outcome, not an error of the span; a store that fails is one.

    Args:
        limiter_id: as for `acquire`, like `timeout`, `cost` and `key`.
        record_key: whether the key becomes the attribute `ratesync.key`. It may be personal data.
        tracer_provider: None takes the global one.

    Returns:
        A context manager for `async with` and for `with`, to be used once; it gives the permit.

    Raises:
        RuntimeError: opentelemetry-api is not installed.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("otel-doc", rate_per_second=10.0)
        >>> with traced_acquire("otel-doc", timeout=1) as permit:
        ...     permit.limiter_id
        'otel-doc'
    """
    _require()
    tracer = otel_trace.get_tracer(_SCOPE, ratesync.__version__, tracer_provider)
    attributes: dict[str, Any] = {"ratesync.limiter": limiter_id, "ratesync.cost": cost}
    if record_key and key is not None:
        attributes["ratesync.key"] = key
    permit = ratesync.acquire(limiter_id, timeout, cost=cost, key=key)
    return TracedAcquire(permit, tracer, f"acquire {limiter_id}", attributes)


class TracedAcquire:
    """What `traced_acquire` returns: `async with` or `with`, once."""

    def __init__(
        self, permit: ratesync.Permit, tracer: Tracer, name: str, attributes: dict[str, Any]
    ) -> None:
        self._permit = permit
        self._tracer = tracer
        self._name = name
        self._attributes = attributes

    async def __aenter__(self) -> ratesync.Permit:
        # Not made current: whatever runs while this task waits is not a child of the wait.
        span = self._tracer.start_span(self._name, attributes=self._attributes)
        try:
            permit = await self._permit.__aenter__()
        except BaseException as error:
            _failed(span, error)
            raise
        _granted(span, permit)
        return permit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._permit.__aexit__(kind, error, trace)

    def __enter__(self) -> ratesync.Permit:
        span = self._tracer.start_span(self._name, attributes=self._attributes)
        try:
            permit = self._permit.__enter__()
        except BaseException as error:
            _failed(span, error)
            raise
        _granted(span, permit)
        return permit

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._permit.__exit__(kind, error, trace)


def _granted(span: Span, permit: ratesync.Permit) -> None:
    if span.is_recording():
        span.set_attribute("ratesync.wait", permit.waited)
        if permit.passed_open:
            span.set_attribute("ratesync.outcome", "passed_open")
        else:
            span.set_attribute("ratesync.outcome", "granted")
            span.set_attribute("ratesync.remaining", permit.remaining)
    span.end()


def _failed(span: Span, error: BaseException) -> None:
    if span.is_recording():
        span.set_attribute("error.type", type(error).__qualname__)
        reason = error.reason if isinstance(error, RateLimiterAcquisitionError) else None
        if reason is not None:
            span.set_attribute("ratesync.reason", reason)
        if reason in ("rate_limited", "concurrency_full"):
            span.set_attribute("ratesync.outcome", "refused")
            if isinstance(error, RateLimiterAcquisitionError) and error.retry_after:
                span.set_attribute("ratesync.retry_after", error.retry_after)
        else:
            span.set_attribute("ratesync.outcome", "error")
            if isinstance(error, Exception):  # a cancelled wait is no failure
                span.record_exception(error)
                span.set_status(otel_trace.StatusCode.ERROR, str(error))
    span.end()
