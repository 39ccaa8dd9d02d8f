"""Limiters constructed directly, on real servers: one pool for equal options, one state for equal names."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

import ratesync
from ratesync import PostgresRateLimiter, RateLimiter, RedisRateLimiter
from ratesync._schemas import ALGORITHMS, ENGINES
from ratesync.engines import limiter_class
from ratesync.engines.redis_sliding_window import RedisSlidingWindowRateLimiter
from ratesync.schemas import PostgresEngineConfig
from ratesync.testing import reset_limiter

needs_redis = pytest.mark.skipif("redis" not in ENGINES, reason="this build has no Redis store")

pytestmark = pytest.mark.usefixtures("ratesync_registry")


@pytest.fixture(params=["postgres", pytest.param("redis", marks=needs_redis)])
def make(request: pytest.FixtureRequest) -> Any:
    """Makes a limiter of one engine with its own keywords."""
    url = request.getfixturevalue(f"ratesync_{request.param}_url")
    if request.param == "postgres":
        return lambda group, **fields: PostgresRateLimiter(url, group, auto_create=True, **fields)
    return lambda group, **fields: RedisRateLimiter(url=url, group_id=group, **fields)


@pytest.fixture(params=["postgres", "redis"])
def db(request: pytest.FixtureRequest) -> str:
    """The store `db`, of one engine."""
    url = request.getfixturevalue(f"ratesync_{request.param}_url")
    options = {"auto_create": True} if request.param == "postgres" else {}
    ratesync.configure_store("db", request.param, url=url, **options)
    return str(request.param)


async def test_two_objects_of_one_name_share_the_limit_and_other_names_do_not(make: Any) -> None:
    first, second = (make("api", rate_per_second=0.01, burst=2) for _ in range(2))
    other = make("other", rate_per_second=0.01)
    assert isinstance(first, RateLimiter)
    await first.initialize()
    assert first.is_initialized
    assert [await first.try_acquire(), await second.try_acquire(), await first.try_acquire()] == [
        True,
        True,
        False,
    ]
    assert await other.try_acquire()
    state = await second.get_state()
    assert (state.allowed, state.remaining) == (False, 0)
    await reset_limiter(first)
    assert await second.try_acquire()


async def test_slots_are_shared_and_given_back(make: Any) -> None:
    first, second = (make("slots", max_concurrent=1) for _ in range(2))
    async with first.acquire_context(timeout=20):
        assert not await second.try_acquire()
        assert (await second.get_state()).current_usage == 1
    assert await second.try_acquire(timeout=20)
    await second.release()


async def test_it_limits_a_function_and_threads(make: Any) -> None:
    limiter = make("calls", rate_per_second=0.01, burst=2)

    @ratesync.rate_limited(limiter, timeout=0, mode="try")
    def work() -> bool:
        return True

    assert [await asyncio.to_thread(work) for _ in range(3)] == [True, True, None]


async def test_a_disconnected_limiter_connects_again(make: Any) -> None:
    limiter = make("api", rate_per_second=1000.0, burst=10)
    assert await limiter.try_acquire()
    await limiter.disconnect()
    assert not limiter.is_initialized
    with pytest.raises(ratesync.StoreClosedError):
        await limiter.acquire()
    await limiter.initialize()
    assert await limiter.try_acquire()


async def test_the_registry_makes_the_class_of_the_engine(ratesync_postgres_url: str) -> None:
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url, auto_create=True)
    ratesync.configure_limiter("api", "db", rate_per_second=0.01)
    limiter = ratesync.get_limiter("api")
    assert type(limiter) is PostgresRateLimiter is limiter_class("postgres", "token_bucket")
    assert await limiter.try_acquire()
    direct = PostgresRateLimiter(ratesync_postgres_url, "api", rate_per_second=0.01)
    assert not await direct.try_acquire(), "the same name in the same table"


async def test_a_config_record_makes_a_limiter(ratesync_postgres_url: str) -> None:
    config = PostgresEngineConfig(url=ratesync_postgres_url, auto_create=True, table_name="Other Limits")
    limiter = PostgresRateLimiter.from_config(config, group_id="api", rate_per_second=0.01)
    assert [await limiter.try_acquire(), await limiter.try_acquire()] == [True, False]


async def test_twenty_limiters_and_tenants_open_one_pool(
    ratesync_postgres_url: str, ratesync_asyncpg: Any
) -> None:
    limiters = [
        PostgresRateLimiter(
            ratesync_postgres_url, f"tenant-{i}", rate_per_second=1e5, auto_create=True, pool_max_size=3
        )
        for i in range(20)
    ]
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url, auto_create=True, pool_max_size=3)
    ratesync.configure_limiter("tenant", "db", rate_per_second=1e5)
    clones = [await ratesync.get_or_clone_limiter("tenant", str(i)) for i in range(20)]
    await asyncio.gather(*(limiter.acquire() for limiter in [*limiters, *clones] for _ in range(5)))
    count = await ratesync_asyncpg.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'ratesync%' "
        "AND datname = current_database()"
    )
    assert count <= 2 * 3


async def test_checks_tell_the_true_numbers_of_a_server(db: str) -> None:
    ratesync.configure_limiter("user", "db", rate_per_second=0.01, burst=3)
    ratesync.configure_limiter("ip", "db", rate_per_second=0.01, burst=2, max_concurrent=1)
    for _ in range(3):
        looked = await ratesync.check_limiter("user", acquire_if_allowed=False)
        assert (looked.allowed, looked.limit, looked.remaining) == (True, 3, 3)
    for left in (1, 0):
        result = await ratesync.check_multi_limiters(["user", "ip"])
        assert (result.allowed, result.limit, result.remaining) == (True, 2, left)
        assert 0 < result.reset_in <= 200
    refused = await ratesync.check_multi_limiters(["user", "ip"])
    assert (refused.allowed, refused.blocking_limiter_id) == (False, "ip")
    assert 90 < refused.reset_in <= 100
    assert (await ratesync.check_limiter("user", acquire_if_allowed=False)).remaining == 1
    assert (await ratesync.get_limiter("ip").peek()).in_use == 0


async def test_many_checks_of_several_limits_at_once_charge_all_or_nothing(db: str) -> None:
    ratesync.configure_limiter("a", "db", rate_per_second=0.001, burst=7)
    ratesync.configure_limiter("b", "db", rate_per_second=0.001, burst=9)
    await ratesync.initialize_all_limiters()
    results = await asyncio.gather(*(ratesync.check_multi_limiters(["a", "b"]) for _ in range(40)))
    granted = sum(result.allowed for result in results)
    assert granted == 7
    assert 9 - (await ratesync.get_limiter("b").peek()).remaining == granted


async def test_a_mistake_is_seen_and_not_taken_for_an_outage(ratesync_postgres_url: str) -> None:
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url)  # no table, and none made
    ratesync.configure_limiter("api", "db", rate_per_second=1.0)
    ratesync.configure_limiter("local", rate_per_second=1.0)
    for acquire in (True, False):
        with pytest.raises(ratesync.StoreServerError, match="auto_create"):
            await ratesync.check_limiter("api", acquire_if_allowed=acquire)
        with pytest.raises(ratesync.StoreServerError, match="auto_create"):
            await ratesync.check_multi_limiters(["local", "api"], acquire_if_allowed=acquire)
    assert (await ratesync.get_limiter("local").peek()).remaining == 1


async def test_limits_of_several_stores_are_checked_all_or_nothing(db: str) -> None:
    ratesync.configure_limiter("shared", "db", rate_per_second=0.001, burst=2)
    ratesync.configure_limiter("local", rate_per_second=0.001, burst=5, max_concurrent=3)
    composite = ratesync.CompositeRateLimiter({"a": "shared", "b": "local"})
    answers = [(await composite.check({"a": "x", "b": "y"})).allowed for _ in range(4)]
    assert answers == [True, True, False, False]
    state = await ratesync.get_limiter("local").peek("y")
    assert (state.current_usage, state.in_use) == (2, 0)


@needs_redis
@pytest.mark.skipif("sliding_window" not in ALGORITHMS, reason="this build has no windows")
async def test_the_sliding_window_of_redis_has_its_own_class(ratesync_redis_url: str) -> None:
    limiter = RedisSlidingWindowRateLimiter(ratesync_redis_url, "login", limit=3, window_seconds=600)
    assert isinstance(limiter, RedisRateLimiter)
    assert (limiter.limit, limiter.window_seconds, limiter.rate_per_second) == (3, 600, None)
    assert [await limiter.try_acquire() for _ in range(4)] == [True, True, True, False]
    ratesync.configure_store("redis", "redis", url=ratesync_redis_url)
    ratesync.configure_limiter("login", "redis", algorithm="sliding_window", limit=3, window_seconds=600)
    by_name = ratesync.get_limiter("login")
    assert type(by_name) is RedisSlidingWindowRateLimiter
    assert not await by_name.try_acquire(), "the same name with the same prefix"
    assert (await by_name.get_state()).remaining == 0


@needs_redis
async def test_another_prefix_is_another_limit(ratesync_redis_url: str) -> None:
    limiters = [
        RedisRateLimiter(ratesync_redis_url, "api", rate_per_second=0.01, key_prefix=prefix)
        for prefix in ("one", "two")
    ]
    assert [await limiter.try_acquire() for limiter in limiters] == [True, True]


async def test_checks_cancelled_at_any_moment_leave_no_slot_and_keep_the_count(db: str) -> None:
    ratesync.configure_limiter("a", "db", rate_per_second=0.001, burst=1000)
    ratesync.configure_limiter("b", "db", rate_per_second=0.001, burst=1000, max_concurrent=500)
    ratesync.configure_limiter("local", rate_per_second=0.001, burst=1000)
    await ratesync.initialize_all_limiters()
    chance = random.Random(7)
    granted = 0

    async def check() -> None:
        nonlocal granted
        result = await ratesync.check_multi_limiters(["a", "b", "local"])
        granted += result.allowed

    for _ in range(30):
        tasks = [asyncio.create_task(check()) for _ in range(5)]
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0 if chance.random() < 0.5 else 0.001)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # What was granted to those who left is given back behind their backs; a unit that was not the newest
    # deal any more stays charged, and so does a check that was cancelled while it asked for numbers.
    async with asyncio.timeout(10):
        while (await ratesync.get_limiter("b").peek()).in_use:
            await asyncio.sleep(0.01)
    states = [await ratesync.get_limiter(name).peek() for name in ("a", "b", "local")]
    assert granted >= 30
    used = [state.current_usage for state in states]
    assert all(granted <= units <= granted + 30 for units in used), (granted, used)


@pytest.mark.slow
async def test_a_cluster_that_keeps_the_limits_apart_checks_them_all_or_nothing(
    ratesync_redis_cluster: Any,
) -> None:
    ratesync.configure_store("cluster", "redis", url=ratesync_redis_cluster.url)
    ratesync.configure_limiter("user", "cluster", rate_per_second=0.001, burst=5)
    ratesync.configure_limiter("ip", "cluster", rate_per_second=0.001, burst=2, max_concurrent=1)
    composite = ratesync.CompositeRateLimiter({"user": "user", "ip": "ip"})
    checks = [await composite.check({"user": "ada", "ip": "192.0.2.7"}) for _ in range(4)]
    assert [check.allowed for check in checks] == [True, True, False, False]
    assert checks[-1].triggered_by == "ip"
    assert (await ratesync.get_limiter("user").peek("ada")).remaining == 3
    assert (await ratesync.get_limiter("ip").peek("192.0.2.7")).in_use == 0
