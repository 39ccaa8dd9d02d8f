"""The contract of versioned values: what is written, read, swapped and deleted, and with which version."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ratesync import StaleVersionError, State, Store
from ratesync.testing.contract import Caller, StoreContract

__all__ = ["LARGEST", "SMALLEST", "StateValueContract", "StateSuite"]

LARGEST = 2**63 - 1
SMALLEST = -(2**63)


class StateSuite(StoreContract):
    """The base of the suites of state: a state in the store under test."""

    @pytest.fixture
    def state(self, store: Store) -> State:
        return store.state()


class StateValueContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    # Versions -------------------------------------------------------------------------------------

    def test_nothing_is_there_before_the_first_write(self, state: State, call: Caller) -> None:
        assert call(state.get("k")) is None
        assert call(state.get_versioned("k")) is None
        assert call(state.delete("k")) is False
        assert call(state.touch("k", 60)) is False

    def test_the_first_to_set_a_key_creates_it_and_nobody_after(self, state: State, call: Caller) -> None:
        assert call(state.check_and_set("order-42", "1", ttl=300)) is True
        assert call(state.check_and_set("order-42", "2", ttl=300)) is False
        assert call(state.check_and_set("order-42")) is False
        assert call(state.get("order-42")) == "1"
        assert call(state.check_and_set("other")) is True
        assert call(state.get("other")) == "1"

    def test_every_write_counts_the_version_up_by_one(self, state: State, call: Caller) -> None:
        assert call(state.set("k", "a")) == 1
        assert call(state.set("k", "a")) == 2
        assert call(state.compare_and_swap("k", expected=2, value="b")) == 3
        assert call(state.set("k", 7)) == 4
        assert call(state.increment("k", 3)) == 10
        assert call(state.increment("k", 0)) == 10
        assert call(state.get_versioned("k")) == (10, 6, None)
        assert call(state.touch("k", 60, expected=6)) is True
        assert call(state.check_and_set("k", "no")) is False
        found = call(state.get_versioned("k"))
        assert found is not None
        assert (found.value, found.version) == (10, 6)

    def test_a_created_key_has_version_one_however_it_was_created(self, state: State, call: Caller) -> None:
        call(state.check_and_set("create", "v"))
        call(state.set("set", "v"))
        call(state.compare_and_swap("swap", expected=0, value="v"))
        call(state.increment("add"))
        for key in ("create", "set", "swap", "add"):
            found = call(state.get_versioned(key))
            assert found is not None
            assert found.version == 1

    def test_a_swap_needs_the_version_and_says_the_one_it_found(self, state: State, call: Caller) -> None:
        with pytest.raises(StaleVersionError) as absent:
            call(state.compare_and_swap("k", expected=3, value="x"))
        assert (absent.value.expected, absent.value.actual) == (3, 0)
        assert call(state.get("k")) is None

        assert call(state.compare_and_swap("k", expected=0, value="a")) == 1
        assert call(state.compare_and_swap("k", expected=1, value="b")) == 2
        for stale in (0, 1, 3, LARGEST):
            with pytest.raises(StaleVersionError) as caught:
                call(state.compare_and_swap("k", expected=stale, value="x"))
            assert (caught.value.expected, caught.value.actual) == (stale, 2)
        assert call(state.get_versioned("k")) == ("b", 2, None)

    def test_a_deletion_can_name_the_version(self, state: State, call: Caller) -> None:
        call(state.set("k", "a"))
        call(state.set("k", "b"))
        assert call(state.delete("k", 1)) is False
        assert call(state.delete("k", expected=3)) is False
        assert call(state.get_versioned("k")) == ("b", 2, None)
        assert call(state.delete("k", expected=2)) is True
        assert call(state.delete("k", expected=2)) is False
        assert call(state.get("k")) is None

    def test_a_deleted_key_is_absent_to_every_operation(self, state: State, call: Caller) -> None:
        def deleted(key: str) -> str:
            call(state.set(key, 5, ttl=60))
            assert call(state.delete(key))
            return key

        assert call(state.get(deleted("get"))) is None
        assert call(state.get_versioned(deleted("versioned"))) is None
        assert call(state.delete(deleted("delete"))) is False
        assert call(state.touch(deleted("touch"), 60)) is False
        assert call(state.touch(deleted("touch-1"), 60, expected=1)) is False
        assert call(state.check_and_set(deleted("create"), "new")) is True
        assert call(state.increment(deleted("add"), 2)) == 2
        with pytest.raises(StaleVersionError) as caught:
            call(state.compare_and_swap(deleted("swap"), expected=1, value="x"))
        assert caught.value.actual == 0
        assert call(state.compare_and_swap(deleted("create-0"), expected=0, value="x")) > 1
        assert call(state.set(deleted("set"), "x")) > 1
        # What came anew has nothing of what was: no expiry, no value.
        for key, value in (("create", "new"), ("add", 2), ("create-0", "x"), ("set", "x")):
            found = call(state.get_versioned(key))
            assert found is not None
            assert (found.value, found.expires_at) == (value, None)

    def test_no_version_is_used_twice_after_deletions_and_purges(self, state: State, call: Caller) -> None:
        seen = 0
        create: list[Callable[[], Any]] = [
            lambda: state.set("k", "same"),
            lambda: state.check_and_set("k", "same"),
            lambda: state.compare_and_swap("k", expected=0, value="same"),
            lambda: state.increment("k"),
        ]
        for turn in range(12):
            call(create[turn % 4]())
            found = call(state.get_versioned("k"))
            assert found is not None
            assert found.version > seen
            for stale in range(1, seen + 1):
                assert call(state.delete("k", expected=stale)) is False
            seen = found.version
            assert call(state.delete("k"))
            with pytest.raises(StaleVersionError):
                call(state.compare_and_swap("k", expected=seen, value="late"))
            if turn % 3 == 2:
                call(state.purge())
        assert call(state.get("k")) is None

    # Values ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "1",
            "text with \x00 and \n and 'quotes' \\ %s $1",
            "\N{GREEK SMALL LETTER ALPHA}\N{PILE OF POO}",
            b"",
            b"1",
            bytes(range(256)),
            0,
            -1,
            LARGEST,
            SMALLEST,
            "x" * 1_000_000,
            b"\xff" * 1_000_000,
        ],
        ids=lambda value: f"{type(value).__name__}-{len(repr(value))}",
    )
    def test_text_bytes_and_integers_come_back_as_they_were(
        self, state: State, call: Caller, value: Any
    ) -> None:
        assert call(state.check_and_set("created", value))
        assert call(state.set("set", "before")) == 1
        assert call(state.set("set", value)) == 2
        assert call(state.compare_and_swap("swapped", expected=0, value="before")) == 1
        assert call(state.compare_and_swap("swapped", expected=1, value=value)) == 2
        for key in ("created", "set", "swapped"):
            back = call(state.get(key))
            assert back == value
            assert type(back) is type(value)
            found = call(state.get_versioned(key))
            assert found is not None
            assert type(found.value) is type(value)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            1.5,
            -3,
            "text",
            "",
            [],
            {"a": [1, {"b": None}], "\N{SNOWMAN}": "\x00\ud7ff"},
            {"n": 2**70},
        ],
        ids=repr,
    )
    def test_json_values_come_back_as_they_were(self, store: Store, call: Caller, value: Any) -> None:
        state = store.state(codec="json")
        assert call(state.set("k", value)) == 1
        found = call(state.get_versioned("k"))
        assert found is not None
        assert found.value == value
        assert type(found.value) is type(value)
        assert call(state.get("k")) == value
        assert call(state.compare_and_swap("k", expected=1, value=[value])) == 2
        assert call(state.get("k")) == [value]

    # Several callers ------------------------------------------------------------------------------

    async def test_one_caller_of_many_creates(self, state: State) -> None:
        won = await asyncio.gather(*(state.check_and_set("k", str(n)) for n in range(200)))
        assert sum(won) == 1
        assert await state.get_versioned("k") == (str(won.index(True)), 1, None)

    async def test_operations_of_one_caller_on_one_key_keep_their_order(self, state: State) -> None:
        versions = await asyncio.gather(*(state.set("k", n) for n in range(100)))
        assert versions == list(range(1, 101))
        mixed = await asyncio.gather(
            state.get("k"),
            state.set("k", 5),
            state.increment("k", 2),
            state.get("k"),
            state.delete("k"),
            state.get("k"),
            state.check_and_set("k", "anew"),
            state.get("k"),
        )
        assert mixed == [99, 101, 7, 7, True, None, True, "anew"]

    async def test_swaps_in_a_loop_lose_no_update(self, state: State) -> None:
        async def add_one() -> int:
            for attempt in range(1000):
                found = await state.get_versioned("k")
                value, version = (found.value, found.version) if found else (0, 0)
                try:
                    await state.compare_and_swap("k", expected=version, value=value + 1)
                except StaleVersionError:
                    continue
                return attempt
            raise AssertionError("a thousand times somebody else was faster")

        await asyncio.gather(*(add_one() for _ in range(30)))
        assert await state.get_versioned("k") == (30, 30, None)

    def test_threads_share_a_key(self, state: State) -> None:
        barrier = threading.Barrier(8)

        def work(number: int) -> tuple[bool, list[int]]:
            barrier.wait()
            won = state.check_and_set("race", str(number)).wait()
            return won, [state.increment("n").wait() for _ in range(25)]

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(8)))
        assert sum(won for won, _ in results) == 1
        assert sorted(n for _, sums in results for n in sums) == list(range(1, 201))
        for _, sums in results:
            assert sums == sorted(sums)

    async def test_a_cancelled_write_happened_once_or_not_at_all(self, state: State) -> None:
        finished = 0
        for turns in range(30):
            tasks = [asyncio.ensure_future(state.increment("n")) for _ in range(4)]
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            for task in tasks[turns % 4 :: 2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            finished += sum(isinstance(result, int) for result in results)
        found = await state.get_versioned("n")
        assert found is not None
        assert finished <= found.value <= 120
        assert found.version == found.value
