"""The contract of rates: spacing, timeouts, keys, cost, loops, threads and processes.

No test rests on the speed of the machine: rates are so slow (a unit per hundred seconds) that time does
not matter, or only a lower bound of elapsed time is asserted.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import ratesync
from ratesync import AcquireTimeoutError
from ratesync.testing.contract import SLOW, Caller, Contract, MakeLimiter, eventually

__all__ = ["RateContract"]


class RateContract(Contract):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    # Rate -----------------------------------------------------------------------------------------

    def test_the_burst_is_granted_at_once_and_not_one_more(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=5)
        assert [call(limiter.try_acquire()) for _ in range(7)] == [True] * 5 + [False] * 2

    def test_without_burst_grants_are_spaced_from_the_first(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW)
        assert call(limiter.try_acquire())
        assert not call(limiter.try_acquire())
        assert 50 < call(limiter.peek()).retry_after <= 100

    def test_a_high_rate_is_limited_in_spite_of_the_timing_margin(
        self, limit: MakeLimiter, call: Caller
    ) -> None:
        limiter = limit(rate_per_second=200.0)
        begin = time.monotonic()
        for _ in range(41):
            call(limiter.acquire())
        # 40 intervals of 5 ms; the margin forgives one interval at most, once.
        assert time.monotonic() - begin >= 39 * 0.005

    @pytest.mark.parametrize("rate", [100.0, 1000.0])
    async def test_a_crowd_is_spaced_where_the_margin_is_as_long_as_the_interval(
        self, limit: MakeLimiter, rate: float
    ) -> None:
        # "elapsed >= interval - margin" would let all of them through at once.
        limiter = limit(rate_per_second=rate)
        begin = time.monotonic()
        await asyncio.gather(*(limiter.acquire() for _ in range(int(rate / 2))))
        assert time.monotonic() - begin >= (rate / 2 - 2) / rate

    def test_a_cost_takes_that_many_units(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=10)
        assert call(limiter.try_acquire(cost=7))
        assert not call(limiter.try_acquire(cost=4))
        assert call(limiter.peek()).remaining == 3
        assert call(limiter.try_acquire(cost=3))
        assert not call(limiter.try_acquire())

    def test_a_permit_says_what_is_left(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=5)
        with call.holding(limiter.acquire_context(cost=2)) as permit:
            assert permit.remaining == 3
            assert permit.limiter_id == limiter.group_id
            assert not permit.lost
            assert 0 <= permit.waited < 50

    # Timeouts -------------------------------------------------------------------------------------

    def test_a_slot_beyond_the_timeout_is_refused_at_once_and_charges_nothing(
        self, limit: MakeLimiter, call: Caller
    ) -> None:
        limiter = limit(rate_per_second=SLOW)
        call(limiter.acquire())
        begin = time.monotonic()
        with pytest.raises(AcquireTimeoutError):
            call(limiter.acquire(timeout=50.0))
        with pytest.raises(AcquireTimeoutError), call.holding(limiter.acquire_context(timeout=50.0)):
            pytest.fail("the body must not run")
        assert not call(limiter.try_acquire(timeout=50.0))
        assert time.monotonic() - begin < 40
        assert 50 < call(limiter.peek()).retry_after <= 100

    def test_timeout_zero_tries_once(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, timeout=60.0)
        call(limiter.acquire(timeout=0))
        with pytest.raises(AcquireTimeoutError):
            call(limiter.acquire(timeout=0))

    def test_the_default_timeout_is_the_limiters(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, timeout=20.0)
        with call.holding(limiter.acquire_context()):
            pass
        with pytest.raises(AcquireTimeoutError), call.holding(limiter.acquire_context()):
            pytest.fail("the body must not run")

    # Cancelling -----------------------------------------------------------------------------------

    async def test_a_cancelled_waiter_for_rate_leaves_no_charge(self, limit: MakeLimiter) -> None:
        limiter = limit(rate_per_second=SLOW)
        await limiter.acquire()
        before = (await limiter.peek()).retry_after
        tasks = [asyncio.ensure_future(self.enter(limiter)) for _ in range(5)]

        async def all_wait() -> bool:  # with a slot each: only the newest one that was dealt can come back
            return (await limiter.peek()).retry_after > before + 4.5 / SLOW

        await eventually(all_wait)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 5

        async def all_given_back() -> bool:
            return (await limiter.peek()).retry_after <= before

        await eventually(all_given_back)

    # Keys, peek, reset, settle ----------------------------------------------------------------------

    @pytest.mark.parametrize("key", ["tenant-7", "a:b", "back\\slash", "ünïcode"])
    def test_a_key_has_a_limit_of_its_own_that_is_the_clones(
        self, limit: MakeLimiter, call: Caller, key: str
    ) -> None:
        limiter = limit(rate_per_second=SLOW)
        assert call(limiter.try_acquire(key=key))
        assert not call(limiter.try_acquire(key=key))
        assert call(limiter.try_acquire())
        assert call(limiter.try_acquire(key="another"))
        clone = call(ratesync.get_or_clone_limiter(limiter.group_id, key))
        assert not call(clone.try_acquire())
        assert not call(limiter.peek(key=key)).allowed

    def test_peek_charges_nothing(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=3)
        assert [call(limiter.peek()).remaining for _ in range(4)] == [3] * 4
        call(limiter.acquire())
        seen = call(limiter.get_state())
        assert (seen.allowed, seen.remaining, seen.current_usage, seen.retry_after) == (True, 2, 1, 0)

    def test_reset_forgets_consumption_and_holders(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=2, max_concurrent=2)
        assert call(limiter.try_acquire())
        assert call(limiter.try_acquire())
        call(limiter.reset())
        seen = call(limiter.peek())
        assert (seen.remaining, seen.in_use) == (2, 0)
        assert call(limiter.try_acquire())

    @pytest.mark.parametrize(("actual", "left"), [(2, 8), (5, 5), (8, 2)])
    def test_settle_charges_what_it_really_cost(
        self, limit: MakeLimiter, call: Caller, actual: int, left: int
    ) -> None:
        limiter = limit(rate_per_second=SLOW, burst=10)
        with call.holding(limiter.acquire_context(cost=5)) as permit:
            call(permit.settle(actual))
        assert call(limiter.peek()).remaining == left

    def test_a_changed_limit_keeps_what_was_consumed(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=4)
        assert call(limiter.try_acquire(cost=4))
        ratesync.configure_limiter(
            limiter.group_id, "contract", rate_per_second=SLOW, burst=6, fail_closed=True, outage_budget=30
        )
        changed = ratesync.get_limiter(limiter.group_id)
        assert [call(changed.try_acquire()) for _ in range(3)] == [True, True, False]

    # Loops, threads, processes ----------------------------------------------------------------------

    async def test_a_sync_acquire_that_would_block_the_loop_is_refused(self, limit: MakeLimiter) -> None:
        limiter = limit(rate_per_second=SLOW)
        await limiter.acquire()
        with pytest.raises(RuntimeError, match="async with"), limiter.acquire_context():
            pytest.fail("the body must not run")

    def test_a_second_event_loop_works_after_the_first_was_closed(self, limit: MakeLimiter) -> None:
        limiter = limit(rate_per_second=200.0, max_concurrent=1)

        async def several() -> int:
            await asyncio.gather(*(self.enter(limiter) for _ in range(5)))
            return 5

        assert asyncio.run(several()) + asyncio.run(several()) == 10
        with limiter:
            pass

    def test_loops_in_several_threads_share_the_limiter(self, limit: MakeLimiter) -> None:
        limiter = limit(rate_per_second=SLOW, burst=10)

        async def tries() -> int:
            return sum([await limiter.try_acquire() for _ in range(5)])

        with ThreadPoolExecutor(4) as pool:
            granted = [pool.submit(asyncio.run, tries()) for _ in range(4)]
            assert sum(future.result() for future in granted) == 10

    def test_processes_share_the_limit_where_the_store_is_shared(
        self, limit: MakeLimiter, store_options: dict[str, Any]
    ) -> None:
        limiter = limit(rate_per_second=SLOW, burst=7)
        if not ratesync.get_store("contract").capabilities["shared"]:
            pytest.skip("the store belongs to one process")
        limiter.initialize().wait()
        program = """if True:
            import json, sys, ratesync
            ratesync.configure_store("contract", **json.loads(sys.argv[1]))
            options = {"rate_per_second": 0.01, "burst": 7, "fail_closed": True, "outage_budget": 30}
            ratesync.configure_limiter(sys.argv[2], "contract", **options)
            print(sum(ratesync.try_acquire(sys.argv[2]).wait() for _ in range(5)))
        """
        command = [sys.executable, "-c", program, json.dumps(store_options), limiter.group_id]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        assert sum(int(child.communicate()[0]) for child in children) == 7

    # Counters ---------------------------------------------------------------------------------------

    def test_metrics_count_what_happened(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=2, max_concurrent=5)
        with call.holding(limiter.acquire_context()):
            assert limiter.get_metrics().current_concurrent == 1
        call(limiter.try_acquire())
        call(limiter.try_acquire())
        call(limiter.release())
        metrics = limiter.get_metrics()
        deadline = time.monotonic() + 60
        while metrics.current_concurrent and time.monotonic() < deadline:
            time.sleep(0.001)  # a release is counted by the engine's thread
        assert metrics.total_acquisitions == 2
        assert metrics.timeouts == 1
        assert metrics.total_releases == 2
        assert metrics.current_concurrent == 0
        assert metrics.last_acquisition_at is not None
        assert metrics.passed_open == 0
