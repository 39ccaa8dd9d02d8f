"""Calls on state that are cancelled, late, cut off, or under way when everything ends.

A proxy in front of a real server reaches every step: `before_it_began`, `not_sent` (no connection comes
about), `sent` (the answer is held back), `in_the_turn_of_its_answer`. What was not sent never happens; what
was sent happens at most once, and nobody else is disturbed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import urlsplit

import pytest

import ratesync
from ratesync import ops
from ratesync.testing import TcpProxy


@pytest.fixture(params=["redis", "postgres"])
def proxy(request: pytest.FixtureRequest, ratesync_registry: object) -> Iterator[TcpProxy]:
    url = request.getfixturevalue(f"ratesync_{request.param}_url")
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    with TcpProxy(parts.hostname, parts.port) as proxy:
        options: dict[str, object] = {"auto_create": True, "command_timeout": 10.0}
        if request.param == "redis":
            options = {"socket_timeout": 60.0}
        ratesync.configure_store("s", request.param, url=proxy.through(url), **options)
        yield proxy
        proxy.resume()
        ratesync.shutdown()


@pytest.fixture
async def state(proxy: TcpProxy) -> ratesync.State:
    state = ratesync.get_store("s").state(timeout=60.0)
    await state.set("warm", "1")
    return state


async def settled() -> None:
    """What was submitted has been decided or sent, as far as it can be."""
    await asyncio.sleep(0.05)


Step = Callable[[TcpProxy, asyncio.Task], Awaitable[None]]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


@step
async def before_it_began(proxy: TcpProxy, task: asyncio.Task) -> None:
    pass


@step
async def just_submitted(proxy: TcpProxy, task: asyncio.Task) -> None:
    await asyncio.sleep(0)


@step
async def sent(proxy: TcpProxy, task: asyncio.Task) -> None:
    proxy.stall("replies")
    await settled()


@step
async def in_the_turn_of_its_answer(proxy: TcpProxy, task: asyncio.Task) -> None:
    await asyncio.sleep(0)
    time.sleep(0.05)  # the answer is in the queue as a rule; its reader callback has not run


@step
async def after_it(proxy: TcpProxy, task: asyncio.Task) -> None:
    await asyncio.wait([task])


WAYS: dict[str, Callable[[asyncio.Task], None]] = {
    "cancel": lambda task: task.cancel(),
    "cancel with a message": lambda task: task.cancel("because"),
    "twice": lambda task: task.cancel() and task.cancel(),
}
CALLS: dict[str, Callable[[ratesync.State], Awaitable]] = {
    "one": lambda state: state.increment("n"),
    "many": lambda state: state.many([ops.get("x"), ops.increment("n")]),
    "atomic": lambda state: state.many([ops.get("x"), ops.increment("n")], atomic=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", STEPS)
async def test_a_cancelled_call_happens_at_most_once_and_disturbs_nobody(
    state: ratesync.State, proxy: TcpProxy, at: str, way: str, call: str
) -> None:
    async def use() -> object:
        return await CALLS[call](state)

    before = asyncio.create_task(state.increment("n"))
    victim = asyncio.create_task(use())
    behind = asyncio.create_task(state.increment("n"))
    if at == "before_it_began":
        WAYS[way](victim)
    await STEPS[at](proxy, victim)
    WAYS[way](victim)
    outcome = (await asyncio.gather(victim, return_exceptions=True))[0]
    proxy.resume()
    first, last = await asyncio.wait_for(asyncio.gather(before, behind), 60)
    total = await state.get("n")
    assert first == 1
    assert total in (2, 3)
    assert last in (2, total)
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, asyncio.CancelledError)
        assert at != "after_it"
        if at == "before_it_began":
            assert total == 2
    else:
        assert total == 3


async def test_what_was_not_sent_never_happens(proxy: TcpProxy) -> None:
    proxy.stall("requests")  # no connection gets as far as to carry anything
    state = ratesync.get_store("s").state(timeout=60.0)
    tasks = [asyncio.create_task(call) for call in (state.set("a", "1"), state.many([ops.set("b", "1")]))]
    await settled()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    proxy.resume()
    assert await state.many([ops.get("a"), ops.get("b")]) == [None, None]


async def test_a_timeout_of_asyncio_is_a_cancel(state: ratesync.State, proxy: TcpProxy) -> None:
    proxy.stall("replies")
    for consume in (
        lambda: asyncio.wait_for(state.set("a", "1"), 0.3),
        lambda: asyncio.wait_for(asyncio.gather(state.set("a", "1"), state.get("a")), 0.3),
    ):
        with pytest.raises(TimeoutError):
            await consume()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await state.set("a", "1")
    proxy.resume()
    assert await state.get("a") == "1"


async def test_closing_the_coroutine_gives_the_call_up(state: ratesync.State, proxy: TcpProxy) -> None:
    proxy.stall("replies")
    calls = [state.set("a", "1"), state.many([ops.set("b", "1")])]
    for call in calls:
        call.send(None)
        call.close()
        with pytest.raises(RuntimeError):
            call.send(None)
    call = state.set("c", "1")
    call.send(None)
    with pytest.raises(ZeroDivisionError):
        call.throw(ZeroDivisionError())
    del calls, call
    proxy.resume()
    assert await state.increment("n") == 1


async def test_a_call_that_is_dropped_while_it_waits_leaves_nothing(
    state: ratesync.State, proxy: TcpProxy
) -> None:
    proxy.stall("replies")
    for _ in range(100):
        call = state.set("a", "1")
        call.send(None)
        del call
        waiter = state.get("a").__await__()
        del waiter
    gc.collect()
    proxy.resume()
    assert await state.increment("n") == 1


# Deadlines -----------------------------------------------------------------------------------------


async def test_a_write_without_an_answer_is_in_doubt_at_its_deadline_and_a_read_is_late(
    state: ratesync.State, proxy: TcpProxy
) -> None:
    hasty = state.store.state(timeout=1.0)  # time to be sent in, on a machine that is busy
    late, in_doubt = ratesync.StoreTimeoutError, ratesync.InDoubtError
    calls: list[tuple[Callable[[], Awaitable], str | None, list[type]]] = [
        (lambda: hasty.set("a", "1"), "a", [in_doubt]),
        (lambda: hasty.get("a"), None, [late]),
        (lambda: hasty.many([ops.get("a"), ops.set("b", "1")]), "b", [late, in_doubt]),
        (lambda: hasty.many([ops.set("c", "1")], atomic=True), "c", [in_doubt]),
    ]
    for call, written, expected in calls:
        for _ in range(10):
            proxy.stall("replies")  # each of them alone, so that it is sent at once
            (outcome,) = await asyncio.wait_for(asyncio.gather(call(), return_exceptions=True), 60)
            proxy.resume()
            found = await state.get(written or "warm")
            kinds = [type(each) for each in (outcome if isinstance(outcome, list) else [outcome])]
            if kinds == expected:
                assert found == "1"
                break
            # The machine stood still for so long that it was not sent, and so it is said.
            assert kinds == [late] * len(kinds)
            assert found is None
        else:
            pytest.fail("never sent in time")


async def test_a_scan_and_a_claim_end_at_their_deadline(state: ratesync.State, proxy: TcpProxy) -> None:
    hasty = state.store.state(timeout=1.0)
    await state.schedule("due", 0)
    for _ in range(10):
        proxy.stall("replies")
        calls = hasty._scan(None, "", "", 10), hasty.claim_due(lease=0.001)
        page, claim = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        proxy.resume()
        await state.get("warm")
        assert isinstance(page, ratesync.StoreTimeoutError)
        if isinstance(claim, ratesync.InDoubtError):
            break
        assert isinstance(claim, ratesync.StoreTimeoutError)  # not sent: the machine stood still
    else:
        pytest.fail("never sent in time")
    assert [key async for key, _ in state.scan()] == ["warm"]
    async with asyncio.timeout(60):
        while [due.key for due in await state.claim_due()] != ["due"]:
            await asyncio.sleep(0.01)


async def test_what_waits_for_a_connection_until_its_deadline_was_not_executed(proxy: TcpProxy) -> None:
    proxy.stall("requests")
    state = ratesync.get_store("s").state(timeout=0.2)
    with pytest.raises((ratesync.StoreTimeoutError, ratesync.StoreUnavailableError)):
        await asyncio.wait_for(state.set("a", "1"), 20)
    with pytest.raises((ratesync.StoreTimeoutError, ratesync.StoreUnavailableError)):
        await asyncio.to_thread(lambda: state.set("b", "1").wait())
    proxy.resume()
    patient = state.store.state(timeout=60.0)
    assert await patient.many([ops.get("a"), ops.get("b")]) == [None, None]


# A storm -------------------------------------------------------------------------------------------


async def test_sums_hold_whatever_is_cancelled(state: ratesync.State, proxy: TcpProxy) -> None:
    dice = random.Random(5)
    acknowledged = 0
    given_up = 0

    async def worker() -> None:
        nonlocal acknowledged, given_up
        for _ in range(60):
            task = asyncio.create_task(state.increment("n"))
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
            if dice.random() < 0.5:
                task.cancel()
            try:
                await task
                acknowledged += 1
            except asyncio.CancelledError:
                given_up += 1

    await asyncio.wait_for(asyncio.gather(*(worker() for _ in range(40))), 120)
    total = await state.get("n")
    assert acknowledged + given_up == 2400
    assert given_up > 100
    assert acknowledged > 100
    assert acknowledged <= total <= acknowledged + given_up


# The end of everything -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["shutdown", "close"])
async def test_what_is_under_way_when_the_store_closes_is_answered(
    state: ratesync.State, proxy: TcpProxy, end: str
) -> None:
    proxy.stall("replies")
    calls = [state.set("a", "1"), state.many([ops.get("a")]), state.many([ops.get("a")], atomic=True)]
    tasks = [asyncio.create_task(call) for call in calls]
    await settled()
    if end == "shutdown":
        await asyncio.to_thread(ratesync.shutdown)
    else:
        await asyncio.wait_for(state.store.close(), 40)
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 40)
    assert [type(outcome) for outcome in outcomes] == [ratesync.StoreClosedError] * 3


def test_a_loop_closed_with_calls_under_way_is_let_go(proxy: TcpProxy) -> None:
    state = ratesync.get_store("s").state(timeout=60.0)

    async def leave_waiting() -> asyncio.Task:
        await state.set("warm", "1")
        proxy.stall("replies")
        task = asyncio.create_task(state.set("a", "1"))
        await settled()
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(leave_waiting())
    loop.close()
    gone = weakref.ref(task)
    task.get_coro().close()  # type: ignore[union-attr]
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task, loop
    proxy.resume()

    async def other() -> object:
        return await state.increment("n")

    assert asyncio.run(other()) == 1
    gc.collect()
    assert gone() is None


def test_ctrl_c_interrupts_a_blocked_call_and_the_next_one_works(proxy: TcpProxy) -> None:
    state = ratesync.get_store("s").state(timeout=60.0)
    state.set("warm", "1").wait()
    proxy.stall("replies")
    for call in (state.set("a", "1"), state.many([ops.set("a", "1")])):
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come before the call waits
            timer.start()
            call.wait()
        timer.join()
    proxy.resume()
    assert state.increment("n").wait() == 1


def run(script: str, url: str, *, seconds: float = 60) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(script), url],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Error" not in ended.stderr
    return ended.stdout


def test_a_process_ends_while_calls_are_under_way(proxy: TcpProxy, ratesync_redis_url: str) -> None:
    script = """
        import asyncio, sys, threading, ratesync
        ratesync.configure_store("s", "redis", url=sys.argv[1])
        state = ratesync.get_store("s").state(timeout=60)
        state.set("warm", "1").wait()
        async def main():
            tasks = [asyncio.create_task(state.increment("n")) for _ in range(100)]
            await asyncio.sleep(0)
        def block():
            try:
                while True:
                    state.get("n").wait()
            except ratesync.StoreClosedError:
                pass
        threading.Thread(target=block, daemon=True).start()
        asyncio.run(main())
        call = state.set("a", "1")
        print("done")
    """
    assert run(script, ratesync_redis_url) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_forked_child_goes_on_with_a_state_of_its_own(kind: str, ratesync_redis_url: str) -> None:
    script = (
        """
        import asyncio, gc, os, signal, sys, traceback, ratesync
        from ratesync import ops
        kind = """
        + repr(kind)
        + """
        ratesync.configure_store("s", kind, **({} if kind == "memory" else {"url": sys.argv[1]}))
        state = ratesync.get_store("s").state(timeout=60)
        assert state.increment("n", 5).wait() == 5
        unused = state.increment("n")
        begun = None
        async def begin():
            global begun
            begun = state.set("late", "1")
            await begun
        asyncio.run(begin())

        def child():
            base = 0 if kind == "memory" else 5
            assert state.increment("n").wait() == base + 1
            assert asyncio.run(state.many([ops.increment("n")])) == [base + 2]
            assert unused.wait() == base + 3  # made in the parent, consumed here
            assert state.get("n", kind="other").wait() is None
            gc.collect()

        for level in range(2):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                try:
                    child()
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            assert status == 0, status
            state.set("n", 5).wait()
        assert unused.wait() == 6
        print("done")
        """
    )
    assert run(script, ratesync_redis_url) == "done\n"
