"""Several processes on one PostgreSQL: the limits hold over all of them.

Each worker is a real process with an engine of its own. Who is inside is counted by the server, through
asyncpg, so that none of our code is the judge.
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
ENOUGH = 40  # grants of each process, also when the machine stands still while its time runs


def _configure(url: str, **limiter: object) -> None:
    ratesync.configure_store("db", strategy="postgres", url=url, auto_create=True)
    ratesync.configure_limiter("shared", "db", fail_closed=True, outage_budget=30, **limiter)


def _rate_worker(url: str, rate: float, burst: int, tasks: int, seconds: float) -> list[tuple[float, float]]:
    """When each grant was asked for and seen, on the monotonic clock that all processes here share."""

    async def main() -> list[tuple[float, float]]:
        _configure(url, rate_per_second=rate, burst=burst)
        await ratesync.get_store("db").initialize()
        end = time.monotonic() + seconds
        grants: list[tuple[float, float]] = []

        async def worker() -> None:
            while (asked := time.monotonic()) < end or len(grants) < ENOUGH:
                async with ratesync.acquire("shared"):
                    grants.append((asked, time.monotonic()))

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
        ratesync.configure_limiter(
            name, "db", rate_per_second=0.001, burst=7, fail_closed=True, outage_budget=30
        )
        granted = await asyncio.gather(*(ratesync.try_acquire(name) for _ in range(5)))
        return sum(granted)

    return asyncio.run(main())


async def _run(worker: object, count: int, *args: object) -> list:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(count, mp_context=SPAWN) as executor:
        return await asyncio.gather(*(loop.run_in_executor(executor, worker, *args) for _ in range(count)))


async def test_one_rate_over_four_processes(ratesync_postgres_url):
    rate, burst, seconds = 200.0, 5, 3.0
    grants = sorted(
        itertools.chain.from_iterable(
            await _run(_rate_worker, 4, ratesync_postgres_url, rate, burst, 25, seconds)
        )
    )
    # Over any time T at most rate * (T + margin) + burst. A process may stand still before it sees its grant:
    # it counts for the stretches that have both, its question and its answer.
    for begin, _ in grants[::5]:
        seen = sorted(seen for asked, seen in grants if asked >= begin)
        for count, end in enumerate(seen, 1):
            assert count <= rate * (end - begin + 0.005) + burst
    assert len(grants) >= 4 * ENOUGH


@pytest.mark.parametrize("limit", [1, 5])
async def test_slots_are_never_exceeded_over_four_processes(ratesync_postgres_url, ratesync_asyncpg, limit):
    await ratesync_asyncpg.execute("CREATE TABLE inside (n int); INSERT INTO inside VALUES (0)")
    most = await _run(_slot_worker, 4, ratesync_postgres_url, limit, 8, 10)
    assert max(most) <= limit
    assert await ratesync_asyncpg.fetchval("SELECT n FROM inside") == 0
    async with asyncio.timeout(60):
        while await ratesync_asyncpg.fetchval("SELECT current_concurrent FROM rate_limiter_state") != 0:
            await asyncio.sleep(0.02)


async def test_ten_instances_start_at_once_and_the_first_grants_are_exact(
    ratesync_postgres_url, ratesync_asyncpg
):
    granted = await _run(_first_use, 10, ratesync_postgres_url, "fresh")
    assert sum(granted) == 7
    assert await ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state") == 1


async def test_a_holder_killed_with_9_gives_its_slot_back_and_a_busy_one_keeps_it(
    ratesync_postgres_url, ratesync_asyncpg
):
    lease = 9.0  # renewed after a third of it, so that the holder may stand still for the rest
    ready = SPAWN.Event()
    holder = SPAWN.Process(target=_hold_forever, args=(ratesync_postgres_url, lease, ready))
    holder.start()
    try:
        assert await asyncio.to_thread(ready.wait, 60)
        _configure(ratesync_postgres_url, max_concurrent=1, lease_seconds=lease)
        # The holder's Python is blocked for longer than a lease; its engine renews all the same.
        leases = "SELECT expires_at FROM rate_limiter_state_leases"
        granted_until = await ratesync_asyncpg.fetchval(leases)
        async with asyncio.timeout(60):
            while await ratesync_asyncpg.fetchval("SELECT clock_timestamp() <= $1", granted_until):
                await asyncio.sleep(0.05)
        with pytest.raises(ratesync.RateLimiterAcquisitionError):
            async with ratesync.acquire("shared", timeout=0.1):
                pass
        os.kill(holder.pid, signal.SIGKILL)
        killed = time.monotonic()
        async with ratesync.acquire("shared", timeout=60):
            assert time.monotonic() - killed < lease + 20
    finally:
        holder.kill()
        holder.join(10)
