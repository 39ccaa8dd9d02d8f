"""Failover by Sentinel, resharding and failover of a Cluster, under load.

Redis replicates without waiting: a failover may lose the last moments, so that limits hold up to one more
burst; resharding loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest

import ratesync
from ratesync.testing import RedisCluster, RedisSentinel

BUDGET = 0.3
# A call may cost its budget, and what a machine adds that stands still meanwhile.
AT_MOST = BUDGET + 8


def configure(url: str, **limiter: object) -> None:
    ratesync.configure_store("r", "redis", url=url, socket_timeout=1.0, socket_connect_timeout=1.0)
    ratesync.configure_limiter("api", "r", **({"outage_budget": BUDGET, "fail_closed": True} | limiter))


class Load:
    """Tasks that acquire for as long as the block lasts: what they got, what went wrong, how long it took."""

    def __init__(self) -> None:
        self.granted = 0
        self.errors: list[Exception] = []
        self.slowest = 0.0
        self.inside = 0
        self.most_inside = 0

    @contextlib.asynccontextmanager
    async def of(self, tasks: int, key: Callable[[int], str | None] = lambda _: None) -> AsyncIterator[Load]:
        done = False

        async def work(number: int) -> None:
            while not done:
                start = time.monotonic()
                try:
                    async with ratesync.acquire("api", key=key(number)):
                        self.slowest = max(self.slowest, time.monotonic() - start)
                        self.granted += 1
                        self.inside += 1
                        self.most_inside = max(self.most_inside, self.inside)
                        try:
                            await asyncio.sleep(0.001)
                        finally:
                            self.inside -= 1
                except ratesync.RateLimiterAcquisitionError as error:
                    self.slowest = max(self.slowest, time.monotonic() - start)
                    self.errors.append(error)
                    await asyncio.sleep(0.01)

        running = [asyncio.create_task(work(number)) for number in range(tasks)]
        try:
            yield self
        finally:
            done = True
            await asyncio.gather(*running)


async def goes_on(load: Load, grants: int = 1) -> None:
    """Until so many more were granted."""
    goal = load.granted + grants
    async with asyncio.timeout(60):
        while load.granted < goal:
            await asyncio.sleep(0.02)


async def recovers(key: str | None = None, within: float = 60.0) -> None:
    async with asyncio.timeout(within):
        while True:
            with contextlib.suppress(ratesync.RateLimiterAcquisitionError):
                async with ratesync.acquire("api", key=key):
                    return
            await asyncio.sleep(0.05)


async def in_thread(function: Callable[..., object], *arguments: object) -> object:
    return await asyncio.to_thread(function, *arguments)


@pytest.mark.parametrize("kind", [RedisCluster, RedisSentinel])
async def test_tls_and_passwords_reach_every_server(
    ratesync_registry, kind: type[RedisCluster] | type[RedisSentinel]
) -> None:
    with kind(tls=True, password="p w/@:%") as group:
        configure(group.url, rate_per_second=0.001, burst=1, outage_budget=20.0)
        keys = [f"k{number}" for number in range(9)]
        assert all(await asyncio.gather(*(ratesync.try_acquire("api", key=key) for key in keys)))
        assert not any(await asyncio.gather(*(ratesync.try_acquire("api", key=key) for key in keys)))
        ratesync.shutdown()


async def test_a_failover_by_sentinel_costs_each_call_its_budget_and_at_most_a_burst(
    ratesync_registry, ratesync_redis_sentinel: RedisSentinel
) -> None:
    group = ratesync_redis_sentinel
    configure(group.url, rate_per_second=50.0, burst=20)
    await recovers()
    load = Load()
    start = time.monotonic()
    async with load.of(10):
        await asyncio.sleep(0.3)
        await in_thread(group.kill_primary)
        await in_thread(group.wait_for_failover)
        await recovers()
        await goes_on(load)
    elapsed = time.monotonic() - start
    # A call waits for its slot (10 tasks at 50/s: 0.2 s) and for the store, never for longer.
    assert load.slowest < AT_MOST + 10 / 50
    assert load.granted <= 50.0 * (elapsed + 0.01) + 2 * 20 + 10
    for error in load.errors:
        assert "api" in str(error)


async def test_open_limiters_let_calls_pass_during_a_failover(
    ratesync_registry, ratesync_redis_sentinel: RedisSentinel
) -> None:
    group = ratesync_redis_sentinel
    configure(group.url, rate_per_second=1e6, burst=1000, fail_closed=False)
    await recovers()
    load = Load()
    async with load.of(5):
        await in_thread(group.kill_primary)
        await in_thread(group.wait_for_failover)
        metrics = ratesync.get_limiter("api").get_metrics
        async with asyncio.timeout(60):
            while True:
                before, granted = metrics().passed_open, load.granted
                await asyncio.sleep(0.2)
                if metrics().passed_open == before and load.granted > granted:
                    break
    assert load.errors == []
    assert load.slowest < AT_MOST


async def test_a_primary_that_hangs_is_left_for_its_successor(
    ratesync_registry, ratesync_redis_sentinel: RedisSentinel
) -> None:
    group = ratesync_redis_sentinel
    configure(group.url, rate_per_second=1e6, burst=1000, max_concurrent=5, lease_seconds=3.0)
    await recovers()
    load = Load()
    old = group.primary
    async with load.of(10):
        old.pause()
        await in_thread(group.wait_for_failover, old)
        await recovers()
        await asyncio.sleep(0.2)
    old.resume()
    assert load.slowest < AT_MOST
    async with asyncio.timeout(60):
        while (await ratesync.get_limiter("api").peek()).in_use != 0:
            await asyncio.sleep(0.05)


def move_on(cluster: RedisCluster, slot: int) -> None:
    """The slot, amid some others of its owner, goes to the next primary."""
    owner = cluster.owner_of(slot)
    target = next(node for node in cluster.primaries if node is not owner)
    others = [s for s in range(slot + 1, min(slot + 10, 16384)) if cluster.owner_of(s) is owner]
    cluster.move_slots([slot, *others], owner, target)


async def test_resharding_under_load_reaches_no_caller_and_limits_hold(
    ratesync_registry, ratesync_redis_cluster: RedisCluster
) -> None:
    cluster = ratesync_redis_cluster
    configure(cluster.url, rate_per_second=300.0, burst=20, max_concurrent=7, outage_budget=30.0)
    await recovers()
    server_keys = [key for node in cluster.primaries for key in node.call("KEYS", "*")]
    slots = sorted({cluster.slot_of(key) for key in server_keys})
    assert slots
    for node in cluster.primaries:
        node.call("CONFIG", "RESETSTAT")
    load = Load()
    start = time.monotonic()
    async with load.of(50):
        for _ in range(3):
            for slot in slots:
                await in_thread(move_on, cluster, slot)
                await goes_on(load, 40)  # at the new place, too
    elapsed = time.monotonic() - start
    assert load.errors == []
    assert load.most_inside <= 7
    assert load.granted > 100
    assert load.granted <= 300.0 * (elapsed + 0.01) + 20
    met = "".join(node.call("INFO", "errorstats") for node in cluster.primaries)
    assert "errorstat_MOVED" in met
    async with asyncio.timeout(60):
        while (await ratesync.get_limiter("api").peek()).in_use != 0:
            await asyncio.sleep(0.05)


async def test_limits_of_all_slots_survive_resharding_of_a_third_of_them(
    ratesync_registry, ratesync_redis_cluster: RedisCluster
) -> None:
    cluster = ratesync_redis_cluster
    configure(cluster.url, rate_per_second=0.001, burst=3, outage_budget=20.0)
    keys = [f"tenant-{number}" for number in range(200)]
    assert all(await asyncio.gather(*(ratesync.try_acquire("api", key=key) for key in keys)))
    first, second, _ = cluster.primaries
    mover = asyncio.create_task(in_thread(cluster.move_slots, 1500, first, second))
    again = await asyncio.gather(*(ratesync.try_acquire("api", key=key) for key in keys))
    await mover
    last = await asyncio.gather(*(ratesync.try_acquire("api", key=key) for key in keys))
    over = await asyncio.gather(*(ratesync.try_acquire("api", key=key) for key in keys))
    assert all(again)
    assert all(last)
    assert not any(over)  # nothing was forgotten on the way
    cluster.move_slots(1500, second, first)


async def test_limits_of_different_slots_in_one_acquire_are_refused_with_the_cure(
    ratesync_registry, ratesync_redis_cluster: RedisCluster
) -> None:
    configure(ratesync_redis_cluster.url, rate_per_second=0.001, burst=1)
    for name in ("one", "two", "three"):
        ratesync.configure_limiter(
            name, "r", rate_per_second=0.001, burst=1, fail_closed=True, outage_budget=20.0
        )
    with pytest.raises(ratesync.RateLimiterError, match="hash_tag"):
        async with ratesync.acquire("one", "two", "three"):
            pass
    for name in ("one", "two", "three"):
        assert await ratesync.try_acquire(name)  # nothing was charged


async def test_a_node_killed_under_load_is_replaced_and_the_others_go_on(
    ratesync_registry, ratesync_redis_cluster: RedisCluster
) -> None:
    cluster = ratesync_redis_cluster
    configure(cluster.url, rate_per_second=1e6, burst=1000)
    keys = [f"k{number}" for number in range(30)]
    for key in keys:
        await recovers(key)
    load = Load()
    async with load.of(30, key=lambda number: keys[number]):
        await asyncio.sleep(0.2)
        await in_thread(cluster.fail_over, cluster.primaries[1])
        for key in keys:
            await recovers(key)
        async with asyncio.timeout(60):
            while True:  # where the machine stands still for 0.3 s, calls are refused
                errors, before = len(load.errors), load.granted
                await asyncio.sleep(0.5)
                if load.granted > before and len(load.errors) == errors:
                    break
    assert load.slowest < AT_MOST


async def test_a_plain_url_of_a_node_is_enough_also_after_a_failover(
    ratesync_registry, ratesync_redis_cluster: RedisCluster
) -> None:
    cluster = ratesync_redis_cluster
    seed = cluster.primaries[2]
    configure(seed.url, rate_per_second=1e6, burst=1000)
    keys = [f"k{number}" for number in range(12)]
    for key in keys:
        await recovers(key)
    await in_thread(cluster.fail_over, seed)
    for key in keys:
        await recovers(key)
    await in_thread(cluster.heal)  # the seed is a replica now
    ratesync.shutdown()
    for key in keys:
        await recovers(key)
