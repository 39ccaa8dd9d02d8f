"""State: operations per second and latency at 1, 16 and 64 callers, on memory, PostgreSQL and Redis.

Measured: tasks that repeat one operation for a fixed time, all in one process, against servers of our own:
a fresh `check_and_set`, `get`, `set`, `increment` of one hot key, and a whole lock cycle (acquire and release
of a lock of one's own). Peers do the same by hand, as their documentation shows: one statement over an
asyncpg pool of 32, durable like ours; one command over redis-py with 64 connections; a dict with expiry for
memory. The ceilings are raw libpq in pipeline mode with a commit per statement, and redis-benchmark with 16
commands in flight on each of 50 connections, sending the plain command that is needed by hand (SET NX PX,
not our script: ours also keeps versions).

Traps avoided: every check_and_set is of a key that never was, so the table grows for all alike; everybody's
answers are checked (a refused one fails the run); the server has fsync on and nobody turns
`synchronous_commit` off; one task of ten takes times, the others only count; on few CPUs client and server
share them, so with one caller the result is mostly the machine's wake-up time: look at the ratios. Memory
never suspends a task, so 16 and 64 callers there are the same as one and are left out.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import ratesync
from benchmarks import pg
from benchmarks.load import Load, drive
from benchmarks.report import Goal, Report, Spread, Table, integer, micros, progress, ratios, times
from ratesync.testing import RedisServer

CALLERS = (1, 16, 64)
KEYS = 10_000
OPERATIONS = ("check_and_set", "get", "set", "increment", "lock cycle")
OURS = "ratesync"

Operation = Callable[[int], Awaitable[object]]
Make = Callable[[str], Operation]  # operation's name -> what one caller repeats
Cell = tuple[str, int, str]  # operation, callers, contender

_runs = itertools.count()  # makes keys fresh over all loads of the run


class Refused(AssertionError):
    """An operation answered something else than the load expects."""


def _expect(what: bool) -> None:
    if not what:
        raise Refused("a fresh key was there already, a key was missing, or a free lock was taken")


# Ours -----------------------------------------------------------------------------------------------


def _ours(store: ratesync.Store) -> Make:
    state = store.state()
    lock = store.lock

    def make(name: str) -> Operation:
        run = next(_runs)

        async def fresh(serial: int) -> None:
            _expect(await state.check_and_set(f"fresh-{run}-{serial}", "1", ttl=300))

        async def get(serial: int) -> None:
            _expect(await state.get(f"key-{serial % KEYS}") is not None)

        async def put(serial: int) -> None:
            _expect(await state.set(f"key-{serial % KEYS}", "1") > 0)

        async def increment(_: int) -> None:
            _expect(await state.increment("hot") > 0)

        async def cycle(serial: int) -> None:
            async with lock(f"lock-{run}-{serial % KEYS}", ttl=30):
                pass

        return dict(zip(OPERATIONS, (fresh, get, put, increment, cycle), strict=True))[name]

    return make


async def _fill(store: ratesync.Store) -> None:
    state = store.state()
    for first in range(0, KEYS, 1000):
        await asyncio.gather(*(state.set(f"key-{n}", "1") for n in range(first, first + 1000)))


# PostgreSQL by hand -----------------------------------------------------------------------------------

HAND_TABLES = (
    (
        "CREATE TABLE hand (key TEXT PRIMARY KEY, value BYTEA, number BIGINT, version BIGINT NOT NULL,"
        " expires_at TIMESTAMPTZ) WITH (fillfactor = 80)"
    ),
    "CREATE INDEX hand_expires ON hand (expires_at) WHERE expires_at IS NOT NULL",
    (
        "CREATE TABLE hand_locks (name TEXT PRIMARY KEY, token BIGINT NOT NULL,"
        " expires_at TIMESTAMPTZ NOT NULL) WITH (fillfactor = 80)"
    ),
    "CREATE SEQUENCE hand_tokens",
    "CREATE SEQUENCE hand_serial",
    f"INSERT INTO hand SELECT 'key-' || i, '1', NULL, 1, NULL FROM generate_series(0, {KEYS - 1}) AS i",
    "INSERT INTO hand VALUES ('hot', NULL, 0, 1, NULL)",
    "VACUUM ANALYZE hand",
)
TTL = "clock_timestamp() + interval '300 s'"
CREATE = (
    f"INSERT INTO hand VALUES ($1, '1', NULL, 1, {TTL}) ON CONFLICT (key) DO UPDATE SET"
    " value = excluded.value, version = hand.version + 1, expires_at = excluded.expires_at"
    " WHERE hand.expires_at <= clock_timestamp() RETURNING version"
)
GET = "SELECT value FROM hand WHERE key = $1 AND (expires_at IS NULL OR expires_at > clock_timestamp())"
SET = (
    "INSERT INTO hand VALUES ($1, '1', NULL, 1, NULL) ON CONFLICT (key) DO UPDATE SET value = excluded.value,"
    " version = hand.version + 1, expires_at = excluded.expires_at RETURNING version"
)
INCREMENT = "UPDATE hand SET number = number + 1, version = version + 1 WHERE key = $1 RETURNING number"
LOCK = (
    "INSERT INTO hand_locks VALUES ($1, nextval('hand_tokens'), clock_timestamp() + interval '30 s')"
    " ON CONFLICT (name) DO UPDATE SET token = nextval('hand_tokens'), expires_at = excluded.expires_at"
    " WHERE hand_locks.expires_at <= clock_timestamp() RETURNING token"
)
UNLOCK = "UPDATE hand_locks SET expires_at = clock_timestamp() WHERE name = $1 AND token = $2 RETURNING token"
# The same from C: one parameter, one row; fresh keys are numbered by the server.
RAW = {
    "check_and_set": CREATE.replace(
        f"VALUES ($1, '1', NULL, 1, {TTL})",
        f"SELECT $1 || nextval('hand_serial'), '1'::bytea, NULL::bigint, 1, {TTL}",
    ),
    "get": GET,
    "set": SET.replace(
        "VALUES ($1, '1', NULL, 1, NULL)",
        "SELECT $1 || (random() * 9999)::int, '1'::bytea, NULL::bigint, 1, NULL::timestamptz",
    ),
    "increment": INCREMENT,
}
RAW_PARAMETER = {"check_and_set": "raw-", "get": "key-1", "set": "key-", "increment": "hot"}


def _asyncpg(pool: Any) -> Make:
    fetchval = pool.fetchval

    def make(name: str) -> Operation:
        run = next(_runs)

        async def fresh(serial: int) -> None:
            _expect(await fetchval(CREATE, f"fresh-{run}-{serial}") is not None)

        async def get(serial: int) -> None:
            _expect(await fetchval(GET, f"key-{serial % KEYS}") is not None)

        async def put(serial: int) -> None:
            _expect(await fetchval(SET, f"key-{serial % KEYS}") > 0)

        async def increment(_: int) -> None:
            _expect(await fetchval(INCREMENT, "hot") > 0)

        async def cycle(serial: int) -> None:
            name = f"lock-{run}-{serial % KEYS}"
            token = await fetchval(LOCK, name)
            _expect(token is not None)
            _expect(await fetchval(UNLOCK, name, token) == token)

        return dict(zip(OPERATIONS, (fresh, get, put, increment, cycle), strict=True))[name]

    return make


# Redis by hand ------------------------------------------------------------------------------------------

UNLOCK_SCRIPT = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
COMMANDS = {  # of redis-benchmark
    "check_and_set": ["SET", "bench-__rand_int__", "1", "NX", "PX", "300000"],
    "get": ["GET", "key-1"],
    "set": ["SET", "key-__rand_int__", "1"],
    "increment": ["INCR", "hot"],
}


def _redis_py(url: str) -> Make:
    import redis.asyncio

    pool = redis.asyncio.BlockingConnectionPool.from_url(url, max_connections=64, timeout=60)
    client = redis.asyncio.Redis(connection_pool=pool)
    unlock = client.register_script(UNLOCK_SCRIPT)

    def make(name: str) -> Operation:
        run = next(_runs)

        async def fresh(serial: int) -> None:
            _expect(bool(await client.set(f"fresh-{run}-{serial}", "1", nx=True, px=300_000)))

        async def get(serial: int) -> None:
            await client.get(f"key-{serial % KEYS}")

        async def put(serial: int) -> None:
            _expect(bool(await client.set(f"key-{serial % KEYS}", "1")))

        async def increment(_: int) -> None:
            _expect(await client.incr("hot") > 0)

        async def cycle(serial: int) -> None:
            name, owner = f"lock-{run}-{serial % KEYS}", str(serial)
            _expect(bool(await client.set(name, owner, nx=True, px=30_000)))
            _expect(await unlock(keys=[name], args=[owner]) == 1)

        return dict(zip(OPERATIONS, (fresh, get, put, increment, cycle), strict=True))[name]

    return make


def _redis_benchmark(url: str, operation: str, seconds: float) -> Load:
    address = urlsplit(url)
    base = ["redis-benchmark", "-h", str(address.hostname), "-p", str(address.port), "-c", "50", "-P", "16"]
    count = str(int(200_000 * max(1.0, seconds)))
    done = subprocess.run(
        [*base, "-r", "1000000000", "-q", "-n", count, *COMMANDS[operation]], capture_output=True, check=True
    )
    found = re.findall(rb"([0-9.]+) requests per second", done.stdout)
    if not found:
        raise RuntimeError(f"redis-benchmark: {done.stdout[-500:]!r}")
    return Load(float(found[-1]), float("nan"), float("nan"), 0)


# Memory by hand -------------------------------------------------------------------------------------------


class _Dict:
    """What one would write: a dict of values with their expiry."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, float]] = {f"key-{n}": ("1", float("inf")) for n in range(KEYS)}
        self._number = 0

    async def check_and_set(self, key: str, value: str, ttl: float) -> bool:
        now = time.monotonic()
        found = self._rows.get(key)
        if found is not None and found[1] > now:
            return False
        self._rows[key] = (value, now + ttl)
        return True

    async def get(self, key: str) -> str | None:
        found = self._rows.get(key)
        return found[0] if found is not None and found[1] > time.monotonic() else None

    async def set(self, key: str, value: str) -> int:
        self._rows[key] = (value, float("inf"))
        return 1

    async def increment(self, key: str) -> int:
        self._number += 1
        return self._number


async def _memory_load(name: str, contender: str, count: int) -> Load:
    """Operations per second of one task, in a plain loop."""
    if contender == OURS:
        store = ratesync.get_store("bench-memory")
        state: Any = store.state()
        lock = store.lock
    else:
        state, lock = _Dict(), None
    run = next(_runs)
    fresh = [f"fresh-{contender}-{run}-{n}" for n in range(count)]
    keys = [f"key-{n % KEYS}" for n in range(count)]
    clock = time.perf_counter_ns
    begin = clock()
    if name == "check_and_set":
        for key in fresh:
            await state.check_and_set(key, "1", ttl=300)
    elif name == "get":
        for key in keys:
            await state.get(key)
    elif name == "set":
        for key in keys:
            await state.set(key, "1")
    elif name == "increment":
        for _ in keys:
            await state.increment("hot")
    elif lock is not None:
        for key in keys:
            async with lock(key, ttl=30):
                pass
    else:
        locks: dict[str, asyncio.Lock] = {}
        for key in keys:
            async with locks.setdefault(key, asyncio.Lock()):
                pass
    elapsed = (clock() - begin) / 1e9
    return Load(count / elapsed, elapsed / count, float("nan"), count)


# The run ------------------------------------------------------------------------------------------------


def run(quick: bool) -> Report:
    pg.need(pg.can_measure())
    with pg.server() as postgres, RedisServer() as redis:
        return asyncio.run(_run(postgres, redis.url, quick))


async def _run(started: pg.PostgresServer, redis_url: str, quick: bool) -> Report:
    import asyncpg

    rounds, seconds = (1, 0.3) if quick else (3, 1.0)
    our_url, hand_url = await asyncio.to_thread(lambda: (pg.database(started), pg.database(started)))
    hand = urlsplit(hand_url).path.lstrip("/")
    await asyncio.to_thread(lambda: started.execute(*HAND_TABLES, database=hand))
    ratesync.configure_store("bench-memory", "memory")
    ratesync.configure_store("bench-postgres", "postgres", url=our_url, auto_create=True, command_timeout=30)
    ratesync.configure_store("bench-redis", "redis", url=redis_url)
    for store_id in ("bench-memory", "bench-postgres", "bench-redis"):
        await _fill(ratesync.get_store(store_id))
    pool = await asyncpg.create_pool(hand_url, min_size=32, max_size=32)
    floor = pg.Floor(started, hand_url)

    makers: dict[str, dict[str, Make]] = {
        "postgres": {OURS: _ours(ratesync.get_store("bench-postgres")), "asyncpg by hand": _asyncpg(pool)},
        "redis": {OURS: _ours(ratesync.get_store("bench-redis")), "redis-py by hand": _redis_py(redis_url)},
    }
    contenders: dict[tuple[str, Cell], Callable[[], Awaitable[Load]]] = {}
    counts: dict[tuple[str, Cell], list[tuple[int, int, int]]] = {}
    for operation in OPERATIONS:
        count = 20_000 if quick else 200_000 if operation != "lock cycle" else 50_000
        for name in (OURS, "asyncio.Lock in a dict" if operation == "lock cycle" else "dict with expiry"):
            contenders["memory", (operation, 1, name)] = (
                lambda o=operation, n=name, c=count: _memory_load(o, n, c)  # type: ignore[misc]
            )
        for callers in CALLERS:
            for kind, named in makers.items():
                for name, make in named.items():
                    cell = (kind, (operation, callers, name))
                    contenders[cell] = (
                        lambda c=cell, m=make, o=operation, n=callers: _drive(c, m(o), n, seconds, counts)  # type: ignore[misc]
                    )
        if operation in RAW:
            for depth in CALLERS:
                contenders["postgres", (operation, depth, "raw libpq pipeline")] = (
                    lambda o=operation, d=depth: asyncio.to_thread(  # type: ignore[misc]
                        floor.statement, RAW[o], RAW_PARAMETER[o], seconds, d
                    )
                )
        if operation in COMMANDS:
            contenders["redis", (operation, 800, "redis-benchmark -c 50 -P 16")] = (
                lambda o=operation: asyncio.to_thread(_redis_benchmark, redis_url, o, seconds)  # type: ignore[misc]
            )

    for (_, (operation, _, _)), contender in list(contenders.items()):  # connections, plans, scripts
        del operation
        if quick:
            break
        await contender()
    counts.clear()
    loads: dict[tuple[str, Cell], list[Load]] = {cell: [] for cell in contenders}
    for number in range(rounds):
        order = list(contenders)
        random.Random(number).shuffle(order)
        for place, cell in enumerate(order):
            progress(f"state round {number + 1}/{rounds}, {place + 1}/{len(order)}: {cell}")
            loads[cell].append(await contenders[cell]())
    progress("")
    await pool.close()
    floor.close()

    report = _report(loads, counts)
    report.notes = [
        f"{rounds} rounds of {seconds:g} s per load, alternating; client and servers share the CPUs"
    ]
    import redis.asyncio

    found = await redis.asyncio.Redis.from_url(redis_url).info("server")
    version = await asyncio.to_thread(pg.server_version, started)
    report.data["provenance"] = [version, f"Redis {found['redis_version']} (loopback, no persistence)"]
    return report


async def _drive(
    cell: tuple[str, Cell],
    operation: Operation,
    callers: int,
    seconds: float,
    counts: dict[tuple[str, Cell], list[tuple[int, int, int]]],
) -> Load:
    if cell[1][2] != OURS:
        return await drive(operation, callers, seconds)
    store = ratesync.get_store(f"bench-{cell[0]}")
    before = await store.stats()
    load = await drive(operation, callers, seconds)
    after = await store.stats()
    sent = tuple(after[counter] - before[counter] for counter in ("statements", "round_trips"))
    counts.setdefault(cell, []).append((load.operations, *sent))
    return load


def _report(
    loads: dict[tuple[str, Cell], list[Load]], counts: dict[tuple[str, Cell], list[tuple[int, int, int]]]
) -> Report:
    rates = {cell: Spread([load.rate for load in found]) for cell, found in loads.items()}
    tables, data = [], {}
    for kind in ("memory", "postgres", "redis"):
        table = Table(
            f"state: {kind}",
            ["", "callers", "per second", "ours to it", "p50", "p99", "statements / op", "trips / op"],
        )
        for operation in OPERATIONS:
            cells = [cell for cell in loads if cell[0] == kind and cell[1][0] == operation]
            for cell in sorted(cells, key=lambda cell: (cell[1][1], cell[1][2] != OURS, cell[1][2])):
                _, callers, name = cell[1]
                mine = (kind, (operation, min(callers, CALLERS[-1]), OURS))
                timed = [load for load in loads[cell] if load.p99 == load.p99]
                sent = [sum(column) for column in zip(*counts.get(cell, [(0, 0, 0)]), strict=True)]
                table.rows.append(
                    [
                        f"{operation}: {name}",
                        integer(callers),
                        rates[cell].text(integer),
                        "" if name == OURS else ratios(rates[mine], rates[cell]).text(times),
                        Spread([load.p50 for load in timed]).text(micros) if timed else "",
                        Spread([load.p99 for load in timed]).text(micros) if timed else "",
                        f"{sent[1] / sent[0]:.3f}" if sent[0] else "",
                        f"{sent[2] / sent[0]:.3f}" if sent[0] else "",
                    ]
                )
                data["/".join((kind, operation, str(callers), name))] = {"rate": rates[cell].as_json()}
        tables.append(table)
    return Report("state", tables, _goals(loads, rates), data=data)


def _goals(loads: dict[tuple[str, Cell], list[Load]], rates: dict[tuple[str, Cell], Spread]) -> list[Goal]:
    def ours(kind: str, operation: str, callers: int) -> tuple[str, Cell]:
        return kind, (operation, callers, OURS)

    def rate(kind: str, operation: str, callers: int, bound: float) -> Goal:
        found = rates[ours(kind, operation, callers)].median
        what = f"{kind}, {operation}, {callers} callers: per second"
        return Goal(what, found, bound, at_most=False, form=integer)

    def p99(operation: str) -> Goal:
        found = Spread([load.p99 for load in loads[ours("postgres", operation, 64)]]).median
        return Goal(f"postgres, {operation}, 64 callers: p99", found, 0.010, form=micros)

    lone = ratios(
        Spread([load.p50 for load in loads[ours("postgres", "check_and_set", 1)]]),
        Spread([load.p50 for load in loads["postgres", ("check_and_set", 1, "raw libpq pipeline")]]),
    ).median
    return [
        rate("memory", "check_and_set", 1, 2_000_000),
        rate("postgres", "check_and_set", 64, 80_000),
        rate("postgres", "lock cycle", 64, 40_000),
        p99("check_and_set"),
        p99("lock cycle"),
        Goal("postgres, check_and_set, 1 caller: p50 / raw round trip", lone, 1.5, form=times),
        rate("redis", "check_and_set", 64, 100_000),
    ]
