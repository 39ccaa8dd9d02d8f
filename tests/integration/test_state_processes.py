"""Several processes on one server: one winner, exact counters, one holder, each timeout to one claimer.

Each worker is a real process with an engine of its own. What was stored is read by asyncpg and redis-py,
and what a stale holder may still write is decided by the server, so that none of our code is the judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import asyncpg
import pytest
import redis.asyncio

import ratesync
from ratesync import fencing

SPAWN = multiprocessing.get_context("spawn")
PROCESSES = 8

_barrier: Any = None


def _remember(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


@contextlib.contextmanager
def opened(options: dict[str, Any]) -> Iterator[ratesync.Store]:
    """The store, connected, in a worker that other tests may use later."""
    ratesync.configure_store("db", **options)
    try:
        store = ratesync.get_store("db")
        store.state().initialize().wait()
        yield store
    finally:
        ratesync.shutdown()


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(PROCESSES, SPAWN, _remember, (SPAWN.Barrier(PROCESSES),)) as executor:
        yield executor


@pytest.fixture(params=["postgres", "redis"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    url = request.getfixturevalue(f"ratesync_{request.param}_url")
    created = {"auto_create": True} if request.param == "postgres" else {}
    return {"engine": request.param, "url": url, **created}


@pytest.fixture
def store(ratesync_registry: object, options: dict[str, Any]) -> ratesync.Store:
    ratesync.configure_store("db", **options)
    return ratesync.get_store("db")


async def everywhere(
    workers: ProcessPoolExecutor, work: Callable[..., Any], options: dict[str, Any], *arguments: Any
) -> list[Any]:
    """What the work returned in each of the processes, which begin it at the same moment."""
    await ratesync.get_store("db").state().initialize()  # the schema is there before they come
    loop = asyncio.get_running_loop()
    return await asyncio.gather(
        *(loop.run_in_executor(workers, work, options, number, *arguments) for number in range(PROCESSES))
    )


# One winner, exact counters -----------------------------------------------------------------------


def _create(options: dict[str, Any], number: int, keys: int, calls: int) -> list[list[int]]:
    """Which of the calls on each key won."""

    async def main(store: ratesync.Store) -> list[list[int]]:
        state = store.state(timeout=60)
        _barrier.wait(150)
        won = await asyncio.gather(
            *(
                state.check_and_set(f"key-{key}", f"{number}/{call}", ttl=300)
                for key, call in itertools.product(range(keys), range(calls))
            )
        )
        return [[call for call in range(calls) if won[key * calls + call]] for key in range(keys)]

    with opened(options) as store:
        return asyncio.run(main(store))


async def test_one_of_a_thousand_creates_a_key(workers, options, store):
    keys = 10
    wins = await everywhere(workers, _create, options, keys, 1000 // PROCESSES)
    state = store.state()
    for key in range(keys):
        winners = [f"{number}/{call}" for number in range(PROCESSES) for call in wins[number][key]]
        assert len(winners) == 1
        found = await state.get_versioned(f"key-{key}")
        assert (found.value, found.version) == (winners[0], 1)


def _count(options: dict[str, Any], number: int, tasks: int, rounds: int) -> list[int]:
    async def main(store: ratesync.Store) -> list[int]:
        state = store.state(timeout=60)
        _barrier.wait(150)

        async def work() -> list[int]:
            return [await state.increment("n") for _ in range(rounds)]

        sums = await asyncio.gather(*(work() for _ in range(tasks)))
        for own in sums:
            assert own == sorted(own)
        return list(itertools.chain.from_iterable(sums))

    with opened(options) as store:
        return asyncio.run(main(store))


async def test_a_counter_is_exact_and_each_caller_sees_a_sum_of_its_own(workers, options, store):
    total = PROCESSES * 16 * 20
    sums = await everywhere(workers, _count, options, 16, 20)
    assert sorted(itertools.chain.from_iterable(sums)) == list(range(1, total + 1))
    assert await store.state().get_versioned("n") == (total, total, None)


def _swap(options: dict[str, Any], number: int, tasks: int, rounds: int) -> int:
    """Adds by reading and swapping; returns how often it was too late."""

    async def main(store: ratesync.Store) -> int:
        state = store.state(codec="json", timeout=60)
        late = 0
        _barrier.wait(150)

        async def work() -> None:
            nonlocal late
            for _ in range(rounds):
                while True:
                    found = await state.get_versioned("n")
                    value = {"n": found.value["n"] + 1} if found else {"n": 1}
                    try:
                        await state.compare_and_swap("n", expected=found.version if found else 0, value=value)
                        break
                    except ratesync.StaleVersionError:
                        late += 1

        await asyncio.gather(*(work() for _ in range(tasks)))
        return late

    with opened(options) as store:
        return asyncio.run(main(store))


async def test_increments_through_compare_and_swap_are_exact(workers, options, store):
    late = await everywhere(workers, _swap, options, 2, 10)
    total = PROCESSES * 2 * 10
    assert await store.state(codec="json").get_versioned("n") == ({"n": total}, total, None)
    assert sum(late) > 0, "nobody raced"


# Timeouts -----------------------------------------------------------------------------------------


def _claim(options: dict[str, Any], number: int) -> list[tuple[str, int]]:
    async def main(store: ratesync.Store) -> list[tuple[str, int]]:
        state = store.state(timeout=60)
        taken: list[tuple[str, int]] = []
        empty = 0
        _barrier.wait(150)
        while empty < 3:
            found = await state.claim_due(limit=13, lease=600)
            taken += [(due.key, due.claim) for due in found]
            empty = 0 if found else empty + 1
            await asyncio.sleep(0.005)
        return taken

    with opened(options) as store:
        return asyncio.run(main(store))


async def test_each_due_timeout_goes_to_exactly_one_claimer(workers, options, store):
    state = store.state()
    expected = sorted(f"k{number}" for number in range(400))
    await asyncio.gather(*(state.schedule(key, 0) for key in expected))
    taken = list(itertools.chain.from_iterable(await everywhere(workers, _claim, options)))
    assert sorted(key for key, _ in taken) == expected
    assert all(await asyncio.gather(*(state.unschedule(key, claim=claim) for key, claim in taken)))


# Locks --------------------------------------------------------------------------------------------

GUARDED = "CREATE TABLE guarded (fence bigint); INSERT INTO guarded VALUES (0)"
WRITE_LUA = """
if tonumber(ARGV[1]) < tonumber(redis.call('GET', KEYS[1]) or '0') then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""


class Guard:
    """A resource of our own on the same server, which refuses older tokens: by triggers, or a script."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    async def __aenter__(self) -> Guard:
        if self._options["engine"] == "postgres":
            self._postgres = await asyncpg.connect(self._options["url"])
        else:
            self._redis = redis.asyncio.from_url(self._options["url"])
        return self

    async def __aexit__(self, *exc: object) -> None:
        await (self._postgres.close() if self._options["engine"] == "postgres" else self._redis.aclose())

    async def create(self) -> None:
        if self._options["engine"] == "postgres":
            await self._postgres.execute(GUARDED)
            await fencing.guard(self._postgres, "guarded")

    async def write(self, token: int) -> bool:
        if self._options["engine"] == "postgres":
            try:
                return await self._postgres.execute("UPDATE guarded SET fence = $1", token) == "UPDATE 1"
            except asyncpg.PostgresError as error:
                if not fencing.is_stale(error):
                    raise
                return False
        return bool(await self._redis.eval(WRITE_LUA, 1, "guarded", token))

    async def count(self, by: int) -> int:
        """Adds to who is inside; the server counts."""
        if self._options["engine"] == "postgres":
            return await self._postgres.fetchval(
                "INSERT INTO inside VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET n = inside.n + $1 "
                "RETURNING n",
                by,
            )
        return int(await self._redis.incrby("inside", by))


@pytest.fixture
async def guard(options: dict[str, Any]) -> AsyncIterator[Guard]:
    async with Guard(options) as guard:
        if options["engine"] == "postgres":
            await guard._postgres.execute("CREATE TABLE inside (id int PRIMARY KEY, n int)")
        await guard.create()
        yield guard


def _enter(options: dict[str, Any], number: int, tasks: int, rounds: int) -> list[tuple[int, int]]:
    """(token, how many were inside) of each time this process held the lock."""

    async def main(store: ratesync.Store) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        async with Guard(options) as guard:
            _barrier.wait(150)

            async def work() -> None:
                for _ in range(rounds):
                    async with store.lock("one", ttl=30, timeout=120) as lease:
                        seen.append((lease.token, await guard.count(1)))
                        assert await guard.write(lease.token)
                        await guard.count(-1)

            await asyncio.gather(*(work() for _ in range(tasks)))
        return seen

    with opened(options) as store:
        return asyncio.run(main(store))


async def test_one_holder_at_a_time_over_eight_processes(workers, options, store, guard):
    seen = list(itertools.chain.from_iterable(await everywhere(workers, _enter, options, 3, 6)))
    assert len(seen) == PROCESSES * 3 * 6
    assert {inside for _, inside in seen} == {1}
    assert len({token for token, _ in seen}) == len(seen)
    assert await guard.count(0) == 0


def _hold(options: dict[str, Any], ttl: float, pipe: Connection) -> None:
    """Holds the lock and does what it is told; what it sends is what it believes."""

    async def main(store: ratesync.Store) -> None:
        async with Guard(options) as guard:
            lease = await store.lock("one", ttl=ttl, timeout=60, auto_renew=True).acquire()
            pipe.send(lease.token if lease else None)
            assert lease is not None
            while (order := await asyncio.to_thread(pipe.recv)) != "end":
                if order == "write":
                    pipe.send(await guard.write(lease.token))
                elif order == "lost":
                    pipe.send(await asyncio.wait_for(lease.lost_signal(), 60))
                elif order == "extend":
                    try:
                        await lease.extend(ttl)
                        pipe.send(True)
                    except ratesync.LockLostError:
                        pipe.send(False)
                else:
                    pipe.send(await lease.release())

    with opened(options) as store:
        asyncio.run(main(store))


class Holder:
    """A process that holds the lock "one"."""

    # Renewed after a third of it, so that the holder may stand still for the rest.
    TTL = 8.0

    def __init__(self, options: dict[str, Any], ttl: float = TTL) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_hold, args=(options, ttl, theirs))
        self.process.start()

    async def answer(self) -> Any:
        async with asyncio.timeout(90):
            while not self._pipe.poll():
                assert self.process.is_alive()
                await asyncio.sleep(0.005)
        return self._pipe.recv()

    async def ask(self, order: str) -> Any:
        self._pipe.send(order)
        return await self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send("end")
        self.process.join(10)
        self.process.kill()
        self.process.join(10)


async def test_a_stopped_holder_is_succeeded_and_its_late_writes_are_refused(options, store, guard):
    await store.state().initialize()
    holder = Holder(options)
    try:
        old = await holder.answer()
        assert await holder.ask("write") is True
        # Longer than its lease, but it is renewed.
        async with asyncio.timeout(60):
            while (await store.locks())[0]["held_for"] <= Holder.TTL:
                await asyncio.sleep(0.05)
        with pytest.raises(ratesync.LockTimeoutError):
            async with store.lock("one", ttl=30, timeout=0.1):
                pytest.fail("two holders")
        holder.signal(signal.SIGSTOP)
        async with store.lock("one", ttl=60, timeout=60) as lease:
            assert lease.token > old
            assert await guard.write(lease.token)
            holder.signal(signal.SIGCONT)
            assert await holder.ask("write") is False
            assert await holder.ask("lost") is True
            assert await holder.ask("extend") is False
            assert await holder.ask("write") is False
            assert await holder.ask("release") is False
            assert not lease.lost
            assert await guard.write(lease.token)
            assert await store.try_lock("one", ttl=30) is None
    finally:
        holder.signal(signal.SIGCONT)
        holder.end()


async def test_a_killed_holder_is_succeeded_by_a_waiter_when_its_lease_is_over(options, store, guard):
    await store.state().initialize()
    holder = Holder(options)
    try:
        old = await holder.answer()

        async def wait() -> int:
            async with store.lock("one", ttl=30, timeout=60) as lease:
                return lease.token

        waiters = [asyncio.create_task(wait()) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(waiter.done() for waiter in waiters)
        holder.signal(signal.SIGKILL)
        tokens = await asyncio.gather(*waiters)
        assert [old, *tokens] == sorted({old, *tokens})
    finally:
        holder.end()


def _write_under_lock(options: dict[str, Any], pipe: Connection) -> None:
    """Takes the lock again and again and reports each write that the server let through or refused."""

    async def main(store: ratesync.Store) -> None:
        async with Guard(options) as guard:
            pipe.send("ready")
            while not pipe.poll():
                try:
                    async with store.lock("one", ttl=0.4, timeout=30) as lease:
                        for _ in range(3):
                            pipe.send((lease.token, await guard.write(lease.token)))
                            await asyncio.sleep(0.005)
                except ratesync.LockLostError:
                    pipe.send("lost")
            pipe.send("end")

    with opened(options) as store:
        asyncio.run(main(store))


@pytest.mark.slow
async def test_holders_stopped_at_any_moment_never_write_with_an_old_token(options, store, guard):
    await store.state().initialize()
    pipes, processes = [], []
    for _ in range(4):
        ours, theirs = SPAWN.Pipe()
        processes.append(SPAWN.Process(target=_write_under_lock, args=(options, theirs)))
        processes[-1].start()
        pipes.append(ours)
    events: list[list[Any]] = [[] for _ in pipes]

    def read() -> None:
        for pipe, seen in zip(pipes, events, strict=True):
            # Behind "end" its pipe is closed; before, that is an error, and the test is over.
            while "end" not in seen[-1:] and pipe.poll():
                seen.append(pipe.recv())

    def granted() -> int:
        return sum(event[1] for seen in events for event in seen if isinstance(event, tuple))

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(90):
            while not condition():
                read()
                await asyncio.sleep(0.002)

    try:
        await until(lambda: all(seen for seen in events))
        for _ in range(8):
            victim = random.choice(processes)
            await asyncio.sleep(random.uniform(0.02, 0.1))
            os.kill(victim.pid, signal.SIGSTOP)
            end = time.monotonic() + random.choice([0.1, 0.8])
            await until(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            os.kill(victim.pid, signal.SIGCONT)
        await until(lambda: granted() > 20)
        for pipe in pipes:
            pipe.send("stop")
        await until(lambda: all("end" in seen for seen in events))
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    holders = [{event[0] for event in seen if isinstance(event, tuple)} for seen in events]
    for one, other in itertools.combinations(holders, 2):
        assert not one & other, "two processes held one token"
    for seen in events:
        tokens = [event[0] for event in seen if isinstance(event, tuple)]
        assert tokens == sorted(tokens)
