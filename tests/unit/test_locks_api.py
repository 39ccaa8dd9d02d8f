# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""Locks in memory: entering, leaving, loss, and cancel_on_loss with what asyncio and anyio bring along."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest

import ratesync
from ratesync import ConfigValidationError, LockLostError, LockTimeoutError
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")


def shortly(value: object) -> str:
    return ascii(value)[:30]


async def lose(name: str) -> None:
    """Takes the lock from whoever has it, as `ratesync locks break` does."""
    assert await ratesync.get_store("memory").break_lock(name)


async def is_free(name: str) -> bool:
    lease = await ratesync.try_lock(name)
    return lease is not None and await lease.release()


async def test_entering_gives_a_lease_and_leaving_gives_it_back() -> None:
    async with ratesync.lock("a", ttl=30) as lease:
        assert isinstance(lease, ratesync.Lease)
        assert (lease.name, lease.lost) == ("a", False)
        assert 29 < lease.remaining <= 30
        assert await ratesync.try_lock("a") is None
    second = await ratesync.try_lock("a")
    assert second is not None
    assert second.token > lease.token
    assert await second.release() is True
    assert await second.release() is False


def test_the_same_in_a_thread() -> None:
    with ratesync.lock("a") as lease:
        assert ratesync.try_lock("a").wait() is None
        assert not lease.lost
    lease = ratesync.try_lock("a").wait()
    assert lease is not None
    assert lease.release().wait() is True


async def test_names_of_tenants_and_prefixes_never_meet() -> None:
    store = ratesync.get_store("memory")
    spaces: list[dict[str, str]] = [{}, {"tenant": "t"}, {"namespace": "n"}, {"prefix": "p_"}]
    async with contextlib.AsyncExitStack() as stack:
        for space in spaces:
            await stack.enter_async_context(store.lock("a", timeout=0, **space))
        for space in spaces:
            assert await store.try_lock("a", **space) is None


async def test_not_got_in_time_says_who_has_it() -> None:
    async with ratesync.lock("a", ttl=30):
        with pytest.raises(LockTimeoutError, match=r"'a' was not free within 0.01 s") as caught:
            async with ratesync.lock("a", timeout=0.01):
                pytest.fail("two holders")
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.name == "a"
    if caught.value.remaining is not None:
        assert 0 < caught.value.remaining <= 30


def test_timeout_zero_asks_once() -> None:
    with ratesync.lock("a"), pytest.raises(LockTimeoutError), ratesync.lock("a", timeout=0):
        pytest.fail("two holders")


async def test_a_release_wakes_who_waits_first() -> None:
    order: list[int] = []

    async def worker(number: int) -> None:
        async with lock:
            order.append(number)
            await asyncio.sleep(0)

    lock = ratesync.lock("a")  # one object, many tasks
    async with lock:
        tasks = [asyncio.create_task(worker(number)) for number in range(5)]
        await asyncio.sleep(0.01)
        assert order == []
    await asyncio.gather(*tasks)
    assert order == list(range(5))


def test_threads_never_hold_it_together() -> None:
    inside = most = 0

    def worker() -> None:
        nonlocal inside, most
        for _ in range(50):
            with ratesync.lock("a"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


async def test_a_cancelled_waiter_leaves_no_trace() -> None:
    async with ratesync.lock("a"):
        waiter = asyncio.create_task(ratesync.lock("a").__aenter__())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
    lease = await ratesync.try_lock("a")
    assert lease is not None
    await lease.release()


# Loss ---------------------------------------------------------------------------------------------


async def test_leaving_a_body_whose_lock_was_lost_raises() -> None:
    with pytest.raises(LockLostError, match="fencing") as caught:
        async with ratesync.lock("a") as lease:
            await lose("a")
    assert (caught.value.name, caught.value.token) == ("a", lease.token)


def test_the_same_in_a_thread_for_loss() -> None:
    store = ratesync.get_store("memory")
    with pytest.raises(LockLostError), ratesync.lock("a"):
        assert store.break_lock("a").wait()


async def test_a_body_that_raised_keeps_its_exception() -> None:
    with pytest.raises(KeyError):
        async with ratesync.lock("a"):
            await lose("a")
            raise KeyError("of the body")
    assert await is_free("a")  # and the lock is free


async def test_a_body_that_released_early_is_fine() -> None:
    async with ratesync.lock("a") as lease:
        assert await lease.release() is True
        other = await ratesync.try_lock("a")
        assert other is not None
    assert not other.lost
    await other.release()


async def test_a_lease_that_was_asked_for_gives_itself_back() -> None:
    lease = await ratesync.try_lock("a")
    assert lease is not None
    async with lease as entered:
        assert entered is lease
        assert lease.held
    assert await is_free("a")
    with pytest.raises(RuntimeError, match="given back already: acquire the lock anew"):
        await lease.__aenter__()
    with pytest.raises(KeyError):
        async with await ratesync.lock("a").acquire():
            raise KeyError("of the body")
    assert await is_free("a")


def test_the_same_in_a_thread_for_a_lease() -> None:
    lease = ratesync.try_lock("a").wait()
    assert lease is not None
    with lease as entered:
        assert entered is lease
        assert ratesync.try_lock("a").wait() is None
    with pytest.raises(RuntimeError, match="given back already"):
        lease.__enter__()
    with ratesync.lock("a", timeout=0):
        pass


async def test_a_lost_lease_cannot_be_entered_nor_left_in_silence() -> None:
    lease = await ratesync.try_lock("a")
    assert lease is not None
    with pytest.raises(LockLostError):
        async with lease:
            await lose("a")
    with pytest.raises(LockLostError):
        await lease.__aenter__()


def test_without_renewal_the_lease_ends(ratesync_clock: ManualClock) -> None:
    with pytest.raises(LockLostError), ratesync.lock("a", ttl=10, auto_renew=False) as lease:
        ratesync_clock.advance(9)
        assert not lease.lost
        ratesync_clock.advance(2)
        assert lease.lost
        assert lease.remaining == 0
        other = ratesync.try_lock("a").wait()
        assert other is not None
        assert other.token > lease.token
        assert other.release().wait() is True


def test_extending_moves_the_end(ratesync_clock: ManualClock) -> None:
    with ratesync.lock("a", ttl=10, auto_renew=False) as lease:
        ratesync_clock.advance(9)
        lease.extend(20).wait()
        ratesync_clock.advance(15)
        assert not lease.lost
        assert ratesync.try_lock("a").wait() is None


# cancel_on_loss -----------------------------------------------------------------------------------


Body = Callable[[asyncio.Event], Coroutine[Any, Any, Any]]


async def hold(reached: asyncio.Event) -> None:
    """Until it is lost, or cancelled."""
    async with ratesync.lock("a", cancel_on_loss=True):
        reached.set()
        await asyncio.sleep(3600)


async def started(body: Body) -> asyncio.Task[Any]:
    """A task of the body, which has said where it is."""
    reached = asyncio.Event()
    task = asyncio.create_task(body(reached))
    await reached.wait()
    return task


async def test_the_task_goes_on_after_a_loss_it_has_handled() -> None:
    async def body(reached: asyncio.Event) -> str:
        try:
            await hold(reached)
        except LockLostError:
            await asyncio.sleep(0)  # not cancelled any more
            async with asyncio.timeout(5):
                await asyncio.sleep(0)
            current = asyncio.current_task()
            assert current is not None
            return f"went on with {current.cancelling()} cancellations"
        return "not lost"

    task = await started(body)
    await lose("a")
    assert await task == "went on with 0 cancellations"


async def test_a_cancellation_from_elsewhere_stays_one() -> None:
    task = await started(hold)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await is_free("a")


async def test_both_at_once_is_a_cancellation() -> None:
    async def body(reached: asyncio.Event) -> None:
        async with ratesync.lock("a", cancel_on_loss=True):
            reached.set()
            try:
                await asyncio.sleep(3600)
            finally:
                asyncio.current_task().cancel()  # type: ignore[union-attr]

    task = await started(body)
    await lose("a")
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_children_of_a_task_group_are_cancelled_with_the_body() -> None:
    ended: list[str] = []

    async def child() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("child")

    async def body(reached: asyncio.Event) -> None:
        async with ratesync.lock("a", cancel_on_loss=True), asyncio.TaskGroup() as group:
            group.create_task(child())
            await asyncio.sleep(0)
            reached.set()

    task = await started(body)
    await lose("a")
    with pytest.raises(LockLostError):
        await task
    assert ended == ["child"]


async def test_inside_a_task_group_the_loss_is_an_error_like_any_other() -> None:
    reached = asyncio.Event()
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(hold(reached))
            await reached.wait()
            await lose("a")
    assert [type(error) for error in caught.value.exceptions] == [LockLostError]


async def test_anyio_groups_and_scopes_work_inside_and_outside() -> None:
    reached = anyio.Event()

    async def body() -> None:
        with pytest.raises(LockLostError):
            async with ratesync.lock("a", cancel_on_loss=True), anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 3600)
                reached.set()
        with anyio.move_on_after(0) as scope:
            async with ratesync.lock("a", cancel_on_loss=True):
                await anyio.sleep(3600)
        assert scope.cancelled_caught

    async with anyio.create_task_group() as outer:
        outer.start_soon(body)
        await reached.wait()
        await lose("a")
    assert await is_free("a")


async def test_a_loss_while_the_body_raises_keeps_the_exception() -> None:
    async def body(reached: asyncio.Event) -> None:
        async with ratesync.lock("a", cancel_on_loss=True):
            reached.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                raise KeyError("of the body") from None

    task = await started(body)
    await lose("a")
    with pytest.raises(KeyError):
        await task


async def test_a_body_that_ends_in_time_is_not_cancelled_later() -> None:
    async with ratesync.lock("a", cancel_on_loss=True):
        pass
    await asyncio.sleep(0.01)
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


def test_a_thread_cannot_be_cancelled() -> None:
    lock = ratesync.lock("a", cancel_on_loss=True)
    with pytest.raises(ConfigValidationError, match=r"look at lease\.lost"), lock:
        pytest.fail("entered")


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b", "\ud800", 5, None], ids=shortly)
def test_names_that_cannot_be_are_refused(name: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError)):
        ratesync.lock(name)


@pytest.mark.parametrize("ttl", [0, -1, None, float("nan"), "30", True], ids=shortly)
def test_a_ttl_that_is_none_is_refused(ttl: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError)):
        ratesync.lock("a", ttl=ttl)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5"], ids=shortly)
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError)):
        ratesync.lock("a", timeout=timeout)


def test_locks_are_listed_with_their_holders() -> None:
    store = ratesync.get_store("memory")
    with ratesync.lock("a", ttl=30), store.lock("b", tenant="t"):
        rows = store.locks().wait()
        assert [(row["name"], row["tenant"]) for row in rows] == [("a", "default"), ("b", "t")]
        assert rows[0]["expires_in"] > 0
        assert rows[0]["token"] > 0
    assert store.break_lock("a").wait() is False


def test_a_lock_of_a_discovered_file_is_where_it_says(ratesync_registry: Path) -> None:
    (ratesync_registry / "rate-sync.toml").write_text('[state]\nbackend = "memory"\nprefix = "x_"\n')
    with ratesync.lock("a"):
        assert [row["name"] for row in ratesync.get_store("memory").locks("x_").wait()] == ["a"]
