"""What every operation of state refuses, before anything is sent: the same whatever the store."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import pytest

from ratesync import ConfigValidationError, State, Store, ops
from ratesync.testing.contract import refused
from ratesync.testing.state_name_contract import REFUSED
from ratesync.testing.state_value_contract import LARGEST, SMALLEST, StateSuite

__all__ = ["StateArgumentContract"]


class StateArgumentContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @pytest.mark.parametrize("value", [None, True, 1.5, ["a"], {"a": 1}, object], ids=repr)
    def test_other_values_are_refused_and_the_cure_is_the_json_codec(self, state: State, value: Any) -> None:
        for write in (
            lambda: state.set("k", value),
            lambda: state.check_and_set("k", value),
            lambda: state.compare_and_swap("k", expected=0, value=value),
        ):
            with pytest.raises(ConfigValidationError, match="json"):
                write().wait()
        assert state.get("k").wait() is None

    @pytest.mark.parametrize("value", [LARGEST + 1, SMALLEST - 1, 10**30])
    def test_integers_beyond_64_bits_are_refused(self, state: State, value: int) -> None:
        with pytest.raises(ConfigValidationError, match="64"):
            state.set("k", value).wait()
        assert state.get("k").wait() is None

    def test_what_json_cannot_say_is_refused(self, store: Store) -> None:
        state = store.state(codec="json")
        for value in (object(), {1, 2}):
            with refused("JSON"):
                state.set("k", value).wait()
        assert state.get("k").wait() is None

    @pytest.mark.parametrize("delta", [LARGEST + 1, SMALLEST - 1, 1.0, "1", None], ids=repr)
    def test_a_delta_that_is_no_64_bit_integer_is_refused(self, state: State, delta: Any) -> None:
        with refused("delta"):
            state.increment("n", delta).wait()
        assert state.get("n").wait() is None

    @pytest.mark.parametrize(
        "ttl",
        [0, 0.0, -1, -1e-9, timedelta(0), timedelta(seconds=-1), math.nan, math.inf, -math.inf, 1e300, "60"],
        ids=repr,
    )
    def test_a_ttl_that_means_nothing_is_refused_with_the_cure(self, state: State, ttl: Any) -> None:
        for write in (
            lambda: state.set("k", "v", ttl=ttl),
            lambda: state.check_and_set("k", "v", ttl=ttl),
            lambda: state.increment("k", ttl=ttl),
            lambda: state.compare_and_swap("k", expected=0, value="v", ttl=ttl),
            lambda: state.touch("k", ttl),
        ):
            with refused("ttl"):
                write().wait()
        assert state.get("k").wait() is None

    @pytest.mark.parametrize("key", REFUSED, ids=repr)
    def test_a_bad_key_is_refused_before_anything_is_sent(self, state: State, key: Any) -> None:
        operations: list[Any] = [
            lambda: state.get(key),
            lambda: state.get_versioned(key),
            lambda: state.set(key, "v"),
            lambda: state.check_and_set(key),
            lambda: state.delete(key),
            lambda: state.increment(key),
            lambda: state.compare_and_swap(key, expected=1, value="v"),
            lambda: state.touch(key, 1),
            lambda: state.schedule(key, 0),
            lambda: state.unschedule(key),
        ]
        for operation in operations:
            with refused("key"):
                operation().wait()

    @pytest.mark.parametrize("part", ["namespace", "tenant", "kind"])
    @pytest.mark.parametrize("name", ["", "a\x00b", "\ud800", "x" * 256, 7], ids=lambda name: repr(name)[:9])
    def test_a_bad_space_or_kind_is_refused(self, store: Store, part: str, name: Any) -> None:
        with refused(part):
            store.state(**{part: name}).get("k").wait()

    @pytest.mark.parametrize("prefix", ["a" * 41, "a\x00", 7], ids=lambda prefix: repr(prefix)[:9])
    def test_a_bad_prefix_is_refused(self, store: Store, prefix: Any) -> None:
        with refused("prefix"):
            store.state(prefix=prefix).get("k").wait()

    @pytest.mark.parametrize("page_size", [0, -1, 2**40, 1.5, "5"])
    def test_a_page_size_that_means_nothing_is_refused(self, state: State, page_size: Any) -> None:
        with refused("page_size"):
            list(state.scan(page_size=page_size))

    @pytest.mark.parametrize(
        "batch",
        [
            [ops.set("good", 1), ops.set("", 1)],
            [ops.set("good", 1), ops.set("k", "v", ttl=0)],
            [ops.set("good", 1), ops.set("k", None)],
            [ops.set("good", 1), "get"],
            [ops.set("good", 1), ops.Op("drop", "k")],  # type: ignore[arg-type]
            [ops.set("good", 1), ops.increment("k", 2**63)],
        ],
        ids=range(6),
    )
    @pytest.mark.parametrize("atomic", [False, True])
    def test_a_batch_with_a_mistake_is_refused_whole(
        self, state: State, batch: list[Any], atomic: bool
    ) -> None:
        with pytest.raises((ConfigValidationError, TypeError)):
            state.many(batch, atomic=atomic).wait()
        assert state.get("good").wait() is None

    @pytest.mark.parametrize(
        "options",
        [{"limit": 0}, {"limit": -1}, {"limit": 1.5}, {"lease": 0}, {"lease": -1}, {"lease": "60"}],
        ids=repr,
    )
    def test_claims_that_mean_nothing_are_refused(self, state: State, options: Any) -> None:
        with refused(next(iter(options))):
            state.claim_due(**options).wait()

    @pytest.mark.parametrize(
        "at", [datetime(2020, 1, 1), float("nan"), float("inf"), 1e300, "now", None, -1e300], ids=repr
    )
    def test_a_moment_that_is_none_is_refused(self, state: State, at: Any) -> None:
        with refused("at"):
            state.schedule("k", at).wait()
        assert state.unschedule("k").wait() is False
