"""What is stored, seen by others: asyncpg and redis-py read the rows, and change them behind our back."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

import ratesync

SPACE = {"namespace": "n:s", "tenant": "t%", "kind": "k_"}


@pytest.fixture
async def postgres(ratesync_registry: object, ratesync_postgres_url: str) -> ratesync.State:
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url, auto_create=True)
    state = ratesync.get_store("db").state(**SPACE)
    await state.initialize()
    return state


@pytest.fixture
async def redis(ratesync_registry: object, ratesync_redis_url: str) -> ratesync.State:
    ratesync.configure_store("db", "redis", url=ratesync_redis_url)
    state = ratesync.get_store("db").state(**SPACE)
    await state.initialize()
    return state


# PostgreSQL ---------------------------------------------------------------------------------------


async def test_postgres_has_one_row_for_each_key_with_its_parts_in_columns(postgres, ratesync_asyncpg):
    await asyncio.gather(*(postgres.increment("a:b", 2) for _ in range(10)))
    await postgres.set("text", "v\x00", ttl=1000)
    await postgres.set("bytes", b"\xff")
    await postgres.set("text", "w\x00", ttl=1000)
    await postgres.set("gone", 5)
    await postgres.delete("gone")
    rows = await ratesync_asyncpg.fetch(
        "SELECT namespace, tenant, kind, key, value, number, version, removed, "
        "expires_at IS NULL OR expires_at > clock_timestamp() AS living FROM acteon_state ORDER BY key"
    )
    space = ("n:s", "t%", "k_")
    assert [tuple(row) for row in rows] == [
        (*space, "a:b", None, 20, 10, False, True),
        (*space, "bytes", b"\xff", None, 1, False, True),
        (*space, "gone", None, None, 1, True, False),
        (*space, "text", b"w\x00", None, 2, False, True),
    ]


async def test_postgres_keeps_expiry_on_its_own_clock(postgres, ratesync_asyncpg):
    await postgres.set("k", "v", ttl=100)
    found = await postgres.get_versioned("k")
    stored, left = await ratesync_asyncpg.fetchrow(
        "SELECT expires_at, expires_at - clock_timestamp() FROM acteon_state"
    )
    assert abs(found.expires_at - stored) < timedelta(milliseconds=1.5)
    assert timedelta(0) < left <= timedelta(seconds=100)
    await ratesync_asyncpg.execute("UPDATE acteon_state SET expires_at = clock_timestamp()")
    assert await postgres.get("k") is None
    assert await postgres.check_and_set("k", "anew")


async def test_postgres_rows_changed_by_others_are_what_counts(postgres, ratesync_asyncpg):
    await postgres.set("k", 5)
    await ratesync_asyncpg.execute("UPDATE acteon_state SET number = 50, version = version + 1")
    assert await postgres.increment("k") == 51
    with pytest.raises(ratesync.StaleVersionError) as caught:
        await postgres.compare_and_swap("k", expected=2, value=0)
    assert caught.value.actual == 3
    await ratesync_asyncpg.execute("DELETE FROM acteon_state")
    assert await postgres.get("k") is None
    assert await postgres.check_and_set("k", "anew")


async def test_postgres_purges_in_two_steps_and_versions_go_on(postgres, ratesync_asyncpg):
    """What was raised as the floor of its bucket may be deleted a minute later: here, by hand."""
    for number in range(20):
        for _ in range(number + 1):
            await postgres.set(f"k{number}", "v")
        await postgres.delete(f"k{number}")
    await postgres.purge()
    # As if it had happened long ago: dead and raised for more than a minute.
    await ratesync_asyncpg.execute("UPDATE acteon_state SET expires_at = expires_at - interval '1 hour'")
    for _ in range(3):
        await postgres.purge()
    floors = dict(await ratesync_asyncpg.fetch("SELECT bucket, version FROM acteon_floors"))
    rows = await ratesync_asyncpg.fetch("SELECT bucket, version FROM acteon_state")
    for bucket, version in rows:
        assert version <= floors.get(bucket, version)
    for number in range(20):
        assert await postgres.set(f"k{number}", "v") > number + 1


async def test_concurrent_operations_share_round_trips(postgres, ratesync_asyncpg):
    store = postgres.store
    before = (await store.stats())["round_trips"]
    await asyncio.gather(*(postgres.set(f"k{number}", number) for number in range(500)))
    trips = (await store.stats())["round_trips"] - before
    assert trips <= 100
    assert await ratesync_asyncpg.fetchval("SELECT count(*) FROM acteon_state") == 500
    alone = []
    for _ in range(4):
        before = (await store.stats())["round_trips"]
        await postgres.get("k1")
        alone.append((await store.stats())["round_trips"] - before)
    assert min(alone) == 1  # now and then a purge is counted as well


# Redis --------------------------------------------------------------------------------------------


async def rows(witness) -> list[str]:
    return sorted(
        [key async for key in witness.scan_iter("acteon_state*") if await witness.type(key) == "hash"]
    )


async def test_redis_has_one_hash_for_each_key(redis, ratesync_redis_py):
    await asyncio.gather(*(redis.increment("a:b", 2) for _ in range(10)))
    (row,) = await rows(ratesync_redis_py)
    assert await ratesync_redis_py.hget(row, "v") == "20"
    assert (await ratesync_redis_py.hget(row, "m")).split()[0] == "10"
    assert await ratesync_redis_py.pttl(row) == -1
    await redis.set("a:b", "text", ttl=1000)
    assert await rows(ratesync_redis_py) == [row]
    assert await ratesync_redis_py.hget(row, "v") == "text"
    assert await ratesync_redis_py.pttl(row) == -1  # its version has to outlive it
    other = ratesync.get_store("db").state(**SPACE | {"kind": "k_:a"})
    await other.set("b", "v")
    assert len(await rows(ratesync_redis_py)) == 2


async def test_redis_keys_of_another_type_in_our_place_are_an_error_and_stay(redis, ratesync_redis_py):
    await redis.set("k", "v")
    await redis.set("other", "v")
    names = {await ratesync_redis_py.hget(row, "v"): row for row in await rows(ratesync_redis_py)}
    assert len(names) == 1  # both hold "v"
    for row in await rows(ratesync_redis_py):
        await ratesync_redis_py.delete(row)
        await ratesync_redis_py.set(row, "foreign")
    for operation in (redis.get("k"), redis.set("k", "w"), redis.increment("k"), redis.delete("k")):
        with pytest.raises(ratesync.StoreError, match="WRONGTYPE"):
            await operation
    assert await redis.set("third", "fine") == 1


async def test_redis_forgets_everything_and_goes_on(redis, ratesync_redis_py):
    await redis.set("k", "v")
    await ratesync_redis_py.flushall()
    await ratesync_redis_py.script_flush()
    assert await redis.get("k") is None
    assert await redis.check_and_set("k", "anew")
    assert await redis.increment("n") == 1


async def test_concurrent_operations_share_round_trips_to_redis(redis):
    store = redis.store
    before = (await store.stats())["round_trips"]
    await asyncio.gather(*(redis.set(f"k{number}", number) for number in range(500)))
    assert (await store.stats())["round_trips"] - before <= 250
