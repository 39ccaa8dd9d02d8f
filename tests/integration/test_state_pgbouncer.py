"""State and locks through PgBouncer in transaction mode, where every transaction may meet another session.

asyncpg looks at the database directly, past the pooler.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

import ratesync
from ratesync import ops
from ratesync.testing.pgbouncer import BINARY, PgBouncer

SPAWN = multiprocessing.get_context("spawn")

# In continuous integration a missing pooler is an error, not a reason to test less.
pytestmark = pytest.mark.skipif(
    BINARY is None and not os.environ.get("CI"), reason="needs pgbouncer (apt-get install)"
)


@pytest.fixture
def bouncer(ratesync_registry: object, ratesync_postgres_url: str) -> Iterator[PgBouncer]:
    pooler = PgBouncer(ratesync_postgres_url)
    yield pooler
    ratesync.shutdown()
    pooler.close()


def configure(url: str, **options: Any) -> ratesync.Store:
    ratesync.configure_store("db", "postgres", url=url, auto_create=True, **options)
    return ratesync.get_store("db")


@pytest.fixture
def store(bouncer: PgBouncer, ratesync_postgres_url: str) -> ratesync.Store:
    return configure(bouncer.through(ratesync_postgres_url))


def _work(url: str, cache: str, number: int, tasks: int, rounds: int) -> tuple[int, list[int], int]:
    """How often this process created the key, the sums it saw, and the most that held the lock at once."""

    async def main() -> tuple[int, list[int], int]:
        import asyncpg

        store = configure(url, statement_cache=cache)
        state = store.state(timeout=60)
        most = 0
        async with asyncpg.create_pool(url, min_size=1, max_size=2, statement_cache_size=0) as pool:

            async def work() -> list[int]:
                nonlocal most
                sums = []
                for _ in range(rounds):
                    async with store.lock("one", ttl=30, timeout=50):
                        most = max(most, await pool.fetchval("UPDATE inside SET n = n + 1 RETURNING n"))
                        await pool.execute("UPDATE inside SET n = n - 1")
                    sums.append(await state.increment("n"))
                return sums

            created = asyncio.gather(*(state.check_and_set(f"k{n}", number) for n in range(200)))
            sums = await asyncio.gather(*(work() for _ in range(tasks)))
            return sum(await created), list(itertools.chain.from_iterable(sums)), most

    return asyncio.run(main())


@pytest.mark.parametrize("cache", ["auto", "on", "off"])
async def test_two_processes_share_keys_counters_and_locks_exactly(
    bouncer, store, ratesync_postgres_url, ratesync_asyncpg, cache
):
    await ratesync_asyncpg.execute("CREATE TABLE inside (n int); INSERT INTO inside VALUES (0)")
    await store.state().initialize()
    url = bouncer.through(ratesync_postgres_url)
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(2, mp_context=SPAWN) as executor:
        work = [loop.run_in_executor(executor, _work, url, cache, number, 3, 4) for number in range(2)]
        results = await asyncio.gather(*work)
    assert sum(created for created, _, _ in results) == 200
    assert sorted(itertools.chain.from_iterable(sums for _, sums, _ in results)) == list(range(1, 25))
    assert {most for _, _, most in results} == {1}


async def test_every_operation_works_through_the_pooler(store):
    state = store.state()
    assert await state.check_and_set("k", "v", ttl=300)
    assert await state.compare_and_swap("k", expected=1, value=b"w") == 2
    assert (await state.get_versioned("k")).value == b"w"
    assert await state.touch("k", 60, expected=2)
    await state.schedule("k", 0)
    (due,) = await state.claim_due()
    assert await state.unschedule("k", claim=due.claim)
    assert await state.many([ops.increment("n", 5), ops.get("k")], atomic=True) == [5, b"w"]
    assert await state.delete("k", expected=2)
    with pytest.raises(ratesync.RolledBackError):
        await state.many(
            [ops.increment("n", 5), ops.compare_and_swap("k", expected=9, value=0), ops.set("x", 1)],
            atomic=True,
        )
    assert [item async for item in state.scan()] == [("n", 5)]
    async with store.idempotent("charge-42", fingerprint="f", ttl=300) as op:
        op.result = "receipt"
    async with store.idempotent("charge-42", fingerprint="f", ttl=300) as op:
        assert op.done
        assert op.result == "receipt"


async def test_who_waits_for_an_operation_looks_now_and_then(store):
    async def wait() -> object:
        async with store.idempotent("slow", wait=30) as op:
            return op.result if op.done else "ran after all"

    async with store.idempotent("slow") as op:
        waiters = [asyncio.create_task(wait()) for _ in range(5)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in waiters)
        op.result = "receipt"
    assert await asyncio.gather(*waiters) == ["receipt"] * 5


async def test_a_lease_is_renewed_through_the_pooler(store):
    # Renewed after a third of it, so that a machine may stand still for the rest.
    async with store.lock("one", ttl=8.0, auto_renew=True) as lease:
        await asyncio.sleep(9)
        assert not lease.lost
        assert await store.try_lock("one", ttl=30) is None


async def test_everybodys_sessions_stay_as_they_were(bouncer, store, ratesync_postgres_url):
    import asyncpg

    state = store.state()
    await asyncio.gather(*(state.increment(f"k{number % 7}") for number in range(200)))
    async with store.lock("one", ttl=30):
        pass
    for _ in range(6):
        connection = await asyncpg.connect(bouncer.through(ratesync_postgres_url), statement_cache_size=0)
        changed = await connection.fetch(
            "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name LIKE ANY ($1)",
            ["enable_%", "plan_cache%", "synchronous%", "default_transaction%"],
        )
        assert changed == []
        assert (
            await connection.fetch("SELECT * FROM pg_prepared_statements WHERE name LIKE 'ratesync%'") == []
        )
        assert await connection.fetch("SELECT * FROM pg_locks WHERE locktype = 'advisory'") == []
        await connection.close()


async def test_the_pooler_restarts_and_keys_and_locks_survive(bouncer, store):
    state = store.state(timeout=20)
    await state.set("k", "v")
    async with store.lock("one", ttl=60) as lease:
        bouncer.stop()
        with pytest.raises(ratesync.StoreError):
            await store.state(timeout=0.2).set("k", "w")
        bouncer.start()
        # "Unavailable" says that nothing was executed, so a swap can be tried again.
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(ratesync.StoreUnavailableError):
                    assert await state.compare_and_swap("k", expected=1, value="w") == 2
                    break
                await asyncio.sleep(0.05)
        assert not lease.lost
        assert await store.try_lock("one", ttl=30) is None
    async with store.lock("one", ttl=30, timeout=60) as second:
        assert second.token > lease.token


async def test_a_serializable_database_behind_the_pooler_stays_exact(
    store, ratesync_asyncpg, ratesync_postgres_url
):
    # Nothing is set on a pooled session, so transactions run as the database says.
    name = urlsplit(ratesync_postgres_url).path.lstrip("/")
    await ratesync_asyncpg.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'"
    )
    state = store.state()
    await asyncio.gather(*(state.increment("n") for _ in range(100)))
    assert await state.get("n") == 100
    won = await asyncio.gather(*(state.check_and_set("k", str(number)) for number in range(50)))
    assert sum(won) == 1
    inside = most = 0

    async def work() -> None:
        nonlocal inside, most
        async with store.lock("one", ttl=30, timeout=40):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(work() for _ in range(20)))
    assert most == 1
