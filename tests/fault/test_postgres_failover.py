"""The primary is killed under load, its synchronous standby promoted: what was acknowledged is there.

Several processes take locks and dedup keys all the while. Each notes what it was told, with the times of the
clock that they share; what is stored afterwards is read by asyncpg. An answer may fail, then it may have been
carried out or not; what was answered must be true.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import pytest

import ratesync
from ratesync.testing._sql import execute
from ratesync.testing.postgres_pair import PostgresPair

SPAWN = multiprocessing.get_context("spawn")
PROCESSES = 4
LOCKS = 3


@dataclass
class Notes:
    """What one process was told."""

    number: int
    won: list[int] = field(default_factory=list)  # dedup keys that were ours
    lost: list[int] = field(default_factory=list)  # dedup keys that were somebody's
    unknown: list[int] = field(default_factory=list)  # no answer
    added: int = 0  # increments that were acknowledged
    maybe_added: int = 0
    sums: list[int] = field(default_factory=list)  # what acknowledged increments returned
    held: list[tuple[int, int, float, float]] = field(default_factory=list)  # lock, token, from, until
    lock_losses: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def configure(url: str) -> ratesync.Store:
    ratesync.configure_store("db", engine="postgres", url=url, auto_create=True, connect_timeout=2.0)
    return ratesync.get_store("db")


def work(url: str, number: int, made: Any, failed: Any, stop: Any, answer: Connection) -> None:
    """One process: dedup keys, a counter and locks, until told to stop. It counts `made` and `failed`."""
    notes = Notes(number)

    def failure(error: Exception) -> None:
        notes.errors[type(error).__name__] += 1
        failed.value += 1

    async def keys(state: ratesync.State) -> None:
        for key in itertools.count():
            if stop.is_set():
                return
            try:
                won = await state.check_and_set(f"key-{key}", str(number), ttl=600)
            except ratesync.StoreError as error:
                notes.unknown.append(key)
                failure(error)
                await asyncio.sleep(0.02)
                continue
            (notes.won if won else notes.lost).append(key)
            made.value += 1

    async def counter(state: ratesync.State) -> None:
        while not stop.is_set():
            try:
                notes.sums.append(await state.increment("counter", ttl=None))
            except ratesync.StoreError as error:
                failure(error)
                if isinstance(error, ratesync.InDoubtError):
                    notes.maybe_added += 1
                await asyncio.sleep(0.02)
                continue
            notes.added += 1

    async def locks(store: ratesync.Store) -> None:
        for turn in itertools.count(number):
            if stop.is_set():
                return
            lock = turn % LOCKS
            try:
                lease = await store.try_lock(f"lock-{lock}", ttl=90)
            except ratesync.StoreError as error:
                failure(error)
                lease = None
            if lease is None:
                await asyncio.sleep(0.005)
                continue
            begin = time.monotonic()
            await asyncio.sleep(0.002)
            notes.held.append((lock, lease.token, begin, time.monotonic()))
            try:
                if not await lease.release():
                    notes.lock_losses += 1
            except (ratesync.StoreError, ratesync.LockError) as error:
                failure(error)

    async def main() -> None:
        store = configure(url)
        async with asyncio.TaskGroup() as group:
            group.create_task(keys(store.state(kind="dedup")))
            group.create_task(counter(store.state(kind="counter")))
            group.create_task(locks(store))

    try:
        asyncio.run(main())
        answer.send(notes)
    finally:
        ratesync.shutdown()


class Workers:
    """The processes of one test."""

    def __init__(self, url: str) -> None:
        self.stop = SPAWN.Event()
        self.made = [SPAWN.Value("q", 0) for _ in range(PROCESSES)]
        self.failed = [SPAWN.Value("q", 0) for _ in range(PROCESSES)]
        self._answers = []
        self._processes = []
        for number in range(PROCESSES):
            ours, theirs = SPAWN.Pipe()
            self._answers.append(ours)
            arguments = (url, number, self.made[number], self.failed[number], self.stop, theirs)
            self._processes.append(SPAWN.Process(target=work, args=arguments, daemon=True))
        for process in self._processes:
            process.start()

    async def reach(self, more: int) -> None:
        """Until each process got so many answers more."""
        goals = [made.value + more for made in self.made]
        async with asyncio.timeout(60):
            while any(made.value < goal for made, goal in zip(self.made, goals, strict=True)):
                assert all(process.is_alive() for process in self._processes)
                await asyncio.sleep(0.05)

    def failures(self) -> int:
        return sum(failed.value for failed in self.failed)

    async def notice(self, more_than: int) -> None:
        """Until one of them was told of a further error."""
        async with asyncio.timeout(60):
            while self.failures() <= more_than:
                assert all(process.is_alive() for process in self._processes)
                await asyncio.sleep(0.01)

    async def end(self) -> list[Notes]:
        self.stop.set()
        notes = []
        for answer in self._answers:
            assert await asyncio.to_thread(answer.poll, 90), "a process did not end"
            notes.append(answer.recv())
        for process in self._processes:
            process.join(30)
        return notes

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


def check_keys(notes: list[Notes], stored: dict[int, str]) -> None:
    winners: dict[int, list[int]] = defaultdict(list)
    for note in notes:
        for key in note.won:
            winners[key].append(note.number)
    assert [key for key, who in winners.items() if len(who) > 1] == [], "a second winner"
    assert [key for key in winners if key not in stored] == [], "an acknowledged key was lost"
    assert {key: str(who[0]) for key, who in winners.items()}.items() <= stored.items()
    for note in notes:
        # Told that somebody else was first: then somebody was, whether he learned it or not.
        assert [key for key in note.lost if stored.get(key) in (None, str(note.number))] == []
    for key in stored.keys() - winners.keys():
        assert key in notes[int(stored[key])].unknown, f"nobody knows who made key {key}"


def check_locks(notes: list[Notes]) -> None:
    turns = sorted((begin, end, lock, token) for note in notes for lock, token, begin, end in note.held)
    tokens = [token for _, _, _, token in turns]
    assert len(set(tokens)) == len(tokens), "one token was given twice"
    for name in range(LOCKS):
        mine = [turn for turn in turns if turn[2] == name]
        for before, after in itertools.pairwise(mine):
            assert before[1] <= after[0], f"two holders at once: {before}, {after}"
            assert before[3] < after[3], f"a token that did not grow: {before}, {after}"


async def test_nothing_acknowledged_is_lost_and_nobody_wins_twice(
    ratesync_registry: object, ratesync_postgres_pair: PostgresPair
) -> None:
    pair = ratesync_postgres_pair
    url = pair.create_database()
    store = configure(url)
    state = store.state(kind="dedup", timeout=60)
    assert await state.check_and_set("before", "1", ttl=600)
    lease = await store.lock("held-all-the-while", ttl=90).acquire(timeout=60)
    assert lease is not None

    workers = Workers(url)
    try:
        await workers.reach(50)
        before = workers.failures()
        await asyncio.to_thread(pair.kill_primary)
        await workers.notice(before)
        await asyncio.to_thread(pair.promote)
        await workers.reach(50)
        notes = await workers.end()
    finally:
        workers.kill()

    rows = execute(url, "SELECT key, convert_from(value, 'UTF8') FROM acteon_state WHERE key LIKE 'key-%'")
    check_keys(notes, {int(key.removeprefix("key-")): value for key, value in rows})
    check_locks(notes)
    assert sum(note.lock_losses for note in notes) == 0

    sums = [value for note in notes for value in note.sums]
    assert len(set(sums)) == len(sums), "one increment was counted twice or one sum given twice"
    total = await store.state(kind="counter", timeout=60).get("counter")
    acknowledged = sum(note.added for note in notes)
    assert acknowledged <= total <= acknowledged + sum(note.maybe_added for note in notes)

    # What was taken before is still ours, and known as ours.
    assert not await state.check_and_set("before", "2", ttl=600)
    assert await store.try_lock("held-all-the-while") is None
    assert not lease.lost
    assert await lease.release()
    again = await store.lock("held-all-the-while").acquire(timeout=60)
    assert again is not None
    assert again.token > lease.token
    assert await again.release()


async def test_a_waiter_gets_the_lock_after_the_failover(
    ratesync_registry: object, ratesync_postgres_pair: PostgresPair
) -> None:
    pair = ratesync_postgres_pair
    store = configure(pair.create_database())
    lease = await store.lock("invoice", ttl=90).acquire(timeout=60)
    assert lease is not None
    held: list[int] = []

    async def wait() -> None:
        async with store.lock("invoice", ttl=90, timeout=120) as second:
            held.append(second.token)

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0.2)
    await asyncio.to_thread(pair.kill_primary)
    await asyncio.to_thread(pair.promote)
    assert not waiter.done(), "nobody gave the lock back"
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ratesync.StoreError):
                assert await lease.release()
                break
            await asyncio.sleep(0.1)
        await waiter
    assert held
    assert held[0] > lease.token


async def test_where_the_primary_does_not_wait_for_the_standby_keys_are_lost_and_this_test_sees_it(
    ratesync_registry: object,
) -> None:
    with PostgresPair(synchronous=False) as pair:
        assert pair.standby is not None
        url = pair.create_database()
        store = configure(url)
        state = store.state(kind="dedup", timeout=60)
        assert await state.check_and_set("key-0", "0", ttl=600)
        at = pair.primary.execute("SELECT pg_current_wal_lsn()::text")[0][0]
        async with asyncio.timeout(60):
            while not pair.standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{at}'::pg_lsn")[0][0]:
                await asyncio.sleep(0.02)
        pair.standby.stop()
        assert await state.check_and_set("key-1", "0", ttl=600)
        pair.kill_primary()
        pair.standby.start()
        pair.promote()
        rows = execute(
            url, "SELECT key, convert_from(value, 'UTF8') FROM acteon_state WHERE key LIKE 'key-%'"
        )
        ratesync.shutdown()
    stored = {int(key.removeprefix("key-")): value for key, value in rows}
    assert stored == {0: "0"}
    with pytest.raises(AssertionError, match="was lost"):
        check_keys([Notes(0, won=[0, 1])], stored)
