"""A cancelled acquire leaves nothing behind, whatever step it was at - with each way of cancelling.

The manual clock makes every step reachable: `STEPS` cancels one of three contenders before it starts,
queued, sleeping, in the loop turn of its completion, and after it. Then the store is as if it had
never asked: those behind it move up, and all units and slots come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ratesync._engine import Engine, Limiter

SHAPES = {
    "rate": {"rate_per_second": 1.0},
    "concurrency": {"max_concurrent": 1},
    "both": {"rate_per_second": 1.0, "max_concurrent": 1},
}


class Rig:
    """One limiter on an engine with a manual clock."""

    def __init__(self, **shape: float) -> None:
        self.engine = Engine(manual_clock=True)
        self.store = self.engine.add_store("memory", "memory", {})
        self.limiter = Limiter(self.store, "x", **shape)
        self.has_rate = "rate_per_second" in shape

    async def settle(self, seconds: float = 0.0) -> None:
        """Everything submitted is decided, time moves, and every task that was woken has run."""
        self.engine.advance(0)
        if seconds:
            self.engine.advance(seconds)
        for _ in range(4):
            await asyncio.sleep(0)
        self.engine.advance(0)
        for _ in range(4):
            await asyncio.sleep(0)

    async def peek(self) -> dict:
        return await self.limiter._peek(None)

    async def assert_everything_is_back(self) -> None:
        await self.settle()
        await self.settle(1e6)
        seen = await self.peek()
        assert seen["in_use"] == 0
        assert seen["full_after"] == 0.0
        assert self.limiter._counters()["held"] == 0


@pytest.fixture(params=list(SHAPES))
async def rig(request) -> AsyncIterator[Rig]:
    rig = Rig(**SHAPES[request.param])
    yield rig
    rig.engine.shutdown()


async def hold_and_order(rig: Rig, name: str, order: list[str], gate: asyncio.Event) -> None:
    async with rig.limiter.acquire_context():
        order.append(name)
        await gate.wait()


STEPS: dict[str, Callable[[Rig, asyncio.Task], Awaitable[None]]] = {}


def step(function: Callable[[Rig, asyncio.Task], Awaitable[None]]):
    STEPS[function.__name__] = function
    return function


@step
async def before_its_first_turn(rig: Rig, task: asyncio.Task) -> None:
    pass


@step
async def just_submitted(rig: Rig, task: asyncio.Task) -> None:
    await asyncio.sleep(0)


@step
async def decided_and_waiting(rig: Rig, task: asyncio.Task) -> None:
    await rig.settle()


@step
async def in_the_turn_of_completion(rig: Rig, task: asyncio.Task) -> None:
    # The grant is in the queue, its reader callback has not run.
    await rig.settle()
    rig.release_first()
    rig.engine.advance(0)
    rig.engine.advance(1)


@step
async def with_completion_and_cancel_in_one_turn(rig: Rig, task: asyncio.Task) -> None:
    await rig.settle()
    rig.release_first()
    rig.engine.advance(0)
    rig.engine.advance(1)
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.sleep(0)


@step
async def after_it_entered(rig: Rig, task: asyncio.Task) -> None:
    await rig.settle()
    rig.release_first()
    await rig.settle(1)


@pytest.mark.parametrize("name", list(STEPS))
async def test_a_cancel_at_any_step_leaves_the_store_as_if_it_had_never_asked(rig: Rig, name: str) -> None:
    order: list[str] = []
    gate = asyncio.Event()
    first = rig.limiter.acquire_context()
    await first.__aenter__()
    rig.release_first = first.release
    victim = asyncio.create_task(hold_and_order(rig, "victim", order, gate))
    if name != "before_its_first_turn":
        await asyncio.sleep(0)
        rig.engine.advance(0)
    behind = asyncio.create_task(hold_and_order(rig, "behind", order, gate))

    await STEPS[name](rig, victim)
    victim.cancel()
    with pytest.raises(asyncio.CancelledError):
        await victim
    await rig.settle()
    first.release()
    await rig.settle()
    # uvloop polls before it runs what was called soon: there the victim enters just before the cancel.
    if "victim" in order:
        assert name in ("after_it_entered", "with_completion_and_cancel_in_one_turn")
        # Its unit is used up; the next one is due a second later.
        await rig.settle(1)
        assert order == ["victim", "behind"]
    else:
        # The victim's slot is the next one's: due one second after the start, which is now for those
        # cancelled around their completion.
        if "completion" not in name:
            await rig.settle(1)
        assert order == ["behind"]
    gate.set()
    await behind
    await rig.assert_everything_is_back()


async def test_the_last_reserved_slot_is_refunded_and_the_ones_before_it_in_turn() -> None:
    rig = Rig(rate_per_second=1.0)
    await rig.limiter.acquire_context()
    tasks = [asyncio.create_task(rig.limiter._try(None, 1, None)) for _ in range(3)]
    await rig.settle()
    assert (await rig.peek())["full_after"] == 4.0
    for left in (3.0, 2.0, 1.0):
        task = tasks.pop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await rig.settle()
        assert (await rig.peek())["full_after"] == left
    rig.engine.shutdown()


async def test_a_thousand_waiters_cancelled_in_random_order_leave_nothing(rig: Rig) -> None:
    first = rig.limiter.acquire_context()
    await first.__aenter__()
    order: list[int] = []

    async def wait(number: int) -> None:
        async with rig.limiter.acquire_context():
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
    await rig.settle()
    for turn in range(1, 21):
        await rig.settle(1)
        if rig.has_rate:
            assert order == survivors[:turn]
    assert order == survivors
    await rig.assert_everything_is_back()


async def test_ten_thousand_cancelled_sleepers_do_not_stall_the_io_thread() -> None:
    rig = Rig(rate_per_second=1.0)
    await rig.limiter.acquire_context()
    tasks = [asyncio.create_task(rig.limiter._try(None, 1, None)) for _ in range(10_000)]
    await rig.settle()
    started = asyncio.get_running_loop().time()
    for task in tasks:
        task.cancel()
    rig.engine.advance(0)  # returns when the I/O thread got through them
    assert asyncio.get_running_loop().time() - started < 10
    await asyncio.gather(*tasks, return_exceptions=True)
    await rig.settle()
    assert (await rig.peek())["full_after"] == 1.0
    rig.engine.shutdown()


async def test_a_waiter_refused_by_the_rate_leaves_the_slot_to_the_next() -> None:
    rig = Rig(rate_per_second=1.0, max_concurrent=1)
    first = rig.limiter.acquire_context()
    await first.__aenter__()
    hasty = asyncio.create_task(rig.limiter._try(0.5, 1, None))
    await rig.settle()
    patient = asyncio.create_task(rig.limiter._try(10, 1, None))
    await rig.settle()
    first.release()
    await rig.settle()
    assert await hasty is False
    await rig.settle(1)
    assert await asyncio.wait_for(patient, 30) is True
    rig.engine.shutdown()


# Ways to cancel -----------------------------------------------------------------------------------


@pytest.fixture
async def full() -> AsyncIterator[Rig]:
    """A limiter whose one slot is held until `release_first()`."""
    rig = Rig(max_concurrent=1)
    first = rig.limiter.acquire_context()
    await first.__aenter__()
    rig.release_first = first.release
    yield rig
    first.release()
    await rig.assert_everything_is_back()
    rig.engine.shutdown()


async def test_asyncio_timeout_around_acquire(full: Rig) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), full.limiter.acquire_context():
            pytest.fail("entered")


async def test_wait_for_an_acquire_object(full: Rig) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(full.limiter.acquire_context(), 0.01)
    asyncio.get_running_loop().call_later(0.01, full.release_first)
    permit = await asyncio.wait_for(full.limiter.acquire_context(), 30)
    permit.release()


async def test_wait_for_aenter_gives_the_permit(full: Rig) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(full.limiter.acquire_context().__aenter__(), 0.01)
    asyncio.get_running_loop().call_later(0.01, full.release_first)
    acquiring = full.limiter.acquire_context()
    permit = await asyncio.wait_for(acquiring.__aenter__(), 30)
    assert permit is acquiring
    assert (await full.peek())["in_use"] == 1
    permit.release()


async def test_wait_for_the_limiters_own_aenter(full: Rig) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(full.limiter.__aenter__(), 0.01)


async def test_a_failing_task_group_cancels_its_waiters(full: Rig) -> None:
    async def fail() -> None:
        await full.settle()
        raise ValueError("one of the group")

    async def wait() -> None:
        async with full.limiter:
            pytest.fail("entered")

    async def group_of_three() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(wait())
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await group_of_three()


async def test_a_second_cancel_changes_nothing(full: Rig) -> None:
    task = asyncio.create_task(full.limiter._try(None, 1, None))
    await full.settle()
    assert task.cancel()
    assert task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_message_of_a_cancel_arrives(full: Rig) -> None:
    # anyio recognises its own cancellations by it.
    async def wait() -> tuple[object, ...]:
        try:
            async with full.limiter.acquire_context():
                return ()
        except asyncio.CancelledError as error:
            return error.args

    task = asyncio.create_task(wait())
    await full.settle()
    task.cancel("Cancelled by cancel scope 7f")
    assert await task == ("Cancelled by cancel scope 7f",)


async def test_a_task_that_survives_its_cancel_can_acquire_again(full: Rig) -> None:
    async def stubborn() -> str:
        try:
            await full.limiter.acquire_context()
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
        async with full.limiter.acquire_context():
            return "second"

    task = asyncio.create_task(stubborn())
    await full.settle()
    task.cancel()
    await full.settle()
    full.release_first()
    assert await asyncio.wait_for(task, 30) == "second"


async def test_a_shielded_acquire_goes_on_and_its_permit_is_usable(full: Rig) -> None:
    inner = asyncio.ensure_future(full.limiter.acquire_context())
    outer = asyncio.create_task(asyncio.wait_for(asyncio.shield(inner), 30))
    await full.settle()
    outer.cancel()
    await full.settle()
    assert not inner.done()
    full.release_first()
    permit = await asyncio.wait_for(inner, 30)
    permit.release()


async def test_an_exception_thrown_into_a_waiting_coroutine_comes_out_of_it(full: Rig) -> None:
    async def wait() -> None:
        async with full.limiter.acquire_context():
            pytest.fail("entered")

    for thrown in (LookupError("inside"), LookupError):
        coroutine = wait()
        coroutine.send(None)
        with pytest.raises(LookupError):
            coroutine.throw(thrown)


async def test_a_coroutine_closed_while_waiting(full: Rig) -> None:
    async def wait() -> None:
        async with full.limiter.acquire_context():
            pytest.fail("entered")

    coroutine = wait()
    coroutine.send(None)
    await full.settle()
    coroutine.close()


async def test_a_coroutine_closed_after_the_grant_and_before_resuming(full: Rig) -> None:
    async def wait() -> None:
        async with full.limiter.acquire_context():
            pytest.fail("entered")

    coroutine = wait()
    coroutine.send(None)
    await full.settle()
    full.release_first()
    await full.settle()  # granted, and nobody is there to be woken
    coroutine.close()


async def test_an_iterator_dropped_while_waiting(full: Rig) -> None:
    iterator = full.limiter.acquire_context().__await__()
    next(iterator)
    del iterator
    full.release_first()


async def test_a_generator_based_driver_gets_the_permit(full: Rig) -> None:
    def drive():
        return (yield from full.limiter.acquire_context().__await__())

    class Awaitable_:  # noqa: N801
        def __await__(self):
            return drive()

    async def wait():
        return await Awaitable_()

    task = asyncio.create_task(wait())
    await full.settle()
    full.release_first()
    (await asyncio.wait_for(task, 30)).release()


async def test_a_pending_cancelled_before_its_first_step_acquires_nothing() -> None:
    rig = Rig(max_concurrent=1)
    task = asyncio.create_task(rig.limiter._acquire_bare(None, 1, None))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rig.assert_everything_is_back()
    rig.engine.shutdown()


async def test_create_task_takes_a_pending_that_need_not_wait() -> None:
    rig = Rig(max_concurrent=1)
    assert await asyncio.create_task(rig.limiter._try(0, 1, None)) is True
    assert await asyncio.create_task(rig.limiter._try(0, 1, None)) is False
    rig.engine.shutdown()


async def test_exit_stacks_and_gather_take_acquire_objects_and_limiters(rig: Rig) -> None:
    async with contextlib.AsyncExitStack() as stack:
        permit = await stack.enter_async_context(rig.limiter.acquire_context())
        assert permit.limiter_id == "x"
    await rig.settle(1)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rig.limiter)
    await rig.settle(1)
    gathered = asyncio.gather(rig.limiter.acquire_context(), rig.limiter.acquire_context())
    await rig.settle()
    await rig.settle(1)
    rig.limiter._release_bare()  # the first one's, where slots are counted
    await rig.settle(1)
    for permit in await asyncio.wait_for(gathered, 30):
        permit.release()
