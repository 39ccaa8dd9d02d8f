"""Several processes on one Redis: the limits hold over all of them, and slots pass between them.

Each worker is a real process with an engine of its own. Who is inside at once is counted by the server,
through redis-py, so that none of our code is the judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import ratesync

redis = pytest.importorskip("redis")
SPAWN = multiprocessing.get_context("spawn")
ENOUGH = 40  # grants of each process, also when the machine stands still while its time runs


def _configure(url: str, **limiter: Any) -> None:
    ratesync.configure_store("db", strategy="redis", url=url)
    ratesync.configure_limiter("shared", "db", fail_closed=True, outage_budget=30, **limiter)


def _rate_worker(url: str, rate: float, burst: int, tasks: int, seconds: float) -> list[tuple[float, float]]:
    """When each grant was asked for and seen, on the monotonic clock that all processes here share."""

    async def main() -> list[tuple[float, float]]:
        _configure(url, rate_per_second=rate, burst=burst)
        await ratesync.get_store("db").initialize()
        end = time.monotonic() + seconds
        grants: list[tuple[float, float]] = []

        async def worker() -> None:
            while (asked := time.monotonic()) < end or len(grants) < ENOUGH:
                async with ratesync.acquire("shared"):
                    grants.append((asked, time.monotonic()))

        await asyncio.gather(*(worker() for _ in range(tasks)))
        return grants

    return asyncio.run(main())


def _slot_worker(url: str, limit: int, tasks: int, rounds: int) -> tuple[int, int]:
    """The most that were inside at once, as the server counted, and the rounds done."""

    async def main() -> tuple[int, int]:
        _configure(url, max_concurrent=limit)
        most = done = 0
        async with redis.asyncio.from_url(url) as witness:

            async def worker() -> None:
                nonlocal most, done
                for _ in range(rounds):
                    async with ratesync.acquire("shared"):
                        most = max(most, await witness.incr("inside"))
                        await asyncio.sleep(0.001)
                        await witness.decr("inside")
                        done += 1

            await asyncio.gather(*(worker() for _ in range(tasks)))
        return most, done

    return asyncio.run(main())


def _hold(url: str, lease: float, ready: Any, leave: Any) -> None:
    async def main() -> None:
        _configure(url, max_concurrent=1, lease_seconds=lease)
        async with ratesync.acquire("shared"):
            ready.set()
            leave.wait(600)  # blocks the loop too: the engine's thread has to keep the lease alone

    asyncio.run(main())


def _wait_once(url: str, ready: Any, got: Any) -> None:
    async def main() -> None:
        _configure(url, max_concurrent=1)
        store = ratesync.get_store("db")
        await store.initialize()
        task = asyncio.ensure_future(ratesync.get_limiter("shared").acquire())
        await asyncio.sleep(0)
        ready.set()
        await task
        got.set()
        await ratesync.get_limiter("shared").release()

    asyncio.run(main())
    ratesync.shutdown()  # multiprocessing ends its children without atexit


def _first_use(url: str, name: str) -> int:
    async def main() -> int:
        ratesync.configure_store("db", strategy="redis", url=url)
        ratesync.configure_limiter(
            name, "db", rate_per_second=0.001, burst=7, fail_closed=True, outage_budget=30
        )
        return sum(await asyncio.gather(*(ratesync.try_acquire(name) for _ in range(5))))

    return asyncio.run(main())


async def _run(worker: Any, count: int, *args: object) -> list[Any]:
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(count, mp_context=SPAWN) as executor:
        return await asyncio.gather(*(loop.run_in_executor(executor, worker, *args) for _ in range(count)))


@contextlib.contextmanager
def process(target: Any, *args: object) -> Iterator[Any]:
    child = SPAWN.Process(target=target, args=args, daemon=True)
    child.start()
    try:
        yield child
    finally:
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()


async def test_one_rate_over_three_processes(ratesync_redis_url):
    rate, burst, seconds = 200.0, 5, 2.0
    grants = sorted(
        itertools.chain.from_iterable(
            await _run(_rate_worker, 3, ratesync_redis_url, rate, burst, 20, seconds)
        )
    )
    # Over any time T at most rate * (T + margin) + burst. A process may stand still before it sees its grant:
    # it counts for the stretches that have both, its question and its answer.
    for begin, _ in grants[::5]:
        seen = sorted(seen for asked, seen in grants if asked >= begin)
        for count, end in enumerate(seen, 1):
            assert count <= rate * (end - begin + 0.005) + burst
    assert len(grants) >= 3 * ENOUGH


async def test_slots_hold_over_three_processes_and_nobody_starves(ratesync_redis_url):
    results = await _run(_slot_worker, 3, ratesync_redis_url, 4, 8, 12)
    assert max(most for most, _ in results) <= 4
    assert [done for _, done in results] == [96, 96, 96]


async def test_a_first_use_by_many_processes_grants_no_more_than_the_burst(ratesync_redis_url):
    for number in range(3):
        assert sum(await _run(_first_use, 3, ratesync_redis_url, f"fresh-{number}")) == 7


async def test_a_killed_holders_slot_comes_back_after_its_lease(ratesync_redis_url, ratesync_redis_py):
    ready, leave = SPAWN.Event(), SPAWN.Event()
    _configure(ratesync_redis_url, max_concurrent=1)
    # Renewed after a third of it, so that the holder may stand still for the rest.
    with process(_hold, ratesync_redis_url, 9.0, ready, leave) as holder:
        assert await asyncio.to_thread(ready.wait, 60)
        # Renewed although its loop is blocked.
        (lease,) = (await ratesync_redis_py.hgetall("rate_limit:{shared}:s")).values()
        granted_until = int(lease.split(" ")[1])
        async with asyncio.timeout(60):
            while await server_us(ratesync_redis_py) <= granted_until:
                await asyncio.sleep(0.05)
        assert not await ratesync.try_acquire("shared")
        killed = time.monotonic()
        os.kill(holder.pid, signal.SIGKILL)
        async with asyncio.timeout(60), ratesync.acquire("shared"):
            assert time.monotonic() - killed >= 0.5
    async with asyncio.timeout(60):  # nothing is left of it
        while await ratesync_redis_py.exists("rate_limit:{shared}:s"):
            await asyncio.sleep(0.05)


async def server_us(witness: Any) -> int:
    seconds, micros = await witness.time()
    return seconds * 1_000_000 + micros


async def waiter_in_line(witness: Any) -> str:
    """The field of the one who waits, once it is stored that it hears its channel."""
    async with asyncio.timeout(60):
        while True:
            fields = await witness.hgetall("rate_limit:{shared}:s")
            waiters = [field for field in fields if field.startswith("w")]
            if len(waiters) == 1 and fields[waiters[0]].endswith(" 1"):
                return waiters[0]
            await asyncio.sleep(0.01)


async def test_a_release_wakes_a_waiter_elsewhere(ratesync_redis_url, ratesync_redis_py):
    ready, got = SPAWN.Event(), SPAWN.Event()
    _configure(ratesync_redis_url, max_concurrent=1)
    limiter = ratesync.get_limiter("shared")
    await limiter.acquire()
    with process(_wait_once, ratesync_redis_url, ready, got) as waiter:
        assert await asyncio.to_thread(ready.wait, 60)
        field = await waiter_in_line(ratesync_redis_py)
        # Nobody else subscribed: here nobody waits.
        channels = await ratesync_redis_py.pubsub_channels("rate_limit:wake:*")
        assert channels == [f"rate_limit:wake:{field[1:]}"]
        async with ratesync_redis_py.pubsub() as listening:
            await listening.psubscribe("rate_limit:wake:*")
            await limiter.release()
            async with asyncio.timeout(60):
                async for message in listening.listen():
                    if message["type"] == "pmessage":
                        break
        assert message["data"] == "shared"
        assert await asyncio.to_thread(got.wait, 60)
        await asyncio.to_thread(waiter.join, 60)

    async def forgotten() -> bool:
        return not await ratesync_redis_py.exists("rate_limit:{shared}:s")

    async with asyncio.timeout(60):
        while not await forgotten():
            await asyncio.sleep(0.01)


async def test_nobody_overtakes_a_waiter_elsewhere(ratesync_redis_url, ratesync_redis_py):
    ready, got = SPAWN.Event(), SPAWN.Event()
    _configure(ratesync_redis_url, max_concurrent=1)
    limiter = ratesync.get_limiter("shared")
    for _ in range(3):
        await limiter.acquire()
        with process(_wait_once, ratesync_redis_url, ready, got):
            assert await asyncio.to_thread(ready.wait, 60)
            await waiter_in_line(ratesync_redis_py)
            await limiter.release()
            # Whoever comes now gets the slot only after the one that waits.
            async with asyncio.timeout(60):
                await limiter.acquire()
            assert await asyncio.to_thread(got.wait, 60)
            await limiter.release()
        ready.clear()
        got.clear()


async def test_a_dead_waiter_holds_nobody_up_for_long(ratesync_redis_url, ratesync_redis_py):
    ready, got = SPAWN.Event(), SPAWN.Event()
    _configure(ratesync_redis_url, max_concurrent=1)
    limiter = ratesync.get_limiter("shared")
    await limiter.acquire()
    with process(_wait_once, ratesync_redis_url, ready, got) as waiter:
        assert await asyncio.to_thread(ready.wait, 60)
        await waiter_in_line(ratesync_redis_py)
        os.kill(waiter.pid, signal.SIGKILL)
        waiter.join()
    await limiter.release()
    async with asyncio.timeout(60):
        await limiter.acquire()
    await limiter.release()


async def test_a_reset_elsewhere_is_a_lost_lease_here(ratesync_redis_url, ratesync_redis_py):
    _configure(ratesync_redis_url, max_concurrent=1, lease_seconds=3)
    async with ratesync.acquire("shared") as permit:
        await ratesync_redis_py.delete("rate_limit:{shared}:s")
        async with asyncio.timeout(60):
            while not permit.lost:
                await asyncio.sleep(0.01)
        assert await ratesync.try_acquire("shared", 60)
