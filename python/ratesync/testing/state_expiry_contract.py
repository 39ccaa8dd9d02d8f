"""The contract of expiry: on the store's clock, to the millisecond, and absent means absent everywhere."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ratesync import StaleVersionError, State, ops
from ratesync.ops import KEEP
from ratesync.testing.contract import PATIENCE, Caller
from ratesync.testing.state_value_contract import StateSuite

__all__ = ["StateExpiryContract"]

SOON = 0.01


class StateExpiryContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @staticmethod
    def gone(state: State, *keys: str, kind: str | None = None) -> None:
        """Waits until the keys have expired by the store's clock."""
        deadline = time.monotonic() + PATIENCE
        while any(state.get_versioned(key, kind=kind).wait() for key in keys):
            assert time.monotonic() < deadline, "never expired"
            time.sleep(0.005)

    @staticmethod
    def expiry(state: State, call: Caller, key: str) -> datetime | None:
        found = call(state.get_versioned(key))
        assert found is not None
        return found.expires_at

    def test_expired_is_absent_to_every_operation(self, state: State, call: Caller) -> None:
        keys = ["get", "touch", "create", "add", "swap", "swap-0", "set", "delete", "scan", "many"]
        for key in keys:
            call(state.set(key, 5, ttl=SOON, kind="short"))
        self.gone(state, *keys, kind="short")
        short: dict[str, Any] = {"kind": "short"}
        assert call(state.get("get", **short)) is None
        assert call(state.touch("touch", 60, **short)) is False
        assert call(state.touch("touch", 60, expected=1, **short)) is False
        assert call(state.delete("delete", **short)) is False
        assert call(state.delete("delete", expected=1, **short)) is False
        assert call.each(state.scan(kind="short")) == []
        assert call(state.many([ops.get("many", kind="short"), ops.touch("many", 60, kind="short")])) == [
            None,
            False,
        ]
        with pytest.raises(StaleVersionError) as caught:
            call(state.compare_and_swap("swap", expected=1, value="late", **short))
        assert caught.value.actual == 0
        # Created anew: as on a fresh key, but with a version that was never used.
        assert call(state.check_and_set("create", "anew", **short)) is True
        assert call(state.increment("add", 2, **short)) == 2
        assert call(state.compare_and_swap("swap-0", expected=0, value="anew", **short)) > 1
        assert call(state.set("set", "anew", **short)) > 1
        for key in ("create", "add", "swap-0", "set"):
            found = call(state.get_versioned(key, **short))
            assert found is not None
            assert found.version > 1
            assert found.expires_at is None

    def test_no_version_is_used_twice_after_expiry_and_purge(self, state: State, call: Caller) -> None:
        seen = 0
        for _ in range(5):
            version = call(state.set("k", "same", ttl=SOON))
            assert version > seen
            seen = version
            self.gone(state, "k")
            call(state.purge())
            with pytest.raises(StaleVersionError):
                call(state.compare_and_swap("k", expected=seen, value="late"))

    def test_a_key_lives_as_long_as_it_was_told(self, state: State, call: Caller) -> None:
        call(state.set("first", "v", ttl=1000))
        call(state.set("second", "v", ttl=timedelta(seconds=2000)))
        first, second = (self.expiry(state, call, key) for key in ("first", "second"))
        assert first is not None
        assert second is not None
        assert first.tzinfo is UTC
        # The time between the two calls comes on top.
        assert timedelta(seconds=1000) <= second - first < timedelta(seconds=1060)
        assert call(state.get("first")) == "v"

    def test_each_write_but_swap_and_increment_decides_the_expiry_anew(
        self, state: State, call: Caller
    ) -> None:
        call(state.set("k", 1, ttl=1000))
        begun = self.expiry(state, call, "k")
        assert begun is not None
        call(state.compare_and_swap("k", expected=1, value=2))
        assert self.expiry(state, call, "k") == begun
        call(state.compare_and_swap("k", expected=2, value=2, ttl=KEEP))
        call(state.increment("k"))
        call(state.increment("k", ttl=50))
        assert self.expiry(state, call, "k") == begun
        call(state.increment("k", ttl=5000, renew=True))
        renewed = self.expiry(state, call, "k")
        assert renewed is not None
        assert renewed - begun > timedelta(seconds=3900)
        call(state.compare_and_swap("k", expected=6, value=2, ttl=1000))
        swapped = self.expiry(state, call, "k")
        assert swapped is not None
        assert renewed - swapped > timedelta(seconds=3900)
        call(state.compare_and_swap("k", expected=7, value=2, ttl=None))
        assert self.expiry(state, call, "k") is None
        call(state.set("k", 1, ttl=1000))
        assert self.expiry(state, call, "k") is not None
        call(state.set("k", 1))
        assert self.expiry(state, call, "k") is None
        call(state.increment("k", ttl=60))
        assert self.expiry(state, call, "k") is None
        call(state.increment("k", ttl=60, renew=True))
        assert self.expiry(state, call, "k") is not None
        assert call(state.check_and_set("k", "no", ttl=5)) is False

    def test_a_created_counter_has_the_ttl_and_an_old_one_keeps_its_own(
        self, state: State, call: Caller
    ) -> None:
        call(state.increment("n", ttl=1000))
        begun = self.expiry(state, call, "n")
        assert begun is not None
        call(state.increment("n", ttl=9000))
        assert self.expiry(state, call, "n") == begun
        call(state.increment("short", ttl=SOON))
        self.gone(state, "short")
        assert call(state.increment("short", ttl=1000)) == 1

    def test_touch_changes_the_expiry_and_nothing_else(self, state: State, call: Caller) -> None:
        call(state.set("k", "v", ttl=1000))
        before = self.expiry(state, call, "k")
        assert call(state.touch("k", 5000)) is True
        after = self.expiry(state, call, "k")
        assert before is not None
        assert after is not None
        assert after - before > timedelta(seconds=3900)
        assert call(state.touch("k", 10, expected=2)) is False
        assert self.expiry(state, call, "k") == after
        assert call(state.touch("k", None, expected=1)) is True
        assert call(state.get_versioned("k")) == ("v", 1, None)
        assert call(state.touch("k", SOON)) is True
        self.gone(state, "k")

    def test_a_swap_of_a_key_that_expires_does_not_keep_it_alive(self, state: State, call: Caller) -> None:
        version = call(state.set("k", 0, ttl=0.3))

        def swap_for_ever() -> None:
            nonlocal version
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                version = call(state.compare_and_swap("k", expected=version, value=version))

        with pytest.raises(StaleVersionError) as caught:
            swap_for_ever()
        assert caught.value.actual == 0

    def test_a_ttl_of_a_thousand_years_is_kept(self, state: State, call: Caller) -> None:
        call(state.set("k", "v", ttl=timedelta(days=365_000)))
        found = self.expiry(state, call, "k")
        assert found is not None
        assert found - datetime.now(UTC) > timedelta(days=364_000)
        assert call(state.get("k")) == "v"

    @pytest.mark.parametrize("ttl", [1e-9, 0.0004, timedelta(microseconds=1)], ids=repr)
    def test_less_than_a_millisecond_is_one(self, state: State, call: Caller, ttl: Any) -> None:
        assert call(state.check_and_set("k", "v", ttl=ttl)) is True
        self.gone(state, "k")
        assert call(state.check_and_set("k", "v", ttl=100)) is True
