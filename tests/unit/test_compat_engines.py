"""Section 5 of the compatibility contract: limiters constructed directly. (On servers: tests/integration.)"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

import ratesync
from ratesync import (
    ConfigValidationError,
    MemoryRateLimiter,
    PostgresRateLimiter,
    RateLimiter,
    RedisRateLimiter,
)
from ratesync.engines import memory
from ratesync.schemas import MemoryEngineConfig, PostgresEngineConfig, RedisEngineConfig
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")

URL = "postgresql://app:secret@localhost:1/app"


# Construction -------------------------------------------------------------------------------------


def test_the_keywords_of_existing_code() -> None:
    limiter = MemoryRateLimiter(
        group_id="api", rate_per_second=10.0, max_concurrent=5, default_timeout=2.0, fail_closed=True
    )
    assert isinstance(limiter, RateLimiter)
    assert (limiter.group_id, limiter.rate_per_second, limiter.max_concurrent) == ("api", 10.0, 5)
    assert (limiter.default_timeout, limiter.fail_closed, limiter.algorithm) == (2.0, True, "token_bucket")
    assert (limiter.limit, limiter.window_seconds, limiter.is_initialized) == (None, None, False)
    postgres = PostgresRateLimiter(
        connection_url=URL,
        group_id=" api ",
        rate_per_second=10.0,
        table_name="limits",
        schema_name="app",
        auto_create=True,
        pool_min_size=1,
        pool_max_size=4,
        timing_margin_ms=5.0,
    )
    assert (postgres.group_id, postgres.store_id) == ("api", "postgres")
    assert PostgresRateLimiter(URL, "api", 10.0).rate_per_second == 10.0
    assert (
        PostgresRateLimiter(url=URL, group_id="api", max_concurrent=1, command_timeout=1.0).max_concurrent
        == 1
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "rate_per_second"),
        ({"rate_per_second": 0}, "rate_per_second"),
        ({"rate_per_second": -1.0}, "rate_per_second"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"limit": 5}, "window_seconds"),
        ({"window_seconds": 5}, "limit"),
        ({"rate_per_second": 1.0, "limit": 5, "window_seconds": 1.0}, "rate_per_second"),
        ({"rate_per_second": 1.0, "default_timeout": -1}, "default_timeout"),
        ({"rate_per_second": 1.0, "brust": 5}, "brust"),
        ({"rate_per_second": 1.0, "group_id": ""}, "group_id"),
        ({"rate_per_second": 1.0, "group_id": "  "}, "group_id"),
        ({"rate_per_second": 1.0, "group_id": "x" * 256}, "group_id"),
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ["memory", "postgres"])
def test_bad_values_are_refused_with_the_field(engine: str, fields: dict[str, Any], field: str) -> None:
    given = {"group_id": "api", **fields}
    with pytest.raises(ValueError) as caught:
        MemoryRateLimiter(**given) if engine == "memory" else PostgresRateLimiter(URL, **given)
    assert isinstance(caught.value, ConfigValidationError)
    assert caught.value.field == field
    assert f"RateLimiter: {field} " in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"connection_url": ""}, "url"),
        ({"connection_url": "mysql://x"}, "url"),
        ({"connection_url": URL, "pool_max_size": 0}, "pool_max_size"),
        ({"connection_url": URL, "pool_min_size": 50}, "pool_min_size"),
        ({"connection_url": URL, "timing_margin_ms": -1}, "timing_margin_ms"),
        ({"connection_url": URL, "table_name": ""}, "table_name"),
        ({"connection_url": URL, "statement_cache": "maybe"}, "statement_cache"),
    ],
    ids=str,
)
def test_bad_options_of_a_store_are_refused_with_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigValidationError) as caught:
        PostgresRateLimiter(group_id="api", rate_per_second=1.0, **fields)
    assert caught.value.field == field
    assert "secret" not in str(caught.value)


def test_the_keywords_of_redis() -> None:
    limiter = RedisRateLimiter(
        url="redis://localhost:1/0",
        group_id="api",
        rate_per_second=10.0,
        max_concurrent=5,
        db=1,
        password="secret",
        pool_min_size=2,
        pool_max_size=4,
        key_prefix="app",
        timing_margin_ms=5.0,
        socket_timeout=1.0,
        socket_connect_timeout=1.0,
        default_timeout=2.0,
        fail_closed=True,
    )
    assert (limiter.rate_per_second, limiter.max_concurrent, limiter.default_timeout) == (10.0, 5, 2.0)
    by_another_name = RedisRateLimiter(
        connection_url="redis://localhost:1/0", group_id="b", max_concurrent=1, db=1
    )
    assert by_another_name._store is not limiter._store, "another password, another store"
    for fields, field in (
        ({"url": ""}, "url"),
        ({"url": "secret@localhost"}, "url"),
        ({"url": "memcached://localhost"}, "url"),
        ({"db": -1}, "db"),
        ({"key_prefix": ""}, "key_prefix"),
        ({"socket_timeout": 0}, "socket_timeout"),
        ({"sockettimeout": 1}, "sockettimeout"),
    ):
        given: dict[str, Any] = {
            "url": "redis://localhost:1",
            "group_id": "a",
            "rate_per_second": 1.0,
            **fields,
        }
        with pytest.raises(ConfigValidationError) as caught:
            RedisRateLimiter(**given)
        assert caught.value.field == field
        assert "secret" not in str(caught.value)
    for url in (
        "rediss+sentinel://a,b/main",
        "redis+cluster://a:1,b:2",
        "unix:///tmp/redis.sock",
        "REDIS://a",
    ):
        assert RedisRateLimiter(url, "api", rate_per_second=1.0).group_id == "api"
    config = RedisEngineConfig(url="redis://:secret@localhost:1/0", key_prefix="app")
    assert "secret" not in repr(config)
    made = RedisRateLimiter.from_config(config, group_id="a", rate_per_second=1.0)
    assert made.group_id == "a"


def test_from_config() -> None:
    limiter = MemoryRateLimiter.from_config(MemoryEngineConfig(), group_id="api", rate_per_second=5.0)
    assert type(limiter) is MemoryRateLimiter
    config = PostgresEngineConfig(url=URL, pool_max_size=3)
    postgres = PostgresRateLimiter.from_config(config, group_id="api", rate_per_second=5.0)
    assert postgres.rate_per_second == 5.0
    assert PostgresRateLimiter.from_config({"url": URL}, group_id="api", max_concurrent=5).max_concurrent == 5
    with pytest.raises(ConfigValidationError, match="engine"):
        MemoryRateLimiter.from_config(config, group_id="api", rate_per_second=5.0)


def test_equal_options_share_one_store_and_it_goes_with_the_last_limiter() -> None:
    from ratesync.engines import _engine_limiter

    first = PostgresRateLimiter(URL, "a", rate_per_second=1.0)
    second = PostgresRateLimiter(url=URL, group_id="b", max_concurrent=3, fail_closed=True)
    other = PostgresRateLimiter(URL, "a", rate_per_second=1.0, pool_max_size=3)
    assert first._store is second._store
    assert first._store is not other._store
    assert len(_engine_limiter._shared) == 2
    del first, second, other
    gc.collect()
    assert len(_engine_limiter._shared) == 0


# Memory -------------------------------------------------------------------------------------------


async def test_every_memory_limiter_has_a_state_of_its_own() -> None:
    for _ in range(3):  # as in a suite, whose tests all use one name
        limiter = MemoryRateLimiter(group_id="test", rate_per_second=0.001, max_concurrent=1)
        await limiter.initialize()
        assert await limiter.try_acquire()
        assert not await limiter.try_acquire()
        del limiter
        gc.collect()
    two = [MemoryRateLimiter("test", rate_per_second=0.001) for _ in range(2)]
    assert [await limiter.try_acquire() for limiter in two] == [True, True]
    ratesync.configure_limiter("test", rate_per_second=0.001)
    assert await ratesync.try_acquire("test")


def test_a_million_short_lived_limiters_need_few_stores() -> None:
    for number in range(2000):
        assert MemoryRateLimiter(f"tenant-{number % 3}", rate_per_second=0.001).try_acquire().wait()
        if number % 100 == 0:
            gc.collect()
    gc.collect()
    assert len(memory._stores) <= 500


def test_a_limiter_is_kept_by_its_permit() -> None:
    limiter = MemoryRateLimiter("held", max_concurrent=1)
    with limiter.acquire_context():
        del limiter
        gc.collect()
        other = MemoryRateLimiter("held", max_concurrent=1)
        assert other.try_acquire().wait()
        other.release()
    gc.collect()


async def test_the_options_of_ours_are_taken_too() -> None:
    with ManualClock() as clock:
        limiter = MemoryRateLimiter("api", rate_per_second=1.0, burst=3, max_hold_seconds=5.0)
        assert [await limiter.try_acquire() for _ in range(4)] == [True, True, True, False]
        await limiter.reset()
        assert await limiter.try_acquire(cost=2)
        clock.advance(1.0)
        assert (await limiter.get_state()).remaining == 2
        assert limiter.get_metrics().total_acquisitions == 4


async def test_a_limiter_is_used_again_after_disconnect_and_after_shutdown() -> None:
    limiter = MemoryRateLimiter("api", rate_per_second=0.001)
    for end in (limiter.disconnect, None):
        assert await limiter.try_acquire()
        if end is not None:
            await end()
        else:
            ratesync.shutdown()
        assert not limiter.is_initialized
        await limiter.initialize()
        assert limiter.is_initialized
        assert await limiter.try_acquire()
        await limiter.reset()


def test_two_runs_of_asyncio_use_one_limiter() -> None:
    limiter = MemoryRateLimiter("api", rate_per_second=200.0, max_concurrent=1)

    async def use() -> None:
        for _ in range(3):
            async with limiter:
                pass

    asyncio.run(use())
    asyncio.run(use())
    assert limiter.get_metrics().total_acquisitions == 6
