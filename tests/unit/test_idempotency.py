# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""Idempotent operations in memory: who runs, who gets the result, what a crash, a loss or a cancel leaves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import ratesync
from ratesync import (
    ConfigValidationError,
    IdempotencyMismatchError,
    LeaseLostError,
    OperationFailedError,
    OperationInProgressError,
)
from ratesync.idempotency import KIND
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")


def shortly(value: object) -> str:
    return ascii(value)[:30]


def record(key: str = "k") -> Any:
    """The stored record."""
    return ratesync.state(kind=KIND, codec="json").get(key).wait()


async def stored(key: str = "k") -> Any:
    return await ratesync.state(kind=KIND, codec="json").get(key)


async def run_once(key: str = "k", result: Any = "done", **options: Any) -> tuple[bool, Any]:
    async with ratesync.idempotent(key, **options) as op:
        if not op.done:
            op.result = result
    return op.done, op.result


# Fresh, running, done, mismatch -------------------------------------------------------------------


async def test_the_first_caller_runs_and_later_ones_get_its_result() -> None:
    assert await run_once(result={"id": 1}) == (False, {"id": 1})
    assert await run_once(result={"id": 2}) == (True, {"id": 1})
    assert await asyncio.to_thread(_in_a_thread, "k") == (True, {"id": 1})


def _in_a_thread(key: str) -> tuple[bool, Any]:
    with ratesync.idempotent(key) as op:
        if not op.done:
            op.result = "thread"
    return op.done, op.result


async def test_a_body_that_assigns_nothing_stores_none() -> None:
    async with ratesync.idempotent("k") as op:
        assert (op.done, op.result) == (False, None)
    assert await run_once() == (True, None)


async def test_who_comes_while_it_runs_is_told_so() -> None:
    async with ratesync.idempotent("k", lease=5) as op:
        with pytest.raises(OperationInProgressError, match="running elsewhere") as caught:
            await run_once()
        op.result = "first"
    assert caught.value.status_code == 409
    assert caught.value.key == "k"
    assert 0 < caught.value.retry_after <= 6
    assert await run_once() == (True, "first")


async def test_who_waits_gets_the_result() -> None:
    async with ratesync.idempotent("k") as op:
        waiting = [asyncio.create_task(run_once(wait=60)) for _ in range(5)]
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in waiting)
        op.result = "first"
    assert await asyncio.gather(*waiting) == [(True, "first")] * 5


async def test_who_waits_runs_when_the_first_one_fails() -> None:
    with pytest.raises(KeyError):
        async with ratesync.idempotent("k"):
            waiting = asyncio.create_task(run_once(result="second", wait=60))
            await asyncio.sleep(0.02)
            raise KeyError("of the body")
    assert await waiting == (False, "second")


async def test_waiting_has_an_end() -> None:
    async with ratesync.idempotent("k"):
        with pytest.raises(OperationInProgressError, match=r"did not end within 0.02 s"):
            await run_once(wait=0.02)
        with pytest.raises(OperationInProgressError):
            await run_once(wait=0)


async def test_one_of_many_runs() -> None:
    runs = 0

    async def call() -> Any:
        nonlocal runs
        async with ratesync.idempotent("k", wait=60) as op:
            if not op.done:
                runs += 1
                await asyncio.sleep(0.005)
                op.result = runs
        return op.result

    assert await asyncio.gather(*(call() for _ in range(100))) == [1] * 100


def test_one_of_many_threads_runs() -> None:
    runs: list[int] = []
    results: list[Any] = []

    def call(number: int) -> None:
        with ratesync.idempotent("k", wait=60) as op:
            if not op.done:
                runs.append(number)
                op.result = number
        results.append(op.result)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert results == runs * 16


async def test_another_fingerprint_is_another_request() -> None:
    await run_once(fingerprint="5 EUR")
    with pytest.raises(IdempotencyMismatchError, match="new key") as caught:
        await run_once(fingerprint="6 EUR")
    assert caught.value.status_code == 422
    assert await run_once(fingerprint="5 EUR") == (True, "done")
    assert await run_once() == (True, "done")  # None is not compared
    async with ratesync.idempotent("running", fingerprint=b"\x01"):
        with pytest.raises(IdempotencyMismatchError):
            await run_once("running", fingerprint=b"\x02", wait=60)


async def test_results_are_kept_for_their_time(ratesync_clock: ManualClock) -> None:
    await run_once(ttl=60)
    ratesync_clock.advance(59)
    assert await run_once(result="again") == (True, "done")
    ratesync_clock.advance(2)
    assert await run_once(result="again", ttl=None) == (False, "again")
    ratesync_clock.advance(10**6)
    assert await run_once() == (True, "again")


async def test_keys_of_tenants_never_meet() -> None:
    await run_once(result=1)
    assert await run_once(result=2, tenant="t") == (False, 2)
    assert await run_once(result=3, namespace="n") == (False, 3)
    assert await ratesync.state().get("k") is None


# Results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"x", {1}, float("nan"), ...], ids=shortly)
async def test_what_json_cannot_say_is_refused_where_it_is_assigned(value: Any) -> None:
    async with ratesync.idempotent("k") as op:
        with pytest.raises(ConfigValidationError, match="JSON"):
            op.result = value
        op.result = "instead"
    assert await run_once() == (True, "instead")


async def test_the_result_is_stored_as_it_was_when_it_was_assigned() -> None:
    result = {"items": [1]}
    async with ratesync.idempotent("k") as op:
        op.result = result
        result["items"].append(2)
    assert await run_once() == (True, {"items": [1]})


async def test_the_result_of_what_is_done_stays() -> None:
    await run_once()
    async with ratesync.idempotent("k") as op:
        with pytest.raises(ConfigValidationError, match=r"look at op\.done"):
            op.result = "other"
    assert await run_once() == (True, "done")


# Bodies that fail ---------------------------------------------------------------------------------


async def test_a_body_that_raises_frees_the_key() -> None:
    for _ in range(3):
        with pytest.raises(KeyError):
            async with ratesync.idempotent("k", fingerprint="a") as op:
                assert not op.done
                op.result = "never"
                raise KeyError("of the body")
    assert await stored() is None
    assert await run_once(fingerprint="b") == (False, "done")


async def test_a_failure_can_be_kept() -> None:
    with pytest.raises(ValueError):
        async with ratesync.idempotent("k", on_error="keep") as op:
            op.result = "never"
            raise ValueError("card refused")
    with pytest.raises(OperationFailedError, match="ValueError: card refused") as caught:
        await run_once()
    assert caught.value.reason == "ValueError: card refused"
    assert "result" not in await stored()
    assert await ratesync.idempotent("k").forget() is True
    assert await run_once() == (False, "done")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("cannot open 'caf\udce9'"), "OSError: cannot open 'caf\\udce9'"),
        (ValueError("a\0b"), "ValueError: a\0b"),
        (Unprintable(), "Unprintable: (its text cannot be had)"),
    ],
    ids=["surrogate", "nul", "unprintable"],
)
async def test_a_failure_of_any_text_is_kept(error: Exception, reason: str) -> None:
    with pytest.raises(type(error)):
        async with ratesync.idempotent("k", on_error="keep"):
            raise error
    with pytest.raises(OperationFailedError) as caught:
        await run_once()
    assert caught.value.reason == reason


@pytest.mark.parametrize("result", ["\ud800", {"\udcff": 1}, "x" * (64 * 2**20)], ids=shortly)
async def test_a_result_that_cannot_be_stored_is_refused_where_it_is_assigned(result: Any) -> None:
    async with ratesync.idempotent("k") as op:
        with pytest.raises(ConfigValidationError, match="the result"):
            op.result = result
        op.result = "another"
    assert await run_once() == (True, "another")


@pytest.mark.parametrize("argument", ["ttl", "lease", "wait"])
def test_a_time_beyond_what_a_store_takes_is_refused_before_the_body_runs(argument: str) -> None:
    with pytest.raises(ConfigValidationError, match="1000 years"):
        ratesync.idempotent("k", **{argument: 1e11})


async def test_a_cancelled_body_frees_the_key() -> None:
    async def body() -> None:
        async with ratesync.idempotent("k"):
            reached.set()
            await asyncio.sleep(3600)

    reached = asyncio.Event()
    task = asyncio.create_task(body())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await run_once() == (False, "done")


async def test_a_cancelled_waiter_changes_nothing() -> None:
    async with ratesync.idempotent("k") as op:
        waiting = asyncio.create_task(run_once(wait=60))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        op.result = "first"
    assert await run_once() == (True, "first")


# Crashes and late commits -------------------------------------------------------------------------


def crash(key: str = "k", **options: Any) -> Any:
    """A caller that enters and is never heard of again; gives its operation, for what it may do late."""
    entered = ratesync.idempotent(key, **options)
    operation = entered.__enter__()
    assert operation._kept is not None
    operation._kept.stop()  # the process is gone, and with it what renews
    return entered, operation


def test_the_lease_of_a_caller_that_died_ends(ratesync_clock: ManualClock) -> None:
    crash(lease=30, fingerprint="first")
    with pytest.raises(OperationInProgressError), ratesync.idempotent("k"):
        pass
    ratesync_clock.advance(31)
    with ratesync.idempotent("k", fingerprint="second") as op:
        assert not op.done
        op.result = "second"
    assert record()["result"] == "second"


def test_a_living_caller_keeps_its_lease(ratesync_clock: ManualClock) -> None:
    with ratesync.idempotent("k", lease=30) as op:
        for _ in range(20):
            ratesync_clock.advance(5)
        assert not op.lost
        with pytest.raises(OperationInProgressError), ratesync.idempotent("k"):
            pass
        op.result = "slow"
    assert record()["result"] == "slow"


@pytest.mark.parametrize(
    ("then", "text"),
    [
        ("runs", "another caller is running"),
        ("done", "another caller did the operation and stored its result"),
        ("failed", "another caller tried the operation and failed"),
        ("freed", "the key is free"),
    ],
)
def test_a_late_commit_is_refused_and_says_why(ratesync_clock: ManualClock, then: str, text: str) -> None:
    late, operation = crash(lease=30)
    ratesync_clock.advance(31)
    second = ratesync.idempotent("k", on_error="keep" if then == "failed" else "free")
    with pytest.raises(LeaseLostError, match=text) as caught:
        op = second.__enter__()
        op.result = "second"
        if then == "done":
            second.__exit__(None, None, None)
        elif then != "runs":
            error = ValueError("no")
            second.__exit__(ValueError, error, None)
        operation.result = "late"
        late.__exit__(None, None, None)
    assert caught.value.key == "k"
    assert text in caught.value.happened
    found = record()
    assert found is None or found.get("result") != "late"


def test_a_late_commit_counts_when_nobody_took_over(ratesync_clock: ManualClock) -> None:
    late, operation = crash(lease=30)
    ratesync_clock.advance(31)
    operation.result = "late"
    late.__exit__(None, None, None)
    assert record()["result"] == "late"


def test_a_late_failure_does_not_free_the_next_callers_key(ratesync_clock: ManualClock) -> None:
    late, _ = crash(lease=30)
    ratesync_clock.advance(31)
    with ratesync.idempotent("k") as op:
        late.__exit__(KeyError, KeyError("late"), None)
        assert record()["state"] == "running"
        op.result = "second"
    assert record()["result"] == "second"


def test_a_body_whose_lease_was_lost_can_see_it(ratesync_clock: ManualClock) -> None:
    with pytest.raises(LeaseLostError), ratesync.idempotent("k", lease=30) as op:
        assert not op.lost
        assert ratesync.idempotent("k").forget().wait()
        ratesync_clock.advance(31)
        assert op.lost


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"key": ""},
        {"key": "x" * 1025},
        {"key": "a\0b"},
        {"key": 5},
        {"fingerprint": ""},
        {"fingerprint": 5},
        {"fingerprint": "x" * 1025},
        {"ttl": 0},
        {"lease": -1},
        {"lease": None},
        {"lease": float("nan")},
        {"wait": -1},
        {"wait": "5"},
        {"on_error": "ignore"},
        {"tenant": ""},
    ],
    ids=shortly,
)
def test_what_cannot_be_is_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigValidationError):
        ratesync.idempotent(**{"key": "k", **options})


def test_each_object_is_for_one_call() -> None:
    once = ratesync.idempotent("k")
    with once:
        pass
    with pytest.raises(RuntimeError, match="once for each call"), once:
        pass


def test_what_is_no_record_is_not_taken_for_one() -> None:
    ratesync.state(kind=KIND).set("k", "something else").wait()
    with pytest.raises(ratesync.InternalError, match="no record of an operation"), ratesync.idempotent("k"):
        pass


def test_committing_in_a_transaction_needs_postgresql() -> None:
    with ratesync.idempotent("k") as op, pytest.raises(ConfigValidationError, match="backend = 'postgres'"):
        op.commit_in(object())
