"""The public class of state, in memory: what calls look like, what is refused, and what it says.

What operations mean on every backend is the contract suite's business (tests/contract).
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import pickle
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import ratesync
from ratesync import ConfigValidationError, Due, StaleVersionError, State, Versioned, ops
from ratesync.states import make_versioned
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")


def shortly(value: object) -> str:
    return ascii(value)[:30]


@pytest.fixture
def state(ratesync_registry: Path) -> State:
    return ratesync.state()


# The object ---------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_object() -> None:
    first = ratesync.state()
    assert ratesync.state() is first
    assert ratesync.state("default", "default") is first
    assert ratesync.state(tenant="acme") is not first
    assert ratesync.state(codec="json") is not first
    ratesync.configure_state("memory", tenant="acme")
    assert ratesync.state().tenant == "acme"


def test_it_says_what_it_is() -> None:
    state = ratesync.get_store("memory").state("p_", "n", "t", kind="k")
    assert (state.prefix, state.namespace, state.tenant, state.kind) == ("p_", "n", "t", "k")
    assert state.store is ratesync.get_store("memory")
    assert repr(state).startswith("<ratesync.State 'p_' of 'n', 't' in <ratesync.Store 'memory'")


def test_methods_are_compiled_and_documented_like_the_class_says() -> None:
    names = [op.verb for op in (ops.check_and_set("k"), ops.get("k"), ops.get_versioned("k"))]
    for name in [
        *names,
        *("set", "delete", "increment", "compare_and_swap", "touch", "schedule", "unschedule"),
        *("claim_due", "many", "initialize", "purge"),
    ]:
        method = vars(State)[name]
        assert inspect.ismethoddescriptor(method), name
        assert len(inspect.getdoc(method) or "") > 40, name


def test_prefix_namespace_tenant_and_kind_never_meet() -> None:
    store = ratesync.get_store("memory")
    spaces = [
        store.state(*parts)
        for parts in (
            ("a_", "n", "t"),
            ("a_", "n", "t2"),
            ("a_", "n2", "t"),
            ("b_", "n", "t"),
            ("a_", "t", "n"),
        )
    ]
    for number, state in enumerate(spaces):
        assert state.set("key", number).wait() == 1
    assert spaces[0].set("key", "other", kind="k").wait() == 1
    assert [state.get("key").wait() for state in spaces] == list(range(len(spaces)))


def test_a_state_outlives_shutdown_as_configuration_only(state: State) -> None:
    assert state.set("key", "x").wait() == 1
    ratesync.shutdown()
    with pytest.raises(ratesync.StoreClosedError, match="get it again"):
        state.get("key").wait()
    assert ratesync.state().get("key").wait() is None  # the embedded store went with its engine


def test_a_forked_child_stands_on_a_store_of_its_own(state: State) -> None:
    state.set("key", "parents").wait()
    lock = ratesync.lock("forked", timeout=0)
    child = os.fork()
    if child == 0:
        try:
            fresh = state.get("key").wait() is None and state.set("key", "childs").wait() == 1
            with lock:
                os._exit(0 if fresh else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert state.get("key").wait() == "parents"


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["", "text", "ä\0\U0001f600", b"", b"\x00\xff", 0, 5, -(2**63), 2**63 - 1], ids=shortly
)
def test_values_come_back_as_what_they_were(state: State, value: Any) -> None:
    state.set("key", value).wait()
    found = state.get("key").wait()
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("value", [None, True, 1.5, [1], {}, 2**63, ...], ids=shortly)
def test_other_values_are_refused_with_the_cure(state: State, value: Any) -> None:
    with pytest.raises(ConfigValidationError, match=r"json|64 bits"):
        state.set("key", value)
    assert state.get("key").wait() is None


@pytest.mark.parametrize(
    "value", [None, True, 1.5, "x", [1, {"a": None}], {"ä": "\U0001f600\0"}, 5, 2**70], ids=shortly
)
def test_json_says_more(value: Any) -> None:
    state = ratesync.state(codec="json")
    state.set("key", value).wait()
    found = state.get("key").wait()
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "value", [b"x", {1, 2}, float("nan"), float("inf"), ..., "\ud800", {"k": "\udfff"}], ids=shortly
)
def test_json_refuses_what_would_not_come_back(value: Any) -> None:
    state = ratesync.state(codec="json")
    with pytest.raises(ConfigValidationError):
        state.set("key", value)


def test_json_that_never_ends_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigValidationError, match="JSON"):
        ratesync.state(codec="json").set("key", loop)


def test_another_codec_is_refused() -> None:
    with pytest.raises(ConfigValidationError, match="'json'"):
        ratesync.state(codec="pickle")  # type: ignore[arg-type]


def test_what_was_written_as_json_is_no_number(state: State) -> None:
    json_state = ratesync.state(codec="json")
    json_state.set("key", "5").wait()
    with pytest.raises(ratesync.NotAnIntegerError, match="'key'"):
        state.increment("key").wait()


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "x" * 1025, "ä" * 513, "a\0b", "\ud800", b"key", 5, None], ids=shortly)
def test_keys_that_cannot_be_are_refused_before_anything_is_sent(state: State, key: Any) -> None:
    for call in (state.get, state.delete, state.check_and_set, state.increment, state.get_versioned):
        with pytest.raises((ConfigValidationError, TypeError), match=r"key|str"):
            call(key)


@pytest.mark.parametrize("key", ["x", "x" * 1024, "ä" * 512, "%_*[a-z]?{}", "a:b", " ", "\n"], ids=shortly)
def test_keys_are_taken_literally(state: State, key: str) -> None:
    assert state.check_and_set(key).wait() is True
    assert [found for found, _ in state.scan(prefix=key)] == [key]
    assert state.delete(key).wait() is True


@pytest.mark.parametrize(
    "ttl", [0, -1, -0.0, float("nan"), float("-inf"), timedelta(0), True, "60"], ids=shortly
)
def test_a_ttl_that_is_none_is_refused(state: State, ttl: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError), match=r"ttl|second"):
        state.set("key", "x", ttl=ttl)


def test_a_ttl_below_a_millisecond_is_one(ratesync_clock: ManualClock) -> None:
    state = ratesync.state()
    state.set("key", "x", ttl=1e-9).wait()
    assert state.get("key").wait() == "x"
    ratesync_clock.advance(0.001)
    assert state.get("key").wait() is None


@pytest.mark.parametrize("kind", ["", "k" * 256, "\0", 5], ids=shortly)
def test_a_kind_that_cannot_be_is_refused(state: State, kind: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError)):
        state.get("key", kind=kind)
    with pytest.raises((ConfigValidationError, TypeError)):
        list(state.scan(kind=kind))


def test_a_call_that_nobody_waits_for_says_so(state: State) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state.set("key", "x")
        gc.collect()
    assert state.get("key").wait() is None
    assert all("never awaited" in str(w.message) or "nothing happened" in str(w.message) for w in caught)


def test_a_call_is_consumed_once(state: State) -> None:
    call = state.increment("n")
    assert call.wait() == 1
    with pytest.raises(RuntimeError):
        call.wait()
    assert state.get("n").wait() == 1


async def test_calls_are_accepted_by_asyncio(state: State) -> None:
    assert await asyncio.gather(*(state.increment("n") for _ in range(3))) == [1, 2, 3]
    assert await asyncio.create_task(state.check_and_set("k")) is True  # type: ignore[arg-type]
    assert await asyncio.wait_for(state.get("n"), 5) == 3


# Records ------------------------------------------------------------------------------------------


def test_versioned_says_when_it_expires(state: State) -> None:
    before = datetime.now(UTC)
    state.set("key", "x", ttl=timedelta(minutes=5)).wait()
    found = state.get_versioned("key").wait()
    assert isinstance(found, Versioned)
    assert (found.value, found.version) == ("x", 1)
    assert found.expires_at is not None
    assert abs(found.expires_at - before - timedelta(minutes=5)) < timedelta(minutes=1)
    assert found.expires_at.tzinfo is UTC
    state.set("key", "x").wait()
    assert state.get_versioned("key").wait() == Versioned("x", 2, None)


def test_a_moment_beyond_the_calendar_is_its_last_one(state: State) -> None:
    assert make_versioned("x", 1, 10**18) == Versioned("x", 1, datetime.max.replace(tzinfo=UTC))
    with pytest.raises(ConfigValidationError, match="use None for ever"):
        state.set("key", "x", ttl=10**12)


def test_a_stale_write_carries_both_versions(state: State) -> None:
    state.set("key", "x").wait()
    for expected, actual in ((0, 1), (7, 1)):
        with pytest.raises(StaleVersionError) as caught:
            state.compare_and_swap("key", expected=expected, value="y").wait()
        assert (caught.value.expected, caught.value.actual) == (expected, actual)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(StaleVersionError) as caught:
        state.compare_and_swap("absent", expected=3, value="y").wait()
    assert caught.value.actual == 0


def test_counters_that_cannot_be_continued_say_which(state: State) -> None:
    state.set("text", "5").wait()
    with pytest.raises(ratesync.NotAnIntegerError, match="'text'") as caught:
        state.increment("text").wait()
    assert caught.value.key == "text"
    state.set("full", 2**63 - 1).wait()
    with pytest.raises(ratesync.CounterOverflowError, match="'full'"):
        state.increment("full").wait()
    assert state.get("full").wait() == 2**63 - 1


@pytest.mark.parametrize(
    "at",
    [
        lambda: datetime.now(UTC) - timedelta(seconds=5),
        lambda: datetime.now(timezone(timedelta(hours=9))) - timedelta(seconds=5),
        lambda: (datetime.now(UTC) - timedelta(seconds=5)).timestamp(),
        lambda: timedelta(seconds=-5),
        lambda: 0,
    ],
)
def test_a_timeout_is_a_moment_or_a_time_from_now(state: State, at: Callable[[], Any]) -> None:
    state.schedule("order", at(), kind="reminder").wait()
    (due,) = state.claim_due(kind="reminder").wait()
    assert isinstance(due, Due)
    assert (due.key, due.kind) == ("order", "reminder")
    assert due.due_at < datetime.now(UTC)
    assert state.claim_due().wait() == []
    assert state.unschedule("order", claim=due.claim + 1, kind="reminder").wait() is False
    assert state.unschedule("order", claim=due.claim, kind="reminder").wait() is True


@pytest.mark.parametrize("at", [datetime(2026, 1, 1), "soon", None, float("nan"), True], ids=shortly)
def test_a_moment_that_is_none_is_refused(state: State, at: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError)):
        state.schedule("order", at)


# Scans --------------------------------------------------------------------------------------------


async def test_a_scan_serves_both_kinds_of_loops(state: State) -> None:
    for number in range(25):
        await state.set(f"k{number:02}", number)
    await state.set("k00", "of another kind", kind="other")
    expected = [(f"k{number:02}", number) for number in range(25)]
    assert [item async for item in state.scan(page_size=10)] == expected
    assert [item async for item in state.scan(prefix="k1")] == expected[10:20]
    assert [item async for item in state.scan(kind="nothing")] == []
    assert await asyncio.to_thread(lambda: list(state.scan(page_size=1))) == expected


def test_a_scan_that_was_left_early_can_go_on(state: State) -> None:
    for number in range(5):
        state.set(f"k{number}", number).wait()
    scan = state.scan(page_size=2)
    for key, _ in scan:
        if key == "k2":
            break
    assert [key for key, _ in scan] == ["k3", "k4"]
    assert list(scan) == []


async def test_a_scan_is_for_one_loop_at_a_time(state: State) -> None:
    await state.set("k", 1)
    scan = state.scan()
    scan._fetching = True  # as while another task waits for a page
    with pytest.raises(RuntimeError, match="scan\\(\\) once for each loop"):
        await scan.__anext__()


@pytest.mark.parametrize("page_size", [0, -1, 10_001, 1.5, "5", True], ids=shortly)
def test_a_page_size_that_is_none_is_refused(state: State, page_size: Any) -> None:
    with pytest.raises(ConfigValidationError, match="1 to 10000"):
        state.scan(page_size=page_size)


# Many ---------------------------------------------------------------------------------------------


def test_many_gives_each_operation_its_own_outcome(state: State) -> None:
    state.set("text", "x").wait()
    outcomes = state.many(
        [
            ops.check_and_set("new", ttl=60),
            ops.check_and_set("new"),
            ops.increment("text"),
            ops.compare_and_swap("text", expected=9, value="y"),
            ops.compare_and_swap("text", expected=1, value="y"),
            ops.get("text"),
            ops.get_versioned("text"),
            ops.touch("absent", 5),
            ops.delete("text"),
            ops.get("text"),
            ops.increment("n", 5, kind="counter"),
            ops.schedule("new", 0),
            ops.unschedule("new"),
            ops.set("b", b"1", ttl=timedelta(days=1)),
        ]
    ).wait()
    assert outcomes[:2] == [True, False]
    assert isinstance(outcomes[2], ratesync.NotAnIntegerError)
    assert isinstance(outcomes[3], StaleVersionError)
    assert outcomes[4:] == [2, "y", Versioned("y", 2, None), False, True, None, 5, None, True, 1]


def test_an_atomic_many_does_all_or_nothing(state: State) -> None:
    assert state.many([ops.set("a", 1), ops.check_and_set("b")], atomic=True).wait() == [1, True]
    with pytest.raises(ratesync.RolledBackError, match="nothing of the 3 operations") as caught:
        state.many(
            [ops.increment("a"), ops.get("c"), ops.compare_and_swap("b", expected=7, value="x")], atomic=True
        ).wait()
    assert isinstance(caught.value.outcomes[2], StaleVersionError)
    assert (state.get("a").wait(), state.get("b").wait()) == (1, "1")


@pytest.mark.parametrize("given", [None, 5, ["get"], [("get", "k")], [None], ops.get("k")], ids=shortly)
def test_what_is_no_list_of_operations_is_refused(state: State, given: Any) -> None:
    with pytest.raises((ConfigValidationError, TypeError)):
        state.many(given)


def test_operations_are_checked_before_anything_is_sent(state: State) -> None:
    with pytest.raises(ConfigValidationError):
        state.many([ops.set("a", 1), ops.set("b", 1, ttl=0)])
    assert state.get("a").wait() is None


def test_an_atomic_many_names_each_key_once(state: State) -> None:
    with pytest.raises(ConfigValidationError, match=r"distinct|twice|once"):
        state.many([ops.set("a", 1), ops.get("a")], atomic=True)


def test_operations_are_frozen() -> None:
    op = ops.set("k", "v", ttl=5)
    with pytest.raises(AttributeError):
        op.key = "other"  # type: ignore[misc]
    assert op == ops.set("k", "v", 5)
