"""The contract of limits, held against every store; and what only the manual clock can show."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import ratesync
from ratesync.testing import ManualClock, RedisCluster, RedisSentinel
from ratesync.testing.limit_contract import SLOW, LimitContract, MakeLimiter


class TestMemory(LimitContract):
    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        return {"engine": "memory"}


class TestPostgres(LimitContract):
    @pytest.fixture
    def store_options(self, ratesync_postgres_url: str) -> dict[str, Any]:
        return {"engine": "postgres", "url": ratesync_postgres_url, "auto_create": True}


class TestRedis(LimitContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_url: str) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_url}


class TestMemoryAsTimePasses:
    """On the manual clock, so exactly."""

    @pytest.fixture
    def limit(self, ratesync_clock: ManualClock) -> MakeLimiter:
        def make(**options: Any) -> ratesync.RateLimiter:
            ratesync.configure_limiter("clocked", **options)
            return ratesync.get_limiter("clocked")

        return make

    def test_units_come_back_one_by_one_up_to_the_burst(
        self, limit: MakeLimiter, ratesync_clock: ManualClock
    ) -> None:
        limiter = limit(rate_per_second=2.0, burst=3)
        assert limiter.try_acquire(cost=3).wait()
        ratesync_clock.advance(0.499)
        assert limiter.peek().wait().remaining == 0
        ratesync_clock.advance(0.001)
        assert limiter.peek().wait().remaining == 1
        ratesync_clock.advance(60)
        assert [limiter.try_acquire().wait() for _ in range(4)] == [True, True, True, False]

    async def test_waiters_go_one_by_one_when_their_time_comes(
        self, limit: MakeLimiter, ratesync_clock: ManualClock
    ) -> None:
        limiter = limit(rate_per_second=1.0)
        passed: list[int] = []

        async def wait(number: int) -> None:
            async with limiter:
                passed.append(number)

        tasks = [asyncio.create_task(wait(number)) for number in range(4)]
        for seconds in range(4):
            await ratesync_clock.run(0 if seconds == 0 else 1)
            assert passed == list(range(seconds + 1))
        await asyncio.gather(*tasks)

    async def test_the_time_of_a_cancelled_waiter_goes_to_the_next(
        self, limit: MakeLimiter, ratesync_clock: ManualClock
    ) -> None:
        limiter = limit(rate_per_second=1.0)
        await limiter.acquire()
        first = asyncio.create_task(limiter.acquire())
        second = asyncio.create_task(limiter.acquire())
        await ratesync_clock.run(0.5)
        first.cancel()
        await ratesync_clock.run(0.5)
        assert second.done()
        assert first.cancelled()

    async def test_a_permit_says_how_long_it_waited(
        self, limit: MakeLimiter, ratesync_clock: ManualClock
    ) -> None:
        limiter = limit(rate_per_second=SLOW)
        await limiter.acquire()

        async def wait() -> float:
            async with limiter.acquire_context() as permit:
                return permit.waited

        task = asyncio.create_task(wait())
        await ratesync_clock.run(99.9)
        assert not task.done()
        await ratesync_clock.run(0.1)
        assert await task == pytest.approx(100.0)

    async def test_a_forgotten_bare_acquire_comes_back_after_its_lease(
        self, limit: MakeLimiter, ratesync_clock: ManualClock
    ) -> None:
        limiter = limit(max_concurrent=1, lease_seconds=30.0)
        with pytest.warns(ResourceWarning):
            await limiter.acquire_context()
        await ratesync_clock.run(29.9)
        assert not await limiter.try_acquire()
        await ratesync_clock.run(0.2)
        assert await limiter.try_acquire()

    async def test_a_waiter_for_a_slot_gives_up_at_its_deadline(
        self, limit: MakeLimiter, ratesync_clock: ManualClock
    ) -> None:
        limiter = limit(max_concurrent=1)
        async with limiter:
            task = asyncio.ensure_future(limiter.try_acquire(timeout=10.0))
            await ratesync_clock.run(9.9)
            assert not task.done()
            await ratesync_clock.run(0.2)
            assert await task is False


class TestRedisCluster(LimitContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_cluster: RedisCluster) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_cluster.url}


class TestRedisSentinel(LimitContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_sentinel: RedisSentinel) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_sentinel.url}
