"""The contract of locks, held against every store; and what only the manual clock can show."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import ratesync
from ratesync.testing import ManualClock, RedisCluster, RedisSentinel
from ratesync.testing.lock_contract import LockContract


class TestMemory(LockContract):
    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        return {"engine": "memory"}


class TestPostgres(LockContract):
    @pytest.fixture
    def store_options(self, ratesync_postgres_url: str) -> dict[str, Any]:
        return {"engine": "postgres", "url": ratesync_postgres_url, "auto_create": True}


class TestRedis(LockContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_url: str) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_url}


class TestRedisCluster(LockContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_cluster: RedisCluster) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_cluster.url}


class TestRedisSentinel(LockContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_sentinel: RedisSentinel) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_sentinel.url}


class TestMemoryAsTimePasses:
    """On the manual clock, so exactly."""

    @pytest.fixture
    def store(self, ratesync_clock: ManualClock) -> ratesync.Store:
        ratesync.configure_store("clocked", "memory")
        return ratesync.get_store("clocked")

    async def test_a_waiter_takes_over_when_the_lease_is_over(
        self, store: ratesync.Store, ratesync_clock: ManualClock
    ) -> None:
        first = await store.try_lock("name", ttl=30, auto_renew=False)
        assert first is not None
        waiter = asyncio.ensure_future(store.lock("name", ttl=30, timeout=100).__aenter__())
        await ratesync_clock.run(29.9)
        assert not waiter.done()
        assert not first.lost
        await ratesync_clock.run(0.2)
        second = await waiter
        assert second.token > first.token
        assert first.lost
        assert await second.release()

    async def test_a_waiter_gives_up_at_its_timeout(
        self, store: ratesync.Store, ratesync_clock: ManualClock
    ) -> None:
        lease = await store.try_lock("name", ttl=30)
        assert lease is not None
        waiter = asyncio.ensure_future(store.lock("name", ttl=30, timeout=10).__aenter__())
        await ratesync_clock.run(9.9)
        assert not waiter.done()
        await ratesync_clock.run(0.2)
        with pytest.raises(ratesync.LockTimeoutError):
            await waiter
        assert await lease.release()

    async def test_a_renewed_lease_goes_on_for_ever(
        self, store: ratesync.Store, ratesync_clock: ManualClock
    ) -> None:
        lease = await store.try_lock("name", ttl=30, auto_renew=True)
        assert lease is not None
        for _ in range(100):
            await ratesync_clock.run(9)
            assert not lease.lost
            assert lease.remaining > 0
        assert await store.try_lock("name", ttl=30) is None
        assert await lease.release()
