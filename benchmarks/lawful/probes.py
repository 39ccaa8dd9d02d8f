"""The probes: each takes a contender and says whether it was lawful."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lawful.contenders import Contender, Refused, fresh

ABSENT = "not offered"


@dataclass(frozen=True)
class Verdict:
    lawful: bool | None  # None: the library does not offer it
    text: str


@dataclass(frozen=True)
class Probe:
    name: str
    title: str
    explains: str
    run: Callable[[Contender, str, str], Awaitable[Verdict]]


def judged(passed: int, least: int, most: int) -> Verdict:
    if passed > most:
        return Verdict(False, f"FAILS: {passed:,} of {most:,}")
    if passed < least:
        return Verdict(False, f"FAILS: only {passed:,} of {least:,}")
    return Verdict(True, f"ok ({passed:,} of {most:,})")


# Burst ----------------------------------------------------------------------------------------------


async def burst(contender: Contender, url: str, directory: str) -> Verdict:
    if contender.take is None:
        return Verdict(None, ABSENT)
    take = await contender.take(url, fresh("burst"), 10, 1.0, 4)
    begin, wall = time.monotonic(), time.time()
    passed = 0
    for _ in range(3000):
        passed += await take()
        if time.monotonic() - begin > 0.7:
            break
    elapsed = time.monotonic() - begin
    if contender.window:
        windows = int(wall + elapsed) - int(wall) + 1 if contender.aligned else 1 + int(elapsed)
        return judged(passed, 10, 10 * windows)
    return judged(passed, 4, 4 + int(10 * (elapsed + 0.01)) + 1)


# A holder that dies -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def child(*arguments: str, skew: float = 0.0) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m benchmarks.lawful.child ARGUMENTS`, on a clock that is `skew` seconds ahead."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    if skew:
        libraries = glob.glob("/usr/lib/*/faketime/libfaketime.so.1") + glob.glob(
            "/usr/lib/faketime/libfaketime.so.1"
        )
        if not libraries:
            sys.exit("benchmarks: libfaketime is missing; Debian: apt-get install libfaketime")
        environment.update(LD_PRELOAD=libraries[0], FAKETIME=f"{skew:+}s", FAKETIME_DONT_FAKE_MONOTONIC="1")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.lawful.child",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        await process.wait()


async def asked(process: asyncio.subprocess.Process, line: str = "") -> str:
    assert process.stdin
    assert process.stdout
    if line:
        process.stdin.write(line.encode() + b"\n")
        await process.stdin.drain()
    answer = (await process.stdout.readline()).decode().strip()
    if not answer:
        raise RuntimeError("the other process ended")
    return answer


async def dead_holder(contender: Contender, url: str, directory: str) -> Verdict:
    """Two slots (a lock: one); a process takes one and is killed, others stay active."""
    if contender.slot is None:
        return Verdict(None, ABSENT)
    if contender.store == "memory":
        return Verdict(None, "one process")
    expiry, name = 2.0, fresh("dead")
    capacity = min(2, contender.most)
    slot = await contender.slot(url, name, capacity, expiry, 0)
    async with child("hold", contender.name, url, name, str(capacity), str(expiry)) as process:
        await asked(process)
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        while time.monotonic() - killed < 4 * expiry:
            free = 0
            async with contextlib.AsyncExitStack() as stack:
                with contextlib.suppress(Refused):
                    for _ in range(capacity):
                        await stack.enter_async_context(slot())
                        free += 1
            if free == capacity:
                elapsed = time.monotonic() - killed
                return Verdict(elapsed < 2 * expiry + 1, f"ok ({elapsed:.1f} s)")
            await asyncio.sleep(0.1)
    return Verdict(False, f"FAILS: lost after {4 * expiry:.0f} s")


async def living_holder(contender: Contender, url: str, directory: str) -> Verdict:
    """One slot, held for three times its expiry by a process that is busy computing."""
    if contender.slot is None:
        return Verdict(None, ABSENT)
    if contender.store == "memory":
        return Verdict(None, "one process")
    expiry, name = 1.0, fresh("living")
    slot = await contender.slot(url, name, 1, expiry, 0)
    async with child("hold", contender.name, url, name, "1", str(expiry)) as process:
        await asked(process)
        begin = time.monotonic()
        while (elapsed := time.monotonic() - begin) < 3 * expiry:
            with contextlib.suppress(Refused):
                async with slot():
                    return Verdict(False, f"FAILS: 2 holders after {elapsed:.1f} s")
            await asyncio.sleep(0.1)
    return Verdict(True, "ok")


# Clocks that differ -------------------------------------------------------------------------------------


async def skew(contender: Contender, url: str, directory: str) -> Verdict:
    """Two processes, one of them 1.2 s ahead, 5 per second: both try 20 times, twice."""
    if contender.take is None:
        return Verdict(None, ABSENT)
    if contender.store == "memory":
        return Verdict(None, "one process")
    name = fresh("skew")
    arguments = ("take", contender.name, url, name, "5", "1.0", "5")
    async with child(*arguments) as straight, child(*arguments, skew=1.2) as ahead:
        await asked(straight)
        await asked(ahead)
        if contender.aligned:  # not across the boundary of a window, where twice the limit is lawful
            await asyncio.sleep(1 - time.time() % 1 + 0.02)
        begin = time.monotonic()
        passed = 0
        for process in (straight, ahead, straight, ahead):
            passed += int(await asked(process, "20"))
        elapsed = time.monotonic() - begin
    most = 5 * (1 + int(elapsed)) if contender.window else 5 + int(5 * (elapsed + 0.05)) + 1
    return judged(passed, 5, most)


# Cancelling ---------------------------------------------------------------------------------------------


async def cancel_slots(contender: Contender, url: str, directory: str) -> Verdict:
    """20 callers give up while the store is frozen; afterwards the slot has to be free."""
    if contender.slot is None:
        return Verdict(None, ABSENT)
    name = fresh("cancel")
    slot = await contender.slot(url, name, 1, 0 if contender.most == 1 else 30, 5)
    with contextlib.suppress(Refused):
        async with slot():
            pass

    async def one() -> None:
        async with slot():
            await asyncio.sleep(10)

    async with frozen(contender.store, url):
        tasks = [asyncio.create_task(one()) for _ in range(20)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=0.1)
    await asyncio.wait(tasks, timeout=3)
    await asyncio.sleep(0.3)
    begin = time.monotonic()
    try:
        async with slot():
            return Verdict(True, f"ok ({(time.monotonic() - begin) * 1000:.0f} ms)")
    except Refused:
        return Verdict(False, "FAILS: slot lost")


async def cancel_waiters(contender: Contender, url: str, directory: str) -> Verdict:
    """20 callers wait at 5 per second and give up; the next one must not wait for their 4 seconds."""
    if contender.wait is None:
        return Verdict(None, ABSENT)
    acquire = await contender.wait(url, fresh("queue"), 5.0, 1)
    await acquire()

    async def one() -> None:
        await acquire()

    tasks = [asyncio.create_task(one()) for _ in range(20)]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    begin = time.monotonic()
    await acquire()
    waited = time.monotonic() - begin
    return Verdict(waited < 1, f"ok ({waited:.1f} s)" if waited < 1 else f"FAILS: {waited:.1f} s of 0.2")


# 0.4 s in which the server reads nothing; what arrived meanwhile is executed afterwards.
BUSY = """
local begin = redis.call('TIME')
repeat
  local now = redis.call('TIME')
  local elapsed = (now[1] - begin[1]) * 1000000 + (now[2] - begin[2])
until elapsed > 400000
"""


@contextlib.asynccontextmanager
async def frozen(store: str, url: str) -> AsyncIterator[None]:
    """A store that takes commands and does not answer for a moment."""
    if store == "redis":
        import redis.asyncio

        connection = redis.asyncio.Redis.from_url(url)
        await connection.ping()
        busy = asyncio.ensure_future(connection.eval(BUSY, 0))  # type: ignore[no-untyped-call]
        await asyncio.sleep(0.02)
        yield
        await busy
        await connection.aclose()
    elif store == "postgres":
        import asyncpg

        session = await asyncpg.connect(url)
        transaction = session.transaction()
        await transaction.start()
        await session.execute("LOCK TABLE rate_limiter_state IN ACCESS EXCLUSIVE MODE")
        yield
        await transaction.rollback()
        await session.close()
    else:
        yield


# Several limits at once ---------------------------------------------------------------------------------


async def pair(contender: Contender, url: str, directory: str) -> Verdict:
    """30 an hour and 1 a minute, 50 calls: one passes, and 49 refusals must not eat the hour's budget."""
    if contender.pair is None:
        return Verdict(None, ABSENT)
    take, gone = await contender.pair(url, fresh("pair"))
    passed = 0
    for _ in range(50):
        passed += await take()
    used = await gone()
    if passed != 1:
        return Verdict(False, f"FAILS: {passed} passed")
    return Verdict(used == 1, "ok" if used == 1 else f"FAILS: {used} of 30 gone")


ALL = (
    Probe("burst", "burst", "10 per second, burst 4 (a window: 10 per second), up to 3,000 calls", burst),
    Probe("skew", "clock skew", "5 per second, two processes, one 1.2 s ahead", skew),
    Probe("dead", "dead holder", "a holder is killed with -9; its slot expires after 2 s", dead_holder),
    Probe("living", "living holder", "a busy holder keeps a slot for 3 times its expiry", living_holder),
    Probe("cancel", "cancelled acquires", "20 callers give up while the store is frozen", cancel_slots),
    Probe("queue", "cancelled waiters", "20 waiting callers give up at 5 per second", cancel_waiters),
    Probe("pair", "refused pair", "30 an hour and 1 a minute together, 50 calls", pair),
)
