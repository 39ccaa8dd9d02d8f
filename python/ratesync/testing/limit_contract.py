"""The contract of rate and concurrency limits: what every store has to keep, as tests to inherit.

    class TestMyStore(LimitContract):
        @pytest.fixture
        def store_options(self):
            return {"engine": "memory"}

Everything goes through the public API. No test rests on the speed of the machine: rates are so slow
(a unit per hundred seconds) that time does not matter, or only a lower bound of elapsed time is asserted.
Tests with the fixture `call` run twice, from asyncio and from a plain thread. Needs pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

import ratesync
from ratesync import AcquireTimeoutError, Pending, Permit, RateLimiter

__all__ = ["Caller", "LimitContract"]

T = TypeVar("T")
SLOW = 0.01  # units per second: the next one comes after 100 s, that is never
MakeLimiter = Callable[..., RateLimiter]


class Caller:
    """Calls the product the way one of its two kinds of users does."""

    def __init__(self, kind: str) -> None:
        self._runner = asyncio.Runner() if kind == "asyncio" else None

    def __call__(self, pending: Pending[T]) -> T:
        """The result of a call."""
        if self._runner is None:
            return pending.wait()

        async def result() -> T:
            return await pending

        return self._runner.run(result())

    @contextlib.contextmanager
    def holding(self, permit: Permit) -> Iterator[Permit]:
        """`with permit` or `async with permit`."""
        if self._runner is None:
            with permit as entered:
                yield entered
            return

        async def enter() -> Permit:
            return await permit.__aenter__()

        async def leave(*exc: Any) -> None:
            await permit.__aexit__(*exc)

        entered = self._runner.run(enter())
        try:
            yield entered
        finally:
            self._runner.run(leave(*sys.exc_info()))

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    """For effects that a store learns a moment later: a release, a refund."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.005)


class LimitContract:
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        """Arguments of `configure_store` for an empty store of its own."""
        raise NotImplementedError

    @pytest.fixture
    def limit(self, ratesync_registry: Path, store_options: dict[str, Any]) -> MakeLimiter:
        """A function that configures a limiter with a name of its own and returns it."""
        ratesync.configure_store("contract", **store_options)
        numbers = itertools.count()

        def make(**options: Any) -> RateLimiter:
            limiter_id = f"limit-{next(numbers)}"
            ratesync.configure_limiter(limiter_id, "contract", fail_closed=True, outage_budget=30, **options)
            return ratesync.get_limiter(limiter_id)

        return make

    @pytest.fixture(params=["asyncio", "threads"])
    def call(self, request: pytest.FixtureRequest, ratesync_registry: Path) -> Iterator[Caller]:
        caller = Caller(request.param)
        yield caller
        caller.close()

    # Rate -----------------------------------------------------------------------------------------

    def test_the_burst_is_granted_at_once_and_not_one_more(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=5)
        assert [call(limiter.try_acquire()) for _ in range(7)] == [True] * 5 + [False] * 2

    def test_without_burst_grants_are_spaced_from_the_first(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW)
        assert call(limiter.try_acquire())
        assert not call(limiter.try_acquire())
        assert 90 < call(limiter.peek()).retry_after <= 100

    def test_a_high_rate_is_limited_in_spite_of_the_timing_margin(
        self, limit: MakeLimiter, call: Caller
    ) -> None:
        limiter = limit(rate_per_second=200.0)
        begin = time.monotonic()
        for _ in range(41):
            call(limiter.acquire())
        # 40 intervals of 5 ms; the margin forgives one interval at most, once.
        assert time.monotonic() - begin >= 39 * 0.005

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
        limiter = limit(rate_per_second=SLOW, timeout=1.0)
        with call.holding(limiter.acquire_context()):
            pass
        with pytest.raises(AcquireTimeoutError), call.holding(limiter.acquire_context()):
            pytest.fail("the body must not run")

    def test_a_full_limit_refuses_when_the_timeout_runs_out(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(max_concurrent=1)
        with call.holding(limiter.acquire_context()):
            begin = time.monotonic()
            assert not call(limiter.try_acquire(timeout=0.05))
            assert time.monotonic() - begin >= 0.045

    # Concurrency ----------------------------------------------------------------------------------

    def test_no_more_slots_than_configured_and_a_release_gives_one_back(
        self, limit: MakeLimiter, call: Caller
    ) -> None:
        limiter = limit(max_concurrent=2)
        with call.holding(limiter.acquire_context()):
            assert call(limiter.try_acquire())
            assert not call(limiter.try_acquire())
            assert call(limiter.peek()).in_use == 2
            assert call(limiter.release())
            assert call(limiter.try_acquire(timeout=5.0))
            assert not call(limiter.try_acquire())

    def test_a_body_that_raises_gives_its_slot_back(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(max_concurrent=1)
        with pytest.raises(ZeroDivisionError), call.holding(limiter.acquire_context()):
            raise ZeroDivisionError
        assert call(limiter.try_acquire(timeout=5.0))

    def test_a_stray_release_frees_nothing(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(max_concurrent=1)
        with call.holding(limiter.acquire_context()):
            assert not call(limiter.release())
            assert not call(limiter.try_acquire())

    async def test_tasks_never_exceed_the_concurrency(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=3)
        inside = most = done = 0

        async def work() -> None:
            nonlocal inside, most, done
            async with limiter:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1
                done += 1

        await asyncio.gather(*(work() for _ in range(60)))
        assert most <= 3
        assert done == 60

    def test_threads_never_exceed_the_concurrency(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=2)
        lock = threading.Lock()
        inside: list[int] = []
        most: list[int] = []

        def work() -> None:
            with limiter.acquire_context(timeout=30.0):
                with lock:
                    inside.append(1)
                    most.append(len(inside))
                time.sleep(0.001)
                with lock:
                    inside.pop()

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work) for _ in range(40)]:
                future.result()
        assert max(most) <= 2
        assert len(most) == 40

    async def test_waiters_get_slots_in_the_order_they_came(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=1)
        order: list[int] = []

        async def work(number: int) -> None:
            async with limiter:
                order.append(number)

        async with limiter:
            tasks = []
            for number in range(8):
                tasks.append(asyncio.create_task(work(number)))
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert order == list(range(8))

    async def test_an_awaited_permit_holds_its_slot_until_released(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=1)
        permit = await limiter.acquire_context()
        assert not await limiter.try_acquire()
        permit.release()
        assert await limiter.try_acquire(timeout=5.0)

    async def test_a_forgotten_permit_warns_and_gives_its_slot_back(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=1)
        permit = await limiter.acquire_context().__aenter__()
        await asyncio.sleep(0)  # the event loop lets go of what woke this task
        with pytest.warns(ResourceWarning):  # noqa: PT031 - dropping it is the call
            del permit
            gc.collect()
        assert await limiter.try_acquire(timeout=5.0)

    # Rate and concurrency together ----------------------------------------------------------------

    def test_a_refusal_for_concurrency_charges_no_rate(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=5, max_concurrent=1)
        with call.holding(limiter.acquire_context()):
            for _ in range(3):
                assert not call(limiter.try_acquire())
            assert call(limiter.peek()).current_usage == 1
        assert [call(limiter.try_acquire(timeout=5.0)) and call(limiter.release()) for _ in range(5)] == [
            True
        ] * 4 + [False]

    def test_a_refusal_for_rate_takes_no_slot(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=1, max_concurrent=2)
        assert call(limiter.try_acquire())
        assert not call(limiter.try_acquire())
        assert call(limiter.peek()).in_use == 1

    # Cancelling -----------------------------------------------------------------------------------

    async def test_a_cancelled_waiter_for_rate_leaves_no_charge(self, limit: MakeLimiter) -> None:
        limiter = limit(rate_per_second=SLOW)
        await limiter.acquire()
        before = (await limiter.peek()).retry_after
        tasks = [asyncio.ensure_future(self._enter(limiter)) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 5

        async def all_given_back() -> bool:
            return (await limiter.peek()).retry_after <= before

        await eventually(all_given_back)

    async def test_a_cancelled_waiter_for_a_slot_leaves_no_slot(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=1)
        async with limiter:
            tasks = [asyncio.ensure_future(self._enter(limiter)) for _ in range(5)]
            await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await limiter.try_acquire(timeout=5.0)
        assert (await limiter.peek()).in_use == 1

    async def test_cancelling_at_any_moment_leaves_nothing(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=2)
        for turns in range(40):
            tasks = [asyncio.ensure_future(self._enter(limiter)) for _ in range(4)]
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            tasks[turns % 4].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        async def nothing_held() -> bool:
            return (await limiter.peek()).in_use == 0

        await eventually(nothing_held)

    @staticmethod
    async def _enter(limiter: RateLimiter) -> None:
        async with limiter:
            await asyncio.sleep(0)

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
            await asyncio.gather(*(self._enter(limiter) for _ in range(5)))
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
            options = {"rate_per_second": 0.01, "burst": 7, "fail_closed": True}
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
        deadline = time.monotonic() + 10
        while metrics.current_concurrent and time.monotonic() < deadline:
            time.sleep(0.001)  # a release is counted by the engine's thread
        assert metrics.total_acquisitions == 2
        assert metrics.timeouts == 1
        assert metrics.total_releases == 2
        assert metrics.current_concurrent == 0
        assert metrics.last_acquisition_at is not None
        assert metrics.passed_open == 0
