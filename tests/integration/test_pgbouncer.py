"""Limits through PgBouncer in transaction mode, where every transaction may meet another session.

The pooler has three server connections for everybody, so that sessions are really shared. asyncpg looks
at the database directly, past the pooler.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from urllib.parse import urlsplit

import pytest

import ratesync
from ratesync.testing.pgbouncer import BINARY, PgBouncer

SPAWN = multiprocessing.get_context("spawn")

# In continuous integration a missing pooler is an error, not a reason to test less.
pytestmark = pytest.mark.skipif(
    BINARY is None and not os.environ.get("CI"), reason="needs pgbouncer (apt-get install)"
)


@pytest.fixture
def bouncer(ratesync_postgres_url: str) -> Iterator[PgBouncer]:
    pooler = PgBouncer(ratesync_postgres_url)
    yield pooler
    ratesync.shutdown()
    pooler.close()


@pytest.fixture
def pooled_url(bouncer: PgBouncer, ratesync_postgres_url: str) -> str:
    return bouncer.through(ratesync_postgres_url)


def configure(url: str, statement_cache: str = "auto", **limiter: object) -> None:
    ratesync.configure_store("db", "postgres", url=url, auto_create=True, statement_cache=statement_cache)
    if limiter:
        ratesync.configure_limiter("shared", "db", fail_closed=True, outage_budget=20.0, **limiter)


def _work(url: str, cache: str, slots: int, tasks: int, rounds: int) -> tuple[int, int]:
    """Takes slots and a finite budget of another limiter; returns the most inside, and the grants."""

    async def main() -> tuple[int, int]:
        import asyncpg

        configure(url, cache, max_concurrent=slots)
        ratesync.configure_limiter(
            "budget", "db", rate_per_second=0.0001, burst=37, fail_closed=True, outage_budget=20.0
        )
        most = granted = 0
        async with asyncpg.create_pool(url, min_size=1, max_size=2, statement_cache_size=0) as pool:

            async def worker() -> None:
                nonlocal most, granted
                for _ in range(rounds):
                    async with ratesync.acquire("shared"):
                        now_inside = await pool.fetchval("UPDATE inside SET n = n + 1 RETURNING n")
                        most = max(most, now_inside)
                        await pool.execute("UPDATE inside SET n = n - 1")
                    got = await ratesync.try_acquire("budget")
                    granted += got

            await asyncio.gather(*(worker() for _ in range(tasks)))
        return most, granted

    return asyncio.run(main())


@pytest.mark.parametrize("cache", ["auto", "on", "off"])
async def test_two_processes_share_slots_and_rates_exactly(pooled_url, ratesync_asyncpg, cache):
    await ratesync_asyncpg.execute("CREATE TABLE inside (n int); INSERT INTO inside VALUES (0)")
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(2, mp_context=SPAWN) as executor:
        work = [loop.run_in_executor(executor, _work, pooled_url, cache, 3, 8, 8) for _ in range(2)]
        results = await asyncio.gather(*work)
    assert max(most for most, _ in results) <= 3
    assert sum(granted for _, granted in results) == 37
    async with asyncio.timeout(60):
        while await ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state_leases"):
            await asyncio.sleep(0.02)


async def test_leases_are_renewed_through_the_pooler(pooled_url, ratesync_asyncpg):
    configure(pooled_url, max_concurrent=1, lease_seconds=12.0)
    async with ratesync.acquire("shared") as permit:
        expires = "SELECT expires_at FROM rate_limiter_state_leases"
        first = await ratesync_asyncpg.fetchval(expires)
        async with asyncio.timeout(60):
            while (await ratesync_asyncpg.fetchval(expires) - first).total_seconds() < 1.0:
                await asyncio.sleep(0.1)
        assert not permit.lost
    assert await ratesync.try_acquire("shared", timeout=20)


async def test_everybodys_sessions_stay_as_they_were(pooled_url, ratesync_asyncpg):
    import asyncpg

    configure(pooled_url, rate_per_second=1e6, burst=1000)
    await asyncio.gather(*(ratesync.acquire("shared", key=str(i % 7)) for i in range(200)))
    subjects = {finding["subject"] for finding in await ratesync.get_store("db").doctor()}
    assert "pooler" in subjects
    for _ in range(6):
        connection = await asyncpg.connect(pooled_url, statement_cache_size=0)
        changed = await connection.fetch(
            "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name LIKE ANY ($1)",
            ["enable_%", "plan_cache%", "synchronous%", "default_transaction%"],
        )
        assert changed == []
        assert (
            await connection.fetch("SELECT name FROM pg_prepared_statements WHERE name LIKE 'ratesync%'")
            == []
        )
        await connection.close()


async def test_the_pooler_restarts_and_slots_survive(bouncer, pooled_url):
    configure(pooled_url, max_concurrent=1)
    async with ratesync.acquire("shared") as permit:
        bouncer.stop()
        with pytest.raises(ratesync.RateLimiterAcquisitionError):
            await ratesync.acquire("shared", timeout=0.2)
        bouncer.start()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert not await ratesync.try_acquire("shared")
                    break
                except ratesync.RateLimiterAcquisitionError:
                    await asyncio.sleep(0.05)
        assert not permit.lost
    assert await ratesync.try_acquire("shared", timeout=20)


async def test_a_serializable_database_behind_the_pooler_keeps_the_limits(pooled_url, ratesync_asyncpg):
    # Nothing is set on a pooled session, so transactions run as the database says.
    name = urlsplit(pooled_url).path.lstrip("/")
    await ratesync_asyncpg.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'"
    )
    configure(pooled_url, max_concurrent=3)
    ratesync.configure_limiter("budget", "db", rate_per_second=0.0001, burst=10)
    async with contextlib.AsyncExitStack() as held:
        for _ in range(3):
            await held.enter_async_context(ratesync.acquire("shared"))
        assert not await ratesync.try_acquire("shared")
    inside = most = granted = 0

    async def worker() -> None:
        nonlocal inside, most, granted
        for _ in range(5):
            async with ratesync.acquire("shared"):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1
            got = await ratesync.try_acquire("budget")
            granted += got

    await asyncio.gather(*(worker() for _ in range(20)))
    assert most <= 3
    assert granted == 10


async def test_waiters_behind_the_pooler_poll_and_doctor_says_listen_url(pooled_url):
    configure(pooled_url, max_concurrent=1)
    findings = {f["subject"]: f["message"] for f in await ratesync.get_store("db").doctor()}
    assert "listen_url" in findings["listen"]


async def test_listen_url_wakes_waiters_past_the_pooler(pooled_url, ratesync_postgres_url, ratesync_asyncpg):
    ratesync.configure_store(
        "db", "postgres", url=pooled_url, auto_create=True, listen_url=ratesync_postgres_url
    )
    assert "listen" not in {f["subject"] for f in await ratesync.get_store("db").doctor()}
    holder = ratesync.PostgresRateLimiter(
        group_id="jobs", connection_url=pooled_url, max_concurrent=1, auto_create=True
    )
    await holder.initialize()
    ratesync.configure_limiter("jobs", "db", max_concurrent=1, fail_closed=True)
    await holder.acquire()

    async def wait() -> None:
        async with ratesync.acquire("jobs", timeout=60):
            pass

    waiter = asyncio.create_task(wait())
    async with asyncio.timeout(60):
        while not await ratesync_asyncpg.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%ratesync_freed%'"
        ):
            await asyncio.sleep(0.01)
    await holder.release()
    await asyncio.wait_for(waiter, 60)
