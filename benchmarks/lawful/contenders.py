"""The limiters that are probed, behind one face, each used the way its documentation shows.

A contender may lack a feature: then the method is None and the probe reports that. Nothing here is made to
look bad: every peer runs with the algorithm and the options that its documentation recommends for the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

Take = Callable[[], Awaitable[bool]]  # one unit, at once or not at all
Slot = Callable[[], AbstractAsyncContextManager[Any]]  # waits for a slot, holds it in the body


class Refused(Exception):
    """No slot within the time given."""


@dataclass(frozen=True)
class Contender:
    """What one library offers on one store."""

    name: str
    library: str
    #: (url, id, limit, seconds, burst) -> take one unit now
    take: Callable[[str, str, int, float, int], Awaitable[Take]] | None = None
    #: Whether at most `limit` pass in a window (else: a bucket of `burst` refilled evenly)
    window: bool = False
    #: Windows that begin at fixed times let twice the limit pass around a boundary, by definition.
    aligned: bool = False
    #: (url, id, rate, burst) -> take one unit, waiting as long as it takes
    wait: Callable[[str, str, float, int], Awaitable[Callable[[], Awaitable[object]]]] | None = None
    #: (url, id, capacity, expiry seconds, seconds to wait) -> a slot; Refused when there is none in time
    slot: Callable[[str, str, int, float, float], Awaitable[Slot]] | None = None
    #: (url, id) -> take from 30 an hour and 1 a minute together; -> how much of the 30 is gone
    pair: Callable[[str, str], Awaitable[tuple[Take, Callable[[], Awaitable[int]]]]] | None = None
    most: int = 1_000_000  # slots that it can offer (a lock: 1)
    store: str = "redis"


# ratesync -------------------------------------------------------------------------------------------

_serial = itertools.count()


def _store(engine: str, url: str) -> str:
    import ratesync

    name = f"lawful-{engine}"
    if engine == "memory":
        ratesync.configure_store(name, "memory")
    elif engine == "postgres":
        ratesync.configure_store(name, "postgres", url=url, auto_create=True)
    else:
        ratesync.configure_store(name, engine, url=url)
    return name


def _ours(engine: str, algorithm: str = "token_bucket") -> Contender:
    import ratesync

    windowed = algorithm != "token_bucket"

    async def take(url: str, name: str, limit: int, seconds: float, burst: int) -> Take:
        if windowed:
            ratesync.configure_limiter(
                name,
                _store(engine, url),
                algorithm=algorithm,
                limit=limit,
                window_seconds=seconds,
                fail_closed=True,
            )
        else:
            ratesync.configure_limiter(
                name, _store(engine, url), rate_per_second=limit / seconds, burst=burst, fail_closed=True
            )
        limiter = ratesync.get_limiter(name)
        await limiter.initialize()
        return lambda: limiter.try_acquire(0)

    async def wait(url: str, name: str, rate: float, burst: int) -> Callable[[], Awaitable[object]]:
        ratesync.configure_limiter(
            name, _store(engine, url), rate_per_second=rate, burst=burst, fail_closed=True
        )
        await ratesync.get_limiter(name).initialize()
        return lambda: ratesync.acquire(name)

    async def slot(url: str, name: str, capacity: int, expiry: float, patience: float) -> Slot:
        ratesync.configure_limiter(
            name,
            _store(engine, url),
            max_concurrent=capacity,
            lease_seconds=expiry,
            fail_closed=True,
            outage_budget=10,
        )
        await ratesync.get_limiter(name).initialize()

        @contextlib.asynccontextmanager
        async def held() -> Any:
            try:
                permit = ratesync.acquire(name, timeout=patience)
                await permit.__aenter__()
            except ratesync.RateLimiterAcquisitionError as error:
                raise Refused from error
            try:
                yield
            finally:
                await permit.__aexit__(None, None, None)

        return held

    async def pair(url: str, name: str) -> tuple[Take, Callable[[], Awaitable[int]]]:
        store = _store(engine, url)
        ids = []
        for label, limit, seconds in (("hour", 30, 3600), ("minute", 1, 60)):
            ids.append(f"{name}-{label}")
            ratesync.configure_limiter(
                ids[-1],
                store,
                algorithm="sliding_window",
                limit=limit,
                window_seconds=seconds,
                fail_closed=True,
            )

        async def gone() -> int:
            return 30 - (await ratesync.get_limiter(ids[0]).peek()).remaining

        return lambda: ratesync.try_acquire(*ids), gone

    label = "" if algorithm == "token_bucket" else f", {algorithm}"
    return Contender(
        f"ratesync, {engine}{label}",
        "ratesync",
        take,
        windowed,
        algorithm == "fixed_window",
        None if windowed else wait,
        None if windowed else slot,
        None if windowed else pair,
        store=engine,
    )


# Peers ----------------------------------------------------------------------------------------------


def _redis(url: str) -> Any:
    import redis.asyncio

    return redis.asyncio.Redis.from_url(url)


def _throttled(algorithm: str) -> Contender:
    async def take(url: str, name: str, limit: int, seconds: float, burst: int) -> Take:
        from datetime import timedelta

        import throttled.asyncio as throttled

        limiter = throttled.Throttled(
            key=name,
            using=algorithm,
            quota=throttled.per_duration(timedelta(seconds=seconds), limit, burst),
            store=throttled.RedisStore(server=url),
        )

        async def one() -> bool:
            return not (await limiter.limit()).limited

        return one

    async def wait(url: str, name: str, rate: float, burst: int) -> Callable[[], Awaitable[object]]:
        import throttled.asyncio as throttled

        limiter = throttled.Throttled(
            key=name,
            using=algorithm,
            quota=throttled.per_sec(int(rate), burst=burst),
            store=throttled.RedisStore(server=url),
            timeout=60,
        )
        return limiter.limit

    return Contender(f"throttled-py, {algorithm}", "throttled-py", take, wait=wait)


def _limits(algorithm: str) -> Contender:
    def strategy_of(url: str) -> Any:
        from limits.aio import storage, strategies

        made = {
            "fixed window": strategies.FixedWindowRateLimiter,
            "moving window": strategies.MovingWindowRateLimiter,
            "sliding window counter": strategies.SlidingWindowCounterRateLimiter,
        }[algorithm]
        return made(storage.RedisStorage(f"async+{url}", implementation="redispy"))

    async def take(url: str, name: str, limit: int, seconds: float, burst: int) -> Take:
        import limits

        strategy, item = strategy_of(url), limits.RateLimitItemPerSecond(limit, max(1, round(seconds)))
        return lambda: strategy.hit(item, name)  # type: ignore[no-any-return]

    async def pair(url: str, name: str) -> tuple[Take, Callable[[], Awaitable[int]]]:
        import limits

        strategy = strategy_of(url)
        hour, minute = limits.parse("30/hour"), limits.parse("1/minute")

        async def both() -> bool:  # as its Flask and Starlette extensions do: one after the other
            allowed = True
            for item in (hour, minute):
                allowed = await strategy.hit(item, name) and allowed
            return allowed

        async def gone() -> int:
            return 30 - int((await strategy.get_window_stats(hour, name)).remaining)

        return both, gone

    return Contender(f"limits, {algorithm}", "limits", take, True, algorithm == "fixed window", pair=pair)


def _pyrate() -> Contender:
    async def bucket_of(url: str, name: str, rates: list[Any]) -> Any:
        from pyrate_limiter import RedisBucket

        return await RedisBucket.init(rates, _redis(url), name)

    async def take(url: str, name: str, limit: int, seconds: float, burst: int) -> Take:
        from pyrate_limiter import Limiter, Rate

        bucket = await bucket_of(url, name, [Rate(limit, int(seconds * 1000))])
        limiter = Limiter(bucket)
        return lambda: limiter.try_acquire_async(name, blocking=False)

    async def wait(url: str, name: str, rate: float, burst: int) -> Callable[[], Awaitable[object]]:
        from pyrate_limiter import Limiter, Rate

        limiter = Limiter(await bucket_of(url, name, [Rate(burst, int(1000 * burst / rate))]))
        return lambda: limiter.try_acquire_async(name)

    async def pair(url: str, name: str) -> tuple[Take, Callable[[], Awaitable[int]]]:
        from pyrate_limiter import Limiter, Rate

        bucket = await bucket_of(url, name, [Rate(1, 60_000), Rate(30, 3_600_000)])
        limiter = Limiter(bucket)

        async def gone() -> int:
            return int(await bucket.count())

        return lambda: limiter.try_acquire_async(name, blocking=False), gone

    return Contender("pyrate-limiter", "pyrate-limiter", take, True, wait=wait, pair=pair)


def _steindamm() -> Contender:
    async def take(url: str, name: str, limit: int, seconds: float, burst: int) -> Take:
        from steindamm import AsyncRedisTokenBucket, MaxSleepExceededError

        bucket = AsyncRedisTokenBucket(
            connection=_redis(url),
            name=name,
            capacity=burst,
            refill_frequency=seconds / limit,
            refill_amount=1,
            max_sleep=0.001,
        )

        async def one() -> bool:
            try:
                async with bucket:
                    return True
            except MaxSleepExceededError:
                return False

        return one

    async def wait(url: str, name: str, rate: float, burst: int) -> Callable[[], Awaitable[object]]:
        from steindamm import AsyncRedisTokenBucket

        bucket = AsyncRedisTokenBucket(
            connection=_redis(url), name=name, capacity=burst, refill_frequency=1 / rate, refill_amount=1
        )

        async def one() -> None:
            async with bucket:
                pass

        return one

    async def slot(url: str, name: str, capacity: int, expiry: float, patience: float) -> Slot:
        from steindamm import AsyncRedisSemaphore, MaxSleepExceededError

        connection = _redis(url)

        @contextlib.asynccontextmanager
        async def held() -> Any:
            semaphore = AsyncRedisSemaphore(
                connection=connection,
                name=name,
                capacity=capacity,
                expiry=max(1, round(expiry)),
                max_sleep=max(0.05, patience),
            )
            try:
                await semaphore.__aenter__()
            except MaxSleepExceededError as error:
                raise Refused from error
            try:
                yield
            finally:
                await semaphore.__aexit__(None, None, None)

        return held

    return Contender("steindamm", "steindamm", take, wait=wait, slot=slot)


def _redis_lock() -> Contender:
    async def slot(url: str, name: str, capacity: int, expiry: float, patience: float) -> Slot:
        connection = _redis(url)

        @contextlib.asynccontextmanager
        async def held() -> Any:
            # Its default has no expiry at all; one who wants a dead holder's lock back sets a timeout.
            lock = connection.lock(name, timeout=expiry if expiry else None)
            if not await lock.acquire(blocking=True, blocking_timeout=max(0.05, patience)):
                raise Refused
            try:
                yield
            finally:
                with contextlib.suppress(Exception):  # no longer owned: the probe finds that by itself
                    await lock.release()

        return held

    return Contender("redis-py Lock", "redis", slot=slot, most=1)


def _aiolimiter() -> Contender:
    async def take(url: str, name: str, limit: int, seconds: float, burst: int) -> Take:
        import aiolimiter

        limiter = aiolimiter.AsyncLimiter(burst, burst * seconds / limit)

        async def one() -> bool:
            if not limiter.has_capacity():
                return False
            await limiter.acquire()
            return True

        return one

    async def wait(url: str, name: str, rate: float, burst: int) -> Callable[[], Awaitable[object]]:
        import aiolimiter

        return aiolimiter.AsyncLimiter(burst, burst / rate).acquire

    return Contender("aiolimiter", "aiolimiter", take, wait=wait, store="memory")


def everybody() -> list[Contender]:
    return [
        _ours("redis"),
        _ours("redis", "sliding_window"),
        _ours("postgres"),
        _ours("postgres", "sliding_window"),
        _ours("memory"),
        _throttled("gcra"),
        _throttled("token_bucket"),
        _limits("moving window"),
        _limits("fixed window"),
        _pyrate(),
        _steindamm(),
        _redis_lock(),
        _aiolimiter(),
    ]


def label(contender: Contender) -> str:
    head, _, tail = contender.name.partition(",")
    return f"{head} {version(contender.library)}{',' + tail if tail else ''}"


def fresh(what: str) -> str:
    """A name that no other probe uses."""
    return f"{what}-{os.getpid()}-{next(_serial)}"


async def settle() -> None:
    await asyncio.sleep(0.05)
