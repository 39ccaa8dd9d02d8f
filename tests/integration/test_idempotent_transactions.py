# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""Results that are committed in the caller's own transaction, by asyncpg and psycopg: both or neither.

The effects are rows of a table of the test's own; what counts is that for every key there is exactly one
effect, or none and no result.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import asyncpg
import psycopg
import pytest

import ratesync

SPAWN = multiprocessing.get_context("spawn")
EFFECTS = "CREATE TABLE effects (key text, amount int)"


@pytest.fixture
async def store(ratesync_registry, ratesync_postgres_url, ratesync_asyncpg) -> ratesync.Store:
    await ratesync_asyncpg.execute(EFFECTS)
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url, auto_create=True)
    return ratesync.get_store("db")


class Asyncpg:
    def __init__(self, url: str) -> None:
        self._url = url

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        self.connection = await asyncpg.connect(self._url)
        try:
            async with self.connection.transaction():
                yield self.connection
        finally:
            await self.connection.close()

    async def insert(self, key: str, amount: int) -> None:
        await self.connection.execute("INSERT INTO effects VALUES ($1, $2)", key, amount)


class Psycopg(Asyncpg):
    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        self.connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        try:
            async with self.connection.transaction():
                yield self.connection
        finally:
            await self.connection.close()

    async def insert(self, key: str, amount: int) -> None:
        await self.connection.execute("INSERT INTO effects VALUES (%s, %s)", (key, amount))


@pytest.fixture(params=[Asyncpg, Psycopg], ids=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest, ratesync_postgres_url: str) -> Asyncpg:
    return request.param(ratesync_postgres_url)


async def effects(witness: Any, key: str = "charge-42") -> list[int]:
    return [row["amount"] for row in await witness.fetch("SELECT amount FROM effects WHERE key = $1", key)]


async def test_effects_and_result_are_committed_together(store, driver, ratesync_asyncpg):
    async with store.idempotent("charge-42", fingerprint="f", ttl=500) as op:
        assert not op.done
        async with driver.transaction() as connection:
            await driver.insert("charge-42", 5)
            op.result = {"receipt": 17}
            await op.commit_in(connection)
            assert await effects(ratesync_asyncpg) == []
        assert await effects(ratesync_asyncpg) == [5]
    async with store.idempotent("charge-42", fingerprint="f", ttl=500) as op:
        assert op.done
        assert op.result == {"receipt": 17}
    found = await store.state(codec="json").get_versioned("charge-42", kind="idempotency")
    assert found.version == 2
    assert 0 < (found.expires_at.timestamp() - await server_time(ratesync_asyncpg)) <= 500
    with pytest.raises(ratesync.IdempotencyMismatchError):
        async with store.idempotent("charge-42", fingerprint="other"):
            pytest.fail("entered")


async def server_time(witness: Any) -> float:
    return await witness.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")


async def test_a_rollback_takes_both_back_and_the_next_caller_runs(store, driver, ratesync_asyncpg):
    async def fail() -> None:
        async with store.idempotent("charge-42") as op, driver.transaction() as connection:
            await driver.insert("charge-42", 5)
            op.result = 1
            await op.commit_in(connection)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await effects(ratesync_asyncpg) == []
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ratesync.OperationInProgressError):
                async with store.idempotent("charge-42") as op:
                    assert not op.done
                    async with driver.transaction() as connection:
                        await driver.insert("charge-42", 6)
                        op.result = 2
                        await op.commit_in(connection)
                break
            await asyncio.sleep(0.01)
    assert await effects(ratesync_asyncpg) == [6]
    async with store.idempotent("charge-42") as op:
        assert (op.done, op.result) == (True, 2)


async def test_committing_twice_says_so_and_after_a_rollback_once_more_is_once(store, driver):
    with pytest.raises(ratesync.LeaseLostError, match="was called before"):
        async with store.idempotent("twice") as op, driver.transaction() as connection:
            await op.commit_in(connection)
            await op.commit_in(connection)
    async with store.idempotent("again") as op:
        with contextlib.suppress(ZeroDivisionError):
            async with driver.transaction() as connection:
                await op.commit_in(connection)
                raise ZeroDivisionError  # as a serialization failure would
        async with driver.transaction() as connection:
            op.result = "second try"
            await op.commit_in(connection)
    async with store.idempotent("again") as op:
        assert (op.done, op.result) == (True, "second try")


async def test_a_late_commit_rolls_the_effects_back(store, driver, ratesync_asyncpg):
    async def late() -> None:
        async with store.idempotent("charge-42") as op, driver.transaction() as connection:
            await driver.insert("charge-42", 5)
            await store.idempotent("charge-42").forget()
            async with store.idempotent("charge-42") as successor:
                successor.result = "successor"
            op.result = "late"
            await op.commit_in(connection)

    with pytest.raises(ratesync.LeaseLostError):
        await late()
    assert await effects(ratesync_asyncpg) == []
    async with store.idempotent("charge-42") as op:
        assert (op.done, op.result) == (True, "successor")


async def test_a_takeover_during_the_transaction_finds_the_result(store, driver, ratesync_asyncpg):
    """The successor waits for the row that the transaction has locked, and then sees what it decided."""

    async def takeover() -> Any:
        async with store.idempotent("charge-42", wait=60) as op:
            return op.done, op.result

    async with store.idempotent("charge-42", lease=0.3) as op:
        async with driver.transaction() as connection:
            await driver.insert("charge-42", 5)
            op.result = "first"
            await op.commit_in(connection)
            other = asyncio.create_task(takeover())
            await asyncio.sleep(0.8)  # its lease is over; but it is written already
            assert not other.done()
        assert await other == (True, "first")
    assert await effects(ratesync_asyncpg) == [5]


async def test_the_commit_has_to_be_in_a_transaction_of_the_right_database(
    store, driver, ratesync_postgres_url
):
    async with store.idempotent("charge-42") as op:
        op.result = 1
        alone = await asyncpg.connect(ratesync_postgres_url)
        with pytest.raises(ratesync.ConfigValidationError, match="transaction"):
            await op.commit_in(alone)
        await alone.close()
        for wrong in (None, object(), "postgresql://"):
            with pytest.raises(ratesync.ConfigValidationError, match="asyncpg"):
                await op.commit_in(wrong)
    ratesync.configure_store("mem", "memory")
    async with ratesync.get_store("mem").idempotent("charge-42") as op, driver.transaction() as connection:
        with pytest.raises(ratesync.ConfigValidationError, match="postgres"):
            await op.commit_in(connection)


def test_a_synchronous_psycopg_connection_commits_too(store, ratesync_postgres_url):
    with psycopg.connect(ratesync_postgres_url) as connection, store.idempotent("charge-42") as op:
        connection.execute("INSERT INTO effects VALUES ('charge-42', 5)")
        op.result = ["sync"]
        op.commit_in(connection).wait()
        connection.commit()
    with store.idempotent("charge-42") as op:
        assert (op.done, op.result) == (True, ["sync"])


def _charge(url: str, pipe: Connection, stop_after_commit_in: bool) -> None:
    """Charges once; tells before it would commit, and waits there to be killed."""

    async def main() -> None:
        ratesync.configure_store("db", "postgres", url=url, auto_create=True)
        store = ratesync.get_store("db")
        connection = await asyncpg.connect(url)
        async with store.idempotent("charge-42", lease=1.0, timeout=60) as op:
            assert not op.done
            async with connection.transaction():
                await connection.execute("INSERT INTO effects VALUES ('charge-42', 5)")
                op.result = "killed"
                if stop_after_commit_in:
                    await op.commit_in(connection)
                pipe.send("there")
                await asyncio.sleep(60)

    asyncio.run(main())


@pytest.mark.parametrize("stop_after_commit_in", [False, True])
async def test_a_killed_caller_leaves_neither_and_the_next_one_runs(
    store, driver, ratesync_postgres_url, ratesync_asyncpg, stop_after_commit_in
):
    await store.state().initialize()
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_charge, args=(ratesync_postgres_url, theirs, stop_after_commit_in))
    process.start()
    try:
        assert await asyncio.to_thread(ours.recv) == "there"
        os.kill(process.pid, signal.SIGKILL)
        async with store.idempotent("charge-42", lease=30, wait=60) as op:
            assert not op.done
            async with driver.transaction() as connection:
                await driver.insert("charge-42", 6)
                op.result = "second"
                await op.commit_in(connection)
    finally:
        process.kill()
        process.join(10)
    assert await effects(ratesync_asyncpg) == [6]


async def test_many_callers_have_one_effect_for_each_key(
    store, driver, ratesync_asyncpg, ratesync_postgres_url
):
    async def charge(number: int) -> Any:
        key = f"key-{number % 3}"
        async with store.idempotent(key, wait=60) as op:
            if not op.done:
                own = type(driver)(ratesync_postgres_url)
                async with own.transaction() as connection:
                    await own.insert(key, number)
                    op.result = number
                    await op.commit_in(connection)
            return op.result

    results = await asyncio.gather(*(charge(number) for number in range(18)))
    for key in range(3):
        assert await effects(ratesync_asyncpg, f"key-{key}") == [results[key]]
        assert set(results[key::3]) == {results[key]}
