"""A row of state that somebody else keeps locked, such as a transaction that commits an idempotent operation.

Who asks for that key waits. Others do not, however many such rows there are among the lanes of a process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import ratesync

LOCKED = ["a", "b", "c"]  # more than there are lanes


@pytest.fixture
async def store(ratesync_registry: object, ratesync_postgres_url: str) -> AsyncIterator[ratesync.Store]:
    ratesync.configure_store(
        "s", "postgres", url=ratesync_postgres_url, auto_create=True, command_timeout=60.0
    )
    yield ratesync.get_store("s")
    await asyncio.to_thread(ratesync.shutdown)


@pytest.fixture
async def locked(store: ratesync.Store, ratesync_asyncpg: Any) -> AsyncIterator[ratesync.State]:
    """State in which the rows LOCKED are locked until the end of the test."""
    state = store.state(timeout=20)
    for key in LOCKED:
        await state.set(key, "1")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_state WHERE key = ANY ($1) FOR UPDATE", LOCKED)
        yield state


async def test_other_keys_do_not_wait_for_locked_rows(store: ratesync.Store, locked: ratesync.State) -> None:
    tasks = []
    for key in LOCKED:  # one trip after the other, so that each takes a lane with it
        tasks.append(asyncio.ensure_future(store.state(timeout=50).set(key, "2")))
        # Asked right behind it, so some of them are queued in its lane.
        async with asyncio.timeout(20):
            await asyncio.sleep(0.02)
            sums = await asyncio.gather(*(locked.increment(f"n-{number}") for number in range(200)))
        assert sums == [len(tasks)] * 200
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_calls_on_one_key_keep_their_order_around_a_locked_row(
    store: ratesync.Store, ratesync_asyncpg: Any
) -> None:
    state = store.state(timeout=60)
    for key in LOCKED:
        await state.set(key, "0")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM acteon_state WHERE key = ANY ($1) FOR UPDATE", LOCKED)
        behind = []
        for key in LOCKED:
            behind.append(asyncio.ensure_future(state.set(key, "1")))
            await asyncio.sleep(0.01)
            behind.append(asyncio.ensure_future(state.get(key)))
            behind.append(asyncio.ensure_future(state.set(key, "2")))
            async with asyncio.timeout(20):
                written = await asyncio.gather(
                    *(state.set(f"k-{i % 20}", f"{key}{i}") for i in range(100)), state.get("k-19")
                )
            assert written[-1] == f"{key}99"
            assert not any(call.done() for call in behind)
    answers = await asyncio.gather(*behind)
    assert answers == [2, "1", 3] * len(LOCKED)
