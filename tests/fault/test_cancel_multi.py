"""A cancelled acquire of several limits leaves nothing behind, whatever step it was at.

On the manual clock, as test_cancel.py: one of two contenders is cancelled before it starts, queued,
waiting, in the loop turn of its completion, and after it entered. Then those behind it move up and
every unit and slot comes back. `two stores` takes the way through the engine also where nobody waits.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

import ratesync
from ratesync.testing import ManualClock

SHAPES = {
    "slots": [("a", {"max_concurrent": 1}), ("b", {"max_concurrent": 1})],
    "rates": [("a", {"rate_per_second": 1.0}), ("b", {"rate_per_second": 0.5})],
    "mixed": [("a", {"rate_per_second": 1.0}), ("b", {"max_concurrent": 1})],
    "two stores": [
        ("a", {"max_concurrent": 1}),
        ("b", {"rate_per_second": 1.0, "max_concurrent": 1, "store_id": "other"}),
    ],
}


class Rig:
    def __init__(self, clock: ManualClock, shape: str) -> None:
        self.clock = clock
        ratesync.configure_store("other", "memory")
        for name, options in SHAPES[shape]:
            ratesync.configure_limiter(name, **options)
        self.limiters = [ratesync.get_limiter(name) for name in ("a", "b")]

    async def settle(self, seconds: float = 0.0) -> None:
        for step in (0.0, seconds, 0.0):
            await self.clock.run(step)

    async def assert_everything_is_back(self) -> None:
        await self.settle()
        await self.settle(1e6)
        for limiter in self.limiters:
            state = await limiter.peek()
            assert (state.in_use, state.current_usage) == (0, 0)
            assert limiter.get_metrics().current_concurrent == 0


@pytest.fixture(params=list(SHAPES))
def rig(request: pytest.FixtureRequest, ratesync_clock: ManualClock) -> Rig:
    return Rig(ratesync_clock, request.param)


Step = Callable[[Rig, "asyncio.Task[None]", ratesync.Permit], Awaitable[None]]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


@step
async def before_its_first_turn(rig: Rig, task: asyncio.Task[None], first: ratesync.Permit) -> None:
    pass


@step
async def just_submitted(rig: Rig, task: asyncio.Task[None], first: ratesync.Permit) -> None:
    await asyncio.sleep(0)


@step
async def decided_and_waiting(rig: Rig, task: asyncio.Task[None], first: ratesync.Permit) -> None:
    await rig.settle()


@step
async def in_the_turn_of_completion(rig: Rig, task: asyncio.Task[None], first: ratesync.Permit) -> None:
    # The grant is in the queue, its reader callback has not run.
    await rig.settle()
    first.release()
    rig.clock.advance(0)
    rig.clock.advance(2)


@step
async def with_completion_and_cancel_in_one_turn(
    rig: Rig, task: asyncio.Task[None], first: ratesync.Permit
) -> None:
    await rig.settle()
    first.release()
    rig.clock.advance(0)
    rig.clock.advance(2)
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.sleep(0)


@step
async def after_it_entered(rig: Rig, task: asyncio.Task[None], first: ratesync.Permit) -> None:
    await rig.settle()
    first.release()
    await rig.settle(2)


@pytest.mark.parametrize("name", list(STEPS))
async def test_a_cancel_at_any_step_leaves_nothing_and_those_behind_move_up(rig: Rig, name: str) -> None:
    order: list[str] = []

    async def enter(who: str) -> None:
        async with ratesync.acquire("a", "b"):
            order.append(who)
            await gate.wait()

    gate = asyncio.Event()
    first = ratesync.acquire("a", "b")
    await first.__aenter__()
    victim = asyncio.create_task(enter("victim"))
    if name != "before_its_first_turn":
        await asyncio.sleep(0)
        rig.clock.advance(0)
    behind = asyncio.create_task(enter("behind"))

    await STEPS[name](rig, victim, first)
    victim.cancel()
    with pytest.raises(asyncio.CancelledError):
        await victim
    await rig.settle()
    first.release()
    await rig.settle()
    for _ in range(4):
        await rig.settle(1)
    assert order[-1:] == ["behind"]
    if "victim" in order:  # under uvloop also when cancelled in one turn with its completion
        assert name in ("after_it_entered", "with_completion_and_cancel_in_one_turn")
    gate.set()
    await behind
    await rig.assert_everything_is_back()


@pytest.mark.parametrize("name", list(STEPS))
async def test_a_cancelled_wait_was_never_charged(ratesync_clock: ManualClock, name: str) -> None:
    rig = Rig(ratesync_clock, "mixed")
    ratesync.configure_limiter("plenty", rate_per_second=1.0, burst=10)
    plenty = ratesync.get_limiter("plenty")
    first = ratesync.acquire("b")
    await first.__aenter__()

    async def enter() -> None:
        async with ratesync.acquire("plenty", "b"):
            pass

    victim = asyncio.create_task(enter())
    await STEPS[name](rig, victim, first)
    entered = victim.done()
    victim.cancel()
    await asyncio.gather(victim, return_exceptions=True)
    await rig.settle()
    assert (await plenty.peek()).remaining >= 9
    if not entered and "completion" not in name:
        assert (await plenty.peek()).remaining == 10
    first.release()
    await rig.assert_everything_is_back()


async def test_a_thousand_in_line_cancelled_in_random_order(rig: Rig) -> None:
    first = ratesync.acquire("a", "b")
    await first.__aenter__()
    order: list[int] = []

    async def wait(number: int) -> None:
        async with ratesync.acquire(*(("a", "b") if number % 2 else ("b", "a"))):
            order.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(1000)]
    await rig.settle()
    survivors = sorted(random.sample(range(1000), 20))
    victims = [number for number in range(1000) if number not in set(survivors)]
    random.shuffle(victims)
    for number in victims:
        tasks[number].cancel()
    await rig.settle()
    assert all(tasks[number].cancelled() for number in victims)
    first.release()
    for _ in range(45):
        await rig.settle(1)
    assert order == survivors
    await rig.assert_everything_is_back()


async def test_an_iterator_dropped_while_waiting_and_a_shutdown(rig: Rig) -> None:
    first = ratesync.acquire("a", "b")
    await first.__aenter__()
    iterator = ratesync.acquire("a", "b").__await__()
    next(iterator)
    del iterator
    task = asyncio.create_task(asyncio.wait_for(ratesync.acquire("b", "a"), 30))
    await rig.settle()
    await asyncio.to_thread(ratesync.shutdown)
    with pytest.raises(ratesync.StoreClosedError):
        await task
    first.release()


async def test_a_reset_of_one_limit_wakes_those_who_wait_for_its_time(ratesync_clock: ManualClock) -> None:
    rig = Rig(ratesync_clock, "rates")
    await ratesync.acquire("a", "b")
    task = asyncio.ensure_future(ratesync.try_acquire("a", "b", timeout=None))
    await rig.settle()
    for limiter in rig.limiters:
        assert not task.done()
        await limiter.reset()
        await rig.settle()
    assert task.done()
    assert await task


def test_a_plain_thread_waits_and_is_woken(ratesync_registry: object) -> None:
    import threading

    for name in ("a", "b"):
        ratesync.configure_limiter(name, max_concurrent=1)
    entered = threading.Event()

    def wait() -> None:
        with ratesync.acquire("a", "b", timeout=30):
            entered.set()

    with ratesync.acquire("b"):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(60)
    thread.join()


async def test_a_permit_of_several_is_used_once_and_warns_when_dropped(ratesync_clock: ManualClock) -> None:
    rig = Rig(ratesync_clock, "slots")
    permit = ratesync.acquire("a", "b")
    async with permit:
        with pytest.raises(RuntimeError, match="still held"):
            await permit.__aenter__()
    with pytest.warns(ResourceWarning, match="a, b"):
        await ratesync.acquire("a", "b")
    assert not await ratesync.try_acquire("a", "b")
    await rig.settle(31)  # the lease
    assert await ratesync.try_acquire("a", "b")
    for limiter in rig.limiters:
        assert await limiter.release()
    await rig.assert_everything_is_back()
