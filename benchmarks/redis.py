"""Redis: grants per second and latency from 1 to 1,000 tasks, on one hot limiter and on 10,000 keys.

Measured: tasks that acquire in a loop for a fixed time, all in one process, against a server of our own on
loopback without persistence. Peers: the Python limiters that count in Redis, each with the algorithm that
its documentation recommends, and a GCRA script sent by hand with redis-py. The ceiling is redis-benchmark
sending, with 50 connections and 16 commands in flight on each, exactly the command that a lone acquire of
ours sends, which is read from the server by MONITOR.

Traps avoided: nobody is refused or waits (limits are far above what the load reaches, checked at the end),
and ours would fail rather than be let pass by an outage; redis-py has a pool that waits for a connection
instead of failing; the key space is the same for all; client and server share the CPUs, so ceilings are of
the whole machine, and with one task the result is mostly the machine's wake-up time: look at the ratios.
"""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
from collections.abc import Awaitable, Callable
from importlib.metadata import version

import ratesync
from benchmarks.load import Load, drive
from benchmarks.report import Goal, Report, Spread, Table, integer, micros, progress, ratios, times
from ratesync.testing import RedisServer

KEYS = 10_000
TASKS = (1, 10, 100, 1000)
KINDS = ("hot", "keys")
OURS = "ratesync"
BY_HAND = "redis-py, GCRA script by hand"
CEILING = "redis-benchmark -c 50 -P 16, our command"

Operation = Callable[[int], Awaitable[object]]
Cell = tuple[str, int, str]  # kind, tasks, contender

# As short as a rate limit gets: one key, the server's clock, a million per second with a burst of an hour.
GCRA = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local tat = tonumber(redis.call('GET', KEYS[1]) or now)
if tat < now then tat = now end
tat = tat + ARGV[1]
if tat - now > tonumber(ARGV[2]) then return tat - now - ARGV[2] end
redis.call('SET', KEYS[1], string.format('%.0f', tat), 'PX', 3600000)
return 0
"""


def _names(kind: str, prefix: str) -> Callable[[int], str]:
    return (lambda _: f"{prefix}-hot") if kind == "hot" else (lambda serial: f"{prefix}-{serial % KEYS}")


def _ours(url: str) -> Callable[[str], Operation]:
    ratesync.configure_store("redis", "redis", url=url)
    for name in KINDS:
        ratesync.configure_limiter(
            name, "redis", rate_per_second=1e6, burst=1_000_000_000, fail_closed=True, outage_budget=30
        )
    acquire = ratesync.acquire
    keys = [f"key-{number}" for number in range(KEYS)]

    def make(kind: str) -> Operation:
        if kind == "hot":
            return lambda _: acquire("hot")
        return lambda serial: acquire("keys", key=keys[serial % KEYS])

    return make


def _by_hand(url: str) -> Callable[[str], Operation]:
    import redis.asyncio

    pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=50, timeout=60)
    script = redis.asyncio.Redis(connection_pool=pool).register_script(GCRA)

    def make(kind: str) -> Operation:
        name = _names(kind, "hand")
        return lambda serial: script(keys=[name(serial)], args=[1, 3_600_000_000])

    return make


def _limits(url: str) -> Callable[[str], Operation]:
    import limits
    import redis.asyncio
    from limits.aio import storage, strategies

    pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=50, timeout=60)
    strategy = strategies.FixedWindowRateLimiter(
        storage.RedisStorage(f"async+{url}", implementation="redispy", connection_pool=pool)
    )
    item = limits.RateLimitItemPerHour(1_000_000_000)

    def make(kind: str) -> Operation:
        name = _names(kind, "limits")
        return lambda serial: strategy.hit(item, name(serial))

    return make


def _throttled(url: str) -> Callable[[str], Operation]:
    import throttled.asyncio as throttled

    store = throttled.RedisStore(
        server=url, options={"CONNECTION_POOL_CLASS": "redis.asyncio.BlockingConnectionPool"}
    )
    limiter = throttled.Throttled(
        using="gcra", quota=throttled.per_sec(1_000_000, burst=1_000_000_000), store=store
    )

    def make(kind: str) -> Operation:
        name = _names(kind, "throttled")
        return lambda serial: limiter.limit(name(serial))

    return make


def _steindamm(url: str) -> Callable[[str], Operation]:
    import redis.asyncio
    from steindamm import AsyncRedisTokenBucket

    pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=50, timeout=60)
    connection = redis.asyncio.Redis(connection_pool=pool)
    made: dict[str, AsyncRedisTokenBucket] = {}

    def make(kind: str) -> Operation:
        name = _names(kind, "steindamm")

        async def one(serial: int) -> None:
            key = name(serial)
            if key not in made:
                made[key] = AsyncRedisTokenBucket(
                    connection=connection,
                    name=key,
                    capacity=1_000_000_000,
                    refill_frequency=1,
                    refill_amount=1_000_000,
                )
            async with made[key]:
                pass

        return one

    return make


PEERS: dict[str, Callable[[str], Callable[[str], Operation]]] = {
    f"limits {version('limits')}, fixed window": _limits,
    f"throttled-py {version('throttled-py')}, GCRA": _throttled,
    f"steindamm {version('steindamm')}": _steindamm,
    BY_HAND: _by_hand,
}


# The ceiling ------------------------------------------------------------------------------------------


async def _our_command(url: str, kind: str) -> list[bytes]:
    """The command that one acquire sends, with the key's number replaced by redis-benchmark's variable."""
    import redis.asyncio

    watcher = redis.asyncio.Redis.from_url(url)
    key = "0123456789ab"  # as long as redis-benchmark's numbers
    async with watcher.monitor() as monitor:
        await (ratesync.acquire("hot") if kind == "hot" else ratesync.acquire("keys", key=key))
        while True:
            seen = (await monitor.next_command())["command"]
            if seen.upper().startswith("EVALSHA"):
                break
    await watcher.aclose()
    return [part.replace(key, "__rand_int__").encode() for part in _split(seen)]


def _split(command: str) -> list[str]:
    return [part.encode().decode("unicode_escape") for part in command.split(" ")]


def _ceiling(url: str, command: list[bytes], seconds: float) -> float:
    """Commands per second."""
    host, port = url.removeprefix("redis://").split("/")[0].split("@")[-1].split(":")
    base = ["redis-benchmark", "-h", host, "-p", port, "-c", "50", "-P", "16", "-r", str(KEYS), "-q"]
    count = int(100_000 * max(1.0, seconds))
    done = subprocess.run([*base, "-n", str(count), *command], capture_output=True, check=True)
    found = re.findall(rb"([0-9.]+) requests per second", done.stdout)
    if not found or b"rror" in done.stdout:
        raise RuntimeError(f"redis-benchmark: {done.stdout[-500:]!r}")
    return float(found[-1])


# The run ------------------------------------------------------------------------------------------------


def run(quick: bool) -> Report:
    with RedisServer() as server:
        return asyncio.run(_run(server.url, quick))


async def _run(url: str, quick: bool) -> Report:
    import redis.asyncio

    rounds, seconds = (1, 0.3) if quick else (5, 1.0)
    makers = {OURS: _ours(url), **{name: make(url) for name, make in PEERS.items()}}
    commands = {kind: await _our_command(url, kind) for kind in KINDS}
    contenders: dict[Cell, Callable[[], Awaitable[Load]]] = {}
    for kind in KINDS:
        for name, make in makers.items():
            operation = make(kind)
            await drive(operation, 10, 0.1)  # scripts loaded, connections open
            for tasks in TASKS:
                contenders[kind, tasks, name] = lambda o=operation, t=tasks: drive(o, t, seconds)  # type: ignore[misc]
        contenders[kind, 800, CEILING] = lambda k=kind: _as_load(url, commands[k], seconds)  # type: ignore[misc]

    before = await ratesync.get_store("redis").stats()
    loads: dict[Cell, list[Load]] = {cell: [] for cell in contenders}
    failed: dict[Cell, str] = {}
    for number in range(rounds):
        order = list(contenders)
        random.Random(number).shuffle(order)
        for place, cell in enumerate(order):
            progress(f"redis round {number + 1}/{rounds}, {place + 1}/{len(order)}: {cell}")
            try:
                loads[cell].append(await contenders[cell]())
            except Exception as error:
                if cell[2] in (OURS, CEILING):
                    raise
                failed[cell] = type(error).__name__
    progress("")
    after = await ratesync.get_store("redis").stats()
    grants = 0
    for name in KINDS:
        metrics = ratesync.get_limiter(name).get_metrics()
        if metrics.passed_open or metrics.timeouts or metrics.max_wait_time_ms > 5_000:
            raise AssertionError(f"{name}: {metrics.passed_open=} {metrics.timeouts=}")
        grants += metrics.total_acquisitions

    report = _report(loads, failed)
    trips = after["round_trips"] - before["round_trips"]
    report.notes = [
        f"{rounds} rounds of {seconds:g} s per load, alternating; client and server share the CPUs",
        f"{grants:,} grants of ours in all, by {trips:,} round trips; none refused or let pass",
        *(f"{name}, {tasks:,} tasks, {kind}: {why}" for (kind, tasks, name), why in failed.items()),
    ]
    found = await redis.asyncio.Redis.from_url(url).info("server")
    report.data["provenance"] = [f"Redis {found['redis_version']} (loopback, no persistence)"]
    return report


async def _as_load(url: str, command: list[bytes], seconds: float) -> Load:
    rate = await asyncio.to_thread(_ceiling, url, command, seconds)
    return Load(rate, float("nan"), float("nan"), 0)


def _report(loads: dict[Cell, list[Load]], failed: dict[Cell, str]) -> Report:
    whole = {cell: found for cell, found in loads.items() if found and cell not in failed}
    rates = {cell: Spread([load.rate for load in found]) for cell, found in whole.items()}
    limiters = [name for name in PEERS if name != BY_HAND]

    def best(kind: str, tasks: int) -> str:
        present = [name for name in limiters if (kind, tasks, name) in rates]
        return max(present, key=lambda name: rates[kind, tasks, name].median)

    tables, data = [], {}
    for kind, title in (("hot", "one hot limiter"), ("keys", f"{KEYS:,} keys")):
        table = Table(f"redis: {title}", ["", "tasks", "per second", "ours to it", "p50", "p99"])
        for cell in sorted((c for c in loads if c[0] == kind), key=lambda c: (c[1], c[2] == CEILING)):
            _, tasks, name = cell
            if cell not in whole:
                table.rows.append([name, integer(tasks), failed[cell], "", "", ""])
                continue
            ours = rates[kind, 1000 if name == CEILING else tasks, OURS]
            timed = name != CEILING
            p50, p99 = (Spread([getattr(load, what) for load in whole[cell]]) for what in ("p50", "p99"))
            table.rows.append(
                [
                    name,
                    integer(tasks),
                    rates[cell].text(integer),
                    "" if name == OURS else ratios(ours, rates[cell]).text(times),
                    p50.text(micros) if timed else "",
                    p99.text(micros) if timed else "",
                ]
            )
            data["/".join(map(str, cell))] = {"rate": rates[cell].as_json()}
        tables.append(table)

    goals = []
    for kind in KINDS:
        peer = best(kind, 100)
        against = ratios(rates[kind, 100, OURS], rates[kind, 100, peer]).median
        goals.append(Goal(f"{kind}, 100 tasks: to {peer}", against, 10, at_most=False, form=times))
        ceiling = ratios(rates[kind, 1000, OURS], rates[kind, 800, CEILING]).median
        goals.append(Goal(f"{kind}, 1,000 tasks: to the ceiling", ceiling, 0.8, at_most=False, form=times))
        lone = ratios(
            Spread([load.p50 for load in whole[kind, 1, OURS]]),
            Spread([load.p50 for load in whole[kind, 1, BY_HAND]]),
        ).median
        goals.append(Goal(f"{kind}, 1 task: p50 to redis-py's", lone, 1, form=times))
    return Report("redis", tables, goals, data=data)
