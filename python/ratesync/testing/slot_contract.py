"""The contract of concurrency: slots are counted, waited for in order, and given back whatever happens."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ratesync.testing.contract import PATIENCE, SLOW, Caller, Contract, MakeLimiter, eventually

__all__ = ["SlotContract"]


class SlotContract(Contract):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

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
            assert call(limiter.try_acquire(timeout=PATIENCE))
            assert not call(limiter.try_acquire())

    def test_a_body_that_raises_gives_its_slot_back(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(max_concurrent=1)
        with pytest.raises(ZeroDivisionError), call.holding(limiter.acquire_context()):
            raise ZeroDivisionError
        assert call(limiter.try_acquire(timeout=PATIENCE))

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
            with limiter.acquire_context(timeout=PATIENCE):
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
        assert await limiter.try_acquire(timeout=PATIENCE)

    async def test_a_forgotten_permit_warns_and_gives_its_slot_back(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=1)
        permit = await limiter.acquire_context().__aenter__()
        await asyncio.sleep(0)  # the event loop lets go of what woke this task
        with pytest.warns(ResourceWarning):  # noqa: PT031 - dropping it is the call
            del permit
            gc.collect()
        assert await limiter.try_acquire(timeout=PATIENCE)

    def test_a_full_limit_refuses_when_the_timeout_runs_out(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(max_concurrent=1)
        with call.holding(limiter.acquire_context()):
            begin = time.monotonic()
            assert not call(limiter.try_acquire(timeout=0.05))
            assert time.monotonic() - begin >= 0.045

    # Rate and concurrency together ----------------------------------------------------------------

    def test_a_refusal_for_concurrency_charges_no_rate(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=5, max_concurrent=1)
        with call.holding(limiter.acquire_context()):
            for _ in range(3):
                assert not call(limiter.try_acquire())
            assert call(limiter.peek()).current_usage == 1
        # Less than what the next unit takes.
        assert [call(limiter.try_acquire(timeout=30.0)) and call(limiter.release()) for _ in range(5)] == [
            True
        ] * 4 + [False]

    def test_a_refusal_for_rate_takes_no_slot(self, limit: MakeLimiter, call: Caller) -> None:
        limiter = limit(rate_per_second=SLOW, burst=1, max_concurrent=2)
        assert call(limiter.try_acquire())
        assert not call(limiter.try_acquire())
        assert call(limiter.peek()).in_use == 1

    # Cancelling -----------------------------------------------------------------------------------

    async def test_a_cancelled_waiter_for_a_slot_leaves_no_slot(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=1)
        async with limiter:
            tasks = [asyncio.ensure_future(self.enter(limiter)) for _ in range(5)]
            await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await limiter.try_acquire(timeout=PATIENCE)
        assert (await limiter.peek()).in_use == 1

    async def test_cancelling_at_any_moment_leaves_nothing(self, limit: MakeLimiter) -> None:
        limiter = limit(max_concurrent=2)
        for turns in range(40):
            tasks = [asyncio.ensure_future(self.enter(limiter)) for _ in range(4)]
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            tasks[turns % 4].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        async def nothing_held() -> bool:
            return (await limiter.peek()).in_use == 0

        await eventually(nothing_held)
