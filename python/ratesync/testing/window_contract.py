"""The contract of windows: at most `limit` units per window, whichever of the three counts them.

Windows are so long (30 days) that time does not matter, also not the boundary of a calendar window; or
they are short and only a lower bound of elapsed time is asserted.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest

import ratesync
from ratesync import AcquireTimeoutError, ConfigValidationError
from ratesync.testing.contract import PATIENCE, Caller, Contract, MakeLimiter, eventually

__all__ = ["WindowContract"]

MONTH = 30 * 86_400


class WindowContract(Contract):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @pytest.fixture(params=["sliding_window", "sliding_counter", "fixed_window"])
    def window(self, request: pytest.FixtureRequest, limit: MakeLimiter) -> MakeLimiter:
        """A function that configures a limiter with a window of 30 days and returns it."""

        def make(units: int, window_seconds: float = MONTH, **options: Any) -> ratesync.RateLimiter:
            return limit(algorithm=request.param, limit=units, window_seconds=window_seconds, **options)

        return make

    def change(self, limiter: ratesync.RateLimiter, **options: Any) -> ratesync.RateLimiter:
        """The same limiter with other parameters."""
        parameters: dict[str, Any] = {
            "algorithm": limiter.algorithm,
            "limit": limiter.limit,
            "window_seconds": limiter.window_seconds,
            "fail_closed": True,
            "outage_budget": 30,
        }
        ratesync.configure_limiter(limiter.group_id, "contract", **(parameters | options))
        return ratesync.get_limiter(limiter.group_id)

    # Counting -------------------------------------------------------------------------------------

    def test_a_window_grants_its_limit_and_not_one_more(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(5)
        assert [call(limiter.try_acquire()) for _ in range(7)] == [True] * 5 + [False] * 2
        seen = call(limiter.peek())
        assert (seen.allowed, seen.remaining, seen.current_usage) == (False, 0, 5)
        assert 0 < seen.retry_after <= 2 * MONTH
        assert seen.retry_after <= seen.reset_after <= 2 * MONTH

    def test_a_window_tells_its_state_and_peek_charges_nothing(
        self, window: MakeLimiter, call: Caller
    ) -> None:
        limiter = window(3)
        for _ in range(3):
            seen = call(limiter.get_state())
            assert (seen.allowed, seen.remaining, seen.current_usage) == (True, 3, 0)
            assert (seen.retry_after, seen.reset_after) == (0, 0)
            assert seen.reset_at > time.time() + MONTH - 3600
        call(limiter.acquire())
        seen = call(limiter.peek())
        assert (seen.allowed, seen.remaining, seen.current_usage, seen.retry_after) == (True, 2, 1, 0)
        assert 0 < seen.reset_after <= 2 * MONTH

    def test_a_cost_takes_that_many_units_of_a_window(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(10)
        assert call(limiter.try_acquire(cost=7))
        assert not call(limiter.try_acquire(cost=4))
        assert call(limiter.peek()).remaining == 3
        assert call(limiter.try_acquire(cost=3))
        assert not call(limiter.try_acquire())

    def test_a_cost_above_the_limit_is_a_mistake_that_names_the_limit(
        self, window: MakeLimiter, call: Caller
    ) -> None:
        limiter = window(10)
        for timeout in (0, 5.0, None):
            with pytest.raises(ConfigValidationError, match="limit of 10"):
                call(limiter.acquire(timeout=timeout, cost=11))
        assert call(limiter.try_acquire(cost=10))

    def test_a_permit_of_a_window_says_what_is_left(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(5)
        with call.holding(limiter.acquire_context(cost=2)) as permit:
            assert permit.remaining == 3
            reset_after = permit.reset_after
            assert reset_after is not None
            assert 0 < reset_after <= 2 * MONTH

    def test_many_at_once_get_what_there_is(self, window: MakeLimiter) -> None:
        limiter = window(100)

        async def tries() -> int:
            costs = [1, 2, 3] * 40
            granted = await asyncio.gather(*(limiter.try_acquire(cost=cost) for cost in costs))
            return sum(cost for cost, was in zip(costs, granted, strict=True) if was)

        assert asyncio.run(tries()) == 100

    # Waiting --------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("requests", "windows"), [(3, 1), (5, 2)])
    async def test_who_waits_goes_when_a_window_has_room(
        self, window: MakeLimiter, requests: int, windows: int
    ) -> None:
        limiter = window(2, 0.25)
        begin = time.monotonic()
        await asyncio.gather(*(limiter.acquire() for _ in range(requests)))
        # Of calendar windows the first may be almost over.
        whole = windows if limiter.algorithm == "sliding_window" else windows - 1
        assert time.monotonic() - begin >= whole * 0.25

    def test_a_slot_beyond_the_timeout_charges_no_window(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(2)
        call(limiter.acquire(cost=2))
        begin = time.monotonic()
        with pytest.raises(AcquireTimeoutError):
            call(limiter.acquire(timeout=3600.0))
        assert not call(limiter.try_acquire(timeout=3600.0, cost=2))
        assert time.monotonic() - begin < 1800
        assert call(limiter.peek()).current_usage == 2

    async def test_nobody_overtakes_who_waits_for_a_window(self, window: MakeLimiter) -> None:
        limiter = window(10)
        await limiter.acquire(cost=3)
        large = asyncio.ensure_future(limiter.acquire(cost=8))

        async def dealt() -> bool:
            return not (await limiter.peek()).allowed

        await eventually(dealt)
        assert not await limiter.try_acquire()
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)

    async def test_cancelled_waiters_leave_no_charge_in_windows_to_come(self, window: MakeLimiter) -> None:
        limiter = window(20)
        await limiter.acquire(cost=20)
        before = (await limiter.peek()).retry_after
        many = 60  # for slots in three windows to come
        tasks = [asyncio.ensure_future(self.enter(limiter)) for _ in range(many)]

        async def all_wait() -> bool:
            return (await limiter.peek()).retry_after > before + 2.5 * MONTH

        await eventually(all_wait)
        # Asked behind all of them, so by now each has its slot: one dealt later would be the newest, and the
        # others could not be given back any more.
        assert not await limiter.try_acquire()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * many

        # The counter may keep the moment of the last slot dealt, up to a quarter of a window ahead here.
        spare = MONTH / 4 if limiter.algorithm == "sliding_counter" else 0

        async def all_given_back() -> bool:
            seen = await limiter.peek()
            return seen.retry_after <= before + spare and seen.reset_after <= 3 * MONTH

        await eventually(all_given_back)

    # With slots -----------------------------------------------------------------------------------

    def test_a_refusal_for_concurrency_charges_no_window(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(5, max_concurrent=1)
        assert (limiter.max_concurrent, limiter.limit) == (1, 5)
        with call.holding(limiter.acquire_context()):
            for _ in range(3):
                assert not call(limiter.try_acquire())
            seen = call(limiter.peek())
            assert (seen.current_usage, seen.in_use, seen.remaining) == (1, 1, 0)
        assert [
            call(limiter.try_acquire(timeout=PATIENCE)) and call(limiter.release()) for _ in range(5)
        ] == [True] * 4 + [False]

    def test_a_refusal_for_the_window_takes_no_slot(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(1, max_concurrent=2)
        assert call(limiter.try_acquire())
        assert not call(limiter.try_acquire())
        assert call(limiter.peek()).in_use == 1

    # Live changes, keys, settle, reset ------------------------------------------------------------

    def test_a_changed_window_keeps_what_was_consumed(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(4)
        assert call(limiter.try_acquire(cost=4))
        limiter = self.change(limiter, limit=6)
        assert [call(limiter.try_acquire()) for _ in range(3)] == [True, True, False]
        limiter = self.change(limiter, limit=3)
        seen = call(limiter.peek())
        assert (seen.remaining, seen.current_usage) == (0, 3)
        assert not call(limiter.try_acquire())
        limiter = self.change(limiter, limit=8)
        assert call(limiter.peek()).remaining == 2

    def test_a_key_has_a_window_of_its_own(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(1)
        assert call(limiter.try_acquire(key="tenant-7"))
        assert not call(limiter.try_acquire(key="tenant-7"))
        assert call(limiter.try_acquire())
        assert call(limiter.try_acquire(key="another"))
        clone = call(ratesync.get_or_clone_limiter(limiter.group_id, "tenant-7"))
        assert (clone.algorithm, clone.limit, clone.window_seconds) == (limiter.algorithm, 1, MONTH)
        assert not call(clone.try_acquire())
        assert not call(limiter.peek(key="tenant-7")).allowed
        call(limiter.reset(key="tenant-7"))
        assert call(limiter.try_acquire(key="tenant-7"))
        assert not call(limiter.try_acquire(key="another"))

    @pytest.mark.parametrize(("actual", "left"), [(0, 10), (2, 8), (5, 5), (8, 2), (15, 0)])
    def test_settle_charges_a_window_what_it_really_cost(
        self, window: MakeLimiter, call: Caller, actual: int, left: int
    ) -> None:
        limiter = window(10)
        with call.holding(limiter.acquire_context(cost=5)) as permit:
            call(permit.settle(actual))
        assert call(limiter.peek()).remaining == left
        assert call(limiter.try_acquire()) is (left > 0)

    def test_reset_empties_a_window(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(2, max_concurrent=2)
        assert call(limiter.try_acquire())
        assert call(limiter.try_acquire())
        call(limiter.reset())
        seen = call(limiter.peek())
        assert (seen.remaining, seen.in_use, seen.current_usage) == (2, 0, 0)
        assert call(limiter.try_acquire())

    def test_processes_share_a_window_where_the_store_is_shared(
        self, window: MakeLimiter, store_options: dict[str, Any]
    ) -> None:
        limiter = window(7)
        if not ratesync.get_store("contract").capabilities["shared"]:
            pytest.skip("the store belongs to one process")
        limiter.initialize().wait()
        program = """if True:
            import json, sys, ratesync
            ratesync.configure_store("contract", **json.loads(sys.argv[1]))
            options = {"limit": 7, "window_seconds": 2592000, "algorithm": sys.argv[3]}
            options |= {"fail_closed": True, "outage_budget": 30}
            ratesync.configure_limiter(sys.argv[2], "contract", **options)
            print(sum(ratesync.try_acquire(sys.argv[2]).wait() for _ in range(5)))
        """
        arguments = [json.dumps(store_options), limiter.group_id, limiter.algorithm]
        command = [sys.executable, "-c", program, *arguments]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        assert sum(int(child.communicate()[0]) for child in children) == 7

    def test_a_refusal_of_a_window_is_counted(self, window: MakeLimiter, call: Caller) -> None:
        limiter = window(1)
        assert call(limiter.try_acquire())
        assert not call(limiter.try_acquire())
        metrics = limiter.get_metrics()
        assert (metrics.total_acquisitions, metrics.timeouts, metrics.refused_rate) == (1, 1, 1)
