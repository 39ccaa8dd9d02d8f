"""Waiters for a slot in one process, woken by a release in another, with asyncpg as witness."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

import ratesync

SPAWN = multiprocessing.get_context("spawn")
LISTENING = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%ratesync_freed%'"


def _configure(url: str, **limiter: object) -> None:
    ratesync.configure_store("db", "postgres", url=url, auto_create=True)
    # Nobody passes because a process that has just started was slow to connect.
    patient = {"max_concurrent": 1, "fail_closed": True, "outage_budget": 30}
    ratesync.configure_limiter("jobs", "db", **(patient | limiter))


def _hold(url: str, pipe: Connection) -> None:
    """Holds the slot until told to let it go; then, as often as told, waits for it and lets it go."""
    _configure(url)
    with ratesync.acquire("jobs", timeout=60):
        pipe.send("held")
        pipe.recv()
    pipe.send("released")
    pipe.recv()


@asynccontextmanager
async def holding(url: str) -> AsyncIterator[tuple[Callable[[], None], int]]:
    """Another process holds the slot; yields how to make it let go, and its process id."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_hold, args=(url, there))
    process.start()
    try:
        assert await asyncio.to_thread(here.recv) == "held"
        assert process.pid is not None
        yield lambda: here.send("let go"), process.pid
    finally:
        process.kill()
        process.join()


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not await check():  # type: ignore[misc]
            await asyncio.sleep(0.01)


async def test_a_release_elsewhere_wakes_the_waiter_without_polling(ratesync_postgres_url, ratesync_asyncpg):
    _configure(ratesync_postgres_url)
    store = ratesync.get_store("db")
    async with holding(ratesync_postgres_url) as (let_go, _):

        async def wait() -> bool:
            async with ratesync.acquire("jobs", timeout=60) as permit:
                return permit.lost

        waiter = asyncio.create_task(wait())
        await until(lambda: ratesync_asyncpg.fetchval(LISTENING))
        await until(lambda: ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state_waiters"))
        # From here on only the slow poll, about once a second.
        await asyncio.sleep(0.5)
        clock = "SELECT extract(epoch FROM clock_timestamp())::float8"
        trips, began = (await store.stats())["round_trips"], await ratesync_asyncpg.fetchval(clock)
        await asyncio.sleep(2)
        passed = await ratesync_asyncpg.fetchval(clock) - began
        assert (await store.stats())["round_trips"] - trips <= passed / 0.5 + 1, (
            "20 polls would be usual otherwise"
        )
        assert not waiter.done()
        let_go()
        assert not await asyncio.wait_for(waiter, 60)
        await until(lambda: ratesync_asyncpg.fetchval("SELECT count(*) = 0 FROM rate_limiter_state_waiters"))


async def test_a_waiter_that_was_killed_does_not_keep_the_slot(ratesync_postgres_url, ratesync_asyncpg):
    _configure(ratesync_postgres_url)
    async with holding(ratesync_postgres_url) as (let_go, _):
        here, there = SPAWN.Pipe()
        victim = SPAWN.Process(target=_hold, args=(ratesync_postgres_url, there))
        victim.start()
        await until(lambda: ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state_waiters"))
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        here.close()
        let_go()
        async with asyncio.timeout(60), ratesync.acquire("jobs"):
            pass


async def test_two_processes_that_wait_take_turns(ratesync_postgres_url, ratesync_asyncpg):
    """Ten callers here, one there: it is served long before the ten are."""
    _configure(ratesync_postgres_url)
    order: list[str] = []

    async def local(number: int) -> None:
        async with ratesync.acquire("jobs", timeout=90):
            order.append(f"here {number}")
            await asyncio.sleep(0.05)

    async with ratesync.acquire("jobs"):
        here, there = SPAWN.Pipe()
        other = SPAWN.Process(target=_hold, args=(ratesync_postgres_url, there))
        other.start()
        await until(lambda: ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state_waiters"))
        tasks = [asyncio.create_task(local(i)) for i in range(10)]
        await asyncio.sleep(0)

    async def there_holds() -> None:
        assert await asyncio.to_thread(here.recv) == "held"
        order.append("there")
        here.send("let go")

    try:
        await asyncio.wait_for(asyncio.gather(*tasks, there_holds()), 90)
    finally:
        other.kill()
        other.join()
    assert order.index("there") <= 3, order
