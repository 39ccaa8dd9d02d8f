"""The contract of several limits in one acquire, held against every store."""

from __future__ import annotations

from typing import Any

import pytest

from ratesync.testing import RedisCluster
from ratesync.testing.multi_contract import MultiLimitContract


class TestMemory(MultiLimitContract):
    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        return {"engine": "memory"}


class TestPostgres(MultiLimitContract):
    @pytest.fixture
    def store_options(self, ratesync_postgres_url: str) -> dict[str, Any]:
        return {"engine": "postgres", "url": ratesync_postgres_url, "auto_create": True}


class TestRedis(MultiLimitContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_url: str) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_url}


class TestRedisCluster(MultiLimitContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_cluster: RedisCluster) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_cluster.url, "hash_tag": "all"}
