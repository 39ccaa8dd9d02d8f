"""Footprint: bytes of resident memory per keyed limit, over a million keys.

Measured: the growth of the resident set of a fresh process that acquires once from each key, divided by the
number of keys. Peers do the same, with fewer keys where they need more.

Traps avoided: one process per contender, so that nobody reuses what another freed; rates so slow that no
key is idle again before the end - the memory store sweeps idle keys away, and would look free otherwise -
which is proved by asking a sample of the keys again: all refuse; key strings are made on the way, so those
counted are the limiter's own copies; the resident set is read, not what an allocator says it handed out.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.report import Goal, Report, Spread, Table, integer, progress, times

SHORT = "user-{:08d}".format
LONG = "0b9ac3f2-7d51-4c7e-9b0d-{:012d}".format


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: the peak, in bytes
    return peak if sys.platform == "darwin" else peak * 1024


def _ratesync(count: int, key: object, **options: object) -> None:
    import ratesync

    ratesync.configure_limiter("api", rate_per_second=0.001, timeout=0, **options)  # type: ignore[arg-type]
    acquire = ratesync.acquire
    with acquire("api"):
        pass
    _begin()
    for number in range(count):
        with acquire("api", key=key(number)):  # type: ignore[operator]
            pass
    _end(count)
    limiter = ratesync.get_limiter("api")
    for number in range(0, count, max(1, count // 1000)):
        if limiter.try_acquire(key=key(number)).wait():  # type: ignore[operator]
            raise AssertionError(f"key {number} was forgotten: the figure is worth nothing")


def _limits(count: int, key: object) -> None:
    import limits
    import limits.strategies

    strategy = limits.strategies.FixedWindowRateLimiter(limits.storage.MemoryStorage())
    item = limits.parse("1/day")
    strategy.hit(item, "warm")
    _begin()
    for number in range(count):
        strategy.hit(item, key(number))  # type: ignore[operator]
    _end(count)


def _throttled(count: int, key: object) -> None:
    import throttled

    store = throttled.MemoryStore(options={"MAX_SIZE": 10**9})
    limiter = throttled.Throttled(using="gcra", quota=throttled.per_day(1), store=store)
    limiter.limit("warm")
    _begin()
    for number in range(count):
        limiter.limit(key(number))  # type: ignore[operator]
    _end(count)


def _aiolimiter(count: int, key: object) -> None:
    import asyncio

    import aiolimiter

    async def fill() -> None:
        table: dict[str, aiolimiter.AsyncLimiter] = {}
        _begin()
        for number in range(count):
            limiter = table[key(number)] = aiolimiter.AsyncLimiter(1, 86400)  # type: ignore[operator]
            await limiter.acquire()
        _end(count)

    asyncio.run(fill())


_before = 0


def _begin() -> None:
    global _before
    gc.collect()
    _before = _resident()


def _end(count: int) -> None:
    gc.collect()
    print(json.dumps((_resident() - _before) / count))


def _window(count: int, algorithm: str) -> None:
    _ratesync(count, SHORT, algorithm=algorithm, limit=1, window_seconds=30 * 86_400)


CONTENDERS = {
    "ratesync, 13-character keys": lambda count: _ratesync(count, SHORT),
    "ratesync, 36-character keys (UUID)": lambda count: _ratesync(count, LONG),
    "ratesync, rate and max_concurrent": lambda count: _ratesync(count, SHORT, max_concurrent=1),
    "ratesync, sliding_window with one grant": lambda count: _window(count, "sliding_window"),
    "ratesync, sliding_counter": lambda count: _window(count, "sliding_counter"),
    "ratesync, fixed_window": lambda count: _window(count, "fixed_window"),
    f"throttled-py {version('throttled-py')}, GCRA": lambda count: _throttled(count, SHORT),
    f"limits {version('limits')}, fixed window": lambda count: _limits(count, SHORT),
    f"aiolimiter {version('aiolimiter')}, one object per key": lambda count: _aiolimiter(count, SHORT),
}


def run(quick: bool) -> Report:
    rounds = 1 if quick else 3
    ours, peers = (200_000, 20_000) if quick else (1_000_000, 100_000)
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            progress(f"footprint round {number + 1}/{rounds}: {name}")
            count = ours if name.startswith("ratesync") else peers
            command = [sys.executable, "-m", "benchmarks.footprint", name, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{name} failed:\n{done.stderr}")
            samples[name].append(float(json.loads(done.stdout.splitlines()[0])))
    progress("")
    spreads = {name: Spread(values) for name, values in samples.items()}
    first = next(iter(spreads.values()))
    table = Table(
        "footprint: resident bytes per keyed limit",
        ["", "keys", "bytes: median [min .. max]", "to ratesync"],
        [
            [
                name,
                integer(ours if name.startswith("ratesync") else peers),
                spread.text(integer),
                times(spread.median / first.median),
            ]
            for name, spread in spreads.items()
        ],
    )
    goals = [
        Goal(f"{name}: bytes", spread.median, 200, form=integer)
        for name, spread in spreads.items()
        if name.startswith("ratesync") and "window" not in name and "counter" not in name
    ]
    data = {name: spread.as_json() for name, spread in spreads.items()}
    return Report("footprint", [table], goals, [f"{rounds} rounds; one process per figure"], data)


if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](int(sys.argv[2]))
