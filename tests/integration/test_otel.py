"""OpenTelemetry with the real SDK: what is collected, and what the spans say."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import ratesync
from ratesync.contrib.otel import instrument_metrics, traced_acquire
from ratesync.testing.contract import eventually

pytestmark = pytest.mark.usefixtures("ratesync_registry")


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def one(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.fixture
def spans() -> Spans:
    return Spans()


def collect(reader: InMemoryMetricReader) -> dict[str, dict[tuple[str, ...], Any]]:
    """metric -> values of its attributes in alphabetical order of their names -> value"""
    found: dict[str, dict[tuple[str, ...], Any]] = {}
    data = reader.get_metrics_data()
    assert data is not None
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            assert scope.scope.name == "ratesync"
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    attributes = point.attributes or {}
                    labels = tuple(str(attributes[name]) for name in sorted(attributes))
                    found.setdefault(metric.name, {})[labels] = point.value  # type: ignore[union-attr]
    return found


@pytest.fixture
def reader() -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    instrument_metrics(MeterProvider([reader], shutdown_on_exit=False))
    return reader


async def test_instruments_read_the_engines_counters(
    reader: InMemoryMetricReader, ratesync_postgres_url: str
) -> None:
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url, auto_create=True)
    ratesync.configure_limiter("api", "db", rate_per_second=20.0, burst=9, max_concurrent=1)
    ratesync.configure_limiter("idle", rate_per_second=1.0)
    async with ratesync.acquire("api", key="ada"), ratesync.acquire("api"):
        assert not await ratesync.try_acquire("api")
        seen = collect(reader)  # on the thread of a running loop
    api = ("postgres", "api", "db")
    assert seen["ratesync.limiter.acquisitions"] == {api: 2, ("memory", "idle", "memory"): 0}
    assert seen["ratesync.limiter.slots_held"][api] == 2
    assert seen["ratesync.limiter.denials"]["postgres", "api", "concurrency_full", "db"] == 1
    assert seen["ratesync.limiter.wait"][api] > 0
    assert seen["ratesync.limiter.wait.max"][api] <= seen["ratesync.limiter.wait"][api]
    assert seen["ratesync.store.round_trips"]["postgres", "db"] >= 3
    assert seen["ratesync.store.connection_waiters"]["postgres", "db"] == 0
    assert "ada" not in str(seen)


async def test_a_grant_in_asyncio(spans: Spans) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.1, burst=5)
    async with traced_acquire("api", cost=2, key="ada", tracer_provider=spans.provider) as permit:
        assert permit.remaining == 3
        span = spans.one()  # ended at the grant
    assert span.name == "acquire api"
    assert dict(span.attributes or {}) == {
        "ratesync.limiter": "api",
        "ratesync.cost": 2,
        "ratesync.wait": 0.0,
        "ratesync.remaining": 3,
        "ratesync.outcome": "granted",
    }
    assert span.status.status_code is StatusCode.UNSET


def test_a_grant_in_a_thread_with_the_key_on_request(spans: Spans) -> None:
    ratesync.configure_limiter("api", max_concurrent=1)
    with traced_acquire("api", key="ada", record_key=True, tracer_provider=spans.provider):
        assert ratesync.get_limiter("api").peek("ada").wait().in_use == 1
    assert ratesync.get_limiter("api").peek("ada").wait().in_use == 0
    assert (spans.one().attributes or {})["ratesync.key"] == "ada"


async def test_the_slot_is_released_when_the_body_fails(spans: Spans) -> None:
    ratesync.configure_limiter("api", max_concurrent=1)
    with pytest.raises(KeyError):
        async with traced_acquire("api", tracer_provider=spans.provider):
            raise KeyError
    assert (await ratesync.get_limiter("api").peek()).in_use == 0
    assert spans.one().status.status_code is StatusCode.UNSET


async def test_a_refusal_is_an_outcome(spans: Spans) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    await ratesync.acquire("api")
    with pytest.raises(ratesync.AcquireTimeoutError):
        async with traced_acquire("api", 0, tracer_provider=spans.provider):
            raise AssertionError
    attributes = dict(spans.one().attributes or {})
    assert attributes["ratesync.outcome"] == "refused"
    assert attributes["ratesync.reason"] == "rate_limited"
    assert 50 < float(str(attributes["ratesync.retry_after"])) <= 100
    assert attributes["error.type"] == "AcquireTimeoutError"
    assert spans.one().status.status_code is StatusCode.UNSET


async def test_an_outage_is_an_error_or_passes_open(spans: Spans) -> None:
    ratesync.configure_store("dead", "postgres", url="postgresql://nobody@127.0.0.1:1/none")
    ratesync.configure_limiter("open", "dead", rate_per_second=1.0)
    ratesync.configure_limiter("closed", "dead", rate_per_second=1.0, fail_closed=True)
    async with traced_acquire("open", tracer_provider=spans.provider):
        pass
    assert (spans.one().attributes or {})["ratesync.outcome"] == "passed_open"
    spans.exporter.clear()
    with pytest.raises(ratesync.RateLimiterAcquisitionError):
        async with traced_acquire("closed", tracer_provider=spans.provider):
            raise AssertionError
    span = spans.one()
    assert (span.attributes or {})["ratesync.outcome"] == "error"
    assert span.status.status_code is StatusCode.ERROR
    assert span.events[0].name == "exception"


async def test_a_cancelled_wait_ends_its_span_and_leaves_nothing(spans: Spans) -> None:
    ratesync.configure_limiter("api", max_concurrent=1)

    async def work() -> None:
        async with traced_acquire("api", tracer_provider=spans.provider):
            raise AssertionError

    async with ratesync.acquire("api"):
        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    span = spans.one()
    assert (span.attributes or {})["error.type"] == "CancelledError"
    assert span.status.status_code is StatusCode.UNSET

    async def free() -> bool:  # a wait that met its grant gives it back behind the cancellation
        return (await ratesync.get_limiter("api").peek()).in_use == 0

    await eventually(free, 15)


def test_an_unknown_limiter_makes_no_span(spans: Spans) -> None:
    with pytest.raises(ratesync.LimiterNotFoundError):
        traced_acquire("nope", tracer_provider=spans.provider)
    assert spans.exporter.get_finished_spans() == ()


def test_without_opentelemetry_it_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from ratesync.contrib import otel
assert not otel.OTEL_AVAILABLE
for call in (otel.instrument_metrics, lambda: otel.traced_acquire("api")):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.count("pip install ratesync[otel]") == 2
