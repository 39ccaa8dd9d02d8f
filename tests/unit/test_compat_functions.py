"""Section 2 of the compatibility contract: the functions by name, called as existing code calls them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import ratesync
from ratesync import (
    LimiterNotFoundError,
    MultiLimiterResult,
    RateLimiterAcquisitionError,
    RateLimitResult,
    check_limiter,
    check_multi_limiters,
    configure_limiter,
    configure_store,
    get_limiter,
)
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")


# Configuring and looking up -----------------------------------------------------------------------


async def test_the_program_of_the_readme_runs() -> None:
    configure_store("mem", strategy="memory")
    configure_limiter("api", store_id="mem", rate_per_second=1000.0, max_concurrent=5, timeout=30.0)
    await ratesync.initialize_all_limiters()
    permit = await ratesync.acquire("api")
    await get_limiter("api").release()
    del permit
    async with ratesync.acquire("api"):
        pass
    assert ratesync.list_stores()["mem"]["initialized"] is True
    listed = ratesync.list_limiters()["api"]
    assert listed["backend"] == "mem"
    assert listed["metrics"].total_acquisitions == 2
    assert {"algorithm", "rate_per_second", "limit", "window_seconds", "fail_closed", "initialized"} <= set(
        listed
    )


def test_all_parameters_may_be_positional() -> None:
    configure_store("mem", "memory")
    configure_limiter("api", "mem", 10.0, 5, 2.0, "token_bucket", None, None, True)
    limiter = get_limiter("api")
    assert (limiter.rate_per_second, limiter.max_concurrent, limiter.default_timeout) == (10.0, 5, 2.0)
    assert limiter.fail_closed is True


async def test_a_clone_is_reused_and_initialized() -> None:
    configure_limiter("tenant", "memory", rate_per_second=5.0)
    first = await ratesync.get_or_clone_limiter("tenant", "a")
    assert first is await ratesync.get_or_clone_limiter("tenant", "a")
    assert first.group_id == "tenant:a"
    assert first.is_initialized
    with pytest.raises(ValueError, match="already exists"):
        ratesync.clone_limiter("tenant", "tenant:a")


async def test_a_timeout_is_an_acquisition_error_with_the_limiter_in_it() -> None:
    configure_limiter("api", rate_per_second=0.01)
    await ratesync.acquire("api")
    with pytest.raises(RateLimiterAcquisitionError) as caught:
        async with ratesync.acquire("api", timeout=0.01):
            pytest.fail("granted")
    assert caught.value.group_id == "api"


async def test_the_legacy_names_warn_and_work_where_they_can(caplog: pytest.LogCaptureFixture) -> None:
    configure_limiter("api", rate_per_second=5.0)
    with caplog.at_level(logging.WARNING, "ratesync"):
        assert ratesync.get_rate_limiter("api") is get_limiter("api")
        await ratesync.initialize_rate_limiter("api")
        with pytest.raises(NotImplementedError, match="configure_store"):
            ratesync.configure_rate_limiter("api", backend="memory", rate_per_second=1)
    assert [record.getMessage().split("(")[0] for record in caplog.records] == [
        "get_rate_limiter",
        "initialize_rate_limiter",
        "configure_rate_limiter",
    ]


# check_limiter ------------------------------------------------------------------------------------


async def test_a_check_takes_one_unit_and_tells_the_true_numbers() -> None:
    configure_limiter("api", rate_per_second=2.0, burst=3)
    with ManualClock() as clock:
        first = await check_limiter("api")
        assert first == RateLimitResult(True, 3, 2, pytest.approx(0.5), "api")
        await check_limiter("api")
        await check_limiter("api")
        refused = await check_limiter("api")
        assert (refused.allowed, refused.limit, refused.remaining) == (False, 3, 0)
        assert refused.reset_in == pytest.approx(0.5)
        assert refused.retry_after == 1
        clock.advance(refused.reset_in)
        assert (await check_limiter("api")).allowed


async def test_a_look_charges_nothing_however_often() -> None:
    configure_limiter("api", rate_per_second=1.0, burst=2)
    with ManualClock():
        for _ in range(10):
            result = await check_limiter("api", acquire_if_allowed=False)
            assert (result.allowed, result.remaining, result.reset_in) == (True, 2, 0.0)
        await get_limiter("api").acquire()
        await get_limiter("api").acquire()
        for _ in range(3):
            result = await check_limiter("api", acquire_if_allowed=False)
            assert (result.allowed, result.remaining) == (False, 0)
            assert result.reset_in == pytest.approx(1.0)


async def test_a_check_leaves_no_slot_held() -> None:
    configure_limiter("slots", max_concurrent=1)
    limiter = get_limiter("slots")
    for _ in range(5):
        result = await check_limiter("slots")
        assert (result.allowed, result.limit) == (True, 1)
    assert (await limiter.peek()).in_use == 0
    async with ratesync.acquire("slots"):
        for look in (True, False):
            result = await check_limiter("slots", acquire_if_allowed=not look)
            assert (result.allowed, result.limit, result.remaining) == (False, 1, 0)
    assert (await check_limiter("slots", False)).allowed
    assert not await limiter.release(), "a check left a bare acquire behind"


async def test_a_check_waits_as_long_as_it_is_told() -> None:
    configure_limiter("api", rate_per_second=1.0)
    with ManualClock() as clock:
        await check_limiter("api")
        assert not (await check_limiter("api", timeout=0.9)).allowed
        waiting = asyncio.ensure_future(check_limiter("api", timeout=1.5))
        await clock.run(1.0)
        assert (await waiting).allowed


def test_a_check_works_in_a_plain_thread() -> None:
    configure_limiter("api", rate_per_second=0.01)
    assert check_limiter("api").wait().allowed
    assert not check_limiter("api").wait().allowed
    assert not check_multi_limiters(["api"]).wait().allowed


async def test_an_unknown_limiter_is_an_error() -> None:
    with pytest.raises(LimiterNotFoundError):
        await check_limiter("nope")


async def test_a_cancelled_check_leaves_nothing_behind() -> None:
    configure_limiter("api", max_concurrent=1)
    configure_limiter("rate", rate_per_second=1.0)
    with ManualClock() as clock:
        async with ratesync.acquire("api"):
            waiting = asyncio.ensure_future(check_multi_limiters(["rate", "api"], timeout=60))
            await clock.run(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await clock.run(0)
        assert (await get_limiter("rate").peek()).remaining == 1
        assert (await get_limiter("api").peek()).in_use == 0


# check_multi_limiters -----------------------------------------------------------------------------


async def test_no_limiter_allows_everything() -> None:
    assert await check_multi_limiters([]) == MultiLimiterResult(True, 1000, 999, 60.0, None, [])


@pytest.mark.parametrize("blocking", [0, 1, 2])
async def test_a_refusal_of_one_charges_none(blocking: int) -> None:
    names = ["user", "ip", "slots"]
    configure_limiter("user", rate_per_second=1.0, burst=10)
    configure_limiter("ip", rate_per_second=1.0, burst=10)
    configure_limiter("slots", rate_per_second=1.0, burst=10, max_concurrent=3)
    with ManualClock():
        for _ in range(10):
            await get_limiter(names[blocking]).acquire()
            await get_limiter(names[blocking]).release()
        for _ in range(3):
            result = await check_multi_limiters(names)
            assert not result.allowed
            assert result.blocking_limiter_id == names[blocking]
            assert [part.allowed for part in result.results] == [i != blocking for i in range(3)]
            assert [part.limiter_id for part in result.results] == names
        for place, name in enumerate(names):
            state = await get_limiter(name).peek()
            assert state.in_use == 0
            assert state.current_usage == (10 if place == blocking else 0)


async def test_an_allowed_check_charges_each_once() -> None:
    configure_limiter("user", rate_per_second=1.0, burst=10)
    configure_limiter("ip", rate_per_second=1.0, burst=5, max_concurrent=3)
    with ManualClock():
        result = await check_multi_limiters(["user", "ip"])
        assert (result.allowed, result.blocking_limiter_id) == (True, None)
        assert result.results[0].remaining == 9
        assert (await get_limiter("user").peek()).remaining == 9
        state = await get_limiter("ip").peek()
        assert (state.current_usage, state.in_use) == (1, 0)


async def test_looking_at_several_charges_none() -> None:
    configure_limiter("user", rate_per_second=1.0, burst=10)
    configure_limiter("ip", rate_per_second=1.0, burst=5)
    with ManualClock():
        for _ in range(8):
            result = await check_multi_limiters(["user", "ip"], acquire_if_allowed=False)
            assert (result.allowed, result.limit, result.remaining) == (True, 5, 5)


async def test_a_repeated_name_counts_once() -> None:
    configure_limiter("api", rate_per_second=1.0, burst=3)
    with ManualClock():
        result = await check_multi_limiters(["api", "api"])
        assert [part.remaining for part in result.results] == [2, 2]
        assert (await get_limiter("api").peek()).remaining == 2


async def test_a_misspelt_name_is_an_error_and_not_an_open_door() -> None:
    configure_limiter("api", rate_per_second=1.0)
    with ManualClock():
        with pytest.raises(LimiterNotFoundError, match="did you mean 'api'"):
            await check_multi_limiters(["api", "apy"])
        assert (await get_limiter("api").peek()).remaining == 1


async def test_many_checks_at_once_never_exceed_the_burst() -> None:
    configure_limiter("a", rate_per_second=0.001, burst=7)
    configure_limiter("b", rate_per_second=0.001, burst=9)
    results: list[Any] = await asyncio.gather(*(check_multi_limiters(["a", "b"]) for _ in range(40)))
    assert sum(result.allowed for result in results) == 7
    assert (await get_limiter("b").peek()).current_usage == 7
