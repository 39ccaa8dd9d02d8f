"""The contract of counters: 64 bits, exact, and refused without a trace where they cannot count."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from ratesync import CounterOverflowError, NotAnIntegerError, State, Store
from ratesync.testing.contract import Caller
from ratesync.testing.state_value_contract import LARGEST, SMALLEST, StateSuite

__all__ = ["StateCounterContract"]


class StateCounterContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    def test_a_counter_begins_at_nothing_and_goes_both_ways(self, state: State, call: Caller) -> None:
        assert call(state.increment("n")) == 1
        assert call(state.increment("n", 10)) == 11
        assert call(state.increment("n", -20)) == -9
        assert call(state.increment("n", delta=0)) == -9
        assert call(state.get_versioned("n")) == (-9, 4, None)

    def test_set_get_swap_and_increment_mix_on_one_key(self, state: State, call: Caller) -> None:
        assert call(state.set("n", 5)) == 1
        assert call(state.increment("n")) == 6
        assert call(state.get("n")) == 6
        assert call(state.compare_and_swap("n", expected=2, value=100)) == 3
        assert call(state.increment("n", -1)) == 99
        assert call(state.set("n", "text")) == 5
        with pytest.raises(NotAnIntegerError):
            call(state.increment("n"))
        assert call(state.set("n", -1)) == 6
        assert call(state.increment("n")) == 0
        assert call(state.get_versioned("n")) == (0, 7, None)
        assert call(state.check_and_set("created", 41))
        assert call(state.increment("created")) == 42

    @pytest.mark.parametrize("value", ["5", "", "text", b"5", b""], ids=repr)
    def test_what_is_no_integer_is_not_counted_and_stays(
        self, state: State, call: Caller, value: Any
    ) -> None:
        call(state.set("n", value, ttl=100))
        before = call(state.get_versioned("n"))
        choices: list[dict[str, Any]] = [{}, {"delta": 0}, {"ttl": 5, "renew": True}]
        for options in choices:
            with pytest.raises(NotAnIntegerError) as caught:
                call(state.increment("n", **options))
            assert caught.value.key == "n"
        assert call(state.get_versioned("n")) == before

    def test_a_json_number_is_no_counter(self, store: Store, call: Caller) -> None:
        json = store.state(codec="json")
        call(json.set("n", 5.5))
        with pytest.raises(NotAnIntegerError):
            call(json.increment("n"))
        assert call(json.get("n")) == 5.5
        assert call(json.increment("fresh", 2)) == 2
        assert call(json.get("fresh")) == 2

    @pytest.mark.parametrize(
        ("start", "delta"),
        [
            (LARGEST, 1),
            (LARGEST, LARGEST),
            (1, LARGEST),
            (SMALLEST, -1),
            (SMALLEST, SMALLEST),
            (-1, SMALLEST),
        ],
    )
    def test_a_sum_beyond_64_bits_is_refused_and_changes_nothing(
        self, state: State, call: Caller, start: int, delta: int
    ) -> None:
        call(state.set("n", start, ttl=100))
        before = call(state.get_versioned("n"))
        with pytest.raises(CounterOverflowError) as caught:
            call(state.increment("n", delta, ttl=5, renew=True))
        assert caught.value.key == "n"
        assert isinstance(caught.value, OverflowError)
        assert call(state.get_versioned("n")) == before

    def test_the_limits_themselves_are_reached(self, state: State, call: Caller) -> None:
        assert call(state.increment("high", LARGEST - 1)) == LARGEST - 1
        assert call(state.increment("high")) == LARGEST
        assert call(state.increment("high", SMALLEST)) == -1
        assert call(state.increment("low", SMALLEST)) == SMALLEST
        assert call(state.increment("low", LARGEST)) == -1
        assert call(state.get_versioned("high")) == (-1, 3, None)
        # Beyond 2**53, where a double would lose the last digit.
        assert call(state.increment("odd", 2**53 + 1)) == 2**53 + 1
        assert call(state.increment("odd", 2)) == 2**53 + 3
        assert call(state.get("odd")) == 2**53 + 3

    async def test_increments_at_once_are_all_counted_and_each_sees_its_own_sum(self, state: State) -> None:
        deltas = [random.randint(-50, 50) for _ in range(300)]
        sums = await asyncio.gather(*(state.increment("n", delta) for delta in deltas))
        assert sums == [sum(deltas[: n + 1]) for n in range(300)]
        assert await state.get_versioned("n") == (sum(deltas), 300, None)

    async def test_an_overflow_among_increments_at_once_leaves_the_others_alone(self, state: State) -> None:
        await state.set("n", LARGEST - 5)
        results = await asyncio.gather(
            *(state.increment("n", delta) for delta in (3, 3, 2, 1, -1, SMALLEST, SMALLEST, 1)),
            return_exceptions=True,
        )
        kinds = [result if isinstance(result, int) else type(result) for result in results]
        high = CounterOverflowError
        assert kinds == [LARGEST - 2, high, LARGEST, high, LARGEST - 1, -2, high, -1]
        assert await state.get_versioned("n") == (-1, 6, None)

    async def test_writes_of_other_kinds_between_increments_are_kept_in_order(self, state: State) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: state.increment("n", 1),
            lambda: state.increment("n", 2),
            lambda: state.set("n", "text"),
            lambda: state.increment("n", 4),
            lambda: state.set("n", 10),
            lambda: state.increment("n", 8),
            lambda: state.increment("n", 16),
            lambda: state.delete("n"),
            lambda: state.increment("n", 32),
        ]
        results = await asyncio.gather(*(make() for make in calls), return_exceptions=True)
        assert isinstance(results.pop(3), NotAnIntegerError)
        assert results == [1, 3, 3, 4, 18, 34, True, 32]
