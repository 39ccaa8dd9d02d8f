"""The engine's awaitables behave as asyncio's own: contexts, tasks, loops that come, close and go."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import gc
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator

import pytest

from ratesync._engine import Engine, Limiter
from ratesync.errors import ConfigValidationError, RateLimiterAcquisitionError


class Rig:
    """A manual clock and limiters on it."""

    def __init__(self) -> None:
        self.engine = Engine(manual_clock=True)
        self.store = self.engine.add_store("memory", "memory", {})

    def limiter(self, name: str = "x", **options: float) -> Limiter:
        return Limiter(self.store, name, **options)

    async def settle(self, seconds: float = 0.0) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.engine.advance(0)
        self.engine.advance(seconds)
        for _ in range(4):
            await asyncio.sleep(0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.engine.shutdown()


def in_use(limiter: Limiter) -> int:
    return limiter._peek(None).wait()["in_use"]


# Tasks --------------------------------------------------------------------------------------------


async def test_a_woken_task_sees_its_own_context_and_itself(rig: Rig) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    limiter = rig.limiter(rate_per_second=1.0)
    await limiter.acquire_context()
    seen: list[tuple[str, asyncio.Task | None]] = []

    async def wait(value: str) -> None:
        variable.set(value)
        async with limiter.acquire_context():
            seen.append((variable.get(), asyncio.current_task()))

    one, two = asyncio.create_task(wait("one")), asyncio.create_task(wait("two"))
    await rig.settle()
    await rig.settle(2)
    await asyncio.gather(one, two)
    assert seen == [("one", one), ("two", two)]
    assert variable.get() == "nothing"


async def test_tasks_that_share_a_context_are_woken_one_after_the_other(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=1.0)
    await limiter.acquire_context()
    context = contextvars.copy_context()
    tasks = [asyncio.create_task(_use(limiter), context=context) for _ in range(3)]
    await rig.settle()
    await rig.settle(3)
    await asyncio.wait_for(asyncio.gather(*tasks), 30)


async def _use(limiter: Limiter) -> float:
    async with limiter.acquire_context() as permit:
        return permit.waited


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
async def test_eager_tasks_wait_and_wake(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    try:
        first = limiter.acquire_context()
        await first.__aenter__()
        task = asyncio.create_task(_use(limiter))
        await rig.settle()
        first.release()
        await rig.settle()
        await asyncio.wait_for(task, 30)
    finally:
        asyncio.get_running_loop().set_task_factory(None)


async def test_ready_and_waiting_work_in_debug_mode_and_have_reprs(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    asyncio.get_running_loop().set_debug(True)
    first = limiter.acquire_context()
    await first.__aenter__()
    task = asyncio.create_task(_use(limiter))
    pending = asyncio.create_task(limiter._try(None, 1, None))
    await rig.settle()
    assert "wait_for=" in repr(task)
    assert repr(pending)
    first.release()
    await rig.settle()
    await asyncio.wait_for(task, 30)
    assert await asyncio.wait_for(pending, 30) is True


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_leaves_the_loop_does_not_lose_the_other_completions(rig: Rig, error: type) -> None:
    limiter = rig.limiter(rate_per_second=1.0)
    woken: list[int] = []

    async def body(number: int) -> None:
        async with limiter.acquire_context():
            woken.append(number)
            if number == 2:
                raise error

    async def fill() -> list[asyncio.Task]:
        await limiter.acquire_context()
        tasks = [asyncio.create_task(body(number)) for number in range(6)]
        await rig.settle()
        return tasks

    loop = asyncio.new_event_loop()
    try:
        tasks = loop.run_until_complete(fill())
        rig.engine.advance(0)
        rig.engine.advance(10)
        with pytest.raises(error):
            loop.run_forever()
        assert woken[:3] == [0, 1, 2]  # uvloop ends after one more turn
        others = [task for number, task in enumerate(tasks) if number != 2]
        loop.run_until_complete(asyncio.wait_for(asyncio.gather(*others), 30))
        assert sorted(woken) == list(range(6))
        assert isinstance(tasks[2].exception(), error)
    finally:
        loop.close()


async def test_waiters_are_served_in_order_and_newcomers_do_not_overtake(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    await first.__aenter__()
    order: list[int] = []

    async def enter(number: int) -> None:
        async with limiter.acquire_context():
            order.append(number)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(enter(number)) for number in range(50)]
    await rig.settle()
    first.release()
    assert await limiter._try(0, 1, None) is False  # free, but promised
    newcomer = asyncio.create_task(enter(50))
    await asyncio.wait_for(asyncio.gather(*tasks, newcomer), 30)
    assert order == list(range(51))


async def test_a_waiter_in_the_middle_times_out_and_the_order_stays(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    await first.__aenter__()
    waits = [asyncio.create_task(limiter._try(timeout, 1, None)) for timeout in (None, 2.0, None)]
    await rig.settle()
    await rig.settle(2)
    assert waits[1].done()
    assert waits[1].result() is False
    first.release()
    await rig.settle()
    assert [task.done() for task in waits] == [True, True, False]
    limiter._release_bare()
    await rig.settle()
    assert await asyncio.wait_for(waits[2], 30) is True


async def test_a_deadline_at_the_slot_exactly_is_in_time(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=2.0, timing_margin_ms=0)
    await limiter.acquire_context()
    early = asyncio.create_task(limiter._try(0.499999999, 1, None))
    await rig.settle()
    assert await early is False
    exact = asyncio.create_task(limiter._try(0.5, 1, None))
    await rig.settle()
    assert not exact.done()
    await rig.settle(0.5)
    assert await asyncio.wait_for(exact, 30) is True


async def test_a_hold_that_is_too_long_loses_its_slot_and_releasing_it_is_harmless(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1, max_hold_seconds=5.0)
    async with limiter.acquire_context() as permit:
        assert not permit.lost
        await rig.settle(5)
        assert permit.lost
        other = limiter.acquire_context()
        await other.__aenter__()
    assert (await limiter._peek(None))["in_use"] == 1
    other.release()
    await rig.settle()
    assert (await limiter._peek(None))["in_use"] == 0


async def test_a_reset_forgets_slots_and_their_late_release(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=1.0, max_concurrent=2)
    old = [limiter.acquire_context(), limiter.acquire_context()]
    await old[0].__aenter__()
    second = asyncio.create_task(old[1].__aenter__())  # holds a slot, sleeps for its second
    third = asyncio.create_task(limiter._try(None, 1, None))
    await rig.settle()
    await limiter._reset(None)
    await rig.settle()
    assert second.done()  # as if it were the first
    await rig.settle(1)
    assert third.done()
    old[0].release()  # a slot of before the reset
    assert (await limiter._peek(None))["in_use"] == 2
    old[1].release()
    limiter._release_bare()
    await rig.settle()
    assert (await limiter._peek(None))["in_use"] == 0


# Loops --------------------------------------------------------------------------------------------


def test_two_loops_in_two_threads_at_the_same_time(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=3)
    done: list[int] = []

    async def use() -> None:
        for _ in range(50):
            async with limiter.acquire_context():
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(use() for _ in range(20))), 30)
        done.append(1)

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [1, 1]
    assert in_use(limiter) == 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts descriptors in /proc")
def test_fifty_loops_leave_no_descriptor_and_no_slot(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)

    async def main() -> None:
        async with limiter.acquire_context():
            # Cancelled by the end of run(): its cancellation is confirmed after the loop is gone.
            waiting = asyncio.create_task(_use(limiter))
            await asyncio.sleep(0)
            assert not waiting.done()

    asyncio.run(main())
    gc.collect()
    before = descriptors()
    for _ in range(50):
        asyncio.run(main())
    gc.collect()
    asyncio.run(main())
    gc.collect()
    assert descriptors() <= before + 1
    rig.engine.advance(0)
    assert in_use(limiter) == 0


def test_a_loop_closed_with_waiters_gives_their_places_back(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()

    async def wait() -> None:
        async with limiter.acquire_context():
            pytest.fail("entered")

    async def leave_waiting() -> asyncio.Task:
        await first.__aenter__()
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(leave_waiting())
    loop.close()
    gone = weakref.ref(task)
    task.get_coro().close()
    task._log_destroy_pending = False
    del task
    rig.engine.advance(0)
    first.release()

    assert limiter._try(0, 1, None).wait() is True
    limiter._release_bare()
    del loop
    gc.collect()
    assert gone() is None
    rig.engine.advance(0)
    assert in_use(limiter) == 0


def test_a_loop_closed_with_waiters_that_nobody_closed_is_found_by_the_next_loop(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    tasks: list[asyncio.Task] = []

    async def leave_waiting() -> None:
        await first.__aenter__()
        tasks.append(asyncio.create_task(_use(limiter)))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_waiting())
    loop.close()
    tasks[0]._log_destroy_pending = False
    rig.engine.advance(0)
    first.release()
    rig.engine.advance(0)  # granted to the task that will never run

    async def another() -> bool:
        return await asyncio.wait_for(limiter._try(30, 1, None), 60)

    assert asyncio.run(another()) is True
    limiter._release_bare()
    rig.engine.advance(0)
    assert in_use(limiter) == 0
    gone = weakref.ref(tasks.pop())
    del loop
    gc.collect()
    assert gone() is None


def test_new_loops_at_an_old_address_get_a_queue_of_their_own(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=1.0)
    addresses = set()
    for _ in range(30):
        loop = asyncio.new_event_loop()
        addresses.add(id(loop))

        async def wait() -> None:
            task = asyncio.create_task(_use(limiter))
            await rig.settle()
            await rig.settle(1)
            await asyncio.wait_for(task, 30)

        loop.run_until_complete(wait())
        loop.close()
        del loop
        gc.collect()
    assert len(addresses) < 30, "addresses were not used again: the test says nothing"


def test_outside_of_a_loop_the_error_says_what_to_do(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    with limiter.acquire_context():
        coroutine = _use(limiter)
        with pytest.raises(RuntimeError, match="no running event loop"):
            coroutine.send(None)


# Misuse -------------------------------------------------------------------------------------------


async def test_one_permit_is_one_acquisition_at_a_time(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=2)
    permit = limiter.acquire_context()
    async with permit:
        with pytest.raises(RuntimeError, match="still held"):
            await permit.__aenter__()
        with pytest.raises(RuntimeError, match="still held"), permit:
            pytest.fail("entered")
    assert (await limiter._peek(None))["in_use"] == 0
    permit.release()
    permit.release()
    assert (await limiter._peek(None))["in_use"] == 0


async def test_a_permit_that_waits_cannot_be_entered_a_second_time(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    await first.__aenter__()
    permit = limiter.acquire_context()
    task = asyncio.create_task(permit.__aenter__())
    await rig.settle()
    with pytest.raises(RuntimeError, match="under way"):
        await permit.__aenter__()
    first.release()
    await asyncio.wait_for(task, 30)
    permit.release()


async def test_a_waiter_is_awaited_once(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    first = limiter.acquire_context()
    await first.__aenter__()
    permit = limiter.acquire_context()
    waiter = permit.__aenter__()

    async def wait() -> object:
        return await waiter

    one = asyncio.create_task(wait())
    await rig.settle()
    with pytest.raises(RuntimeError, match="already being awaited"):
        await waiter
    first.release()
    assert await asyncio.wait_for(one, 30) is permit
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await waiter
    permit.release()


async def test_settle_moves_the_charge_up_and_down_and_only_after_the_grant(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=10.0, burst=10)
    permit = limiter.acquire_context(cost=5)
    with pytest.raises(RuntimeError, match="before the grant"):
        permit.settle(1)
    async with permit:
        await permit.settle(8)
        assert (await limiter._peek(None))["available"] == 2
        await permit.settle(1)
        assert (await limiter._peek(None))["available"] == 9
        await permit.settle(0)
        assert (await limiter._peek(None))["available"] == 10
        for bad in (-1, True, 1.5, "2", None, 2**70):
            with pytest.raises(ConfigValidationError):
                permit.settle(bad)


@pytest.mark.parametrize("cost", [0, -1, True, 1.0, "1", None, 2**63, 2**200, 10**12])
async def test_bad_costs_are_refused_before_anything_is_charged(rig: Rig, cost: object) -> None:
    limiter = rig.limiter(rate_per_second=1.0, burst=10)
    with pytest.raises(ConfigValidationError):
        limiter.acquire_context(cost=cost)
    assert (await limiter._peek(None))["available"] == 10


async def test_huge_costs_never_overflow_into_a_limit_without_limit(rig: Rig) -> None:
    limiter = rig.limiter(rate_per_second=1.0)
    tasks = [asyncio.create_task(limiter._try(None, 10**9, None)) for _ in range(20)]
    await rig.settle()
    permit = limiter.acquire_context(timeout=0)
    with pytest.raises(RateLimiterAcquisitionError):
        await permit.__aenter__()
    assert sum(task.done() and task.result() for task in tasks) == 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800", "k" * 255, 7, b"x"])
async def test_bad_keys_are_refused(rig: Rig, key: object) -> None:
    with pytest.raises(ConfigValidationError):
        rig.limiter(rate_per_second=1.0).acquire_context(key=key)


async def test_keys_up_to_the_limit_and_with_separators_stay_apart(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    keys = ["k" * 253, "é" * 253, "a:b", "a\\:b", "a\\", ":"]
    permits = [limiter.acquire_context(key=key) for key in keys]
    for permit in permits:
        await permit.__aenter__()
    assert len({permit.limiter_id for permit in permits}) == len(keys)
    for permit in permits:
        permit.release()


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "n" * 256])
def test_bad_names_are_refused(rig: Rig, name: str) -> None:
    with pytest.raises(ConfigValidationError):
        rig.limiter(name, rate_per_second=1.0)


@pytest.mark.parametrize("timeout", [float("nan"), -1, -0.001, "1", True, 10**400, object()])
def test_bad_timeouts_are_refused(rig: Rig, timeout: object) -> None:
    with pytest.raises(ConfigValidationError):
        rig.limiter(rate_per_second=1.0).acquire_context(timeout)


@pytest.mark.parametrize("timeout", [None, 0, -0.0, 1e300, float("inf"), decimal.Decimal("1.5"), 1e-12])
async def test_odd_but_valid_timeouts_work(rig: Rig, timeout: object) -> None:
    async with rig.limiter(rate_per_second=1.0).acquire_context(timeout):
        pass


async def test_a_limiter_that_was_not_initialised_says_so() -> None:
    class Lazy(Limiter):
        def __init__(self) -> None:
            pass

    lazy = Lazy()
    for use in (
        lambda: lazy.__aenter__(),
        lambda: lazy.__aexit__(None, None, None),
        lambda: lazy.__enter__(),
        lambda: lazy.__exit__(None, None, None),
        lambda: lazy.acquire_context(),
        lambda: lazy._try(0, 1, None),
        lambda: lazy._peek(None),
        lambda: lazy._counters(),
        lambda: lazy._release_bare(),
    ):
        with pytest.raises(RuntimeError, match="not initialised"):
            use()


def test_a_limiter_is_initialised_once(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    with limiter, pytest.raises(RuntimeError, match="once"):
        limiter.__init__(rig.store, "y", max_concurrent=1)
    assert in_use(limiter) == 0


async def test_async_with_limiter_left_by_another_task_gives_the_slot_back(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    await limiter.__aenter__()

    async def leave() -> None:
        await limiter.__aexit__(None, None, None)

    await asyncio.create_task(leave())
    assert (await limiter._peek(None))["in_use"] == 0


async def test_warnings_as_errors_do_not_break_a_dropped_permit(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await limiter.acquire_context().__aenter__()
        gc.collect()
    assert [w.category for w in caught] == [ResourceWarning]
    await rig.settle()
    assert (await limiter._peek(None))["in_use"] == 0


async def test_calls_after_the_engines_end_raise_a_clear_error(rig: Rig) -> None:
    limiter = rig.limiter(max_concurrent=1)
    held = limiter.acquire_context()
    await held.__aenter__()
    task = asyncio.create_task(limiter._try(None, 1, None))
    await rig.settle()
    rig.engine.shutdown()
    with pytest.raises(Exception, match="shut down"):
        await asyncio.wait_for(task, 30)
    with pytest.raises(Exception, match="shut down"):
        await limiter.acquire_context()
    held.release()
