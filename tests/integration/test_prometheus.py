"""What a scrape shows, parsed from the exposition text; and the push gateway against a real HTTP server."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import prometheus_client
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

import ratesync
from ratesync.contrib import prometheus
from ratesync.contrib.counters import WAIT_BOUNDS
from ratesync.contrib.prometheus import add_metrics_endpoint, enable_metrics, is_enabled, metrics
from ratesync.contrib.prometheus.pushgateway import (
    delete_from_gateway,
    push_to_gateway,
    start_periodic_push,
)
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")

Samples = dict[str, dict[tuple[str, ...], float]]


@pytest.fixture
def registry(ratesync_registry: Path) -> Iterator[CollectorRegistry]:
    own = CollectorRegistry()
    assert enable_metrics(own)
    yield own
    prometheus.disable_metrics()


@pytest.fixture
def default_registry(ratesync_registry: Path) -> Iterator[None]:
    yield
    prometheus.disable_metrics()


def parse(text: str) -> Samples:
    """sample name -> values of its labels in alphabetical order of their names -> value"""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sample.labels[name] for name in sorted(sample.labels))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def scrape(registry: CollectorRegistry) -> Samples:
    return parse(generate_latest(registry).decode())


async def test_grants_waits_and_denials_of_a_limiter(
    registry: CollectorRegistry, ratesync_clock: ManualClock
) -> None:
    ratesync.configure_limiter("api", rate_per_second=50.0, burst=2, max_concurrent=2)

    async def use() -> None:
        async with ratesync.acquire("api"):
            pass

    await use()
    await use()
    third = asyncio.create_task(use())
    await ratesync_clock.run(0.02)
    await third
    assert not await ratesync.try_acquire("api")
    held = [asyncio.create_task(ratesync.acquire("api").__aenter__()) for _ in range(2)]
    await ratesync_clock.run(0.04)
    permits = await asyncio.gather(*held)
    await ratesync_clock.run(0.1)
    assert not await ratesync.try_acquire("api")
    seen = scrape(registry)
    for permit in permits:
        permit.release()
    memory = ("memory", "api")
    assert seen["ratesync_acquisitions_total"][memory] == 5
    assert seen["ratesync_timeouts_total"][memory] == 2
    assert seen["ratesync_denials_total"]["memory", "api", "rate"] == 1
    assert seen["ratesync_denials_total"]["memory", "api", "concurrency"] == 1
    assert seen["ratesync_slots_held"][memory] == 2
    assert seen["ratesync_releases_total"][memory] == 3
    assert seen["ratesync_fallback_activations_total"]["api",] == 0
    assert seen["ratesync_acquisition_duration_seconds_count"][memory] == 5
    assert seen["ratesync_acquisition_duration_seconds_sum"][memory] == pytest.approx(0.02 + 0.04 + 0.04)
    assert seen["ratesync_wait_max_seconds"][memory] == pytest.approx(0.04)
    buckets = {
        le: value for (_, _, le), value in seen["ratesync_acquisition_duration_seconds_bucket"].items()
    }
    assert buckets["0.001"] == 2
    assert buckets["+Inf"] == 5
    values = [buckets[str(bound)] for bound in WAIT_BOUNDS]
    assert values == sorted(values)


def test_the_buckets_are_those_of_the_engine() -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    assert ratesync.get_limiter("api").get_metrics().snapshot()["wait_bounds"] == WAIT_BOUNDS


async def test_keys_and_clones_are_never_labels(registry: CollectorRegistry) -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    for user in ("ada", "bob", "cyd"):
        await ratesync.acquire("api", key=user)
        clone = await ratesync.get_or_clone_limiter("api", user + "-clone")
        await clone.acquire()
    ratesync.clone_limiter("api", "made-by-hand")
    text = generate_latest(registry).decode()
    assert "ada" not in text
    assert parse(text)["ratesync_acquisitions_total"] == {("memory", "api"): 6, ("memory", "made-by-hand"): 0}


async def test_a_store_on_a_server_shows_its_trips_and_its_pool(
    registry: CollectorRegistry, ratesync_postgres_url: str
) -> None:
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url, auto_create=True)
    ratesync.configure_limiter("api", "db", rate_per_second=1e6, burst=1000)
    assert "ratesync_store_round_trips_total" not in scrape(registry)  # nothing is opened by a scrape
    await asyncio.gather(*(_acquire("api") for _ in range(50)))
    seen = scrape(registry)  # on the thread of a running loop
    async with asyncio.timeout(60):
        while await asyncio.to_thread(scrape, registry) != seen:  # a connection was opened meanwhile
            seen = scrape(registry)
    db = ("postgres", "db")
    assert seen["ratesync_acquisitions_total"]["postgres", "api"] == 50
    assert seen["ratesync_store_batched_ops_total"][db] >= 50
    assert 1 <= seen["ratesync_store_round_trips_total"][db] < 60
    assert seen["ratesync_store_connections"]["postgres", "open", "db"] >= 1
    assert seen["ratesync_store_connections"]["postgres", "in_use", "db"] == 0
    assert seen["ratesync_store_connections_waiting"][db] == 0
    assert seen["ratesync_store_reconnects_total"][db] == 0


async def _acquire(limiter_id: str) -> None:
    await ratesync.acquire(limiter_id)


async def test_calls_let_pass_and_calls_refused_by_a_dead_store(registry: CollectorRegistry) -> None:
    ratesync.configure_store("dead", "postgres", url="postgresql://nobody@127.0.0.1:1/none")
    ratesync.configure_limiter("open", "dead", rate_per_second=1.0)
    ratesync.configure_limiter("closed", "dead", rate_per_second=1.0, fail_closed=True)
    await ratesync.acquire("open")
    with pytest.raises(ratesync.RateLimiterAcquisitionError):
        await ratesync.acquire("closed")
    seen = scrape(registry)
    assert seen["ratesync_fallback_activations_total"] == {("open",): 1, ("closed",): 0}
    assert seen["ratesync_errors_total"]["postgres", "closed"] == 1
    assert seen["ratesync_acquisitions_total"]["postgres", "open"] == 0


def test_a_broken_configuration_leaves_the_other_metrics(
    registry: CollectorRegistry, ratesync_registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (ratesync_registry / "rate-sync.toml").write_text("[limiters.api]\nrate_per_second = -1\n")
    assert "ratesync_acquisitions_total" not in scrape(registry)
    assert "rate_per_second" in caplog.text


def test_metrics_go_on_after_shutdown(registry: CollectorRegistry) -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    with ratesync.acquire("api"):
        pass
    ratesync.shutdown()
    assert scrape(registry)["ratesync_acquisitions_total"]["memory", "api"] == 0


def test_what_is_recorded_by_hand_joins_the_series(registry: CollectorRegistry) -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    with ratesync.acquire("api"):
        pass
    metrics.record_acquisition("api", "memory", 0.3)
    metrics.record_acquisition("mine", "own", 99.0)
    metrics.record_timeout("mine", "own")
    metrics.record_fallback_activation("api")
    metrics.record_redis_operation("mine", "eval", 0.002)
    metrics.set_circuit_breaker_state("mine", 1)
    seen = scrape(registry)
    assert seen["ratesync_acquisitions_total"] == {("memory", "api"): 2, ("own", "mine"): 1}
    assert seen["ratesync_timeouts_total"]["own", "mine"] == 1
    assert seen["ratesync_fallback_activations_total"]["api",] == 1
    assert seen["ratesync_acquisition_duration_seconds_sum"]["own", "mine"] == 99
    assert seen["ratesync_acquisition_duration_seconds_bucket"]["own", "mine", "10.0"] == 0
    assert seen["ratesync_acquisition_duration_seconds_bucket"]["memory", "api", "0.5"] == 2
    assert seen["ratesync_redis_operation_duration_seconds_count"]["mine", "eval"] == 1
    assert seen["ratesync_circuit_breaker_state"]["mine",] == 1


def test_recorders_do_nothing_before_enabling() -> None:
    assert not is_enabled()
    metrics.record_acquisition("mine", "own", 1.0)
    own = CollectorRegistry()
    enable_metrics(own)
    try:
        assert is_enabled()
        assert "ratesync_acquisitions_total" not in scrape(own)
        assert enable_metrics(CollectorRegistry())  # one collector: nothing is registered twice
    finally:
        prometheus.disable_metrics()


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
async def test_an_endpoint_serves_the_metrics(kind: type, default_registry: None) -> None:
    app = kind()
    assert add_metrics_endpoint(app, "/own-metrics")
    ratesync.configure_limiter("api", rate_per_second=1.0)
    await ratesync.acquire("api")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get("/own-metrics")
        openmetrics = await client.get("/own-metrics", headers={"accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("text/plain")
    assert parse(answer.text)["ratesync_acquisitions_total"]["memory", "api"] == 1
    assert openmetrics.text.endswith("# EOF\n")
    if kind is FastAPI:
        assert "/own-metrics" not in app.openapi()["paths"]


class Gateway(http.server.BaseHTTPRequestHandler):
    """Keeps what was sent; answers 500 when told to."""

    seen: list[tuple[str, str, str]]
    status = 202

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
        type(self).seen.append((self.command, self.path, body))
        self.send_response(type(self).status)
        self.end_headers()

    do_PUT = do_DELETE = _take  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway(default_registry: None) -> Iterator[tuple[str, type[Gateway]]]:
    handler = type("Handler", (Gateway,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()
        thread.join()


async def test_metrics_are_pushed_and_deleted(gateway: tuple[str, type[Gateway]]) -> None:
    url, handler = gateway
    ratesync.configure_limiter("api", rate_per_second=1.0)
    await ratesync.acquire("api")
    assert await push_to_gateway(url, "batch", {"instance": "a"})
    assert await delete_from_gateway(url, "batch", {"instance": "a"})
    (put, delete) = handler.seen
    assert put[:2] == ("PUT", "/metrics/job/batch/instance/a")
    assert parse(put[2])["ratesync_acquisitions_total"]["memory", "api"] == 1
    assert delete[:2] == ("DELETE", "/metrics/job/batch/instance/a")


async def test_a_gateway_that_fails_is_logged_and_never_raises(
    gateway: tuple[str, type[Gateway]], caplog: pytest.LogCaptureFixture
) -> None:
    url, handler = gateway
    handler.status = 500
    assert not await push_to_gateway(url, "batch")
    assert not await push_to_gateway("http://127.0.0.1:1", "batch", timeout=1)
    assert not await delete_from_gateway("http://127.0.0.1:1", "batch", timeout=1)
    assert caplog.text.count("failed") >= 3


async def test_periodic_pushes_end_with_a_last_one(gateway: tuple[str, type[Gateway]]) -> None:
    url, handler = gateway
    handle = await start_periodic_push(url, "batch", interval=0.01)
    while len(handler.seen) < 3:
        await asyncio.sleep(0.01)
    assert not handle.is_set()
    ratesync.configure_limiter("late", rate_per_second=1.0)
    await handle.stop()
    assert handle.is_set()
    assert "late" in handler.seen[-1][2]
    assert handle.task.done()
    other = await start_periodic_push(url, "batch", interval=3600)
    other.cancel()
    await asyncio.gather(other.task, return_exceptions=True)
    assert other.event.is_set()
    await other.stop()


def test_without_prometheus_client_nothing_breaks(tmp_path: Path) -> None:
    program = """
import importlib.util as util, sys
real = util.find_spec
util.find_spec = lambda name, package=None: None if name == "prometheus_client" else real(name, package)
sys.modules["prometheus_client"] = None
from ratesync.contrib import prometheus
from ratesync.contrib.prometheus import add_metrics_endpoint, metrics
assert not prometheus.PROMETHEUS_AVAILABLE and not prometheus.enable_metrics() and not prometheus.is_enabled()
assert not add_metrics_endpoint(object())
metrics.record_timeout("a", "b")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install ratesync[prometheus]" in done.stderr


def test_the_default_registry_is_the_default(default_registry: None) -> None:
    assert enable_metrics()
    assert enable_metrics()
    ratesync.configure_limiter("api", rate_per_second=1.0)
    assert "ratesync_acquisitions_total" in scrape(prometheus_client.REGISTRY)
