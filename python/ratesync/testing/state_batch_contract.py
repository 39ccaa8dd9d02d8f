"""The contract of batches and timeouts: `many` with an outcome each, or all or nothing; due keys to one."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ratesync import (
    ConfigValidationError,
    CounterOverflowError,
    Due,
    NotAnIntegerError,
    RolledBackError,
    StaleVersionError,
    State,
    Store,
    ops,
)
from ratesync.testing.contract import PATIENCE, Caller
from ratesync.testing.state_name_contract import HOSTILE
from ratesync.testing.state_value_contract import LARGEST, StateSuite

__all__ = ["StateBatchContract", "StateTimeoutContract"]


class StateBatchContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @pytest.mark.parametrize("atomic", [False, True])
    def test_many_answers_each_operation_as_it_would_be_alone(
        self, state: State, call: Caller, atomic: bool
    ) -> None:
        call(state.set("there", "v"))
        call(state.set("old", "v"))
        call(state.schedule("job", 0))
        answers = call(
            state.many(
                [
                    ops.check_and_set("new", b"1", 60),
                    ops.get("there"),
                    ops.get("absent"),
                    ops.set("set", "x"),
                    ops.increment("n", 5),
                    ops.compare_and_swap("old", expected=1, value="w"),
                    ops.delete("nothing"),
                    ops.set("kinded", 3, kind="other"),
                    ops.schedule("later", timedelta(hours=1)),
                    ops.unschedule("job"),
                ],
                atomic=atomic,
            )
        )
        assert answers == [True, "v", None, 1, 5, 2, False, 1, None, True]
        assert call(state.get("new")) == b"1"
        assert call(state.get("old")) == "w"
        assert call(state.get("n")) == 5
        assert call(state.get("kinded", kind="other")) == 3
        assert call(state.claim_due()) == []

    def test_many_of_nothing_is_nothing(self, state: State, call: Caller) -> None:
        assert call(state.many([])) == []
        assert call(state.many([], atomic=True)) == []

    def test_one_that_fails_leaves_the_others_alone(self, state: State, call: Caller) -> None:
        call(state.set("text", "v"))
        call(state.set("full", LARGEST))
        answers = call(
            state.many(
                [
                    ops.compare_and_swap("text", expected=5, value="x"),
                    ops.set("a", 1),
                    ops.increment("text"),
                    ops.check_and_set("text"),
                    ops.increment("full"),
                    ops.touch("absent", 5),
                    ops.get_versioned("text"),
                ]
            )
        )
        stale, set_, text, created, full, touched, found = answers
        assert isinstance(stale, StaleVersionError)
        assert (stale.expected, stale.actual) == (5, 1)
        assert isinstance(text, NotAnIntegerError)
        assert isinstance(full, CounterOverflowError)
        assert (set_, created, touched) == (1, False, False)
        assert found == ("v", 1, None)

    def test_many_without_atomic_keeps_the_order_on_one_key(self, state: State, call: Caller) -> None:
        answers = call(
            state.many([ops.set("k", 1), ops.increment("k"), ops.get("k"), ops.delete("k"), ops.get("k")])
        )
        assert answers == [1, 2, 2, True, None]

    @pytest.mark.parametrize(
        "failing",
        [
            ops.compare_and_swap("there", expected=9, value="x"),
            ops.compare_and_swap("there", expected=0, value="x"),
            ops.compare_and_swap("absent", expected=1, value="x"),
            ops.increment("there"),
            ops.increment("full"),
            ops.check_and_set("there"),
            ops.touch("absent", 60),
        ],
        ids=lambda op: f"{op.verb}-{op.key}-{op.expected}",
    )
    @pytest.mark.parametrize("place", [0, 1, 3])
    def test_all_or_nothing_does_nothing_when_one_fails(
        self, state: State, failing: ops.Op, place: int
    ) -> None:
        state.set("there", "v", ttl=1000).wait()
        state.set("full", LARGEST).wait()
        state.set("n", 1).wait()
        state.set("gone", 1).wait()
        before = sorted(state.scan())
        there = state.get_versioned("there").wait()
        batch = [ops.set("new", 1), ops.increment("n"), ops.delete("gone")]
        batch.insert(place, failing)
        with pytest.raises(RolledBackError) as caught:
            state.many(batch, atomic=True).wait()
        outcomes = caught.value.outcomes
        assert len(outcomes) == 4
        if failing.verb in ("compare_and_swap", "increment"):
            assert isinstance(outcomes[place], (StaleVersionError, NotAnIntegerError, CounterOverflowError))
        assert [n for n, one in enumerate(outcomes) if isinstance(one, Exception)] in ([place], [])
        assert sorted(state.scan()) == before
        assert state.get_versioned("there").wait() == there
        assert state.get_versioned("n").wait() == (1, 1, None)
        # And each of the others can still be done.
        del batch[place]
        assert state.many(batch, atomic=True).wait() == [1, 2, True]

    def test_all_or_nothing_takes_each_key_once(self, state: State) -> None:
        with pytest.raises(ConfigValidationError, match="k"):
            state.many([ops.set("k", 1), ops.increment("k")], atomic=True).wait()
        assert state.many([ops.set("k", 1), ops.set("k", 2, kind="other")], atomic=True).wait() == [1, 1]

    async def test_transfers_keep_the_sum_and_every_look_sees_it(self, state: State) -> None:
        """Money moves between accounts in atomic pairs; reads in one atomic batch never see half of one."""
        accounts = [f"account-{n}" for n in range(4)]
        for account in accounts:
            await state.set(account, 100)

        async def transfer(number: int) -> None:
            for turn in range(12):
                source, target = accounts[(number + turn) % 4], accounts[(number + 2 * turn + 1) % 4]
                if source != target:
                    pair = [ops.increment(source, -3), ops.increment(target, 3)]
                    await state.many(pair[:: 1 if turn % 2 else -1], atomic=True)

        async def watch() -> None:
            for _ in range(15):
                balances = await state.many([ops.get(account) for account in accounts], atomic=True)
                assert sum(balances) == 400

        await asyncio.gather(*(transfer(n) for n in range(8)), watch(), watch())
        assert sum(await state.many([ops.get(account) for account in accounts])) == 400

    async def test_of_rival_batches_on_the_same_keys_one_wins_whole(self, state: State) -> None:
        keys = [f"k{n}" for n in range(6)]

        async def take(number: int) -> bool:
            mine = keys[number % 6 :] + keys[: number % 6]  # another order each
            try:
                await state.many([ops.check_and_set(key, number) for key in mine], atomic=True)
            except RolledBackError:
                return False
            return True

        won = await asyncio.gather(*(take(n) for n in range(20)))
        assert sum(won) == 1
        assert set(await state.many([ops.get(key) for key in keys])) == {won.index(True)}


class StateTimeoutContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @staticmethod
    def claimed(state: State, count: int = 1, **options: Any) -> list[Due]:
        """Claims until so many are there; what is due comes when the store's clock says so."""
        found: list[Due] = []
        deadline = time.monotonic() + PATIENCE
        while len(found) < count:
            assert time.monotonic() < deadline, f"only {found} fell due"
            found += state.claim_due(**options).wait()
            time.sleep(0.005)
        return found

    @pytest.mark.parametrize(
        "at",
        [
            0,
            1.5,
            datetime(2020, 1, 1, tzinfo=UTC),
            datetime(2020, 1, 1, tzinfo=UTC).astimezone(),
            timedelta(0),
            timedelta(seconds=-5),
        ],
        ids=repr,
    )
    def test_what_is_due_is_claimed_once(self, state: State, call: Caller, at: Any) -> None:
        call(state.schedule("k", at, kind="chain"))
        (due,) = self.claimed(state)
        assert (due.key, due.kind) == ("k", "chain")
        assert due.due_at.tzinfo is UTC
        if isinstance(at, datetime):
            assert due.due_at == at
        elif not isinstance(at, timedelta):
            assert due.due_at == datetime.fromtimestamp(at, UTC)
        assert call(state.claim_due()) == []
        assert call(state.unschedule("k", claim=due.claim, kind="chain")) is True
        assert call(state.unschedule("k", claim=due.claim, kind="chain")) is False
        assert call(state.unschedule("k", kind="chain")) is False

    def test_what_is_not_due_is_not_claimed(self, state: State, call: Caller) -> None:
        call(state.schedule("hour", timedelta(hours=1)))
        call(state.schedule("moment", datetime(2100, 1, 1, tzinfo=UTC)))
        call(state.schedule("seconds", 4_000_000_000))
        call(state.schedule("soon", timedelta(milliseconds=50)))
        (due,) = self.claimed(state)
        assert due.key == "soon"
        assert call(state.claim_due()) == []

    def test_a_timeout_is_no_value(self, state: State, call: Caller) -> None:
        call(state.schedule("k", 0))
        assert call(state.get_versioned("k")) is None
        assert call.each(state.scan()) == []
        assert call(state.set("k", "v")) == 1
        call(state.schedule("k", 0))
        assert call(state.get_versioned("k")) == ("v", 1, None)
        assert call(state.delete("k")) is True
        assert [due.key for due in call(state.claim_due())] == ["k"]

    def test_a_claim_that_was_not_finished_falls_due_again_to_a_new_claim(
        self, state: State, call: Caller
    ) -> None:
        call(state.schedule("k", 100))
        (first,) = self.claimed(state, lease=0.05)
        (second,) = self.claimed(state, lease=60)
        assert second.claim > first.claim
        assert second.due_at == first.due_at
        assert call(state.unschedule("k", claim=first.claim)) is False
        assert call(state.unschedule("k", claim=second.claim)) is True

    def test_scheduling_anew_replaces_time_and_claim(self, state: State, call: Caller) -> None:
        call(state.schedule("k", 0))
        (first,) = self.claimed(state)
        call(state.schedule("k", 5))
        assert call(state.unschedule("k", claim=first.claim)) is False
        (second,) = self.claimed(state)
        assert second.due_at == datetime.fromtimestamp(5, UTC)
        assert second.claim > first.claim
        call(state.schedule("k", timedelta(hours=1)))
        assert call(state.claim_due()) == []
        assert call(state.unschedule("k")) is True

    def test_the_oldest_come_first_and_not_more_than_asked_for(self, state: State, call: Caller) -> None:
        for number in (5, 3, 9, 1, 7, 2, 8, 4, 6):
            call(state.schedule(f"k{number}", number))
        taken = [[due.key for due in call(state.claim_due(limit=4))] for _ in range(4)]
        assert taken == [
            ["k1", "k2", "k3", "k4"],
            ["k5", "k6", "k7", "k8"],
            ["k9"],
            [],
        ]

    def test_kinds_can_be_claimed_one_by_one(self, store: Store, call: Caller) -> None:
        state = store.state()
        for kind in ("a", "a:b", "%"):
            call(state.schedule("k", 0, kind=kind))
        assert [due.kind for due in call(state.claim_due(kind="%"))] == ["%"]
        assert sorted(due.kind for due in call(state.claim_due())) == ["a", "a:b"]

    def test_hostile_keys_fall_due_like_others(self, state: State, call: Caller) -> None:
        for number, key in enumerate(HOSTILE):
            call(state.schedule(key, number))
        found = call(state.claim_due(limit=1000))
        assert [due.key for due in found] == HOSTILE
        assert all(call(state.unschedule(due.key, claim=due.claim, kind=due.kind)) for due in found)

    async def test_each_due_key_goes_to_exactly_one_claimer(self, state: State) -> None:
        await asyncio.gather(*(state.schedule(f"k{number}", 0) for number in range(120)))
        taken: list[Due] = []

        async def claim() -> None:
            while found := await state.claim_due(limit=7):
                taken.extend(found)

        await asyncio.gather(*(claim() for _ in range(8)))
        # One that another claimer was just taking may have been passed over.
        while found := await state.claim_due():
            taken.extend(found)
        assert sorted(due.key for due in taken) == sorted(f"k{number}" for number in range(120))
