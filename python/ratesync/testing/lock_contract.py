"""The contract of locks: one holder at a time, tokens that grow, leases that end, and waiters in line.

    class TestMyStoreLocks(LockContract):
        @pytest.fixture
        def store_options(self):
            return {"engine": "memory"}

Everything goes through the public API, and no test rests on the speed of the machine. Needs pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ratesync import Lease, LockLostError, LockTimeoutError, Store
from ratesync.testing.contract import PATIENCE, Caller, StoreContract, eventually, refused
from ratesync.testing.state_name_contract import HOSTILE, REFUSED

__all__ = ["LockContract"]

# Of locks that are renewed while Python is busy for longer: renewed after a third of it, so that a machine
# may stand still for five seconds.
LEASE, LONGER = 9.0, 10.0


def hold_the_gil(seconds: float) -> None:
    """No Python thread runs meanwhile: PyDLL keeps the lock that CDLL would give away."""
    libc = ctypes.PyDLL(None)
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # usleep promises nothing beyond one second
        libc.usleep(400_000)


class LockContract(StoreContract):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @staticmethod
    def taken_over(store: Store, name: str, ttl: float = 30) -> Lease:
        """Takes the lock as soon as the lease of its holder is over; a short lease is not renewed."""
        lease = store.lock(name, ttl=ttl).acquire(timeout=PATIENCE, auto_renew=ttl > 1).wait()
        assert lease is not None
        return lease

    # One holder -----------------------------------------------------------------------------------

    def test_one_holds_it_and_the_next_gets_it_after_the_release(self, store: Store, call: Caller) -> None:
        with call.holding(store.lock("invoice-42", ttl=30, timeout=PATIENCE)) as lease:
            assert lease.name == "invoice-42"
            assert lease.token > 0
            assert lease.lost is False
            assert 0 < lease.remaining <= 30
            assert call(store.try_lock("invoice-42", ttl=30)) is None
        second = call(store.try_lock("invoice-42", ttl=30))
        assert second is not None
        assert second.token > lease.token
        assert call(second.release()) is True

    def test_tokens_grow_with_every_acquisition_of_a_name(self, store: Store, call: Caller) -> None:
        seen = 0
        for _ in range(10):
            lease = call(store.try_lock("name", ttl=30))
            assert lease is not None
            assert lease.token > seen
            seen = lease.token
            assert call(lease.release()) is True
        with call.holding(store.lock("name", ttl=30)) as last:
            assert last.token > seen

    def test_tokens_grow_after_the_lock_was_forgotten_and_purged(self, store: Store, call: Caller) -> None:
        first = self.taken_over(store, "name", ttl=0.01)
        second = self.taken_over(store, "name")
        assert second.token > first.token
        assert call(second.release()) is True
        call(store.state().purge())
        third = call(store.try_lock("name", ttl=30))
        assert third is not None
        assert third.token > second.token
        call(third.release())

    def test_a_body_that_raises_gives_the_lock_back(self, store: Store, call: Caller) -> None:
        with pytest.raises(ZeroDivisionError), call.holding(store.lock("name", ttl=30)):
            raise ZeroDivisionError
        lease = call(store.try_lock("name", ttl=30))
        assert lease is not None
        call(lease.release())

    def test_a_lock_is_not_reentrant(self, store: Store, call: Caller) -> None:
        with call.holding(store.lock("name", ttl=30)):
            begin = time.monotonic()
            with pytest.raises(LockTimeoutError) as caught, call.holding(store.lock("name", 30, 0.05)):
                pytest.fail("entered")
            assert time.monotonic() - begin >= 0.045
        assert caught.value.name == "name"
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.retryable

    def test_release_says_whether_it_was_still_held(self, store: Store, call: Caller) -> None:
        lease = call(store.try_lock("name", ttl=30))
        assert lease is not None
        assert call(lease.release()) is True
        assert call(lease.release()) is False
        late = self.taken_over(store, "name", ttl=0.02)
        second = self.taken_over(store, "name")
        assert call(late.release()) is False
        assert call(store.try_lock("name", ttl=30)) is None
        assert call(second.release()) is True

    async def test_tasks_exclude_each_other(self, store: Store) -> None:
        inside = most = 0
        tokens: list[int] = []

        async def work() -> None:
            nonlocal inside, most
            async with store.lock("name", ttl=30, timeout=PATIENCE) as lease:
                inside += 1
                most = max(most, inside)
                tokens.append(lease.token)
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(work() for _ in range(40)))
        assert most == 1
        assert tokens == sorted(set(tokens))
        assert len(tokens) == 40

    def test_threads_exclude_each_other(self, store: Store) -> None:
        inside: list[int] = []
        most: list[int] = []

        def work() -> None:
            with store.lock("name", ttl=30, timeout=PATIENCE):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(work) for _ in range(30)]:
                future.result()
        assert most == [1] * 30

    # Names ----------------------------------------------------------------------------------------

    def test_hostile_names_are_locks_of_their_own(self, store: Store, call: Caller) -> None:
        leases = [call(store.try_lock(name, ttl=30)) for name in HOSTILE]
        assert all(leases)
        assert [call(store.try_lock(name, ttl=30)) for name in HOSTILE] == [None] * len(HOSTILE)
        for lease in leases:
            assert lease is not None
            assert call(lease.release()) is True

    def test_tenants_namespaces_and_prefixes_have_locks_of_their_own(
        self, store: Store, call: Caller
    ) -> None:
        places: list[dict[str, Any]] = [
            {},
            {"tenant": "a:b"},
            {"tenant": "a"},
            {"namespace": "a"},
            {"namespace": "a:b", "tenant": "c"},
            {"namespace": "a", "tenant": "b:c"},
            {"prefix": "other_"},
        ]
        leases = [call(store.try_lock(name, ttl=30, **place)) for place in places for name in ("c", "b:c")]
        assert None not in leases
        assert call(store.try_lock("c", ttl=30, namespace="a")) is None
        assert all(call(lease.release()) for lease in leases if lease is not None)

    def test_a_lock_and_a_key_of_one_name_do_not_meet(self, store: Store, call: Caller) -> None:
        state = store.state()
        for kind in ("lock", "locks", "dedup"):
            assert call(state.check_and_set("name", "v", kind=kind)) is True
        with call.holding(store.lock("name", ttl=30)):
            assert call(state.get("name", kind="lock")) == "v"
            assert call(state.delete("name", kind="locks")) is True
        assert call.each(state.scan()) == []

    @pytest.mark.parametrize("name", REFUSED, ids=repr)
    def test_a_bad_name_is_refused(self, store: Store, name: Any) -> None:
        with refused("name"):
            store.try_lock(name, ttl=30).wait()

    @pytest.mark.parametrize(
        "options",
        [
            {"ttl": 0},
            {"ttl": -1},
            {"ttl": None},
            {"ttl": float("nan")},
            {"ttl": float("inf")},
            {"ttl": "30"},
            {"ttl": 30, "timeout": -1},
            {"ttl": 30, "timeout": float("nan")},
            {"ttl": 30, "timeout": "10"},
        ],
        ids=repr,
    )
    def test_times_that_mean_nothing_are_refused(self, store: Store, options: Any) -> None:
        wrong = "timeout" if "timeout" in options else "ttl"
        with refused(wrong), store.lock("name", **options):
            pytest.fail("entered")

    # Leases that end ------------------------------------------------------------------------------

    def test_a_lease_that_is_over_is_taken_over_with_a_higher_token(self, store: Store, call: Caller) -> None:
        first = self.taken_over(store, "name", ttl=0.05)
        with call.holding(store.lock("name", ttl=30, timeout=PATIENCE)) as second:
            assert second.token > first.token
            assert call(first.release()) is False
            with pytest.raises(LockLostError) as caught:
                call(first.extend(30))
            assert (caught.value.name, caught.value.token) == ("name", first.token)
            assert first.lost is True
            assert first.remaining == 0
            assert second.lost is False
            assert call(store.try_lock("name", ttl=30)) is None

    def test_a_block_whose_lease_was_taken_over_ends_in_an_error(self, store: Store, call: Caller) -> None:
        with (
            pytest.raises(LockLostError),
            call.holding(store.lock("name", ttl=0.05, auto_renew=False)) as first,
        ):
            second = self.taken_over(store, "name")
        assert first.lost is True
        assert call(second.release()) is True

    def test_an_error_of_the_body_is_not_hidden_by_the_loss(self, store: Store, call: Caller) -> None:
        def hold() -> None:
            with call.holding(store.lock("name", ttl=0.05, auto_renew=False)):
                call(self.taken_over(store, "name").release())
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            hold()

    def test_extending_gives_the_lease_new_time(self, store: Store, call: Caller) -> None:
        lease = call(store.try_lock("name", ttl=100, auto_renew=False))
        assert lease is not None
        call(lease.extend(500))
        assert 400 < lease.remaining <= 500
        call(lease.extend(50))
        assert 20 < lease.remaining <= 50
        assert call(lease.release()) is True
        with pytest.raises(LockLostError):
            call(lease.extend(30))

    def test_a_renewed_lease_outlives_a_call_that_keeps_the_gil(self, store: Store) -> None:
        with store.lock("name", ttl=LEASE, timeout=PATIENCE, auto_renew=True) as lease:
            rivals = ThreadPoolExecutor(1)
            rival = rivals.submit(lambda: store.lock("name", ttl=30, timeout=PATIENCE).__enter__())
            time.sleep(0.05)
            hold_the_gil(LONGER)
            assert not rival.done()
            assert lease.lost is False
            assert lease.remaining > 0
        second = rival.result(PATIENCE)
        assert second.token > lease.token
        assert second.release().wait() is True
        rivals.shutdown()

    async def test_a_renewed_lease_outlives_a_blocked_event_loop(self, store: Store) -> None:
        async with store.lock("name", ttl=LEASE, auto_renew=True) as lease:
            token = lease.token
            time.sleep(LONGER)
            assert await store.try_lock("name", ttl=30) is None
            assert (lease.lost, lease.token) == (False, token)

    def test_a_forgotten_lease_warns_and_its_lock_comes_free(self, store: Store, call: Caller) -> None:
        lease = call(store.try_lock("name", ttl=300))
        assert lease is not None
        with pytest.warns(ResourceWarning):  # noqa: PT031 - dropping it is the call
            del lease
            gc.collect()
        # One that was over before it was dropped is dropped in silence.
        short = self.taken_over(store, "short", ttl=1.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del short
            gc.collect()
        second = self.taken_over(store, "short")
        assert call(second.release()) is True

    # The loss signal ------------------------------------------------------------------------------

    async def test_the_signal_of_loss_comes_when_the_lock_is_broken(self, store: Store) -> None:
        lease = await store.try_lock("name", ttl=LEASE, auto_renew=True)
        assert lease is not None
        signal = asyncio.ensure_future(lease.lost_signal())
        await asyncio.sleep(0.05)
        assert not signal.done()
        assert await store.break_lock("name") is True
        async with store.lock("name", ttl=30, timeout=PATIENCE) as second:
            assert await asyncio.wait_for(signal, PATIENCE) is True
            assert lease.lost
            assert second.token > lease.token
            assert await lease.release() is False

    async def test_the_signal_of_a_released_lease_says_that_nothing_was_lost(self, store: Store) -> None:
        lease = await store.try_lock("name", ttl=30)
        assert lease is not None
        signal = asyncio.ensure_future(lease.lost_signal())
        await asyncio.sleep(0)
        await lease.release()
        assert await asyncio.wait_for(signal, PATIENCE) is False

    async def test_a_lease_that_nobody_renews_is_lost_when_its_time_is_over(self, store: Store) -> None:
        lease = await store.lock("name", ttl=0.1).acquire(timeout=PATIENCE, auto_renew=False)
        assert lease is not None
        assert await asyncio.wait_for(lease.lost_signal(), PATIENCE) is True
        assert lease.lost
        assert lease.remaining == 0

    async def test_a_loss_cancels_the_body_where_wanted(self, store: Store) -> None:
        reached: list[str] = []

        async def hold() -> None:
            async with store.lock("name", ttl=LEASE, cancel_on_loss=True):
                reached.append("entered")
                await asyncio.sleep(50)
                reached.append("went on")

        holding = asyncio.create_task(hold())
        while not reached:
            await asyncio.sleep(0)
        assert await store.break_lock("name") is True
        with pytest.raises(LockLostError) as caught:
            await holding
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert reached == ["entered"]

    def test_a_lock_is_listed_with_its_holder_and_can_be_broken(self, store: Store, call: Caller) -> None:
        assert call(store.break_lock("name")) is False
        lease = call(store.try_lock("name", ttl=500, tenant="a:b"))
        assert lease is not None
        (row,) = call(store.locks())
        assert (row["name"], row["tenant"], row["token"]) == ("name", "a:b", lease.token)
        assert str(os.getpid()) in row["holder"] or not store.capabilities["shared"]
        assert 0 < row["expires_in"] <= 500 or not store.capabilities["shared"]
        assert call(store.break_lock("name")) is False
        assert call(store.break_lock("name", tenant="a:b", token=lease.token + 1)) is False
        assert call(store.break_lock("name", tenant="a:b", token=lease.token)) is True
        second = call(store.try_lock("name", ttl=30, tenant="a:b"))
        assert second is not None
        assert second.token > lease.token
        assert call(lease.release()) is False
        assert call(second.release()) is True
        assert call(store.locks()) == []

    # Waiting --------------------------------------------------------------------------------------

    async def test_waiters_get_the_lock_in_the_order_they_came(self, store: Store) -> None:
        order: list[int] = []

        async def work(number: int) -> None:
            async with store.lock("name", ttl=30, timeout=PATIENCE):
                order.append(number)

        async with store.lock("name", ttl=30):
            tasks = []
            for number in range(8):
                tasks.append(asyncio.create_task(work(number)))
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        assert order == list(range(8))

    async def test_one_waits_as_long_as_it_takes_without_a_timeout(self, store: Store) -> None:
        async def work() -> int:
            async with store.lock("name", ttl=30, timeout=None) as lease:
                return lease.token

        async with store.lock("name", ttl=30) as first:
            task = asyncio.create_task(work())
            await asyncio.sleep(0.2)
            assert not task.done()
        assert await asyncio.wait_for(task, PATIENCE) > first.token

    def test_no_timeout_at_all_is_one_try(self, store: Store, call: Caller) -> None:
        with call.holding(store.lock("name", ttl=30, timeout=0)):
            with pytest.raises(LockTimeoutError), call.holding(store.lock("name", ttl=30, timeout=0)):
                pytest.fail("entered")
            assert call(store.try_lock("name", ttl=30)) is None

    async def test_a_cancelled_waiter_leaves_the_lock_to_the_next(self, store: Store) -> None:
        async def enter() -> None:
            async with store.lock("name", ttl=30, timeout=PATIENCE):
                await asyncio.sleep(0)

        async with store.lock("name", ttl=30):
            tasks = [asyncio.create_task(enter()) for _ in range(6)]
            await asyncio.sleep(0.05)
            for task in tasks[::2]:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, type(None)] * 3

    async def test_cancelling_at_any_moment_leaves_no_holder(self, store: Store) -> None:
        async def enter() -> None:
            async with store.lock("name", ttl=300, timeout=PATIENCE):
                await asyncio.sleep(0)

        for turns in range(30):
            tasks = [asyncio.create_task(enter()) for _ in range(4)]
            for _ in range(turns % 12):
                await asyncio.sleep(0)
            if turns % 3 == 2:
                await asyncio.sleep(0.001)
            tasks[turns % 4].cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)

        async def free() -> bool:
            lease = await store.try_lock("name", ttl=300)
            return lease is not None and await lease.release()

        await eventually(free)

    def test_a_thread_that_waits_gets_the_lock_when_a_task_releases_it(self, store: Store) -> None:
        entered = threading.Event()

        def work() -> None:
            with store.lock("name", ttl=30, timeout=PATIENCE):
                entered.set()

        async def hold() -> threading.Thread:
            async with store.lock("name", ttl=30):
                thread = threading.Thread(target=work)
                thread.start()
                await asyncio.sleep(0.1)
                assert not entered.is_set()
            return thread

        thread = asyncio.run(hold())
        assert entered.wait(PATIENCE)
        thread.join()
