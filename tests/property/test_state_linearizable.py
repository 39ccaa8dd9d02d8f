"""Concurrent operations on a key happen one after the other, in an order that fits all answers and times.

Tasks, and processes where the store is shared, call at random on a few keys and write down when they
called and what came back, by the machine's monotonic clock, which all processes share. The checker
(tests/vectors/linearizability.py) looks for the order.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from linearizability import Call, check

import ratesync
from ratesync.testing import RedisCluster, TcpProxy

SPAWN = multiprocessing.get_context("spawn")
VERBS = ["create", "begin", "get", "get", "set", "add", "add", "add", "swap", "swap", "swap", "delete"]

_barrier: Any = None


def _remember(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


class Caller:
    """Calls at random. `seen` are the versions it knows of, so that its swaps have a chance."""

    def __init__(self, state: ratesync.State, keys: int, seed: object) -> None:
        self._state = state
        self._keys = [f"key-{number}" for number in range(keys)]
        self._random = random.Random(repr(seed))
        self._values = (hash((seed, number)) % 10**9 for number in itertools.count())
        self._seen: dict[str, int] = {}
        self._tried: set[str] = set()
        self.calls: list[Call] = []

    def choose(self) -> tuple[str, str, Any]:
        key, verb = self._random.choice(self._keys), self._random.choice(VERBS)
        if key not in self._tried:  # so that one creation of each key succeeds, whatever the seed
            self._tried.add(key)
            verb = "create"
        version = self._seen.get(key, 0)
        if verb == "swap":
            return (
                ("begin", key, next(self._values))
                if not version
                else (verb, key, (version, next(self._values)))
            )
        if verb == "add":
            return verb, key, self._random.randint(-5, 5)
        if verb == "delete":
            return verb, key, self._random.choice([None, version or None])
        return verb, key, None if verb == "get" else next(self._values)

    def pending(self, verb: str, key: str, argument: Any) -> ratesync.Pending[Any]:
        state = self._state
        match verb:
            case "create":
                return state.check_and_set(key, argument)
            case "begin":
                return state.compare_and_swap(key, expected=0, value=argument)
            case "get":
                return state.get_versioned(key)
            case "set":
                return state.set(key, argument)
            case "add":
                return state.increment(key, argument)
            case "swap":
                return state.compare_and_swap(key, expected=argument[0], value=argument[1])
            case _:
                return state.delete(key, expected=argument)

    def answered(self, verb: str, key: str, argument: Any, answer: Any, called: float) -> None:
        returned = time.monotonic()
        if isinstance(answer, ratesync.StaleVersionError):
            actual = answer.actual
            answer = 0 if verb == "begin" else (False, actual)
            self._seen[key] = actual
        elif verb == "get" and answer is not None:
            self._seen[key] = answer.version
            answer = (answer.version, answer.value)
        elif verb in ("begin", "set"):
            self._seen[key] = answer
        elif verb == "swap":
            self._seen[key] = answer
            answer = (True, answer)
        self.calls.append(Call(key, verb, argument, answer, called, returned))

    def unanswered(self, verb: str, key: str, argument: Any, called: float) -> None:
        if verb != "get":
            self.calls.append(Call(key, verb, argument, None, called))

    async def once(self, give_up: float = 0.0) -> None:
        """One call; with that probability it is cancelled at a random turn of the event loop."""
        chosen = self.choose()
        called = time.monotonic()
        task = asyncio.ensure_future(self.pending(*chosen))
        if self._random.random() < give_up:
            for _ in range(self._random.randrange(4)):
                await asyncio.sleep(0)
            if self._random.random() < 0.5:
                await asyncio.sleep(self._random.random() * 0.002)
            task.cancel()
        try:
            self.answered(*chosen, await task, called)
        except ratesync.StaleVersionError as stale:
            self.answered(*chosen, stale, called)
        except asyncio.CancelledError:
            self.unanswered(*chosen, called)
        except ratesync.StoreError as error:
            if error.in_doubt:
                self.unanswered(*chosen, called)

    def once_in_a_thread(self) -> None:
        chosen = self.choose()
        called = time.monotonic()
        try:
            self.answered(*chosen, self.pending(*chosen).wait(), called)
        except ratesync.StaleVersionError as stale:
            self.answered(*chosen, stale, called)


async def call_at_random(
    state: ratesync.State, tasks: int, rounds: int, keys: int, seed: object, give_up: float = 0.0
) -> list[Call]:
    callers = [Caller(state, keys, (seed, number)) for number in range(tasks)]

    async def work(caller: Caller) -> None:
        for _ in range(rounds):
            await caller.once(give_up)

    await asyncio.gather(*(work(caller) for caller in callers))
    return [call for caller in callers for call in caller.calls]


def _in_process(options: dict[str, Any], number: int, seed: int, tasks: int, rounds: int) -> list[Call]:
    ratesync.configure_store("db", **options)
    state = ratesync.get_store("db").state(kind="linear", timeout=60)
    state.initialize().wait()
    _barrier.wait(120)
    try:
        return asyncio.run(call_at_random(state, tasks, rounds, 3, (seed, number)))
    finally:
        ratesync.shutdown()


def assert_linearizable(calls: list[Call], at_least: int) -> None:
    assert sum(not call.pending for call in calls) >= at_least
    assert {call.verb for call in calls if call.answer} >= {"create", "get", "set", "swap", "delete"}
    broken = check(calls)
    for key, history in broken.items():
        print(f"--- {key}", *history, sep="\n")
    assert not broken, f"not linearizable: {sorted(broken)}"


@pytest.fixture(params=["memory", "postgres", "redis", "cluster"])
def options(request: pytest.FixtureRequest, ratesync_registry: object) -> dict[str, Any]:
    if request.param == "memory":
        return {"engine": "memory"}
    if request.param == "cluster":
        cluster: RedisCluster = request.getfixturevalue("ratesync_redis_cluster")
        return {"engine": "redis", "url": cluster.url}
    url = request.getfixturevalue(f"ratesync_{request.param}_url")
    return {"engine": request.param, "url": url} | (
        {"auto_create": True} if request.param == "postgres" else {}
    )


@pytest.fixture
def state(options: dict[str, Any]) -> ratesync.State:
    ratesync.configure_store("db", **options)
    return ratesync.get_store("db").state(kind="linear", timeout=60)


@pytest.fixture
def seed() -> int:
    chosen = random.randrange(10**9)
    print(f"seed of the callers: {chosen}")
    return chosen


@pytest.mark.parametrize("keys", [1, 4])
async def test_tasks(state, seed, keys):
    calls = await call_at_random(state, 10, 60, keys, seed)
    assert_linearizable(calls, at_least=600)


async def test_tasks_that_are_cancelled_at_any_moment(state, seed):
    calls = await call_at_random(state, 8, 60, 6, seed, give_up=0.2)
    assert_linearizable(calls, at_least=200)


def test_threads(state, seed):
    callers = [Caller(state, 2, (seed, number)) for number in range(8)]
    barrier = threading.Barrier(8)

    def work(caller: Caller) -> None:
        barrier.wait()
        for _ in range(50):
            caller.once_in_a_thread()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, callers))
    assert_linearizable([call for caller in callers for call in caller.calls], at_least=400)


@pytest.mark.parametrize("options", ["postgres", "redis"], indirect=True)
@pytest.mark.parametrize(("tasks", "rounds"), [(3, 60), pytest.param(5, 200, marks=pytest.mark.slow)])
async def test_processes(options, state, seed, tasks, rounds):
    await state.initialize()
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(4, SPAWN, _remember, (SPAWN.Barrier(4),)) as executor:
        histories = await asyncio.gather(
            *(
                loop.run_in_executor(executor, _in_process, options, number, seed, tasks, rounds)
                for number in range(4)
            )
        )
    assert_linearizable(list(itertools.chain.from_iterable(histories)), at_least=4 * tasks * rounds)


@pytest.mark.parametrize("options", ["postgres", "redis"], indirect=True)
async def test_tasks_whose_connections_are_cut(options, seed):
    """Answers are lost; what the store then says, done, not done or in doubt, is the truth."""
    from urllib.parse import urlsplit

    parts = urlsplit(options["url"])
    with TcpProxy(parts.hostname or "127.0.0.1", parts.port) as proxy:
        ratesync.configure_store("db", **(options | {"url": proxy.through(options["url"])}))
        state = ratesync.get_store("db").state(kind="linear", timeout=60)
        await state.get("warm")
        calling = asyncio.create_task(call_at_random(state, 8, 150, 6, seed))
        cuts = 0
        while not calling.done():
            await asyncio.sleep(random.uniform(0.005, 0.03))
            if cuts < 40:
                proxy.cut()
                cuts += 1
        calls = await calling
        ratesync.shutdown()
    assert cuts >= 3
    assert_linearizable(calls, at_least=200)
