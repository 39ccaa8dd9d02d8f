"""A row of state or locks that somebody else keeps locked, such as a transaction that commits an idempotent
operation.

Who asks for that key waits. Others do not, however many such rows there are among the lanes of a process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import ratesync
from ratesync import ops

LOCKED = ["a", "b", "c"]  # more than there are lanes


@pytest.fixture
async def store(ratesync_registry: object, ratesync_postgres_url: str) -> AsyncIterator[ratesync.Store]:
    ratesync.configure_store(
        "s", "postgres", url=ratesync_postgres_url, auto_create=True, command_timeout=170.0
    )
    yield ratesync.get_store("s")
    await asyncio.to_thread(ratesync.shutdown)


@pytest.fixture
async def locked(store: ratesync.Store, ratesync_asyncpg: Any) -> AsyncIterator[ratesync.State]:
    """State in which the rows LOCKED are locked until the end of the test."""
    state = store.state(timeout=170)
    for key in LOCKED:
        await state.set(key, "1")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_state WHERE key = ANY ($1) FOR UPDATE", LOCKED)
        yield state


async def until_stuck(witness: Any, count: int) -> None:
    """So many sessions wait for a lock: what is asked from now on travels behind them."""
    async with asyncio.timeout(50):
        while (
            await witness.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            < count
        ):
            await asyncio.sleep(0.005)


async def drop(tasks: list[asyncio.Future[Any]]) -> None:
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_other_keys_do_not_wait_for_locked_rows(
    store: ratesync.Store, locked: ratesync.State, ratesync_asyncpg: Any
) -> None:
    tasks: list[asyncio.Future[Any]] = []
    for key in LOCKED:  # one trip after the other, so that each takes a lane with it
        tasks.append(asyncio.ensure_future(store.state(timeout=170).set(key, "2")))
        # Asked right behind it, so some of them are queued in its lane.
        await until_stuck(ratesync_asyncpg, len(tasks))
        async with asyncio.timeout(50):
            sums = await asyncio.gather(*(locked.increment(f"n-{number}") for number in range(200)))
        assert sums == [len(tasks)] * 200
    await drop(tasks)


async def test_calls_on_one_key_keep_their_order_around_a_locked_row(
    store: ratesync.Store, ratesync_asyncpg: Any
) -> None:
    state = store.state(timeout=170)
    for key in LOCKED:
        await state.set(key, "0")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_state WHERE key = ANY ($1) FOR UPDATE", LOCKED)
        behind = []
        for count, key in enumerate(LOCKED, 1):
            behind.append(asyncio.ensure_future(state.set(key, "1")))
            await until_stuck(ratesync_asyncpg, count)
            behind.append(asyncio.ensure_future(state.get(key)))
            behind.append(asyncio.ensure_future(state.set(key, "2")))
            async with asyncio.timeout(50):
                written = await asyncio.gather(
                    *(state.set(f"k-{i % 20}", f"{key}{i}") for i in range(100)), state.get("k-19")
                )
            assert written[-1] == f"{key}99"
            assert not any(call.done() for call in behind)
    answers = await asyncio.gather(*behind)
    assert answers == [2, "1", 3] * len(LOCKED)


async def test_other_batches_do_not_wait_for_a_locked_row(
    store: ratesync.Store, locked: ratesync.State, ratesync_asyncpg: Any
) -> None:
    stuck: list[asyncio.Future[Any]] = []
    behind: list[asyncio.Future[Any]] = []
    for key in LOCKED:  # one trip after the other
        batch = [ops.set(key, "2"), ops.set(f"x-{key}", "1")]
        stuck.append(asyncio.ensure_future(locked.many(batch, atomic=True)))
        await until_stuck(ratesync_asyncpg, len(stuck))
        # The other row of the batch is not free either.
        behind.append(asyncio.ensure_future(locked.get(f"x-{key}")))
        async with asyncio.timeout(50):
            written = await asyncio.gather(
                *(
                    locked.many([ops.increment(f"n-{i}"), ops.increment(f"m-{i}")], atomic=True)
                    for i in range(100)
                )
            )
        assert written == [[len(stuck)] * 2] * 100
    await drop(stuck + behind)


async def test_other_batches_do_not_wait_for_one_that_waits_for_a_stuck_call(
    store: ratesync.Store, locked: ratesync.State, ratesync_asyncpg: Any
) -> None:
    stuck: list[asyncio.Future[Any]] = [asyncio.ensure_future(locked.set("a", "2"))]
    await until_stuck(ratesync_asyncpg, 1)
    stuck.append(asyncio.ensure_future(locked.many([ops.set("a", "3"), ops.set("y", "1")], atomic=True)))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(50):
        for i in range(20):
            assert await locked.many([ops.increment("n"), ops.increment("m")], atomic=True) == [i + 1] * 2
    await drop(stuck)


async def test_batches_and_calls_keep_their_order_around_a_locked_row(
    store: ratesync.Store, ratesync_asyncpg: Any
) -> None:
    state = store.state(timeout=170)
    await state.set("a", "0")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_state WHERE key = 'a' FOR UPDATE")
        behind: list[asyncio.Future[Any]] = []
        for number in range(1, 6):
            batch = [ops.increment("sum"), ops.set("a", str(number))]
            behind.append(asyncio.ensure_future(state.many(batch, atomic=True)))
            behind.append(asyncio.ensure_future(state.get("a")))
            behind.append(asyncio.ensure_future(state.many([ops.get("sum"), ops.get("a")], atomic=True)))
            await until_stuck(ratesync_asyncpg, 1)
            await asyncio.sleep(0.1)  # some before the detour, some behind it
            async with asyncio.timeout(50):
                await state.many([ops.set("z", "1"), ops.set("zz", "1")], atomic=True)
        assert not any(call.done() for call in behind)
    answers = await asyncio.gather(*behind)
    expected: list[Any] = []
    for number in range(1, 6):
        expected += [[number, number + 1], str(number), [number, str(number)]]
    assert answers == expected


# Locks


async def cycle(store: ratesync.Store, name: str) -> int:
    async with store.lock(name, timeout=170) as lease:
        return lease.token


async def test_other_names_do_not_wait_for_locked_rows(store: ratesync.Store, ratesync_asyncpg: Any) -> None:
    tokens = [await cycle(store, name) for name in LOCKED]
    stuck: list[asyncio.Task[int]] = []
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_locks WHERE name = ANY ($1) FOR UPDATE", LOCKED)
        for name in LOCKED:  # one trip after the other, so that each takes a lane with it
            stuck.append(asyncio.create_task(cycle(store, name)))
            await until_stuck(ratesync_asyncpg, len(stuck))
            async with asyncio.timeout(50):
                await asyncio.gather(*(cycle(store, f"other-{number}") for number in range(100)))
        assert not any(task.done() for task in stuck)
    again = await asyncio.gather(*stuck)
    assert all(new > old for new, old in zip(again, tokens, strict=True))


async def test_who_gives_up_on_a_locked_row_is_told_so_and_leaves_nothing(
    store: ratesync.Store, ratesync_asyncpg: Any
) -> None:
    await cycle(store, "a")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_locks WHERE name = 'a' FOR UPDATE")
        first = asyncio.create_task(cycle(store, "a"))
        await until_stuck(ratesync_asyncpg, 1)
        await asyncio.sleep(0.3)
        # Held behind the trip that does not come back, and taken out of it again.
        second = asyncio.create_task(cycle(store, "a"))
        await asyncio.sleep(0.1)
        for task in (first, second):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        async with asyncio.timeout(50):
            for number in range(10):
                await cycle(store, f"b-{number}")
    async with asyncio.timeout(50):
        await cycle(store, "a")
        await asyncio.gather(first, return_exceptions=True)
