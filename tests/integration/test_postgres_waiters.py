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
    """Holds the slot until told to let it go."""
    _configure(url)
    with ratesync.acquire("jobs", timeout=60):
        pipe.send("held")
        pipe.recv()
    pipe.send("released")
    pipe.recv()


def _hold_again_and_again(url: str, pipe: Connection, times: int) -> None:
    """Waits for the slot and holds it until told to let it go, so many times."""
    _configure(url)
    for _ in range(times):
        with ratesync.acquire("jobs"):
            pipe.send("held")
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
        # Soon there is only the slow poll, about once a second. Otherwise 20 polls would be usual.
        clock = "SELECT extract(epoch FROM clock_timestamp())::float8"
        async with asyncio.timeout(60):
            while True:
                trips, began = (await store.stats())["round_trips"], await ratesync_asyncpg.fetchval(clock)
                await asyncio.sleep(2)
                passed = await ratesync_asyncpg.fetchval(clock) - began
                if (await store.stats())["round_trips"] - trips <= passed / 0.5 + 1:
                    break
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
    """Here somebody always waits, and the one that waits there is served all the same, and soon."""
    _configure(ratesync_postgres_url)
    served_here = 0
    turns: list[int] = []  # how many were served here before the one there was

    async def local() -> None:
        nonlocal served_here
        while len(turns) < 5:
            async with ratesync.acquire("jobs"):
                served_here += 1
                await asyncio.sleep(0.1)

    async with ratesync.acquire("jobs"):
        here, there = SPAWN.Pipe()
        other = SPAWN.Process(target=_hold_again_and_again, args=(ratesync_postgres_url, there, 5))
        other.start()
        await until(lambda: ratesync_asyncpg.fetchval("SELECT count(*) FROM rate_limiter_state_waiters"))
        tasks = [asyncio.create_task(local()) for _ in range(10)]
        await asyncio.sleep(0)

    async def there_holds() -> None:
        before = 0
        while len(turns) < 5:
            assert await asyncio.to_thread(here.recv) == "held"
            turns.append(served_here - before)
            before = served_here
            here.send("let go")

    try:
        await asyncio.wait_for(asyncio.gather(*tasks, there_holds()), 120)
    finally:
        other.kill()
        other.join()
    # A process that stands still for a moment misses its turn, but not every time.
    assert min(turns) <= 3, turns
