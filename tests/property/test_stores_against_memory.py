"""Every store decides as the memory store does: random histories on both, compared at every step.

The rates are so slow (one unit in about a day) that the time a test takes cannot matter; what is
compared is the arithmetic and the bookkeeping. Waiting is covered by acquisitions that have to wait
and are cancelled: afterwards both stores have to be where they were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ratesync
from ratesync._schemas import ALGORITHMS

INTERVAL = 100_000.0  # seconds per unit
WINDOW = 10 * INTERVAL

KEYS = st.sampled_from([None, "a", "b:c", "b\\"])
ALGORITHM = st.sampled_from(ALGORITHMS)
STEPS = st.one_of(
    st.tuples(st.just("try"), st.integers(1, 4), KEYS),
    st.tuples(st.just("try_slot"), st.integers(1, 2), KEYS),
    st.tuples(st.just("release"), st.just(0), KEYS),
    st.tuples(st.just("settle"), st.integers(0, 6), KEYS),
    st.tuples(st.just("wait_and_cancel"), st.integers(1, 5), KEYS),
    st.tuples(st.just("refused_in_advance"), st.integers(1, 4), KEYS),
    st.tuples(st.just("reset"), st.just(0), KEYS),
)


HISTORIES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


class Side:
    """One store, with what this test holds of it."""

    def __init__(self, store: str, algorithm: str, units: int, slots: int) -> None:
        self.rate = f"{store}-rate"
        self.both = f"{store}-both"
        rate: dict[str, Any] = {"rate_per_second": 1 / INTERVAL, "burst": units}
        if algorithm != "token_bucket":
            rate = {"algorithm": algorithm, "limit": units, "window_seconds": WINDOW}
        ratesync.configure_limiter(self.rate, store, **rate)
        ratesync.configure_limiter(self.both, store, max_concurrent=slots, **rate)
        # A window can never grant more than its limit at once, and says so.
        self.most = units if algorithm != "token_bucket" else 1_000
        self.held: dict[str | None, list[ratesync.Permit]] = {}
        self.settled: ratesync.Permit | None = None

    async def acquire(self, name: str, cost: int, key: str | None, timeout: float) -> ratesync.Permit | None:
        try:
            return await ratesync.acquire(name, timeout, cost=cost, key=key)
        except ratesync.RateLimiterAcquisitionError:
            return None

    async def step(self, kind: str, number: int, key: str | None, burst: int, patience: float) -> object:
        if kind == "try":
            cost = min(number, burst)
            permit = await self.acquire(self.rate, cost, key, 0)
            return permit is not None
        if kind == "try_slot":
            permit = await self.acquire(self.both, min(number, burst), key, 0)
            if permit is not None:
                self.held.setdefault(key, []).append(permit)
            return permit is not None
        if kind == "release":
            mine = self.held.get(key, [])
            if mine:
                mine.pop().release()
            return len(mine)
        if kind == "settle":
            permit = await self.acquire(self.rate, 1, key, 0)
            if permit is not None:
                await permit.settle(number)
            return permit is not None
        number = min(number, self.most)
        if kind == "wait_and_cancel":
            task = asyncio.create_task(self.acquire(self.rate, number, key, INTERVAL * 1000))
            await asyncio.wait([task], timeout=patience)
            if task.done():
                return "granted"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "waited"
        if kind == "refused_in_advance":
            # Waits are whole intervals, less what passed: half of one is granted at once or never.
            return await self.acquire(self.rate, number, key, INTERVAL / 2) is not None
        await ratesync.get_limiter(self.rate).reset(key)
        return "reset"

    async def state(self, key: str | None) -> tuple[object, ...]:
        rate = await ratesync.get_limiter(self.rate).peek(key)
        both = await ratesync.get_limiter(self.both).peek(key)
        return (
            rate.allowed,
            rate.remaining,
            round(rate.retry_after / INTERVAL, 2),
            both.remaining,
            both.in_use,
            round(both.retry_after / INTERVAL, 2),
        )


async def compare(store: str, algorithm: str, units: int, slots: int, steps: Sequence[Any]) -> None:
    """The store, which is configured under that name, against the memory store."""
    ratesync.configure_store("mem", strategy="memory")
    sides = [Side("mem", algorithm, units, slots), Side(store, algorithm, units, slots)]
    for side in sides:
        for key in (None, "a", "b:c", "b\\"):
            await ratesync.get_limiter(side.rate).reset(key)
            await ratesync.get_limiter(side.both).reset(key)
    for kind, number, key in steps:
        memory = await sides[0].step(kind, number, key, units, 0.02)
        # Where memory granted at once, the server may take its time to say the same.
        other = await sides[1].step(kind, number, key, units, 60 if memory == "granted" else 0.02)
        assert memory == other, (kind, number, key)
        async with asyncio.timeout(60):
            # Releases and refunds of a remote store arrive a moment later.
            while (seen := [await side.state(key) for side in sides])[0] != seen[1]:
                await asyncio.sleep(0.01)
    for side in sides:
        for permits in side.held.values():
            for permit in permits:
                permit.release()


@pytest.mark.timeout(480)
@HISTORIES
@given(ALGORITHM, st.integers(1, 5), st.integers(1, 3), st.lists(STEPS, max_size=14))
def test_postgres_decides_as_memory_does(ratesync_postgres_url, algorithm, units, slots, steps):
    async def main() -> None:
        ratesync.configure_store(
            "db", strategy="postgres", url=ratesync_postgres_url, auto_create=True, timing_margin_ms=0
        )
        await compare("db", algorithm, units, slots, steps)

    asyncio.run(main())


@pytest.mark.timeout(480)
@HISTORIES
@given(ALGORITHM, st.integers(1, 5), st.integers(1, 3), st.lists(STEPS, max_size=14))
def test_redis_decides_as_memory_does(ratesync_redis_url, algorithm, units, slots, steps):
    async def main() -> None:
        ratesync.configure_store("db", strategy="redis", url=ratesync_redis_url, timing_margin_ms=0)
        await compare("db", algorithm, units, slots, steps)

    asyncio.run(main())
