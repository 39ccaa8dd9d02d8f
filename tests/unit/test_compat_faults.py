"""Promises that rate-sync makes and breaks, a test each. (With servers: tests/integration, tests/fault.)"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import ratesync
from ratesync import RateLimiter, check_limiter, configure_limiter, get_limiter
from ratesync.testing import ManualClock, reset_backend_store

pytestmark = pytest.mark.usefixtures("ratesync_registry")


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
async def test_a_rate_below_one_per_second_is_kept(rate: float) -> None:
    configure_limiter("slow", rate_per_second=rate)
    limiter = get_limiter("slow")
    with ManualClock() as clock:
        limiter = get_limiter("slow")
        assert (await limiter.get_state()).allowed, "a fresh limiter has a unit"
        assert await limiter.try_acquire()
        clock.advance(1.0)
        assert not await limiter.try_acquire()
        clock.advance(1 / rate - 1.0 + 1e-6)
        assert await limiter.try_acquire()


@pytest.mark.parametrize("rate", [100.0, 250.0, 1000.0])
async def test_a_rate_of_a_hundred_and_more_is_kept(rate: float) -> None:
    configure_limiter("fast", rate_per_second=rate)
    with ManualClock() as clock:
        limiter = get_limiter("fast")
        granted = 0
        for _ in range(2000):
            granted += await limiter.try_acquire()
            clock.advance(0.0005)
        assert granted <= rate + 1


def test_a_second_run_of_asyncio_goes_on_with_the_same_limits() -> None:
    configure_limiter("api", rate_per_second=0.001, burst=3, max_concurrent=1)

    async def use() -> bool:
        try:
            async with ratesync.acquire("api", timeout=0):
                await asyncio.sleep(0)
        except TimeoutError:
            return False
        return True

    assert [asyncio.run(use()) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    "content", ["[stores.db\n", '[limiters.a]\nstore = "nope"\n', "[limiters.a]\nrate = 1\n"]
)
def test_a_bad_file_does_not_break_the_import(ratesync_registry: Path, content: str) -> None:
    (ratesync_registry / "rate-sync.toml").write_text(content)
    code = (
        "import ratesync\n"
        "try:\n    ratesync.acquire('a')\n"
        "except ratesync.ConfigValidationError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rate-sync.toml" in done.stdout


async def test_cancelled_acquires_leak_no_slot() -> None:
    configure_limiter("slots", max_concurrent=3)
    held = [ratesync.acquire("slots") for _ in range(3)]
    for permit in held:
        await permit
    tasks = [asyncio.create_task(get_limiter("slots").acquire()) for _ in range(300)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for permit in held:
        permit.release()
    async with asyncio.timeout(10):  # a slot that met a cancellation on its way is given back behind it
        while (await get_limiter("slots").peek()).in_use:
            await asyncio.sleep(0)


async def test_more_releases_than_acquires_add_no_slot() -> None:
    configure_limiter("slots", max_concurrent=2)
    limiter = get_limiter("slots")
    for _ in range(5):
        await limiter.release()
    assert await limiter.try_acquire()
    async with ratesync.acquire("slots"):
        for _ in range(3):
            await limiter.release()  # the first one frees the bare acquire, never the body's
        assert await limiter.try_acquire()
        assert not await limiter.try_acquire()
    await limiter.release()


async def test_a_refusal_for_a_slot_loses_no_unit_of_the_rate() -> None:
    configure_limiter("both", rate_per_second=0.001, burst=2, max_concurrent=1)
    async with ratesync.acquire("both"):
        for timeout in (0, 0.01):
            assert not await get_limiter("both").try_acquire(timeout)
    assert await get_limiter("both").try_acquire()
    await get_limiter("both").release()


async def test_peeks_consume_nothing_and_say_when() -> None:
    configure_limiter("api", rate_per_second=0.5)
    with ManualClock() as clock:
        for _ in range(5):
            assert (await check_limiter("api", acquire_if_allowed=False)).allowed
            assert (await get_limiter("api").get_state()).allowed
        assert (await check_limiter("api")).allowed
        clock.advance(0.5)
        refused = await check_limiter("api")
        assert (refused.reset_in, refused.retry_after) == (pytest.approx(1.5), 2)


async def test_resetting_a_store_resets_all_its_limiters() -> None:
    ratesync.configure_store("mem", "memory")
    limiters: list[RateLimiter] = []
    for name in ("a", "b"):
        configure_limiter(name, "mem", rate_per_second=0.001)
        limiters.append(get_limiter(name))
        assert await limiters[-1].try_acquire()
    await reset_backend_store("mem")
    assert [await limiter.try_acquire() for limiter in limiters] == [True, True]


async def test_fail_closed_of_a_file_takes_effect(ratesync_registry: Path) -> None:
    (ratesync_registry / "rate-sync.toml").write_text(
        '[stores.db]\nengine = "postgres"\nurl = "postgresql://app@127.0.0.1:1/app"\n'
        "[limiters.closed]\nstore = 'db'\nrate_per_second = 1.0\nfail_closed = true\n"
        "[limiters.open]\nstore = 'db'\nrate_per_second = 1.0\n"
    )
    with pytest.raises(ratesync.RateLimiterAcquisitionError):
        await ratesync.acquire("closed")
    assert (await ratesync.acquire("open")).passed_open
    refused = await check_limiter("closed")
    assert (refused.allowed, refused.remaining) == (False, 0)
    allowed = await check_limiter("open")
    assert (allowed.allowed, allowed.remaining, allowed.limit) == (True, 1, 1)
    together = await ratesync.check_multi_limiters(["open", "closed"])
    assert (together.allowed, together.blocking_limiter_id) == (False, "closed")
    looked = await ratesync.check_multi_limiters(["open", "closed"], acquire_if_allowed=False)
    assert [result.allowed for result in looked.results] == [True, False]
