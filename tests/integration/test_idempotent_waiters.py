"""Who waits for the result of an operation that runs in another process is woken by its end.

The engine's clock stands still here, so nothing looks now and then: only what rings makes a waiter look.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

import ratesync
from ratesync.idempotency import Idempotent
from ratesync.testing import ManualClock, RedisCluster

pytestmark = pytest.mark.timeout(180)
# Looks: the first one; once in line; when it rang. Where the store begins to hear meanwhile, twice more: what
# was told before was missed, and the place is taken anew.
FEW = 5


@pytest.fixture
def clock(ratesync_registry: object) -> Iterator[ManualClock]:
    with ManualClock() as clock:
        yield clock


def _options(request: pytest.FixtureRequest, kind: str) -> dict[str, Any]:
    if kind == "memory":
        return {"engine": "memory"}
    if kind == "postgres":
        url = request.getfixturevalue("ratesync_postgres_url")
        return {"engine": "postgres", "url": url, "auto_create": True}
    if kind == "cluster":
        cluster: RedisCluster = request.getfixturevalue("ratesync_redis_cluster")
        return {"engine": "redis", "url": cluster.url}
    return {"engine": "redis", "url": request.getfixturevalue("ratesync_redis_url")}


@pytest.fixture(params=["memory", "postgres", "redis", "cluster"])
async def stores(request: pytest.FixtureRequest, clock: ManualClock) -> tuple[ratesync.Store, ratesync.Store]:
    """Two processes, as far as the server can tell; in memory there is but one."""
    options = _options(request, request.param)
    for name in ("here", "there"):
        ratesync.configure_store(name, **options)
    here = ratesync.get_store("here")
    there = here if request.param == "memory" else ratesync.get_store("there")
    for store in (here, there):
        await store.state().initialize()
    # Hearing begins with the first who waits; until then it is looked now and then, which takes time.
    heard: set[Any] = set()
    for turn in itertools.count():
        if heard:
            break
        async with here.idempotent(f"first {turn}"):
            waiter = asyncio.create_task(_wait_for(there, f"first {turn}"))
            for _ in range(40):
                await _moment(clock)
        heard, _ = await asyncio.wait([waiter], timeout=3)
        while not waiter.done():
            await _moment(clock)
        assert await waiter == (True, None)
    return here, there


async def _moment(clock: ManualClock) -> None:
    """A little later; not by much more than really passes, for what has to be answered in time."""
    await asyncio.sleep(0.02)
    clock.advance(0.05)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each key was looked at, by everybody together."""
    count: collections.Counter[str] = collections.Counter()
    create = Idempotent._create

    def counting(self: Idempotent, mine: dict[str, Any]) -> Any:
        count[self.key] += 1
        return create(self, mine)

    monkeypatch.setattr(Idempotent, "_create", counting)
    return count


async def _wait_for(store: ratesync.Store, key: str) -> tuple[bool, Any]:
    async with store.idempotent(key, wait=3600) as op:
        if not op.done:
            op.result = "ran after all"
        return op.done, op.result


async def _settled(looks: collections.Counter[str], key: str) -> None:
    """Until nobody looks any more."""
    seen = -1
    while looks[key] < 3 or looks[key] != seen:
        seen = looks[key]
        await asyncio.sleep(0.7)


async def test_a_waiter_gets_the_result_once_it_is_committed(stores, looks):
    here, there = stores
    async with here.idempotent("key") as op:
        waiter = asyncio.create_task(_wait_for(there, "key"))
        await _settled(looks, "key")
        assert looks["key"] <= 1 + FEW - 1
        op.result = "receipt"
    assert await asyncio.wait_for(waiter, 60) == (True, "receipt")
    assert looks["key"] <= 1 + FEW


async def test_a_waiter_runs_when_the_first_one_fails(stores, looks):
    here, there = stores
    waiters = []

    async def fail() -> None:
        async with here.idempotent("key"):
            waiters.append(asyncio.create_task(_wait_for(there, "key")))
            await _settled(looks, "key")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await asyncio.wait_for(waiters[0], 60) == (False, "ran after all")


async def test_a_waiter_runs_when_the_first_one_is_forgotten(stores, looks):
    here, there = stores

    async def slow() -> None:
        async with here.idempotent("key"):
            waiter = asyncio.create_task(_wait_for(there, "key"))
            await _settled(looks, "key")
            assert await here.idempotent("key").forget()
            assert await asyncio.wait_for(waiter, 60) == (False, "ran after all")

    with pytest.raises(ratesync.LeaseLostError):
        await slow()


async def test_all_who_wait_are_woken(stores, looks):
    here, _ = stores
    async with here.idempotent("key") as op:
        waiters = [asyncio.create_task(_wait_for(store, "key")) for store in stores for _ in range(20)]
        await _settled(looks, "key")
        op.result = 1
    done, pending = await asyncio.wait(waiters, timeout=60)
    assert not pending
    assert {task.result() for task in done} == {(True, 1)}
    assert looks["key"] <= 1 + len(waiters) * FEW


async def test_a_waiter_whose_commit_was_cancelled_still_rings(stores, looks):
    here, there = stores
    entered, leave = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with here.idempotent("key") as op:
            op.result = "late"
            entered.set()
            await leave.wait()

    task = asyncio.create_task(first())
    await entered.wait()
    waiter = asyncio.create_task(_wait_for(there, "key"))
    await _settled(looks, "key")
    leave.set()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    done, result = await asyncio.wait_for(waiter, 60)
    assert (done, result) in ((True, "late"), (False, "ran after all"))
