"""Windows under the names of the compatibility contract: configured, constructed, checked, combined."""

from __future__ import annotations

from typing import Any

import pytest

import ratesync
from ratesync import MemoryRateLimiter, check_limiter, configure_limiter, get_limiter
from ratesync._schemas import ALGORITHMS
from ratesync.schemas import LimiterConfig
from ratesync.testing import ManualClock
from ratesync.validation import validate_limiter_config

pytestmark = [
    pytest.mark.usefixtures("ratesync_registry"),
    pytest.mark.skipif("sliding_window" not in ALGORITHMS, reason="this build has no windows"),
]


async def test_a_limit_with_a_window_makes_a_sliding_window() -> None:
    with ManualClock() as clock:
        limiter = MemoryRateLimiter(group_id="login", limit=3, window_seconds=60)
        assert (limiter.algorithm, limiter.limit, limiter.window_seconds) == ("sliding_window", 3, 60)
        assert limiter.rate_per_second is None
        assert [await limiter.try_acquire() for _ in range(4)] == [True, True, True, False]
        clock.advance(59)
        assert not await limiter.try_acquire()
        clock.advance(1)
        assert await limiter.try_acquire()
        config = limiter.get_config()
        assert (config.algorithm, config.limit, config.window_seconds) == ("sliding_window", 3, 60)


async def test_a_window_may_be_combined_with_slots() -> None:
    with ManualClock():
        limiter = MemoryRateLimiter("both", limit=5, window_seconds=60, max_concurrent=1)
        async with limiter:
            assert not await limiter.try_acquire()
            state = await limiter.get_state()
            assert (state.allowed, state.in_use) == (False, 1)
        assert [await limiter.try_acquire(), await limiter.try_acquire()] == [True, False]


@pytest.mark.parametrize("algorithm", ["sliding_window", "sliding_counter", "fixed_window"])
async def test_the_algorithm_may_be_named(algorithm: str) -> None:
    limiter = MemoryRateLimiter("api", limit=2, window_seconds=60, algorithm=algorithm)
    assert limiter.algorithm == algorithm
    assert await limiter.try_acquire()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "limit.*window_seconds"),
        ({"limit": 5}, "window_seconds"),
        ({"window_seconds": 5}, "limit"),
        ({"limit": 0, "window_seconds": 5}, "limit must be > 0"),
        ({"limit": 5, "window_seconds": 0}, "window_seconds must be > 0"),
        ({"limit": 5, "window_seconds": -1}, "window_seconds must be > 0"),
    ],
    ids=str,
)
def test_an_incomplete_window_is_a_value_error_that_names_the_field(
    fields: dict[str, Any], text: str
) -> None:
    for make in (
        lambda: configure_limiter("api", algorithm="sliding_window", **fields),
        lambda: LimiterConfig(store="memory", algorithm="sliding_window", **fields),
        lambda: validate_limiter_config({"store": "memory", "algorithm": "sliding_window", **fields}),
    ):
        with pytest.raises(ValueError, match=text):
            make()


def test_a_window_ignores_what_is_for_buckets() -> None:
    configure_limiter("api", "memory", 5.0, algorithm="sliding_window", limit=3, window_seconds=60)
    assert get_limiter("api").limit == 3
    assert get_limiter("api").rate_per_second is None
    ratesync.clone_limiter("api", "more", limit=9)
    assert (get_limiter("more").limit, get_limiter("more").window_seconds) == (9, 60)


async def test_a_check_tells_the_numbers_of_the_window() -> None:
    configure_limiter("login", algorithm="sliding_window", limit=3, window_seconds=60)
    with ManualClock() as clock:
        for left in (2, 1, 0):
            result = await check_limiter("login")
            assert (result.allowed, result.limit, result.remaining) == (True, 3, left)
            assert result.reset_in == pytest.approx(60)
        clock.advance(20)
        refused = await check_limiter("login")
        assert (refused.allowed, refused.limit, refused.remaining) == (False, 3, 0)
        assert (refused.reset_in, refused.retry_after) == (pytest.approx(40), 40)
        looked = await check_limiter("login", acquire_if_allowed=False)
        assert (looked.allowed, looked.retry_after) == (False, 40)
        clock.advance(40)
        assert (await check_limiter("login", acquire_if_allowed=False)).remaining == 3


async def test_windows_and_buckets_are_charged_all_or_nothing() -> None:
    configure_limiter("login", algorithm="sliding_window", limit=2, window_seconds=60)
    configure_limiter("bucket", rate_per_second=0.001, burst=10)
    composite = ratesync.CompositeRateLimiter({"ip": "login", "user": "bucket"})
    with ManualClock():
        checks = [await composite.check({"ip": "x", "user": "y"}) for _ in range(4)]
        assert [check.allowed for check in checks] == [True, True, False, False]
        assert checks[-1].triggered_by == "ip"
        assert (await get_limiter("bucket").peek("y")).remaining == 8
        several = await ratesync.check_multi_limiters(["login", "bucket"])
        assert [part.remaining for part in several.results] == [1, 9]


async def test_a_decorated_function_keeps_a_window() -> None:
    configure_limiter("mail", algorithm="sliding_window", limit=2, window_seconds=60)

    @ratesync.rate_limited("mail", timeout=0, mode="try")
    async def send() -> bool:
        return True

    with ManualClock() as clock:
        assert [await send() for _ in range(3)] == [True, True, None]
        clock.advance(60)
        assert await send()
