"""The contract of idempotent operations, held against every store."""

from __future__ import annotations

from typing import Any

import pytest

from ratesync.testing import RedisCluster
from ratesync.testing.idempotency_contract import IdempotencyContract


class TestMemory(IdempotencyContract):
    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        return {"engine": "memory"}


class TestPostgres(IdempotencyContract):
    @pytest.fixture
    def store_options(self, ratesync_postgres_url: str) -> dict[str, Any]:
        return {"engine": "postgres", "url": ratesync_postgres_url, "auto_create": True}


class TestRedis(IdempotencyContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_url: str) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_url}


class TestRedisCluster(IdempotencyContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_cluster: RedisCluster) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_cluster.url}
