"""PostgreSQL: grants per second and latency from 1 to 1,000 tasks, on one hot limiter and on 10,000 keys.

Measured: tasks that acquire in a loop for a fixed time, all in one process, against a server with fsync on.
Peers: an atomic UPDATE written by hand over an asyncpg pool of ten (what one would do without a limiter);
the same UPDATE from C over one connection in pipeline mode (`raw_libpq.c`) and from pgbench, which are no
limiters but the floor: what the server and libpq allow when nothing is in between.

Traps avoided: pure rates commit without waiting for the disk by default, so peers run both ways and ratios
compare like with like; nobody waits for a rate (bursts are huge) and nobody is let pass by an outage
(`fail_closed`), both checked at the end; one task of ten takes times, the others only count; the load has to
be reached, not offered, so a queue cannot look like throughput; on few CPUs client and server share them, so
ceilings are of the whole machine, and with one task the result is mostly the machine's wake-up time: look at
the ratio to raw libpq, never at the microseconds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import ratesync
from benchmarks import pg
from benchmarks.load import Load, drive
from benchmarks.pg import HOT, KEYS
from benchmarks.report import Goal, Report, Spread, Table, integer, micros, progress, ratios, times

TASKS = (1, 10, 100, 1000)
KINDS = ("hot", "keys")
DURABILITY = {False: "commits not waited for", True: "durable"}

Cell = tuple[str, int, str]  # kind, tasks, contender


class _Ours:
    """Our stores and limiters on a database of their own, and what they sent."""

    def __init__(self, url: str) -> None:
        self.stats: dict[Cell, list[tuple[int, int, int]]] = {}  # grants, statements, round trips
        for store, setting in (("db-off", "auto"), ("db-on", "on")):
            ratesync.configure_store(
                store, "postgres", url=url, auto_create=True, synchronous_commit=setting, command_timeout=30
            )
            for kind in KINDS:
                ratesync.configure_limiter(
                    f"{kind}-{store}",
                    store,
                    rate_per_second=1e7,
                    burst=1_000_000_000,
                    fail_closed=True,
                    outage_budget=30,
                )
        self._keys = [f"key-{number}" for number in range(KEYS)]

    async def warm_up(self) -> None:
        for store in ("db-off", "db-on"):
            await ratesync.get_store(store).initialize()
            await ratesync.acquire(f"hot-{store}")
            limiter = ratesync.get_limiter(f"keys-{store}")
            for first in range(0, KEYS, 1000):
                batch = self._keys[first : first + 1000]
                await asyncio.gather(*(limiter.acquire(key=key) for key in batch))

    async def load(self, cell: Cell, durable: bool, seconds: float) -> Load:
        kind, tasks, _ = cell
        store_id = "db-on" if durable else "db-off"
        store, name = ratesync.get_store(store_id), f"{kind}-{store_id}"
        acquire, keys = ratesync.acquire, self._keys

        def hot(_: int) -> Awaitable[object]:
            return acquire(name)

        def keyed(serial: int) -> Awaitable[object]:
            return acquire(name, key=keys[serial % KEYS])

        before = await store.stats()
        result = await drive(hot if kind == "hot" else keyed, tasks, seconds)
        after = await store.stats()
        sent = tuple(after[counter] - before[counter] for counter in ("statements", "round_trips"))
        self.stats.setdefault(cell, []).append((result.operations, *sent))
        return result

    def check(self) -> int:
        """That nothing waited or was let pass; the number of all grants."""
        grants = 0
        for store in ("db-off", "db-on"):
            for kind in KINDS:
                metrics = ratesync.get_limiter(f"{kind}-{store}").get_metrics()
                if metrics.passed_open or metrics.timeouts:
                    raise AssertionError(f"{kind}-{store}: {metrics.passed_open=} {metrics.timeouts=}")
                grants += metrics.total_acquisitions
        return grants


async def _asyncpg_load(pool: object, kind: str, tasks: int, seconds: float) -> Load:
    statement, fetch = pg.BY_HAND, pool.fetchval  # type: ignore[attr-defined]

    def hot(_: int) -> Awaitable[object]:
        return fetch(statement, HOT)  # type: ignore[no-any-return]

    def keyed(serial: int) -> Awaitable[object]:
        return fetch(statement, f"key-{serial % KEYS}")  # type: ignore[no-any-return]

    return await drive(hot if kind == "hot" else keyed, tasks, seconds)


def run(quick: bool) -> Report:
    pg.need(pg.can_measure())
    with pg.server() as started:
        return asyncio.run(_run(started, quick))


async def _run(started: pg.PostgresServer, quick: bool) -> Report:
    import asyncpg

    rounds, seconds = (1, 0.3) if quick else (5, 1.0)
    our_url, peers_url = await asyncio.to_thread(lambda: (pg.database(started), pg.with_peers_rows(started)))
    ours, floor = _Ours(our_url), pg.Floor(started, peers_url)
    await ours.warm_up()
    pools = {
        durable: await asyncpg.create_pool(
            peers_url,
            min_size=10,
            max_size=10,
            server_settings={"synchronous_commit": "on" if durable else "off"},
        )
        for durable in DURABILITY
    }

    contenders: dict[Cell, Callable[[], Awaitable[Load]]] = {}
    for kind in KINDS:
        for tasks in TASKS:
            for durable, words in DURABILITY.items():
                cell = (kind, tasks, f"ratesync, {words}")
                contenders[cell] = lambda c=cell, d=durable: ours.load(c, d, seconds)  # type: ignore[misc]
                contenders[kind, tasks, f"asyncpg by hand, {words}"] = (
                    lambda k=kind, t=tasks, d=durable: _asyncpg_load(pools[d], k, t, seconds)  # type: ignore[misc]
                )
    for depth in (1, 100):
        for durable, words in DURABILITY.items():
            contenders["hot", depth, f"raw libpq pipeline, {words}"] = (
                lambda n=depth, d=durable: asyncio.to_thread(floor.raw, seconds, n, durable=d)  # type: ignore[misc]
            )
    for clients in (1, 16):
        for durable, words in DURABILITY.items():
            contenders["hot", clients, f"pgbench, {words}"] = (
                lambda n=clients, d=durable: asyncio.to_thread(_pgbench, floor, seconds, n, d)  # type: ignore[misc]
            )

    loads: dict[Cell, list[Load]] = {cell: [] for cell in contenders}
    for number in range(rounds):
        order = list(contenders)
        random.Random(number).shuffle(order)
        for place, cell in enumerate(order):
            progress(f"postgres round {number + 1}/{rounds}, {place + 1}/{len(order)}: {cell}")
            loads[cell].append(await contenders[cell]())
    progress("")

    grants = ours.check()
    witness = await _witness(started, our_url)
    for pool in pools.values():
        await pool.close()
    floor.close()
    report = _report(loads, ours)
    trips = sum(trips for cells in ours.stats.values() for _, _, trips in cells)
    report.notes = [
        f"{rounds} rounds of {seconds:g} s per load, alternating; client and server share the CPUs",
        f"the server counted {witness:,} transactions, set-up included; we, {trips:,} round trips",
        f"{grants:,} grants in all; none waited, none was let pass by an outage",
    ]
    report.data["provenance"] = [await asyncio.to_thread(pg.server_version, started)]
    return report


def _pgbench(floor: pg.Floor, seconds: float, clients: int, durable: bool) -> Load:
    rate = floor.pgbench(seconds, clients, durable=durable)
    return Load(rate, float("nan"), float("nan"), 0)


async def _witness(started: pg.PostgresServer, url: str) -> int:
    """Transactions of our database, as the server counted them, once our sessions have reported."""
    name = urlsplit(url).path.lstrip("/")
    for store in ("db-off", "db-on"):
        await ratesync.get_store(store).close()
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
    deadline = time.monotonic() + 10
    while (await asyncio.to_thread(started.execute, sessions))[0][0] and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    query = f"SELECT xact_commit FROM pg_stat_database WHERE datname = '{name}'"
    return int((await asyncio.to_thread(started.execute, query))[0][0])


def _report(loads: dict[Cell, list[Load]], ours: _Ours) -> Report:
    rates = {cell: Spread([load.rate for load in found]) for cell, found in loads.items()}
    tables, data = [], {}
    for kind, title in (("hot", "one hot limiter"), ("keys", f"{KEYS:,} keys")):
        table = Table(
            f"postgres: {title}",
            ["", "tasks", "per second", "to asyncpg", "p50", "p99", "statements / grant", "trips / grant"],
        )
        cells = [cell for cell in loads if cell[0] == kind]
        for cell in sorted(cells, key=lambda cell: (cell[1], cell[2].startswith(("raw", "pgb")), cell[2])):
            _, tasks, contender = cell
            peer = (kind, tasks, contender.replace("ratesync,", "asyncpg by hand,"))
            p50 = Spread([load.p50 for load in loads[cell]])
            p99 = Spread([load.p99 for load in loads[cell]])
            mine = contender.startswith("ratesync")
            sent = [sum(column) for column in zip(*ours.stats.get(cell, [(0, 0, 0)]), strict=True)]
            timed = not contender.startswith("pgbench")
            table.rows.append(
                [
                    contender,
                    integer(tasks),
                    rates[cell].text(integer),
                    ratios(rates[cell], rates[peer]).text(times) if mine else "",
                    p50.text(micros) if timed else "",
                    p99.text(micros) if timed else "",
                    f"{sent[1] / sent[0]:.4f}" if mine else "",
                    f"{sent[2] / sent[0]:.4f}" if mine else "",
                ]
            )
            data["/".join(map(str, cell))] = {
                "rate": rates[cell].as_json(),
                **({"p50": p50.as_json(), "p99": p99.as_json()} if timed else {}),
            }
        tables.append(table)

    goals = [
        Goal("hot limiter, 1,000 tasks: grants/s", 0, 300_000, at_most=False, form=integer),
        Goal("10,000 keys, 1,000 tasks: grants/s", 0, 100_000, at_most=False, form=integer),
        Goal("hot limiter, 100 tasks: p99", 0, 0.002, form=micros),
        Goal("10,000 keys, 100 tasks: p99", 0, 0.002, form=micros),
        Goal("1 task: p50 / raw round trip", 0, 1.5, form=times),
    ]
    result = []
    for words in DURABILITY.values():
        name = f"ratesync, {words}"
        raw = loads["hot", 1, f"raw libpq pipeline, {words}"]
        lone = loads["hot", 1, name]
        values = [
            rates["hot", 1000, name].median,
            rates["keys", 1000, name].median,
            Spread([load.p99 for load in loads["hot", 100, name]]).median,
            Spread([load.p99 for load in loads["keys", 100, name]]).median,
            ratios(Spread([load.p50 for load in lone]), Spread([load.p50 for load in raw])).median,
        ]
        for goal, value in zip(goals, values, strict=True):
            what = f"{goal.what} ({words})"
            result.append(Goal(what, value, goal.bound, goal.at_most, form=goal.form))
    return Report("postgres", tables, result, data=data)
