"""The contract of idempotent operations: done once per key, and everybody gets the one result.

    class TestMyStoreIdempotency(IdempotencyContract):
        @pytest.fixture
        def store_options(self):
            return {"engine": "memory"}

Everything goes through the public API, and no test rests on the speed of the machine. Needs pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest

from ratesync import (
    ConfigValidationError,
    IdempotencyMismatchError,
    LeaseLostError,
    OperationFailedError,
    OperationInProgressError,
    Store,
)
from ratesync.testing.contract import PATIENCE, Caller, StoreContract, eventually, refused
from ratesync.testing.state_name_contract import HOSTILE, REFUSED

__all__ = ["IdempotencyContract"]


class IdempotencyContract(StoreContract):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @staticmethod
    def run(store: Store, call: Caller, key: str, result: Any, **options: Any) -> tuple[bool, Any]:
        """Whether it was done before, and its result."""
        with call.holding(store.idempotent(key, **options)) as op:
            assert op.key == key
            if op.done:
                return True, op.result
            assert op.result is None
            op.result = result
        return False, op.result

    # Fresh and done -------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "result",
        [
            None,
            True,
            0,
            -1.5,
            "receipt",
            "",
            [],
            {"id": 42, "lines": [1, None, {"a": "\N{SNOWMAN}\x00"}]},
            2**70,
        ],
        ids=repr,
    )
    def test_the_first_caller_runs_and_the_others_get_its_result(
        self, store: Store, call: Caller, result: Any
    ) -> None:
        assert self.run(store, call, "charge-42", result, fingerprint="f", ttl=300) == (False, result)
        for _ in range(3):
            again = self.run(store, call, "charge-42", "another", fingerprint="f", ttl=300)
            assert again == (True, result)
            assert type(again[1]) is type(result)

    def test_a_body_that_assigns_nothing_stores_none(self, store: Store, call: Caller) -> None:
        with call.holding(store.idempotent("key")) as op:
            assert op.done is False
        assert self.run(store, call, "key", "late") == (True, None)

    def test_the_result_is_kept_for_its_ttl(self, store: Store, call: Caller) -> None:
        assert self.run(store, call, "key", 1, ttl=0.05) == (False, 1)
        deadline = time.monotonic() + PATIENCE
        while (ran := self.run(store, call, "key", 2, ttl=300))[0]:
            assert ran[1] == 1
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert self.run(store, call, "key", 3, ttl=None) == (True, 2)

    def test_what_json_cannot_say_is_refused_where_it_is_assigned(self, store: Store, call: Caller) -> None:
        with call.holding(store.idempotent("key")) as op:
            for value in (object(), b"bytes", float("nan"), {1, 2}):
                with refused("JSON"):
                    op.result = value
            op.result = "fine"
        assert self.run(store, call, "key", None) == (True, "fine")

    def test_the_result_of_what_is_done_cannot_be_replaced(self, store: Store, call: Caller) -> None:
        self.run(store, call, "key", "first")
        with call.holding(store.idempotent("key")) as op, pytest.raises(ConfigValidationError):
            op.result = "second"
        assert self.run(store, call, "key", None) == (True, "first")

    # Fingerprints ---------------------------------------------------------------------------------

    def test_another_fingerprint_under_the_same_key_is_an_error(self, store: Store, call: Caller) -> None:
        def other() -> None:
            self.run(store, call, "key", 2, fingerprint="b")

        with call.holding(store.idempotent("key", fingerprint="a")) as op:
            with pytest.raises(IdempotencyMismatchError) as running:
                other()
            op.result = 1
        with pytest.raises(IdempotencyMismatchError) as done:
            other()
        assert (running.value.key, done.value.key) == ("key", "key")
        assert self.run(store, call, "key", 3, fingerprint="a") == (True, 1)

    def test_a_fingerprint_that_is_left_out_is_not_compared(self, store: Store, call: Caller) -> None:
        self.run(store, call, "with", 1, fingerprint=b"\x00\xff")
        assert self.run(store, call, "with", 2) == (True, 1)
        assert self.run(store, call, "with", 2, fingerprint=b"\x00\xff") == (True, 1)
        self.run(store, call, "without", 1)
        assert self.run(store, call, "without", 2, fingerprint="any") == (True, 1)

    # Running --------------------------------------------------------------------------------------

    def test_a_running_operation_is_an_error_for_who_does_not_wait(self, store: Store, call: Caller) -> None:
        with call.holding(store.idempotent("key", fingerprint="f")) as op:
            with pytest.raises(OperationInProgressError) as at_once:
                self.run(store, call, "key", 2, fingerprint="f")
            begin = time.monotonic()
            with pytest.raises(OperationInProgressError) as waited:
                self.run(store, call, "key", 2, fingerprint="f", wait=0.1)
            assert time.monotonic() - begin >= 0.095
            op.result = 1
        for caught in (at_once, waited):
            assert caught.value.key == "key"
            assert caught.value.retry_after > 0
            assert caught.value.retryable
        assert self.run(store, call, "key", 3, fingerprint="f") == (True, 1)

    async def test_of_many_tasks_one_runs_and_all_get_its_result(self, store: Store) -> None:
        ran: list[int] = []

        async def charge(number: int) -> Any:
            async with store.idempotent("key", wait=PATIENCE) as op:
                if not op.done:
                    ran.append(number)
                    await asyncio.sleep(0.05)
                    op.result = number
                return op.result

        results = await asyncio.gather(*(charge(number) for number in range(30)))
        assert len(ran) == 1
        assert results == ran * 30

    def test_of_many_threads_one_runs_and_all_get_its_result(self, store: Store) -> None:
        ran: list[int] = []
        barrier = threading.Barrier(8)

        def charge(number: int) -> Any:
            barrier.wait()
            with store.idempotent("key", wait=PATIENCE) as op:
                if not op.done:
                    ran.append(number)
                    time.sleep(0.05)
                    op.result = number
                return op.result

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(charge, range(8)))
        assert len(ran) == 1
        assert results == ran * 8

    # Failing --------------------------------------------------------------------------------------

    def test_a_body_that_fails_frees_the_key(self, store: Store, call: Caller) -> None:
        with pytest.raises(ZeroDivisionError), call.holding(store.idempotent("key")):
            raise ZeroDivisionError
        assert self.run(store, call, "key", 2) == (False, 2)

    def test_a_failure_is_kept_where_wanted(self, store: Store, call: Caller) -> None:
        with (
            pytest.raises(ZeroDivisionError),
            call.holding(store.idempotent("key", fingerprint="f", on_error="keep")),
        ):
            raise ZeroDivisionError("by zero, of all")
        for _ in range(2):
            with pytest.raises(OperationFailedError, match="of all") as caught:
                self.run(store, call, "key", 2, fingerprint="f")
        assert caught.value.key == "key"
        assert "ZeroDivisionError" in caught.value.reason
        with pytest.raises(IdempotencyMismatchError):
            self.run(store, call, "key", 2, fingerprint="other")
        assert call(store.idempotent("key").forget()) is True
        assert self.run(store, call, "key", 2) == (False, 2)

    async def test_who_waits_runs_after_a_failure(self, store: Store) -> None:
        async def fail() -> None:
            async with store.idempotent("key"):
                entered.set()
                await asyncio.sleep(0.05)
                raise ZeroDivisionError

        async def charge() -> bool:
            async with store.idempotent("key", wait=PATIENCE) as op:
                return op.done

        entered = asyncio.Event()
        failing = asyncio.create_task(fail())
        await entered.wait()
        done = await asyncio.gather(*(charge() for _ in range(4)))
        with pytest.raises(ZeroDivisionError):
            await failing
        assert sorted(done) == [False, True, True, True]

    async def test_cancelling_at_any_moment_frees_the_key_or_keeps_the_result(self, store: Store) -> None:
        async def charge(number: int) -> Any:
            async with store.idempotent(f"key-{number}") as op:
                if not op.done:
                    await asyncio.sleep(0)
                    op.result = number

        for number in range(30):
            task = asyncio.create_task(charge(number))
            for _ in range(number % 12):
                await asyncio.sleep(0)
            if number % 3 == 2:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for number in range(30):

            async def settled(number: int = number) -> bool:
                try:
                    async with store.idempotent(f"key-{number}") as op:
                        if op.done:
                            assert op.result == number
                except OperationInProgressError:
                    return False
                return True

            await eventually(settled)

    # Taken over -----------------------------------------------------------------------------------

    def test_a_late_commit_is_refused_and_the_result_of_the_successor_stays(
        self, store: Store, call: Caller
    ) -> None:
        late = store.idempotent("key", ttl=300)

        def run_late() -> None:
            with call.holding(late) as op:
                assert call(store.idempotent("key").forget()) is True
                assert self.run(store, call, "key", "successor", ttl=300) == (False, "successor")
                op.result = "late"

        with pytest.raises(LeaseLostError) as caught:
            run_late()
        assert caught.value.key == "key"
        assert self.run(store, call, "key", None) == (True, "successor")

    def test_a_late_commit_is_refused_where_the_key_is_free_again(self, store: Store, call: Caller) -> None:
        def run_late() -> None:
            with call.holding(store.idempotent("key")) as op:
                call(store.idempotent("key").forget())
                op.result = "late"

        with pytest.raises(LeaseLostError):
            run_late()
        assert self.run(store, call, "key", "next") == (False, "next")

    def test_a_late_commit_is_refused_while_the_successor_runs(self, store: Store, call: Caller) -> None:
        first = call.holding(store.idempotent("key"))
        late = first.__enter__()
        call(store.idempotent("key").forget())
        with call.holding(store.idempotent("key")) as second:
            late.result = "late"
            with pytest.raises(LeaseLostError):
                first.__exit__(None, None, None)
            second.result = "second"
        assert self.run(store, call, "key", None) == (True, "second")

    def test_a_late_failure_does_not_free_the_key_of_the_successor(self, store: Store, call: Caller) -> None:
        def run_late() -> None:
            with call.holding(store.idempotent("key")):
                call(store.idempotent("key").forget())
                self.run(store, call, "key", "successor")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run_late()
        assert self.run(store, call, "key", None) == (True, "successor")

    def test_the_lease_is_renewed_while_the_body_is_busy(self, store: Store, call: Caller) -> None:
        def ends() -> datetime:
            found = call(store.state(kind="idempotency").get_versioned("key"))
            assert found is not None
            assert found.expires_at is not None
            return found.expires_at

        # Renewed after four seconds: a machine may stand still for twice as long.
        with call.holding(store.idempotent("key", lease=12.0)) as op:
            begun = ends()
            while ends() <= begun:
                time.sleep(0.05)
            with pytest.raises(OperationInProgressError):
                self.run(store, call, "key", "rival")
            assert op.lost is False
            op.result = "slow"
        assert self.run(store, call, "key", None) == (True, "slow")

    # Names ----------------------------------------------------------------------------------------

    def test_hostile_keys_tenants_and_namespaces_are_apart(self, store: Store, call: Caller) -> None:
        for number, key in enumerate(HOSTILE):
            assert self.run(store, call, key, number) == (False, number)
        for number, key in enumerate(HOSTILE):
            assert self.run(store, call, key, None) == (True, number)
        for place in ({"tenant": "a:b"}, {"tenant": "a"}, {"namespace": "a:b"}, {"prefix": "other_"}):
            assert self.run(store, call, "b", str(place), **place) == (False, str(place))
            assert self.run(store, call, "a", str(place), **place) == (False, str(place))

    def test_keys_of_state_do_not_meet_operations(self, store: Store, call: Caller) -> None:
        state = store.state()
        assert call(state.check_and_set("key", "v"))
        assert call(state.check_and_set("key", "v", kind="dedup"))
        assert self.run(store, call, "key", 1) == (False, 1)
        assert call(state.get("key")) == "v"

    @pytest.mark.parametrize("key", REFUSED, ids=repr)
    def test_a_bad_key_is_refused(self, store: Store, call: Caller, key: Any) -> None:
        with refused("key"), call.holding(store.idempotent(key)):
            pytest.fail("entered")

    @pytest.mark.parametrize(
        "options",
        [
            {"ttl": 0},
            {"ttl": float("nan")},
            {"lease": 0},
            {"lease": None},
            {"wait": -1},
            {"on_error": "ignore"},
            {"fingerprint": 7},
            {"fingerprint": ""},
        ],
        ids=repr,
    )
    def test_options_that_mean_nothing_are_refused(self, store: Store, options: Any) -> None:
        with refused(next(iter(options))), store.idempotent("key", **options):
            pytest.fail("entered")

    def test_each_object_is_for_one_call(self, store: Store, call: Caller) -> None:
        one = store.idempotent("key")
        with call.holding(one):
            pass
        with pytest.raises(RuntimeError), call.holding(one):
            pytest.fail("entered")
