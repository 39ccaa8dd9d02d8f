"""Several processes on one PostgreSQL: the limits hold over all of them.

Each worker is a real process with an engine of its own. What happened is recorded by the server's
clock, through asyncpg, so that no client clock and none of our code is the judge.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import asyncpg
import pytest

import ratesync

SPAWN = multiprocessing.get_context("spawn")


def _configure(url: str, **limiter: object) -> None:
    ratesync.configure_store("db", strategy="postgres", url=url, auto_create=True)
    ratesync.configure_limiter("shared", "db", **limiter)


def _rate_worker(url: str, rate: float, burst: int, tasks: int, seconds: float) -> list[float]:
    """Grants as server epoch seconds, taken right after each grant."""

    async def main() -> list[float]:
        _configure(url, rate_per_second=rate, burst=burst)
        connection = await asyncpg.connect(url)
        offset = (
            await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
            - time.monotonic()
        )
        await connection.close()
        end = time.monotonic() + seconds
        grants: list[float] = []

        async def worker() -> None:
            while time.monotonic() < end:
                async with ratesync.acquire("shared"):
                    grants.append(time.monotonic() + offset)

        await asyncio.gather(*(worker() for _ in range(tasks)))
        return grants

    return asyncio.run(main())


def _slot_worker(url: str, limit: int, tasks: int, rounds: int) -> int:
    """Marks entry and exit in a table; the server counts who is inside at once."""

    async def main() -> int:
        _configure(url, max_concurrent=limit)
        pool = await asyncpg.create_pool(url, min_size=1, max_size=4)
        most = 0

        async def worker() -> None:
            nonlocal most
            for _ in range(rounds):
                async with ratesync.acquire("shared"):
                    inside = await pool.fetchval("UPDATE inside SET n = n + 1 RETURNING n")
                    most = max(most, inside)
                    await asyncio.sleep(0.001)
                    await pool.execute("UPDATE inside SET n = n - 1")

        await asyncio.gather(*(worker() for _ in range(tasks)))
        await pool.close()
        return most

    return asyncio.run(main())


def _hold_forever(url: str, lease: float, ready: object) -> None:
    async def main() -> None:
        _configure(url, max_concurrent=1, lease_seconds=lease)
        async with ratesync.acquire("shared"):
            ready.set()
            time.sleep(600)  # blocks the loop too: the engine's thread has to keep the lease alone

    asyncio.run(main())


def _first_use(url: str, name: str) -> int:
    async def main() -> int:
        ratesync.configure_store("db", strategy="postgres", url=url, auto_create=True)
        ratesync.configure_limiter(name, "db", rate_per_second=0.001, burst=7)
        granted = await asyncio.gather(*(ratesync.try_acquire(name) for _ in range(5)))
        return sum(granted)

    return asyncio.run(main())


async def _run(worker: object, count: int, *args: object) -> list:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(count, mp_context=SPAWN) as executor:
        return await asyncio.gather(*(loop.run_in_executor(executor, worker, *args) for _ in range(count)))


@pytest.mark.timeout(90)
async def test_one_rate_over_four_processes(ratesync_postgres_url):
    rate, burst, seconds = 200.0, 5, 3.0
    grants = sorted(
        itertools.chain.from_iterable(
            await _run(_rate_worker, 4, ratesync_postgres_url, rate, burst, 25, seconds)
        )
    )
    # Over any interval T at most rate * (T + margin) + burst; 25 ms more for the client's own
    # delay between the grant and writing down its time.
    slack = 0.005 + 0.025
    for first in range(0, len(grants), 7):
        for count in (10, 50, 200):
            if first + count < len(grants):
                span = grants[first + count] - grants[first]
                assert count + 1 <= rate * (span + slack) + burst + 1
    assert len(grants) >= 0.9 * rate * seconds


@pytest.mark.timeout(90)
@pytest.mark.parametrize("limit", [1, 5])
async def test_slots_are_never_exceeded_over_four_processes(ratesync_postgres_url, ratesync_asyncpg, limit):
    await ratesync_asyncpg.execute("CREATE TABLE inside (n int); INSERT INTO inside VALUES (0)")
    most = await _run(_slot_worker, 4, ratesync_postgres_url, limit, 8, 10)
    assert max(most) <= limit
    assert await ratesync_asyncpg.fetchval("SELECT n FROM inside") == 0
    async with asyncio.timeout(5):
        while await ratesync_asyncpg.fetchval("SELECT current_concurrent FROM rate_limiter_state") != 0:
            await asyncio.sleep(0.02)


@pytest.mark.timeout(90)
async def test_ten_instances_start_at_once_and_the_first_grants_are_exact(
    ratesync_postgres_url, ratesync_asyncpg
):
    granted = await _run(_first_use, 10, ratesync_postgres_url, "fresh")
    assert sum(granted) == 7
    assert await ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state") == 1


@pytest.mark.timeout(90)
async def test_a_holder_killed_with_9_gives_its_slot_back_and_a_busy_one_keeps_it(ratesync_postgres_url):
    lease = 1.5
    ready = SPAWN.Event()
    holder = SPAWN.Process(target=_hold_forever, args=(ratesync_postgres_url, lease, ready))
    holder.start()
    try:
        await asyncio.to_thread(ready.wait, 30)
        _configure(ratesync_postgres_url, max_concurrent=1, lease_seconds=lease)
        # The holder's Python is blocked for longer than a lease; its engine renews all the same.
        with pytest.raises(ratesync.RateLimiterAcquisitionError):
            async with ratesync.acquire("shared", timeout=2.5 * lease):
                pass
        os.kill(holder.pid, signal.SIGKILL)
        killed = time.monotonic()
        async with ratesync.acquire("shared", timeout=10):
            assert time.monotonic() - killed < lease + 1.5
    finally:
        holder.kill()
        holder.join(10)
