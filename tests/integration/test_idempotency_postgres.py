# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""Idempotent operations on PostgreSQL: results committed in the caller's transaction, with each driver."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

import ratesync
from ratesync import ConfigValidationError, LeaseLostError, OperationInProgressError, Store
from ratesync.idempotency import KIND

pytestmark = pytest.mark.usefixtures("ratesync_registry")


@pytest.fixture
def store(ratesync_registry: Path, ratesync_postgres_url: str) -> Store:
    ratesync.configure_store("pg", "postgres", url=ratesync_postgres_url, auto_create=True)
    ratesync.configure_state(store="pg")
    return ratesync.get_store("pg")


@pytest.fixture
async def db(store: Store, ratesync_postgres_url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(ratesync_postgres_url)
    await connection.execute("CREATE TABLE effects (id int PRIMARY KEY)")
    yield connection
    await connection.close()


async def effects(db: Any) -> list[int]:
    return [row["id"] for row in await db.fetch("SELECT id FROM effects ORDER BY id")]


async def outcome(key: str = "k") -> tuple[bool, Any]:
    try:
        async with ratesync.idempotent(key) as op:
            done, result = op.done, op.result
            raise KeyError("only looking")
    except KeyError:
        return done, result


class Driver:
    """One connection of one driver, for the tests that all of them share."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind, self._url = kind, url

    async def open(self) -> None:
        if self.kind == "asyncpg":
            self.connection: Any = await asyncpg.connect(self._url)
        elif self.kind == "psycopg async":
            self.connection = await psycopg.AsyncConnection.connect(self._url)
        else:
            self.connection = psycopg.connect(self._url)

    async def close(self) -> None:
        closing = self.connection.close()
        if closing is not None:
            await closing

    async def transfer(self, op: ratesync.Operation, effect: int, *, fail: bool = False) -> None:
        """An effect and the result, in one transaction."""
        statement = f"INSERT INTO effects VALUES ({effect})"
        if self.kind == "psycopg":
            await asyncio.to_thread(self._transfer, op, statement, fail)
            return
        async with self.connection.transaction():
            await self.connection.execute(statement)
            op.result = {"effect": effect}
            await op.commit_in(self.connection)
            if fail:
                raise KeyError("after commit_in")

    def _transfer(self, op: ratesync.Operation, statement: str, fail: bool) -> None:
        with self.connection.transaction():
            self.connection.execute(statement)
            op.result = {"effect": int(statement.split("(")[1].rstrip(")"))}
            op.commit_in(self.connection).wait()
            if fail:
                raise KeyError("after commit_in")


@pytest.fixture(params=["asyncpg", "psycopg async", "psycopg"])
async def driver(
    request: pytest.FixtureRequest, db: Any, ratesync_postgres_url: str
) -> AsyncIterator[Driver]:
    driver = Driver(request.param, ratesync_postgres_url)
    await driver.open()
    yield driver
    await driver.close()


async def test_effect_and_result_are_committed_together(driver: Driver, db: Any) -> None:
    async with ratesync.idempotent("k", fingerprint="f") as op:
        await driver.transfer(op, 1)
    assert await effects(db) == [1]
    assert await outcome() == (True, {"effect": 1})
    found = await ratesync.state(kind=KIND, codec="json").get_versioned("k")
    assert found is not None
    assert found.version == 2
    assert found.expires_at is not None
    async with ratesync.idempotent("k", fingerprint="f") as op:
        assert (op.done, op.result) == (True, {"effect": 1})


async def test_a_transaction_that_rolls_back_leaves_neither(driver: Driver, db: Any) -> None:
    with pytest.raises(KeyError):
        async with ratesync.idempotent("k", lease=1) as op:
            await driver.transfer(op, 1, fail=True)
    assert await effects(db) == []
    async with asyncio.timeout(60), ratesync.idempotent("k", wait=60) as op:
        assert not op.done  # freed, or its lease has ended
        await driver.transfer(op, 2)
    assert await effects(db) == [2]
    assert await outcome() == (True, {"effect": 2})


async def test_who_was_taken_over_rolls_back(driver: Driver, db: Any) -> None:
    with pytest.raises(LeaseLostError, match="took over"):
        async with ratesync.idempotent("k") as op:
            assert await ratesync.idempotent("k").forget()  # as a purge after the end of the lease does
            async with ratesync.idempotent("k") as second:
                await driver.transfer(second, 2)
            await driver.transfer(op, 1)
    assert await effects(db) == [2]
    assert await outcome() == (True, {"effect": 2})


async def test_a_lease_that_ended_counts_while_nobody_took_over(driver: Driver, db: Any) -> None:
    async with ratesync.idempotent("k", lease=0.05) as op:
        assert op._kept is not None
        op._kept.stop()
        await asyncio.sleep(0.1)
        await driver.transfer(op, 1)
    assert await outcome() == (True, {"effect": 1})


async def test_a_transaction_around_the_whole_operation_works(db: Any) -> None:
    async with db.transaction(), ratesync.idempotent("k") as op:
        op.result = "inner"
        await op.commit_in(db)
    assert await outcome() == (True, "inner")


async def test_an_error_inside_a_surrounding_transaction_does_not_wait_for_itself(db: Any) -> None:
    async with asyncio.timeout(60):
        with pytest.raises(KeyError):
            async with db.transaction(), ratesync.idempotent("k", lease=1) as op:
                await op.commit_in(db)
                raise KeyError("of the body")
        async with ratesync.idempotent("k", wait=60) as op:
            assert not op.done
            op.result = "again"
    assert await outcome() == (True, "again")


async def test_a_connection_in_no_transaction_is_refused(db: Any, ratesync_postgres_url: str) -> None:
    async with ratesync.idempotent("k") as op:
        with pytest.raises(ConfigValidationError, match=r"connection\.transaction\(\)"):
            await op.commit_in(db)
        async with await psycopg.AsyncConnection.connect(ratesync_postgres_url, autocommit=True) as automatic:
            with pytest.raises(ConfigValidationError, match=r"connection\.transaction\(\)"):
                await op.commit_in(automatic)
        blocking = psycopg.connect(ratesync_postgres_url)
        with blocking, pytest.raises(ConfigValidationError, match="block the event loop"):
            await op.commit_in(blocking)
        with pytest.raises(ConfigValidationError, match=r"await op\.commit_in"):
            op.commit_in(db).wait()
        with pytest.raises(ConfigValidationError, match=r"not builtins\.object"):
            op.commit_in(object())
        op.result = "still runs"
    assert await outcome() == (True, "still runs")


async def test_names_are_taken_literally(store: Store, db: Any) -> None:
    key, prefix = "k'\"%s$1", 'Odd "%s"_'
    for _ in range(2):
        async with store.idempotent(key, prefix=prefix, tenant="t%s") as op:
            if not op.done:
                async with db.transaction():
                    op.result = "odd"
                    await op.commit_in(db)
    assert (op.done, op.result) == (True, "odd")


async def test_psycopg_takes_odd_names_too(store: Store, ratesync_postgres_url: str) -> None:
    key, prefix = "k'\"%s$1", 'Odd "%s"_'
    connection = await psycopg.AsyncConnection.connect(ratesync_postgres_url)
    async with connection, store.idempotent(key, prefix=prefix) as op:
        op.result = "odd"
        await op.commit_in(connection)
    async with store.idempotent(key, prefix=prefix) as op:
        assert (op.done, op.result) == (True, "odd")


def test_the_same_without_an_event_loop(store: Store, ratesync_postgres_url: str) -> None:
    with psycopg.connect(ratesync_postgres_url) as connection:
        connection.execute("CREATE TABLE effects (id int PRIMARY KEY)")
    connection = psycopg.connect(ratesync_postgres_url)
    with pytest.raises(KeyError), connection, ratesync.idempotent("k", lease=1) as op:
        connection.execute("INSERT INTO effects VALUES (1)")
        op.commit_in(connection).wait()
        raise KeyError("of the body")
    with psycopg.connect(ratesync_postgres_url) as connection, ratesync.idempotent("k", wait=60) as op:
        assert not op.done
        connection.execute("INSERT INTO effects VALUES (2)")
        op.result = "sync"
        op.commit_in(connection).wait()
    with psycopg.connect(ratesync_postgres_url) as connection:
        assert connection.execute("SELECT id FROM effects").fetchall() == [(2,)]
    with ratesync.idempotent("k") as op:
        assert (op.done, op.result) == (True, "sync")


async def turns(number: int) -> None:
    """Lets the others run, and the answers of the server come, for a number of turns of the loop."""
    for _ in range(number):
        await asyncio.sleep(0.0005)


async def test_who_is_cancelled_while_entering_leaves_the_key_free(store: Store) -> None:
    await store.idempotent("warm").forget()
    for number in range(25):
        entering = asyncio.create_task(ratesync.idempotent(f"k{number}", lease=3600).__aenter__())
        await turns(number)
        if not entering.done():
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            async with asyncio.timeout(60), ratesync.idempotent(f"k{number}", wait=60) as op:
                assert not op.done
        else:  # entered, and has to be left
            assert await ratesync.idempotent(f"k{number}").forget()


async def test_who_is_cancelled_while_committing_has_committed(store: Store) -> None:
    async def call(key: str) -> None:
        async with ratesync.idempotent(key, lease=3600) as op:
            op.result = "through"
            ended.set()

    for number in range(25):
        ended = asyncio.Event()
        task = asyncio.create_task(call(f"k{number}"))
        await ended.wait()
        await turns(number)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        async with asyncio.timeout(60), ratesync.idempotent(f"k{number}", wait=60) as op:
            assert (op.done, op.result) == (True, "through")


CRASHING = """
    import asyncio, os, signal, sys
    import asyncpg
    import ratesync

    async def main():
        url, moment = sys.argv[1:]
        ratesync.configure_state("postgres", url=url, timeout=60)
        connection = await asyncpg.connect(url)
        async with ratesync.idempotent("k", lease=1) as op:
            async with connection.transaction():
                await connection.execute("INSERT INTO effects VALUES (1)")
                if moment == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                op.result = "first"
                await op.commit_in(connection)
                if moment == "inside":
                    os.kill(os.getpid(), signal.SIGKILL)
            if moment == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["before", "inside", "after"])
async def test_a_process_killed_at_any_moment_leaves_it_done_once(
    moment: str, db: Any, ratesync_postgres_url: str, tmp_path: Path
) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(textwrap.dedent(CRASHING))
    async with ratesync.idempotent("other"):
        pass  # the tables are there
    died = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(script), ratesync_postgres_url, moment],
        env=os.environ,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    async with asyncio.timeout(60), ratesync.idempotent("k", wait=60) as op:
        assert op.done is (moment == "after")
        if not op.done:
            async with db.transaction():
                await db.execute(
                    "INSERT INTO effects VALUES (1)"
                )  # fails, should the first have come through
                op.result = "second"
                await op.commit_in(db)
    assert await effects(db) == [1]
    assert await outcome() == (True, "first" if moment == "after" else "second")


async def test_processes_share_one_run(store: Store, db: Any) -> None:
    async with ratesync.idempotent("k"):
        with pytest.raises(OperationInProgressError):
            async with ratesync.idempotent("k"):
                pass
