"""Objects that are dropped, in cycles, or used a hundred thousand times: slots come back, memory stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import tracemalloc
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ratesync._engine import Engine, Limiter, Permit
from ratesync.errors import RateLimiterAcquisitionError


class Rig:
    """A manual clock and limiters on it."""

    def __init__(self) -> None:
        self.engine = Engine(manual_clock=True)
        self.store = self.engine.add_store("memory", "memory", {})

    def limiter(self, **options: float) -> Limiter:
        return Limiter(self.store, "x", **options)

    async def settle(self, seconds: float = 0.0) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.engine.advance(0)
        self.engine.advance(seconds)
        for _ in range(4):
            await asyncio.sleep(0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.engine.shutdown()


async def in_use(limiter: Limiter) -> int:
    return (await limiter._peek(None))["in_use"]


# Dropped ------------------------------------------------------------------------------------------


async def test_a_dropped_permit_warns_and_gives_its_slot_back(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    permit = limiter.acquire_context()
    await permit.__aenter__()
    with pytest.warns(ResourceWarning, match="limiter 'x' was dropped without release"):
        del permit
    await rig.settle()
    assert await in_use(limiter) == 0


async def test_a_dropped_permit_that_had_to_wait_does_so_too(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    await first.__aenter__()
    waiting = asyncio.create_task(limiter.acquire_context().__aenter__())
    await rig.settle()
    first.release()
    await rig.settle()
    permit = await waiting
    assert await in_use(limiter) == 1
    del waiting
    with pytest.warns(ResourceWarning):
        del permit
    await rig.settle()
    assert await in_use(limiter) == 0


@pytest.mark.parametrize("waited", [False, True])
async def test_a_dropped_bare_permit_is_the_limiters_to_release(rig: Rig, waited: bool) -> None:
    limiter = rig.limiter(max_concurrent=1, lease_seconds=30)
    with pytest.warns(ResourceWarning):
        await bare(rig, limiter, waited)
    await rig.settle()
    assert await in_use(limiter) == 1  # existing code releases it later, by name
    assert limiter._release_bare() is True
    assert limiter._release_bare() is False
    await rig.settle()
    assert await in_use(limiter) == 0
    async with limiter.acquire_context():
        await rig.settle(31)  # and the lease of the one that was released frees nobody else's
        assert await in_use(limiter) == 1


@pytest.mark.parametrize("waited", [False, True])
async def test_a_dropped_bare_permit_comes_back_after_its_lease(rig: Rig, waited: bool) -> None:
    limiter = rig.limiter(max_concurrent=1, lease_seconds=30)
    with pytest.warns(ResourceWarning):
        await bare(rig, limiter, waited)
    queued = asyncio.create_task(limiter._try(None, 1, None))
    await rig.settle(29.9)
    assert not queued.done()
    await rig.settle(0.2)
    assert await asyncio.wait_for(queued, 30) is True
    assert limiter._release_bare() is True  # the queued one's
    await rig.settle()
    assert await in_use(limiter) == 0
    assert limiter._counters()["held"] == 0


async def bare(rig: Rig, limiter: Limiter, waited: bool) -> None:
    if not waited:
        await limiter.acquire_context()
        return
    first = limiter.acquire_context()
    await first.__aenter__()

    async def take() -> None:
        await limiter.acquire_context()

    task = asyncio.create_task(take())
    await rig.settle()
    first.release()
    await rig.settle()
    await task


async def test_a_rate_permit_may_be_dropped_in_silence(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await limiter.acquire_context()
        await limiter.acquire_context(key="k").__aenter__()


async def test_bare_permits_released_by_themselves_are_not_remembered(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=2)
    long_held = await limiter.acquire_context()
    for _ in range(1000):
        (await limiter.acquire_context()).release()
    newest = await limiter.acquire_context()
    assert limiter._release_bare() is True  # the oldest that is still held
    newest.release()
    assert await in_use(limiter) == 0
    long_held.release()
    assert await in_use(limiter) == 0


# Cycles -------------------------------------------------------------------------------------------


async def test_a_cycle_of_limiter_and_its_own_attributes_is_collected(rig: Rig) -> None:
    class Named(Limiter):
        pass

    limiter = Named(rig.store, "cycle", max_concurrent=1)
    limiter.itself = limiter
    gone = weakref.ref(limiter)
    del limiter
    gc.collect()
    assert gone() is None


async def test_a_task_dropped_while_it_waits_is_kept_by_the_engine_and_served(rig: Rig) -> None:
    # asyncio drops a task that nobody refers to ("Task was destroyed but it is pending").
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    await first.__aenter__()
    entered: list[int] = []

    async def wait() -> None:
        async with limiter.acquire_context():
            entered.append(1)

    asyncio.create_task(wait())  # noqa: RUF006
    await rig.settle()
    gc.collect()
    first.release()
    await rig.settle()
    assert entered == [1]
    assert await in_use(limiter) == 0


async def test_finished_waits_leave_no_garbage(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)

    class Marker:
        pass

    async def wait(marker: Marker) -> None:
        async with limiter.acquire_context():
            await asyncio.sleep(0)

    markers = [Marker() for _ in range(20)]
    gone = [weakref.ref(marker) for marker in markers]
    tasks = [asyncio.create_task(wait(marker)) for marker in markers]
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    gc.collect()
    gc.disable()
    try:
        markers.clear()
        tasks.clear()
        del wait
        await rig.settle()
    finally:
        gc.enable()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 20


# Leaks --------------------------------------------------------------------------------------------


async def enter_and_leave(limiter: Limiter) -> None:
    async with limiter.acquire_context():
        pass


async def enter_bound(limiter: Limiter) -> None:
    async with limiter:
        pass


async def enter_key(limiter: Limiter) -> None:
    async with limiter.acquire_context(1, cost=1, key="key") as permit:
        assert permit.remaining >= 0


async def bare_and_release(limiter: Limiter) -> None:
    (await limiter.acquire_context()).release()


async def bare_by_name(limiter: Limiter) -> None:
    await limiter._acquire_bare(None, 1, None)
    limiter._release_bare()


async def tried_in_vain(limiter: Limiter) -> None:
    async with limiter:
        assert await limiter._try(0, 1, None) is False
        with contextlib.suppress(RateLimiterAcquisitionError):
            await limiter.acquire_context(0)


async def waited_in_vain(limiter: Limiter) -> None:
    async with limiter:
        task = asyncio.ensure_future(limiter.acquire_context())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def waited(limiter: Limiter) -> None:
    async with limiter:
        task = asyncio.create_task(enter_and_leave(limiter))
        await asyncio.sleep(0)
    await task


async def peeked(limiter: Limiter) -> None:
    await limiter._peek(None)
    limiter._counters()


async def bad_arguments(limiter: Limiter) -> None:
    for bad in ({"cost": 0}, {"key": ""}, {"timeout": -1}, {"unknown": 1}):
        with contextlib.suppress(ValueError, TypeError):
            limiter.acquire_context(**bad)


def in_thread(limiter: Limiter) -> None:
    with limiter.acquire_context():
        pass
    with limiter:
        pass


USES = [
    (enter_and_leave, 100_000),
    (enter_bound, 100_000),
    (enter_key, 20_000),
    (bare_and_release, 20_000),
    (bare_by_name, 20_000),
    (tried_in_vain, 5_000),
    (waited_in_vain, 3_000),
    (waited, 3_000),
    (peeked, 3_000),
    (bad_arguments, 3_000),
]


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize(("use", "times"), USES, ids=lambda value: getattr(value, "__name__", ""))
async def test_repeated_use_does_not_grow(
    rig: Rig, use: Callable[[Limiter], Awaitable[None]], times: int
) -> None:
    limiter = rig.limiter(max_concurrent=1)
    singletons = (limiter, None, True, False, Permit, type(limiter), asyncio.get_running_loop())

    async def repeat(count: int) -> None:
        for _ in range(count):
            await use(limiter)
        await rig.settle()
        gc.collect()

    await repeat(times // 10)
    before = [sys.getrefcount(thing) for thing in singletons]
    tracemalloc.start()
    try:
        await repeat(max(100, times // 20))  # what tracemalloc sees: Python objects
        first = tracemalloc.get_traced_memory()[0]
        await repeat(max(100, times // 20))
        assert tracemalloc.get_traced_memory()[0] - first < 20_000
    finally:
        tracemalloc.stop()
    memory = rss() if sys.platform == "linux" else 0
    await repeat(times)
    after = [sys.getrefcount(thing) for thing in singletons]
    assert all(abs(now - then) < 50 for now, then in zip(after, before, strict=True))
    if sys.platform == "linux":  # and the engine's
        assert rss() - memory < max(2_000_000, times * 20)


def test_repeated_use_in_threads_does_not_grow() -> None:
    rig = Rig()
    limiter = rig.limiter(max_concurrent=1)
    for _ in range(5_000):
        in_thread(limiter)
    before = sys.getrefcount(limiter)
    memory = rss() if sys.platform == "linux" else 0
    for _ in range(100_000):
        in_thread(limiter)
    assert abs(sys.getrefcount(limiter) - before) < 10
    if sys.platform == "linux":
        assert rss() - memory < 2_000_000
    rig.engine.shutdown()


async def test_a_million_keys_are_forgotten_when_they_are_idle(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=1000.0)
    memory = 0
    for number in range(200_000):
        await limiter.acquire_context(0, key=f"key-{number}")
        if number % 1000 == 0:
            rig.engine.advance(1)
        if number == 50_000 and sys.platform == "linux":
            memory = rss()
    if sys.platform == "linux":
        assert rss() - memory < 20_000_000
