"""The contract of state, held against every store; and what only the manual clock can show."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

import ratesync
from ratesync.testing import ManualClock, RedisCluster, RedisSentinel
from ratesync.testing.state_contract import (
    StateBatchContract,
    StateContract,
    StateCounterContract,
    StateExpiryContract,
    StateNameContract,
    StateTimeoutContract,
    StateValueContract,
)


class TestMemory(StateContract):
    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        return {"engine": "memory"}


class OverTheWire(
    StateValueContract, StateCounterContract, StateExpiryContract, StateNameContract, StateTimeoutContract
):
    """All but what is refused before anything is sent, and batches."""


class TestPostgres(OverTheWire, StateBatchContract):
    @pytest.fixture
    def store_options(self, ratesync_postgres_url: str) -> dict[str, Any]:
        return {"engine": "postgres", "url": ratesync_postgres_url, "auto_create": True}


class TestRedis(OverTheWire, StateBatchContract):
    ordered_scan = False

    @pytest.fixture
    def store_options(self, ratesync_redis_url: str) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_url}


class TestRedisCluster(OverTheWire):
    ordered_scan = False

    @pytest.fixture
    def store_options(self, ratesync_redis_cluster: RedisCluster) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_cluster.url}

    def test_all_or_nothing_over_several_slots_is_refused_with_the_cure(self, state: ratesync.State) -> None:
        batch = [ratesync.ops.set(f"k{number}", 1) for number in range(50)]
        with pytest.raises(ratesync.ConfigValidationError, match="hash_tag"):
            state.many(batch, atomic=True).wait()
        assert state.many([ratesync.ops.get(op.key) for op in batch]).wait() == [None] * 50
        assert state.many(batch).wait() == [1] * 50


class TestRedisClusterInOneSlot(StateBatchContract, StateTimeoutContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_cluster: RedisCluster) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_cluster.url, "hash_tag": "one"}


class TestRedisSentinel(StateValueContract, StateBatchContract):
    @pytest.fixture
    def store_options(self, ratesync_redis_sentinel: RedisSentinel) -> dict[str, Any]:
        return {"engine": "redis", "url": ratesync_redis_sentinel.url}


class TestMemoryAsTimePasses:
    """On the manual clock, so exactly."""

    @pytest.fixture
    def state(self, ratesync_clock: ManualClock) -> ratesync.State:
        ratesync.configure_store("clocked", "memory")
        return ratesync.get_store("clocked").state()

    @pytest.mark.parametrize(
        ("ttl", "lives"),
        [
            (1, 1.0),
            (0.25, 0.25),
            (timedelta(hours=1), 3600.0),
            (0.001, 0.001),
            (1e-9, 0.001),
            (0.0015, 0.001),
        ],
    )
    def test_a_key_lives_for_its_ttl_and_not_a_millisecond_more(
        self, state: ratesync.State, ratesync_clock: ManualClock, ttl: Any, lives: float
    ) -> None:
        assert state.check_and_set("k", "v", ttl=ttl).wait()
        ratesync_clock.advance(lives - 0.0005)
        assert state.get("k").wait() == "v"
        assert not state.check_and_set("k", "v").wait()
        ratesync_clock.advance(0.002)
        assert state.get("k").wait() is None
        assert state.check_and_set("k", "v").wait()

    def test_a_renewed_counter_lives_on_and_another_ends_at_its_time(
        self, state: ratesync.State, ratesync_clock: ManualClock
    ) -> None:
        for turn in range(1, 6):
            assert state.increment("renewed", ttl=10, renew=True).wait() == turn
            assert state.increment("window", ttl=10).wait() == (1 if turn % 2 else 2)
            ratesync_clock.advance(6)

    def test_a_swap_keeps_the_time_that_runs(
        self, state: ratesync.State, ratesync_clock: ManualClock
    ) -> None:
        state.set("k", "a", ttl=10).wait()
        ratesync_clock.advance(6)
        assert state.compare_and_swap("k", expected=1, value="b").wait() == 2
        ratesync_clock.advance(5)
        with pytest.raises(ratesync.StaleVersionError):
            state.compare_and_swap("k", expected=2, value="c").wait()

    def test_timeouts_fall_due_at_their_time_and_again_after_the_lease(
        self, state: ratesync.State, ratesync_clock: ManualClock
    ) -> None:
        state.schedule("k", timedelta(seconds=10)).wait()
        ratesync_clock.advance(9.99)
        assert state.claim_due().wait() == []
        ratesync_clock.advance(0.02)
        (first,) = state.claim_due(lease=60).wait()
        ratesync_clock.advance(59.9)
        assert state.claim_due().wait() == []
        ratesync_clock.advance(0.2)
        (second,) = state.claim_due(lease=60).wait()
        assert second.due_at == first.due_at
        assert second.claim > first.claim

    def test_what_expired_is_purged_once_and_its_versions_are_not_used_again(
        self, state: ratesync.State, ratesync_clock: ManualClock
    ) -> None:
        for number in range(50):
            for _ in range(3):
                state.set(f"k{number}", "v", ttl=1).wait()
            state.set(f"living{number}", "v", ttl=100).wait()
        ratesync_clock.advance(2)
        assert [state.purge(20).wait() for _ in range(4)] == [20, 20, 10, 0]
        for number in range(50):
            assert state.set(f"k{number}", "v").wait() > 3
            assert state.set(f"living{number}", "v").wait() == 2
        assert state.set("never was", "v").wait() == 1
