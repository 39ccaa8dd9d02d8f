"""What happens when PostgreSQL goes away: nothing hangs beyond its budget, limits hold, it recovers."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit, urlunsplit

import pytest

import ratesync
from ratesync.testing import PostgresServer, TcpProxy

BUDGET = 0.3
# A call may cost its budget, and what a machine adds that stands still meanwhile. Waiting for the
# connection instead would take HANG.
AT_MOST = BUDGET + 8
HANG = 30.0


@pytest.fixture
def server():
    with PostgresServer() as own:
        yield own


def through(url: str, port: int) -> str:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"))


def configure(url: str, *, fail_closed: bool = False, budget: float = BUDGET, **limiter: object) -> None:
    ratesync.configure_store("db", strategy="postgres", url=url, auto_create=True, connect_timeout=HANG)
    limiter.setdefault("rate_per_second", 1e6)
    limiter.setdefault("burst", 1000)
    ratesync.configure_limiter("api", "db", fail_closed=fail_closed, outage_budget=budget, **limiter)


async def timed_acquire() -> float:
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


async def test_terminated_backends_are_replaced_and_no_call_fails(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    done = False
    worst = 0.0

    async def load() -> None:
        nonlocal worst
        while not done:
            worst = max(worst, await timed_acquire())

    tasks = [asyncio.create_task(load()) for _ in range(20)]
    for _ in range(5):
        await asyncio.sleep(0.1)
        await ratesync_asyncpg.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE 'ratesync%' AND datname = current_database()"
        )
    done = True
    await asyncio.gather(*tasks)
    assert worst < AT_MOST
    await recovers()


async def test_a_stopped_server_lets_calls_pass_within_the_budget_and_they_count(server):
    configure(server.url())
    await recovers()
    server.stop()
    durations = await asyncio.gather(*(timed_acquire() for _ in range(50)))
    assert max(durations) < AT_MOST
    assert ratesync.get_limiter("api").get_metrics().passed_open >= 50
    server.start()
    await recovers()


async def test_a_stopped_server_refuses_when_closed(server):
    configure(server.url(), fail_closed=True)
    await recovers()
    server.stop()
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(ratesync.RateLimiterAcquisitionError):
            await timed_acquire()
        assert time.monotonic() - start < AT_MOST
    server.start()
    await recovers()


async def test_a_server_killed_with_9_and_restarted_keeps_slots_and_limits(server):
    configure(server.url(), fail_closed=True, budget=HANG, rate_per_second=None, burst=1, max_concurrent=2)
    async with ratesync.acquire("api") as permit:
        server.kill()
        server.start()
        await recovers()
        async with ratesync.acquire("api"):
            assert not await ratesync.try_acquire("api")
        assert not permit.lost


@pytest.mark.parametrize("fail_closed", [False, True])
async def test_a_stalled_connection_costs_the_budget_not_a_hang(server, fail_closed):
    with TcpProxy("127.0.0.1", server.port) as proxy:
        configure(through(server.url(), proxy.port), fail_closed=fail_closed)
        await recovers()
        proxy.stall()
        start = time.monotonic()
        if fail_closed:
            with pytest.raises(ratesync.RateLimiterAcquisitionError):
                await timed_acquire()
        else:
            await timed_acquire()
        assert BUDGET * 0.8 < time.monotonic() - start < AT_MOST
        proxy.resume()
        await recovers()


async def test_cut_connections_in_mid_flight_recover_and_heal_the_slot_count(server):
    with TcpProxy("127.0.0.1", server.port) as proxy:
        configure(through(server.url(), proxy.port), rate_per_second=None, burst=1, max_concurrent=4)
        await recovers()
        stop = False

        async def load() -> None:
            while not stop:
                try:
                    async with ratesync.acquire("api"):
                        await asyncio.sleep(0)
                except ratesync.RateLimiterAcquisitionError:
                    pass

        tasks = [asyncio.create_task(load()) for _ in range(12)]
        for _ in range(10):
            await asyncio.sleep(0.05)
            proxy.cut()
        stop = True
        await asyncio.gather(*tasks)
        await recovers()
        # Grants whose answers were cut off must not keep slots for ever.
        async with asyncio.timeout(60):
            while (await ratesync.get_limiter("api").peek()).in_use != 0:
                async with ratesync.acquire("api"):
                    pass
                await asyncio.sleep(0.05)


async def test_a_partition_longer_than_the_lease_is_seen_by_the_holder(server):
    with TcpProxy("127.0.0.1", server.port) as proxy:
        configure(
            through(server.url(), proxy.port),
            fail_closed=True,
            budget=HANG,
            rate_per_second=None,
            burst=1,
            max_concurrent=1,
            lease_seconds=6.0,
        )
        async with ratesync.acquire("api") as permit:
            assert not permit.lost
            proxy.stall()
            async with asyncio.timeout(60):
                while not permit.lost:
                    await asyncio.sleep(0.05)
            proxy.resume()
        await recovers()


async def test_a_server_that_is_down_at_first_use_is_found_when_it_comes_up(server):
    url = server.url()
    server.stop()
    configure(url, fail_closed=True)
    with pytest.raises(ratesync.RateLimiterAcquisitionError) as caught:
        await timed_acquire()
    assert "127.0.0.1" in str(caught.value) or "outage_budget" in str(caught.value)
    server.start()
    await recovers()


async def test_cancelling_under_load_leaks_nothing(ratesync_postgres_url):
    configure(ratesync_postgres_url, rate_per_second=None, burst=1, max_concurrent=3)

    async def hold() -> None:
        async with ratesync.acquire("api"):
            await asyncio.sleep(0.002)

    for round_number in range(30):
        tasks = [asyncio.create_task(hold()) for _ in range(20)]
        await asyncio.sleep(0.0005 * (round_number % 10))
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    limiter = ratesync.get_limiter("api")
    async with asyncio.timeout(60):
        while (await limiter.peek()).in_use != 0:
            await asyncio.sleep(0.02)
    assert limiter.get_metrics().current_concurrent == 0
