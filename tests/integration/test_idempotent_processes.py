"""Idempotent operations over several processes: one runs, a dead one is succeeded, a late one is refused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

import ratesync

SPAWN = multiprocessing.get_context("spawn")
PROCESSES = 4

_barrier: Any = None


def _remember(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


@pytest.fixture(params=["postgres", "redis"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    url = request.getfixturevalue(f"ratesync_{request.param}_url")
    created = {"auto_create": True} if request.param == "postgres" else {}
    return {"engine": request.param, "url": url, **created}


@pytest.fixture
async def store(ratesync_registry: object, options: dict[str, Any]) -> ratesync.Store:
    ratesync.configure_store("db", **options)
    store = ratesync.get_store("db")
    await store.state().initialize()
    return store


def _charge(options: dict[str, Any], number: int, keys: int, tasks: int) -> list[tuple[int, bool, str]]:
    """(key, whether it ran here, result) of every call."""

    async def main(store: ratesync.Store) -> list[tuple[int, bool, str]]:
        _barrier.wait(150)

        async def charge(key: int, task: int) -> tuple[int, bool, str]:
            async with store.idempotent(f"key-{key}", fingerprint=b"body", wait=120, timeout=60) as op:
                if not op.done:
                    op.result = f"{number}/{task}"
                return key, not op.done, op.result

        return await asyncio.gather(*(charge(*each) for each in itertools.product(range(keys), range(tasks))))

    ratesync.configure_store("db", **options)
    try:
        return asyncio.run(main(ratesync.get_store("db")))
    finally:
        ratesync.shutdown()


async def test_each_key_runs_once_and_every_caller_gets_that_result(options, store):
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(PROCESSES, SPAWN, _remember, (SPAWN.Barrier(PROCESSES),)) as executor:
        calls = itertools.chain.from_iterable(
            await asyncio.gather(
                *(
                    loop.run_in_executor(executor, _charge, options, number, 12, 5)
                    for number in range(PROCESSES)
                )
            )
        )
    by_key = itertools.groupby(sorted(calls), key=lambda call: call[0])
    seen = {key: [call[1:] for call in group] for key, group in by_key}
    assert len(seen) == 12
    for answers in seen.values():
        assert len(answers) == PROCESSES * 5
        assert sum(ran for ran, _ in answers) == 1
        assert len({result for _, result in answers}) == 1


def _hold(options: dict[str, Any], pipe: Connection, lease: float) -> None:
    """Runs the operation until it is told to end; sends what became of its result."""

    async def main() -> None:
        ratesync.configure_store("db", **options)
        try:
            charge = ratesync.get_store("db").idempotent("charge-42", "f", lease=lease, timeout=60)
            async with charge as op:
                assert not op.done
                pipe.send("running")
                await asyncio.to_thread(pipe.recv)
                op.result = "late"
            pipe.send("stored")
        except ratesync.LeaseLostError:
            pipe.send("refused")

    asyncio.run(main())
    ratesync.shutdown()


@contextlib.contextmanager
def holder(options: dict[str, Any], lease: float = 1.0) -> Iterator[tuple[Any, Connection]]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_hold, args=(options, theirs, lease))
    process.start()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(10)


async def told(pipe: Connection) -> Any:
    async with asyncio.timeout(90):
        while not pipe.poll():
            await asyncio.sleep(0.005)
    return pipe.recv()


async def test_a_caller_that_is_busy_for_longer_than_its_lease_keeps_it(options, store):
    # Renewed after a third of it, so that the holder may stand still for the rest.
    with holder(options, lease=8.0) as (_, pipe):
        assert await told(pipe) == "running"
        with pytest.raises(ratesync.OperationInProgressError):
            async with store.idempotent("charge-42", fingerprint="f", wait=9):
                pytest.fail("two run")
        pipe.send("end")
        assert await told(pipe) == "stored"


async def test_a_killed_caller_is_succeeded_when_its_lease_is_over(options, store):
    with holder(options) as (process, pipe):
        assert await told(pipe) == "running"
        os.kill(process.pid, signal.SIGKILL)
        async with store.idempotent("charge-42", fingerprint="f", wait=60) as op:
            assert not op.done
            op.result = "second"
    async with store.idempotent("charge-42", fingerprint="f") as op:
        assert (op.done, op.result) == (True, "second")


@pytest.mark.parametrize("successor", ["done", "running"])
async def test_the_late_commit_of_a_stopped_caller_is_refused(options, store, successor):
    with holder(options) as (process, pipe):
        assert await told(pipe) == "running"
        os.kill(process.pid, signal.SIGSTOP)
        async with store.idempotent("charge-42", fingerprint="f", wait=60) as op:
            assert not op.done
            op.result = "second"
            if successor == "running":
                os.kill(process.pid, signal.SIGCONT)
                pipe.send("end")
                assert await told(pipe) == "refused"
        if successor == "done":
            os.kill(process.pid, signal.SIGCONT)
            pipe.send("end")
            assert await told(pipe) == "refused"
    async with store.idempotent("charge-42", fingerprint="f") as op:
        assert (op.done, op.result) == (True, "second")


async def test_a_stopped_caller_that_nobody_succeeded_still_stores_its_result(options, store):
    """Its lease ran out, but the row was neither deleted nor written over: the result counts."""
    with holder(options) as (process, pipe):
        assert await told(pipe) == "running"
        os.kill(process.pid, signal.SIGSTOP)
        async with asyncio.timeout(60):
            while await store.state(codec="json").get("charge-42", kind="idempotency"):
                await asyncio.sleep(0.01)
        os.kill(process.pid, signal.SIGCONT)
        pipe.send("end")
        assert await told(pipe) == "stored"
    async with store.idempotent("charge-42", fingerprint="f") as op:
        assert (op.done, op.result) == (True, "late")
