"""What was sent and not answered: slots heal, the limit holds, nothing hangs, and it recovers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

import ratesync
from ratesync.testing import RedisServer, TcpProxy

redis = pytest.importorskip("redis")

BUDGET = 0.3
SLOW = 0.001


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as own:
        yield own
        ratesync.shutdown()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", int(server.url.rsplit(":", 1)[1].split("/")[0])) as between:
        yield between
        ratesync.shutdown()


def configure(url: str, *, fail_closed: bool = False, budget: float = BUDGET, **limiter: Any) -> None:
    ratesync.configure_store("db", "redis", url=url, socket_timeout=10.0, socket_connect_timeout=10.0)
    ratesync.configure_limiter("api", "db", fail_closed=fail_closed, outage_budget=budget, **limiter)


async def timed() -> float:
    start = time.monotonic()
    async with ratesync.acquire("api"):
        pass
    return time.monotonic() - start


async def recovers(within: float = 60.0) -> None:
    """A grant that the server really decided."""
    metrics = ratesync.get_limiter("api").get_metrics()
    async with asyncio.timeout(within):
        while True:
            before = metrics.passed_open
            try:
                async with ratesync.acquire("api"):
                    pass
            except ratesync.RateLimiterAcquisitionError:
                await asyncio.sleep(0.02)
                continue
            if metrics.passed_open == before:
                return
            await asyncio.sleep(0.02)


async def free(count: int) -> None:
    async with asyncio.timeout(60):
        while (await ratesync.get_limiter("api").peek()).in_use != count:
            await asyncio.sleep(0.02)


async def test_a_grant_whose_answer_was_lost_leaks_no_slot(server, proxy):
    configure(proxy.through(server.url), fail_closed=True, budget=1, max_concurrent=2, lease_seconds=300)
    limiter = ratesync.get_limiter("api")
    permit = None
    async with asyncio.timeout(60):
        while permit is None:  # where the machine stands still for a second, it is refused
            with contextlib.suppress(ratesync.RateLimiterAcquisitionError):
                permit = await limiter.acquire_context()
    await free(1)
    for _ in range(3):
        proxy.stall("replies")
        with pytest.raises(ratesync.RateLimiterAcquisitionError):
            await limiter.acquire()
        proxy.cut()
        proxy.resume()
        # The lost grant held a slot until the next statement said how many there are.
        await free(1)
    permit.release()
    await free(0)


async def test_a_release_whose_answer_was_lost_is_said_again(server, proxy):
    configure(proxy.through(server.url), fail_closed=True, budget=30, max_concurrent=1, lease_seconds=300)
    async with ratesync.acquire("api"):
        proxy.stall("requests")
    await asyncio.sleep(0.05)
    proxy.cut()
    proxy.resume()
    await free(0)


async def test_a_server_that_lost_its_memory_reports_lost_leases(server):
    configure(server.url, fail_closed=True, budget=30, max_concurrent=2, lease_seconds=15)
    limiter = ratesync.get_limiter("api")
    with redis.Redis.from_url(server.url) as witness:
        async with limiter.acquire_context() as first:
            server.kill()
            server.start()
            assert witness.dbsize() == 0
            async with asyncio.timeout(60):
                while not first.lost:
                    await asyncio.sleep(0.01)
            # Nobody is taken for a holder twice: the limit is what it was.
            granted = [await limiter.try_acquire(timeout=60) for _ in range(2)]
            assert granted == [True, True]
            assert not await limiter.try_acquire()
        assert (await limiter.peek()).in_use == 2


async def test_the_limit_holds_over_cut_connections(server, proxy):
    configure(proxy.through(server.url), fail_closed=True, budget=10, rate_per_second=SLOW, burst=200)
    granted = 0
    done = asyncio.Event()

    async def load() -> None:
        nonlocal granted
        while not done.is_set():
            try:
                if not await ratesync.try_acquire("api"):
                    return
            except ratesync.RateLimiterAcquisitionError:
                continue
            granted += 1
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(load()) for _ in range(10)]
    for _ in range(10):
        await asyncio.sleep(0.01)
        proxy.cut()
    async with asyncio.timeout(90):
        await asyncio.gather(*tasks)
    # A grant whose answer was lost is charged and never used: fewer, never more.
    assert granted <= 200


async def test_waiters_survive_an_outage(server):
    configure(server.url, fail_closed=True, budget=20, max_concurrent=1, lease_seconds=60)
    limiter = ratesync.get_limiter("api")
    async with limiter:
        waiters = [asyncio.create_task(timed()) for _ in range(5)]
        await asyncio.sleep(0.2)
        with redis.Redis.from_url(server.url) as witness:
            witness.client_kill_filter(_type="pubsub")
            witness.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0.1)
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [result for result in results if isinstance(result, BaseException)] == []
    await free(0)


async def test_cancelling_during_an_outage_leaves_nothing(server):
    configure(server.url, fail_closed=True, budget=10, max_concurrent=3, lease_seconds=60)
    await timed()
    server.pause()
    try:
        tasks = [asyncio.create_task(timed()) for _ in range(200)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        for task in reversed(tasks[1::2]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        server.resume()
    await recovers()
    await free(0)


async def test_closing_while_the_server_hangs_does_not_hang(server):
    configure(server.url, budget=20, max_concurrent=3)
    async with ratesync.acquire("api"):
        server.pause()
        begin = time.monotonic()
        try:
            await asyncio.to_thread(ratesync.shutdown)
        finally:
            server.resume()
        assert time.monotonic() - begin < 20
