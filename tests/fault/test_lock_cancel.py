"""A cancelled acquire of a lock leaves nothing behind, whatever step it was at; nor does a dropped lease.

In memory, where a manual clock makes every step reachable; on a server: test_lock_outage.py.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ratesync._core import Lease, Lock
from ratesync._engine import Engine
from ratesync.errors import ConfigValidationError, LockLostError, LockTimeoutError, StoreClosedError


class Rig:
    """Locks in memory on an engine with a manual clock."""

    def __init__(self) -> None:
        self.engine = Engine(manual_clock=True)
        self.store = self.engine.add_store("memory", "memory", {})

    def lock(self, name: str = "a", **options: object) -> Lock:
        return Lock(self.store, "acteon_", "default", "default", name, **options)

    async def settle(self, seconds: float = 0.0) -> None:
        """Everything submitted is decided, time moves, and every task that was woken has run."""
        for _ in range(2):
            self.engine.advance(0)
            if seconds:
                self.engine.advance(seconds)
                seconds = 0.0
            for _ in range(5):
                await asyncio.sleep(0)

    async def locks(self) -> list[dict]:
        task = asyncio.ensure_future(self.store.locks("acteon_", 100))
        await self.settle()
        return await task

    async def assert_nothing_is_left(self) -> None:
        await self.settle()
        assert await self.locks() == []


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.engine.shutdown()


async def hold_and_order(lock: Lock, name: str, order: list[str], gate: asyncio.Event) -> None:
    async with lock:
        order.append(name)
        await gate.wait()


STEPS: dict[str, Callable[[Rig, asyncio.Task, Lease], Awaitable[None]]] = {}


def step(function: Callable[[Rig, asyncio.Task, Lease], Awaitable[None]]):
    STEPS[function.__name__] = function
    return function


@step
async def before_its_first_turn(rig: Rig, task: asyncio.Task, first: Lease) -> None:
    pass


@step
async def just_submitted(rig: Rig, task: asyncio.Task, first: Lease) -> None:
    await asyncio.sleep(0)


@step
async def refused_and_in_line(rig: Rig, task: asyncio.Task, first: Lease) -> None:
    await rig.settle()


@step
async def in_the_turn_of_completion(rig: Rig, task: asyncio.Task, first: Lease) -> None:
    # The lock is in the queue of results, whose reader callback has not run.
    await rig.settle()
    assert first.release().wait()
    rig.engine.advance(0)
    rig.engine.advance(0)


@step
async def with_completion_and_cancel_in_one_turn(rig: Rig, task: asyncio.Task, first: Lease) -> None:
    await rig.settle()
    assert first.release().wait()
    rig.engine.advance(0)
    rig.engine.advance(0)
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.sleep(0)


@step
async def after_it_entered(rig: Rig, task: asyncio.Task, first: Lease) -> None:
    await rig.settle()
    assert first.release().wait()
    await rig.settle()


@pytest.mark.parametrize("name", list(STEPS))
async def test_a_cancel_at_any_step_lets_the_next_one_have_it(rig: Rig, name: str) -> None:
    order: list[str] = []
    gate = asyncio.Event()
    first = await rig.lock().acquire()
    assert first is not None
    victim = asyncio.create_task(hold_and_order(rig.lock(), "victim", order, gate))
    if name != "before_its_first_turn":
        await asyncio.sleep(0)
        rig.engine.advance(0)
    behind = asyncio.create_task(hold_and_order(rig.lock(), "behind", order, gate))
    await STEPS[name](rig, victim, first)
    victim.cancel()
    with pytest.raises(asyncio.CancelledError):
        await victim
    if first.held:
        assert await first.release()
    await rig.settle()
    assert order[-1:] == ["behind"]
    if "victim" in order:
        assert name in ("after_it_entered", "with_completion_and_cancel_in_one_turn")
    gate.set()
    await behind
    await rig.assert_nothing_is_left()


async def test_a_thousand_waiters_cancelled_in_random_order_leave_the_rest_in_order(rig: Rig) -> None:
    first = await rig.lock().acquire()
    order: list[int] = []

    async def wait(number: int) -> None:
        async with rig.lock(timeout=None if number % 2 else 3600):
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
    await first.release()
    while len(order) < len(survivors):
        await rig.settle()
    assert order == survivors
    await rig.assert_nothing_is_left()


async def test_a_cancelled_release_gives_back_all_the_same(rig: Rig) -> None:
    lease = await rig.lock().acquire()
    task = asyncio.ensure_future(lease.release())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await rig.assert_nothing_is_left()
    assert await lease.release() is False


async def test_a_cancelled_signal_costs_nothing_and_another_one_rings(rig: Rig) -> None:
    lease = await rig.lock(ttl=5, auto_renew=False).acquire()
    gone = asyncio.ensure_future(lease.lost_signal())
    stays = asyncio.ensure_future(lease.lost_signal())
    await rig.settle()
    gone.cancel()
    await rig.settle(4.9)
    assert gone.cancelled()
    assert not stays.done()
    assert not lease.lost
    await rig.settle(0.2)
    assert await stays is True
    assert lease.lost
    assert await lease.lost_signal() is True
    with pytest.raises(LockLostError):
        await lease.extend(5)


async def test_a_released_lease_rings_false(rig: Rig) -> None:
    lease = await rig.lock().acquire()
    signal = asyncio.ensure_future(lease.lost_signal())
    await rig.settle()
    await lease.release()
    await rig.settle()
    assert await signal is False
    assert not lease.lost


# Time ---------------------------------------------------------------------------------------------


async def test_in_line_it_is_none_at_the_timeout_and_with_raises(rig: Rig) -> None:
    first = await rig.lock(ttl=30).acquire()
    waiting = asyncio.ensure_future(rig.lock(timeout=2).acquire())
    entering = asyncio.create_task(rig.lock(timeout=2).__aenter__())
    await rig.settle()
    await rig.settle(1.9)
    assert not waiting.done()
    assert not entering.done()
    await rig.settle(0.2)
    assert await waiting is None
    with pytest.raises(LockTimeoutError, match="'a'"):
        await entering
    assert await rig.lock().acquire(timeout=0) is None
    await first.release()


async def test_a_renewed_lease_outlives_its_ttl_and_others_take_over_one_that_is_not(
    rig: Rig,
) -> None:
    kept = await rig.lock("kept", ttl=1).acquire()
    left = await rig.lock("left", ttl=1, auto_renew=False).acquire()
    heir = asyncio.ensure_future(rig.lock("left").acquire())
    await rig.settle(0.9)
    assert not heir.done()
    await rig.settle(0.2)
    assert left.lost
    assert left.remaining == 0
    taken = await heir
    assert taken.token > left.token
    assert await left.release() is False
    assert taken.held
    await rig.settle(100)
    assert kept.held
    assert 0 < kept.remaining <= 1
    listed = {row["name"]: row for row in await rig.locks()}
    assert 0 < listed["kept"]["expires_in"] <= 1
    assert listed["kept"]["token"] == kept.token
    await kept.release()
    await taken.release()


async def test_leaving_a_body_whose_lock_was_lost_says_so_unless_the_body_failed(rig: Rig) -> None:
    with pytest.raises(LockLostError):
        async with rig.lock(ttl=1, auto_renew=False):
            await rig.settle(2)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with rig.lock(ttl=1, auto_renew=False):
            await rig.settle(2)
            raise ZeroDivisionError
    async with rig.lock() as lease:
        assert await lease.release()
    await rig.assert_nothing_is_left()


async def test_an_extension_moves_the_end_both_ways(rig: Rig) -> None:
    lease = await rig.lock(ttl=10, auto_renew=False).acquire()
    await lease.extend(100)
    await rig.settle(50)
    assert lease.held
    assert lease.ttl == 100
    await lease.extend(0.5)
    signal = asyncio.ensure_future(lease.lost_signal())
    await rig.settle(0.6)
    assert lease.lost
    assert await signal


async def test_a_broken_lock_is_lost_to_its_holder(rig: Rig) -> None:
    lease = await rig.lock().acquire()
    signal = asyncio.ensure_future(lease.lost_signal())
    await rig.settle()
    wrong = asyncio.ensure_future(rig.store.break_lock("acteon_", "default", "default", "a", lease.token + 1))
    await rig.settle()
    assert await wrong is False
    assert lease.held
    broken = asyncio.ensure_future(rig.store.break_lock("acteon_", "default", "default", "a", 0))
    await rig.settle()
    assert await broken is True
    assert lease.lost
    assert await signal is True
    assert await lease.release() is False


# Dropped ------------------------------------------------------------------------------------------


async def test_a_dropped_lease_warns_and_runs_out(rig: Rig) -> None:
    lease = await rig.lock(ttl=3).acquire()
    heir = asyncio.ensure_future(rig.lock().acquire())
    await rig.settle(10)  # renewed
    with pytest.warns(ResourceWarning, match="lease of lock 'a' was dropped without release"):
        del lease
    await rig.settle(2.9)
    assert not heir.done()
    await rig.settle(0.2)
    assert (await heir) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert await (await heir).release()
        del heir
        gc.collect()


async def test_a_lease_in_a_cycle_is_found(rig: Rig) -> None:
    class Holder:
        pass

    holder = Holder()
    holder.lease = await rig.lock(ttl=3).acquire()
    holder.me = holder
    del holder
    with pytest.warns(ResourceWarning, match="dropped without release"):
        gc.collect()
    await rig.settle(3.1)
    async with rig.lock(timeout=0):
        pass


def test_a_lock_entered_and_forgotten_warns_once() -> None:
    rig = Rig()
    lock = rig.lock(ttl=3)
    lock.__enter__()
    with pytest.warns(ResourceWarning) as seen:  # noqa: PT031
        del lock
        gc.collect()
    assert len(seen) == 1
    rig.engine.shutdown()


async def test_two_tasks_may_share_one_lock_object(rig: Rig) -> None:
    lock = rig.lock()
    tokens: list[int] = []

    async def work() -> None:
        async with lock as lease:
            tokens.append(lease.token)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work()) for _ in range(20)]
    while not all(task.done() for task in tasks):
        await rig.settle()
    await asyncio.gather(*tasks)
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == 20


def test_threads_exclude_each_other() -> None:
    engine = Engine()
    store = engine.add_store("memory", "memory", {})
    inside = 0
    worst = 0
    done = 0

    def work() -> None:
        nonlocal inside, worst, done
        for _ in range(200):
            with Lock(store, "acteon_", "default", "default", "t"):
                inside += 1
                worst = max(worst, inside)
                inside -= 1
                done += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.shutdown()
    assert worst == 1
    assert done == 1600


async def test_after_shutdown_everything_says_closed(rig: Rig) -> None:
    lock = rig.lock()
    lease = await lock.acquire()
    waiting = asyncio.ensure_future(lock.acquire())
    await rig.settle()
    rig.engine.shutdown()
    with pytest.raises(StoreClosedError):
        await waiting
    with pytest.raises(StoreClosedError):
        await lock.acquire()
    assert lease.held in (True, False)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"ttl": 0}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": None}, "ttl"),
        ({"ttl": float("nan")}, "ttl"),
        ({"ttl": "1"}, "ttl"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
    ],
)
def test_bad_terms_are_refused_before_anything_is_sent(options: dict, field: str) -> None:
    rig = Rig()
    with pytest.raises(ConfigValidationError) as refused:
        rig.lock(**options)
    assert refused.value.field == field
    rig.engine.shutdown()


@pytest.mark.parametrize("name", ["", "x" * 256, "nul\0", "\ud800", 7, None, b"bytes"])
def test_hostile_names_are_refused(name: object) -> None:
    rig = Rig()
    with pytest.raises(ConfigValidationError):
        rig.lock(name)  # type: ignore[arg-type]
    rig.engine.shutdown()


@pytest.mark.parametrize("name", ["%", "_", "a:b", "*", "'; DROP TABLE locks; --", "ü" * 127, "\n"])
def test_names_are_literal(name: str) -> None:
    rig = Rig()
    with rig.lock(name) as lease:
        assert lease.name == name
        assert rig.lock(name).acquire(timeout=0).wait() is None
        assert rig.lock(name + "x").acquire(timeout=0).wait().release().wait()
    rig.engine.shutdown()
