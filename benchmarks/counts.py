"""Counts: statements and round trips per operation, exact, and a gate: exit status 1 when one is exceeded.

Counted on both sides: by our store (`Store.stats`), and by the server's `pg_stat_statements`, read over an
asyncpg connection, which sees every statement whoever sent it.

Traps avoided: statistics that the server reports late (pg_stat_database) are not used; the statements that
set up a connection are kept out by warming up, and the two counts have to be equal afterwards, so neither
can hide work from the other; "cancelled before it was sent" and "arrived during a trip" are made certain by
a row lock, not by luck. How many travel together in a free-running loop depends on how fast the server
answers: that count is reported beside the others and gates nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import asyncpg

import ratesync
from benchmarks import pg
from benchmarks.report import Goal, Report, Table, integer
from ratesync import ops

# Ours are the statements that quote the table's name; the benchmark's own do not.
SEEN = """
SELECT coalesce(sum(calls), 0)::int8
FROM pg_stat_statements AS s JOIN pg_database AS d ON d.oid = s.dbid
WHERE d.datname = $1 AND (s.query LIKE '%"rate_limiter_state%' OR s.query LIKE '%"acteon_%')
"""


class _Counted:
    def __init__(self, grants: int, trips: int, statements: int, seen: int) -> None:
        self.grants = grants
        self.trips = trips
        self.statements = statements
        self.seen = seen


class _Books:
    """Counts what a piece of work sent, by our account and by the server's."""

    def __init__(self, witness: asyncpg.Connection, database: str) -> None:
        self._witness = witness
        self._database = database

    async def of(self, limiter_id: str, work: Callable[[], Awaitable[object]]) -> _Counted:
        store = ratesync.get_store("db")
        metrics = ratesync.get_limiter(limiter_id).get_metrics()
        grants = metrics.total_acquisitions
        before, seen = await store.stats(), await self._seen()
        await work()
        after = await store.stats()
        return _Counted(
            metrics.total_acquisitions - grants,
            after["round_trips"] - before["round_trips"],
            after["statements"] - before["statements"],
            await self._seen() - seen,
        )

    async def _seen(self) -> int:
        return int(await self._witness.fetchval(SEEN, self._database))


def run(quick: bool) -> Report:
    pg.need(pg.can_measure())
    with pg.server(shared_preload_libraries="pg_stat_statements") as started:
        started.execute("CREATE EXTENSION pg_stat_statements")
        return asyncio.run(_run(started, 20 if quick else 200))


async def _task(pending: Awaitable[object]) -> None:
    await pending


async def _run(started: pg.PostgresServer, repeats: int) -> Report:
    url = await asyncio.to_thread(pg.database, started)
    ratesync.configure_store("db", "postgres", url=url, auto_create=True, command_timeout=30)
    generous = {"rate_per_second": 1e7, "burst": 1_000_000_000, "fail_closed": True, "outage_budget": 30.0}
    ratesync.configure_limiter("hot", "db", **generous)  # type: ignore[arg-type]
    ratesync.configure_limiter("slots", "db", max_concurrent=1000, **generous)  # type: ignore[arg-type]
    ratesync.configure_limiter("spent", "db", rate_per_second=0.001, fail_closed=True, outage_budget=30)
    witness = await asyncpg.connect(started.url(socket=True))
    blocker = await asyncpg.connect(url)
    books = _Books(witness, urlsplit(url).path.lstrip("/"))
    acquire = ratesync.acquire

    async def lone() -> None:
        for _ in range(100):
            await acquire("hot")

    async def refused() -> None:
        for _ in range(100):
            await ratesync.try_acquire("spent")

    async def slots() -> None:
        for _ in range(100):
            async with acquire("slots"):
                pass
            while await blocker.fetchval("SELECT count(*) FROM rate_limiter_state_leases"):
                await asyncio.sleep(0)

    async def crowd() -> None:
        async def one() -> None:
            for _ in range(repeats):
                await acquire("hot")

        await asyncio.gather(*(one() for _ in range(1000)))

    async def once() -> None:
        await acquire("hot")

    @contextlib.asynccontextmanager
    async def one_at_the_server() -> AsyncIterator[None]:
        # The row is locked, so the first call waits at the server, and what follows behind it in our queue.
        async with blocker.transaction():
            await blocker.execute("SELECT 1 FROM rate_limiter_state WHERE group_id = 'hot' FOR UPDATE")
            first = asyncio.create_task(once())
            while not await witness.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            ):
                await asyncio.sleep(0)
            yield
        await first

    async def waiting() -> None:
        async with one_at_the_server():
            others = [asyncio.create_task(once()) for _ in range(999)]
            await asyncio.sleep(0)
        await asyncio.gather(*others)

    async def given_up() -> None:
        async with one_at_the_server():
            others = [asyncio.create_task(once()) for _ in range(100)]
            await asyncio.sleep(0)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    state = ratesync.get_store("db").state()
    lock = ratesync.get_store("db").lock
    serial = itertools.count()

    def lone_state(operation: Callable[[int], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            for _ in range(100):
                await operation(next(serial))

        return work

    async def lock_cycle(number: int) -> None:
        async with lock(f"lock-{number}", ttl=600):
            pass

    await state.set("kept", "1")
    await state.increment("hot")
    alone: dict[str, Callable[[int], Awaitable[object]]] = {
        "check_and_set": lambda number: state.check_and_set(f"key-{number}", "1", ttl=300),
        "check_and_set that is refused": lambda _: state.check_and_set("kept", "1"),
        "get": lambda _: state.get("kept"),
        "set": lambda _: state.set("kept", "1"),
        "increment": lambda _: state.increment("hot"),
        "lock cycle": lock_cycle,
    }

    async def mixed() -> None:
        await state.many(
            [
                ops.check_and_set("kept", "1"),
                *(ops.check_and_set(f"many-{n}", "1") for n in range(50)),
                ops.increment("hot"),
                ops.get("kept"),
                ops.set("kept", "2"),
                ops.delete("many-1"),
            ]
        )

    async def crowd_of_state() -> None:
        async with blocker.transaction():
            await blocker.execute("SELECT 1 FROM acteon_state WHERE key = 'hot' FOR UPDATE")
            first = asyncio.create_task(_task(state.increment("hot")))
            while not await witness.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            ):
                await asyncio.sleep(0)
            others = [asyncio.create_task(_task(state.increment("hot"))) for _ in range(999)]
            await asyncio.sleep(0)
        await asyncio.gather(first, *others)

    # Connections of all lanes, prepared statements, schema.
    await lone()
    await slots()
    await crowd()
    await acquire("spent")
    for operation in alone.values():
        await asyncio.gather(*(operation(next(serial)) for _ in range(20)))
    await mixed()

    counted_state = {name: await books.of("hot", lone_state(operation)) for name, operation in alone.items()}
    together = await books.of("hot", mixed)
    hot = await books.of("hot", crowd_of_state)

    counted = {
        "100 lone acquires": await books.of("hot", lone),
        "100 lone tries that are refused": await books.of("spent", refused),
        f"1,000 tasks, {1000 * repeats:,} acquires": await books.of("hot", crowd),
        "1 acquire sent, 999 arrive meanwhile": await books.of("hot", waiting),
        "1 acquire sent, 100 cancelled before": await books.of("hot", given_up),
        "100 lone acquires and releases of a slot": await books.of("slots", slots),
    }
    await blocker.close()
    await witness.close()
    table = Table(
        "counts: what reached the server",
        ["", "grants", "round trips", "statements", "statements seen by the server"],
        [
            [name, integer(c.grants), integer(c.trips), integer(c.statements), integer(c.seen)]
            for name, c in counted.items()
        ],
    )
    by_state = Table(
        "counts: state, what reached the server",
        ["", "operations", "round trips", "statements", "statements seen by the server"],
        [
            [f"100 lone: {name}", "100", integer(c.trips), integer(c.statements), integer(c.seen)]
            for name, c in counted_state.items()
        ]
        + [
            [name, integer(count), integer(c.trips), integer(c.statements), integer(c.seen)]
            for name, count, c in (
                ("one many() of 55 mixed operations", 55, together),
                ("1 increment sent, 999 arrive meanwhile", 1000, hot),
            )
        ],
    )
    one, refusal, running, many, cancelled, _ = counted.values()
    goals = [
        Goal("round trips of one acquire", one.trips / one.grants, 1),
        Goal("statements of one acquire", one.seen / one.grants, 1),
        Goal("round trips of one refusal", refusal.trips / 100, 1),
        Goal("1,000 tasks that arrive during a trip: statements per grant", many.seen / many.grants, 0.02),
        Goal("round trips of 100 cancelled acquires", cancelled.trips - 1, 0),
        Goal("grants charged for 100 cancelled acquires", cancelled.grants - 1, 0),
        *(
            Goal(f"statements counted by us and by the server differ: {name}", abs(c.seen - c.statements), 0)
            for name, c in counted.items()
        ),
    ]
    goals += [
        Goal(f"round trips of one {name}", c.trips / 100, 2 if name == "lock cycle" else 1)
        for name, c in counted_state.items()
    ]
    goals += [
        Goal(f"statements of one {name}", c.seen / 100, 3 if name == "lock cycle" else 1)
        for name, c in counted_state.items()
    ]
    # The keys of one call spread over the lanes, whose trips go side by side.
    goals.append(Goal("round trips of one many() of 55 mixed operations, lane by lane", together.trips, 4))
    goals.append(Goal("1,000 increments that arrive during a trip: statements each", hot.seen / 1000, 0.01))
    for goal in goals:
        goal.gated = True
    goals.append(Goal("1,000 tasks in a loop: statements per grant", running.seen / running.grants, 0.02))
    await ratesync.get_store("db").close()
    data = {name: vars(c) for name, c in counted.items()}
    data["provenance"] = [await asyncio.to_thread(pg.server_version, started)]  # type: ignore[assignment]
    return Report("counts", [table, by_state], goals, data=data)
