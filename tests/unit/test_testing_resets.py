"""reset_limiter, reset_all_limiters, reset_backend_store, and the manual clock."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import ratesync
from ratesync.testing import ManualClock, reset_all_limiters, reset_backend_store, reset_limiter

pytestmark = pytest.mark.usefixtures("ratesync_registry")


def exhausted(limiter_id: str, store: str = "memory", key: str | None = None) -> ratesync.RateLimiter:
    ratesync.configure_limiter(limiter_id, store, rate_per_second=0.01)
    limiter = ratesync.get_limiter(limiter_id)
    assert limiter.try_acquire(key=key).wait()
    assert not limiter.try_acquire(key=key).wait()
    return limiter


async def test_a_limiter_is_reset_by_object_and_by_id() -> None:
    limiter = exhausted("one")
    await reset_limiter(limiter)
    assert await limiter.try_acquire()
    await reset_limiter("one")
    assert await limiter.try_acquire()


async def test_resetting_an_unknown_limiter_says_so() -> None:
    with pytest.raises(ratesync.LimiterNotFoundError, match="nope"):
        await reset_limiter("nope")


def test_all_limiters_are_reset_also_without_a_loop() -> None:
    limiters = [exhausted(name) for name in "abc"]
    reset_all_limiters().wait()
    assert all(limiter.try_acquire().wait() for limiter in limiters)


async def test_a_store_is_reset_with_all_its_limiters_and_keys() -> None:
    ratesync.configure_store("here", "memory")
    ratesync.configure_store("there", "memory")
    first, second = exhausted("first", "here"), exhausted("second", "here", key="tenant")
    other = exhausted("other", "there")
    await reset_backend_store("here")
    assert await first.try_acquire()
    assert await second.try_acquire(key="tenant")
    assert not await other.try_acquire()


async def test_resetting_an_unknown_store_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="'nope' not found"):
        await reset_backend_store("nope")


def test_the_clock_stands_still_until_it_is_moved() -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    with ManualClock() as clock:
        limiter = ratesync.get_limiter("api")
        begin = clock.now
        assert limiter.try_acquire().wait()
        clock.advance(0.999)
        assert not limiter.try_acquire().wait()
        clock.advance(0.001)
        assert limiter.try_acquire().wait()
        assert clock.now == pytest.approx(begin + 1.0)


def test_the_clock_is_moved_by_whole_milliseconds_exactly() -> None:
    with ManualClock() as clock:
        start = clock.now
        for milliseconds in [64_999, 1, 7, 1_001, 299_999]:
            clock.advance(milliseconds / 1000)
        assert clock.now == start + 366.007


async def test_running_the_clock_lets_woken_tasks_run() -> None:
    ratesync.configure_limiter("api", rate_per_second=1 / 60)
    with ManualClock() as clock:
        done: list[int] = []

        async def job(number: int) -> None:
            async with ratesync.acquire("api"):
                done.append(number)

        tasks = [asyncio.create_task(job(number)) for number in range(3)]
        await clock.run(0)
        assert done == [0]
        await clock.run(60)
        assert done == [0, 1]
        await clock.run(60)
        await asyncio.gather(*tasks)


def test_after_the_clock_time_passes_by_itself() -> None:
    ratesync.configure_limiter("api", rate_per_second=1000.0)
    with ManualClock():
        assert ratesync.try_acquire("api").wait()
    for _ in range(3):
        ratesync.get_limiter("api").acquire().wait()


def test_time_only_goes_forward_and_only_while_started() -> None:
    clock = ManualClock()
    with pytest.raises(RuntimeError, match="not started"):
        clock.advance(1)
    with clock, pytest.raises(ValueError, match="forward"):
        clock.advance(-1)


def test_the_registry_fixture_gives_an_empty_directory(ratesync_registry: Path) -> None:
    assert Path.cwd() == ratesync_registry
    assert ratesync.list_limiters() == {}
