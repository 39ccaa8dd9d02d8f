"""Memory: what an acquisition that need not wait costs, in nanoseconds and against peers.

Measured: one task (or thread) that acquires in a loop, the loop itself included for everybody. The reference
is an `async with` on an object whose two methods are empty and written in Python: the least that any limiter
written in Python can cost.

Traps avoided: no limiter ever waits or refuses (every rate is far above what the loop reaches, checked at the
end), so nobody is fast by saying no; peers run in the fastest configuration that still counts, on an event
loop that is already running; everybody is made anew each round, since one that logs every hit gets slower
with the length of the benchmark; contenders change places every few milliseconds, because a neighbour that
is busy for a second halves the speed of whoever runs then. A round's figure is the median of its turns.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

import ratesync
from benchmarks.report import Goal, Report, Spread, Table, integer, progress, ratios, times

RATE = 1e9
BURST = 1_000_000_000
TURNS = 15  # per round; a turn takes some milliseconds
KEYS = [f"tenant-{number}" for number in range(1000)]

Loop = Callable[[int], Awaitable[None]]
EMPTY = "empty async with, pure Python"
NAMED = 'async with acquire("api")'
BOUND = "async with limiter"
AWAITED = 'await acquire("api")'


class _Empty:
    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc: object) -> None:
        pass


class _EmptySync:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


def _references() -> dict[str, Callable[[], Loop]]:
    def empty() -> Loop:
        nothing = _Empty()

        async def run(count: int) -> None:
            for _ in range(count):
                async with nothing:
                    pass

        return run

    def empty_sync() -> Loop:
        nothing = _EmptySync()

        async def run(count: int) -> None:
            for _ in range(count):
                with nothing:
                    pass

        return run

    return {EMPTY: empty, "empty with, pure Python": empty_sync}


def _ours() -> dict[str, Callable[[], Loop]]:
    acquire = ratesync.acquire
    limiter = ratesync.get_limiter("api")

    def named() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                async with acquire("api"):
                    pass

        return run

    def bound() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                async with limiter:
                    pass

        return run

    def awaited() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                await acquire("api")

        return run

    def keyed() -> Loop:
        async def run(count: int) -> None:
            for number in range(count):
                async with acquire("api", key=KEYS[number % 1000]):
                    pass

        return run

    def options() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                async with acquire("api", timeout=1.0, cost=2):
                    pass

        return run

    def slots() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                async with acquire("slots"):
                    pass

        return run

    def try_acquire() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                if not await limiter.try_acquire():
                    raise AssertionError("refused: the rate of the benchmark is too low")

        return run

    def sync() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                with acquire("api"):
                    pass

        return run

    def sync_bound() -> Loop:
        async def run(count: int) -> None:
            for _ in range(count):
                with limiter:
                    pass

        return run

    return {
        NAMED: named,
        BOUND: bound,
        AWAITED: awaited,
        'async with acquire("api", key=...)': keyed,
        'async with acquire("api", timeout=1.0, cost=2)': options,
        "async with acquire, rate and max_concurrent": slots,
        "await limiter.try_acquire()": try_acquire,
        'with acquire("api")': sync,
        "with limiter": sync_bound,
    }


def _peers() -> dict[str, Callable[[], Loop]]:
    import aiolimiter
    import limits
    import limits.aio.storage
    import limits.aio.strategies
    import pyrate_limiter
    import throttled.asyncio as throttled

    def aio() -> Loop:
        limiter = aiolimiter.AsyncLimiter(RATE, 1)

        async def run(count: int) -> None:
            for _ in range(count):
                async with limiter:
                    pass

        return run

    def aio_acquire() -> Loop:
        limiter = aiolimiter.AsyncLimiter(RATE, 1)

        async def run(count: int) -> None:
            for _ in range(count):
                await limiter.acquire()

        return run

    def limits_fixed() -> Loop:
        strategy = limits.aio.strategies.FixedWindowRateLimiter(limits.aio.storage.MemoryStorage())
        item = limits.parse(f"{BURST}/second")

        async def run(count: int) -> None:
            for _ in range(count):
                await strategy.hit(item, "api")

        return run

    def throttled_with(algorithm: str) -> Callable[[], Loop]:
        def make() -> Loop:
            quota = throttled.per_sec(BURST, burst=BURST)
            limiter = throttled.Throttled(
                key="api", using=algorithm, quota=quota, store=throttled.MemoryStore()
            )

            async def run(count: int) -> None:
                for _ in range(count):
                    await limiter.limit()

            return run

        return make

    def pyrate() -> Loop:
        limiter = pyrate_limiter.Limiter(
            pyrate_limiter.InMemoryBucket([pyrate_limiter.Rate(BURST, pyrate_limiter.Duration.SECOND)])
        )

        async def run(count: int) -> None:
            for _ in range(count):
                await limiter.try_acquire_async("api")

        return run

    return {
        f"aiolimiter {version('aiolimiter')}, async with": aio,
        f"aiolimiter {version('aiolimiter')}, await acquire()": aio_acquire,
        f"limits {version('limits')}, fixed window": limits_fixed,
        f"throttled-py {version('throttled-py')}, fixed window": throttled_with("fixed_window"),
        f"throttled-py {version('throttled-py')}, GCRA": throttled_with("gcra"),
        f"pyrate-limiter {version('pyrate-limiter')}, in-memory bucket": pyrate,
    }


def run(quick: bool) -> Report:
    rounds, count = (3, 5_000) if quick else (15, 10_000)
    ratesync.configure_limiter("api", rate_per_second=RATE, burst=BURST)
    ratesync.configure_limiter("slots", rate_per_second=RATE, burst=BURST, max_concurrent=BURST)
    references, ours, peers = _references(), _ours(), _peers()

    async def measure() -> dict[str, Spread]:
        everybody = {**references, **ours, **peers}
        samples: dict[str, list[float]] = {name: [] for name in everybody}
        for number in range(rounds):
            progress(f"memory round {number + 1}/{rounds}")
            loops = {name: make() for name, make in everybody.items()}
            turns: dict[str, list[float]] = {name: [] for name in everybody}
            gc.collect()
            for turn in range(TURNS + 1):
                order = list(loops)
                random.Random(turn).shuffle(order)
                for name in order:
                    length = count // 10 if name in peers else count
                    begin = time.perf_counter_ns()
                    await loops[name](length)
                    turns[name].append((time.perf_counter_ns() - begin) / length)
            for name, values in turns.items():
                samples[name].append(statistics.median(values[1:]))  # the first one warms up
        progress("")
        return {name: Spread(values) for name, values in samples.items()}

    spreads = asyncio.run(measure())
    waited = ratesync.get_limiter("api").get_metrics().max_wait_time_ms
    if waited > 0:
        raise AssertionError(f"an acquisition waited for {waited} ms: the benchmark measured the limit")

    # Like is compared with like: a body with a body, a bare await with a bare await.
    fastest = min(peers, key=lambda name: spreads[name].median)
    with_body = [name for name in peers if name.endswith(", async with")]
    fastest_with_body = min(with_body, key=lambda name: spreads[name].median)
    table = Table(
        "memory: one uncontended acquisition",
        ["", "ns: median [min .. max]", "to the empty async with", f"{fastest} costs"],
    )
    for name, spread in spreads.items():
        table.rows.append(
            [
                name,
                spread.text(integer),
                ratios(spread, spreads[EMPTY]).text(times),
                ratios(spreads[fastest], spread).text(times) if name in ours else "",
            ]
        )

    def ratio(of: str, to: str, bound: float, *, at_most: bool) -> Goal:
        median = ratios(spreads[of], spreads[to]).median
        return Goal(f"{of} / {to}", median, bound, at_most=at_most, form=times)

    goals = [
        ratio(NAMED, EMPTY, 0.8, at_most=True),
        ratio(BOUND, EMPTY, 0.5, at_most=True),
        ratio(fastest_with_body, NAMED, 5, at_most=False),
        ratio(fastest, AWAITED, 5, at_most=False),
    ]
    notes = [f"{rounds} rounds of {TURNS} alternating turns; one event loop, one task"]
    data = {name: spread.as_json() for name, spread in spreads.items()}
    return Report("memory", [table], goals, notes, data)
