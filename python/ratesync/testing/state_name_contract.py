"""The contract of names: no two of them meet, none is a pattern, and no tenant sees another's keys."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ratesync import ConfigValidationError, Pending, State, Store
from ratesync.testing.contract import Caller
from ratesync.testing.state_value_contract import StateSuite

__all__ = ["HOSTILE", "REFUSED", "StateNameContract"]

# Names that mean something to SQL, LIKE, Redis patterns, key tags, separators, or encodings.
HOSTILE = [
    "a",
    "A",
    "a:b",
    "a:b:c",
    "a\\:b",
    "a\\",
    ":",
    "::",
    "%",
    "a%",
    "_",
    "__",
    "*",
    "a*",
    "?",
    "[a-z]",
    "[^a]",
    "{a}",
    "{}",
    "}{",
    "'",
    "''",
    '"',
    "\\",
    "\\\\",
    "\\x61",
    "; DROP TABLE acteon_state; --",
    "$1",
    "NULL",
    " ",
    " a",
    "a ",
    "\n",
    "\t",
    "\x01",
    "\x7f",
    "|",
    "/",
    "..",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{PILE OF POO}",
    "\uffff",
    "\U0010ffff",
    "x" * 255,
]
REFUSED: list[Any] = ["", "a\x00b", "\x00", "\ud800", "a\udfff", 7, None, b"bytes"]


class StateNameContract(StateSuite):
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    ordered_scan = True  # by the bytes of the key

    def test_hostile_keys_are_keys_like_others(self, state: State, call: Caller) -> None:
        for number, key in enumerate(HOSTILE):
            assert call(state.check_and_set(key, number)) is True, key
        for number, key in enumerate(HOSTILE):
            assert call(state.get(key)) == number, key
            assert call(state.increment(key, 1000)) == number + 1000
        for key in HOSTILE[::2]:
            assert call(state.delete(key)) is True
        assert {key for key in HOSTILE if call(state.get(key)) is not None} == set(HOSTILE[1::2])

    def test_the_longest_key_is_one_of_1024_bytes(self, state: State, call: Caller) -> None:
        for key in ("k" * 1024, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 512, "\N{PILE OF POO}" * 256):
            assert call(state.set(key, "v")) == 1
            assert call(state.get(key)) == "v"
        for key in ("k" * 1025, "k" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 512, "\N{PILE OF POO}" * 257):
            with pytest.raises(ConfigValidationError, match="1024"):
                call(state.set(key, "v"))

    def test_names_that_look_alike_when_joined_are_apart(self, store: Store, call: Caller) -> None:
        places = []
        for first, second in [("a:b", "c"), ("a", "b:c"), ("a\\", ":b:c"), ("a\\:b", "c"), ("{a}", "b")]:
            places += [
                (store.state(tenant=first, kind="k"), second),
                (store.state(tenant="t", kind=first), second),
                (store.state(namespace=first, tenant=second, kind="k"), "key"),
                (store.state(namespace=first, tenant="t", kind=second), "key"),
                (store.state(namespace=first, tenant="t", kind="k"), second),
            ]
        for number, (state, key) in enumerate(places):
            assert call(state.check_and_set(key, number)) is True
        assert [call(state.get(key)) for state, key in places] == list(range(len(places)))

    @pytest.mark.parametrize("part", ["namespace", "tenant", "kind"])
    def test_hostile_namespaces_tenants_and_kinds_are_apart(
        self, store: Store, call: Caller, part: Any
    ) -> None:
        options: list[dict[str, Any]] = [{part: name} for name in HOSTILE]
        states = [store.state(**each) for each in options]
        for number, state in enumerate(states):
            assert call(state.set("k", number)) == 1
        for number, state in enumerate(states):
            assert call(state.get("k")) == number
            if part != "kind":
                assert call.each(state.scan()) == [("k", number)]

    def test_prefixes_are_apart(self, store: Store, call: Caller) -> None:
        first, second = store.state(prefix="one_"), store.state(prefix="two_")
        call(first.set("k", "1"))
        assert call(second.get("k")) is None
        assert call(second.check_and_set("k", "2")) is True
        assert call(first.get("k")) == "1"

    def test_a_kind_can_be_named_with_the_call(self, store: Store, call: Caller) -> None:
        chains = store.state(kind="chain")
        anything = store.state()
        call(chains.set("k", "chain"))
        call(anything.set("k", "dedup", kind="dedup"))
        assert call(anything.get("k", kind="chain")) == "chain"
        assert call(chains.get("k", kind="dedup")) == "dedup"
        assert call(chains.get("k")) == "chain"
        assert call(anything.delete("k", kind="chain")) is True
        assert call(chains.get("k")) is None
        assert call(anything.get("k", kind="dedup")) == "dedup"

    def test_no_operation_reaches_another_tenant(self, store: Store, call: Caller) -> None:
        mine, other = store.state(tenant="mine"), store.state(tenant="other")
        call(mine.set("k", 1))
        call(mine.schedule("k", 0))
        assert call(other.get("k")) is None
        assert call(other.get_versioned("k")) is None
        assert call(other.delete("k")) is False
        assert call(other.touch("k", 1)) is False
        assert call(other.unschedule("k")) is False
        assert call(other.claim_due()) == []
        assert call.each(other.scan()) == []
        assert call(other.increment("k", 10)) == 10
        assert call(mine.get_versioned("k")) == (1, 1, None)
        assert [due.key for due in call(mine.claim_due())] == ["k"]

    # Scans ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("page_size", [1, 2, 7, 500])
    def test_a_scan_finds_every_key_of_its_kind_once(
        self, store: Store, call: Caller, page_size: int
    ) -> None:
        state = store.state(kind="chain")
        for number, key in enumerate(HOSTILE):
            call(state.set(key, number))
            call(state.set(key, "no", kind="other"))
        found = call.each(state.scan(page_size=page_size))
        assert sorted(found) == sorted((key, number) for number, key in enumerate(HOSTILE))
        if self.ordered_scan:
            assert [key for key, _ in found] == sorted(HOSTILE, key=str.encode)
        assert sorted(call.each(store.state().scan(kind="other"))) == sorted((key, "no") for key in HOSTILE)

    def test_a_prefix_is_literal(self, state: State, call: Caller) -> None:
        for key in HOSTILE:
            call(state.set(key, "v"))
        for prefix in {key[:size] for key in HOSTILE for size in (1, 2, 3)}:
            found = call.each(state.scan(prefix=prefix, page_size=5))
            assert sorted(key for key, _ in found) == sorted(key for key in HOSTILE if key.startswith(prefix))
        assert call.each(state.scan(prefix="nothing")) == []

    def test_the_prefix_of_the_last_character_there_is_has_an_end(self, state: State, call: Caller) -> None:
        last = "\U0010ffff"
        for key in (last, last * 2, last + "a", "a", "\uffff"):
            call(state.set(key, "v"))
        assert {key for key, _ in call.each(state.scan(prefix=last))} == {last, last * 2, last + "a"}
        assert {key for key, _ in call.each(state.scan(prefix=last * 2))} == {last * 2}

    def test_a_scan_leaves_out_what_was_deleted_or_has_another_tenant(
        self, store: Store, call: Caller
    ) -> None:
        state = store.state()
        for tenant in ("default2", "defaul", "default:", "%"):
            call(store.state(tenant=tenant).set("k-other", "no"))
        for number in range(20):
            call(state.set(f"k-{number}", number))
        for number in range(0, 20, 2):
            call(state.delete(f"k-{number}"))
        assert sorted(value for _, value in call.each(state.scan(prefix="k-", page_size=3))) == list(
            range(1, 20, 2)
        )

    async def test_what_is_there_during_a_whole_scan_comes_once_whatever_else_changes(
        self, state: State
    ) -> None:
        stay = [f"k{number:03}" for number in range(0, 60, 2)]
        await asyncio.gather(*(state.set(key, "stays") for key in stay))
        await asyncio.gather(*(state.set(f"k{number:03}", "goes") for number in range(1, 60, 2)))
        seen = []
        async for key, value in state.scan(page_size=4):
            if value == "stays":
                seen.append(key)
            number = len(seen)
            changes: list[Pending[Any]] = [
                state.delete(f"k{2 * number - 1:03}"),
                state.set(f"k{2 * number + 1:03}a", "new"),
                state.set(f"a{number}", "new"),
            ]
            for change in changes:
                await change
        assert sorted(seen) == stay

    async def test_a_scan_can_be_left_early(self, state: State) -> None:
        await asyncio.gather(*(state.set(f"k{number}", "v") for number in range(30)))
        async for _ in state.scan(page_size=3):
            break
        assert len([key async for key, _ in state.scan(page_size=3)]) == 30

    def test_a_scan_in_a_plain_loop_can_be_left_early(self, state: State) -> None:
        for number in range(10):
            state.set(f"k{number}", "v").wait()
        for _ in state.scan(page_size=3):
            break
        assert len(list(state.scan(page_size=3))) == 10
