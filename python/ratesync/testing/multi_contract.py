"""The contract of several limits in one acquire: what every store has to keep, as tests to inherit.

    class TestMyStoreMulti(MultiLimitContract):
        @pytest.fixture
        def store_options(self):
            return {"engine": "memory"}

As in `limit_contract`, everything goes through the public API, and no test rests on the speed of the
machine. Needs pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ratesync
from ratesync import AcquireTimeoutError, ConfigValidationError, LimiterNotFoundError
from ratesync.testing.contract import PATIENCE
from ratesync.testing.limit_contract import SLOW, Caller, eventually

__all__ = ["MultiLimitContract"]

# Everything that can limit, so that a refusal by one must not show in the others.
MIXED: dict[str, dict[str, Any]] = {
    "bucket": {"rate_per_second": SLOW, "burst": 9},
    "slots": {"max_concurrent": 9},
    "both": {"rate_per_second": SLOW, "burst": 9, "max_concurrent": 9},
    "fixed": {"algorithm": "fixed_window", "limit": 9, "window_seconds": 86_400 * 30},
    "counter": {"algorithm": "sliding_counter", "limit": 9, "window_seconds": 86_400 * 30},
    "log": {"algorithm": "sliding_window", "limit": 9, "window_seconds": 86_400},
}

CHILD = """if True:
    import json, random, sys, ratesync
    store, limiters = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    ratesync.configure_store("contract", **store)
    for name, options in limiters.items():
        ratesync.configure_limiter(name, "contract", fail_closed=True, outage_budget=30, **options)
"""


class MultiLimitContract:
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        """Arguments of `configure_store` for an empty store of its own."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def store(self, ratesync_registry: Path, store_options: dict[str, Any]) -> None:
        ratesync.configure_store("contract", **store_options)

    @pytest.fixture(params=["asyncio", "threads"])
    def call(self, request: pytest.FixtureRequest, store: None) -> Iterator[Caller]:
        caller = Caller(request.param)
        yield caller
        caller.close()

    @staticmethod
    def limit(limiter_id: str, store_id: str = "contract", **options: Any) -> ratesync.RateLimiter:
        ratesync.configure_limiter(limiter_id, store_id, fail_closed=True, outage_budget=30, **options)
        return ratesync.get_limiter(limiter_id)

    @staticmethod
    def seen(call: Caller, *limiter_ids: str) -> dict[str, tuple[int, int]]:
        """Units left and slots in use of each."""
        states = {name: call(ratesync.get_limiter(name).peek()) for name in limiter_ids}
        return {name: (state.remaining, state.in_use) for name, state in states.items()}

    def settled(self, call: Caller, expected: dict[str, tuple[int, int]]) -> None:
        """For effects that a store learns a moment later: a release, a refund."""
        deadline = time.monotonic() + 60
        while self.seen(call, *expected) != expected and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.seen(call, *expected) == expected

    @staticmethod
    async def refused() -> None:
        """Until the store has refused what it was asked before: it answered other questions since."""
        for _ in range(5):
            await asyncio.gather(*(ratesync.get_limiter(name).peek() for name in ("a", "b")))
            await asyncio.sleep(0.1)

    # All or nothing ---------------------------------------------------------------------------------

    def test_a_grant_charges_every_limit_and_the_slots_come_back_together(self, call: Caller) -> None:
        self.limit("rate", rate_per_second=SLOW, burst=5)
        self.limit("a", max_concurrent=2)
        self.limit("b", rate_per_second=SLOW, burst=3, max_concurrent=4)
        with call.holding(ratesync.acquire("rate", "a", "b", cost=2)) as permit:
            assert self.seen(call, "rate", "a", "b") == {"rate": (3, 0), "a": (1, 1), "b": (1, 1)}
            assert permit.remaining == 1
            assert permit.limiter_id == "rate, a, b"
            assert permit.waited >= 0
            assert not permit.lost
        self.settled(call, {"rate": (3, 0), "a": (2, 0), "b": (1, 0)})

    @pytest.mark.parametrize("blocking", list(MIXED))
    def test_a_refusal_by_any_kind_of_limit_charges_nothing_anywhere(
        self, call: Caller, blocking: str
    ) -> None:
        for name, options in MIXED.items():
            self.limit(name, **options)
        full = [ratesync.acquire(blocking) for _ in range(9)]
        for permit in full:
            call(ratesync._engine.attempt(permit))
        before = self.seen(call, *MIXED)
        assert before[blocking][0] == 0
        names = list(MIXED)
        random.shuffle(names)
        assert not call(ratesync.try_acquire(*names))
        with pytest.raises(AcquireTimeoutError) as caught, call.holding(ratesync.acquire(*names, timeout=0)):
            pytest.fail("entered")
        assert caught.value.group_id == blocking
        assert self.seen(call, *MIXED) == before
        others = [name for name in names if name != blocking]
        assert call(ratesync.try_acquire(*others))
        assert {units for units, _ in self.seen(call, *others).values()} == {8}

    def test_a_time_beyond_the_timeout_is_refused_at_once_and_named(self, call: Caller) -> None:
        self.limit("free", rate_per_second=SLOW, burst=5)
        self.limit("used", rate_per_second=SLOW)
        assert call(ratesync.try_acquire("used"))
        begin = time.monotonic()
        with pytest.raises(AcquireTimeoutError) as caught, call.holding(ratesync.acquire("free", "used", 50)):
            pytest.fail("entered")
        assert time.monotonic() - begin < 40
        assert caught.value.group_id == "used"
        assert caught.value.reason == "rate_limited"
        assert 50 < (caught.value.retry_after or 0) <= 100
        assert self.seen(call, "free") == {"free": (5, 0)}

    @pytest.mark.parametrize("order", [("here", "there"), ("there", "here")])
    def test_two_stores_a_refusal_by_one_charges_nothing_in_the_other(
        self, call: Caller, order: tuple[str, str]
    ) -> None:
        ratesync.configure_store("other", "memory")
        self.limit("here", "other", rate_per_second=SLOW, burst=5, max_concurrent=5)
        self.limit("there", rate_per_second=SLOW, burst=2, max_concurrent=5)
        before = {"here": (5, 0), "there": (2, 0)}
        with call.holding(ratesync.acquire(*order, timeout=PATIENCE)):
            assert self.seen(call, *order) == {"here": (4, 1), "there": (1, 1)}
        assert call(ratesync.try_acquire("there"))
        assert call(ratesync.get_limiter("there").release())
        before = {"here": (4, 0), "there": (0, 0)}
        self.settled(call, before)
        for _ in range(5):
            assert not call(ratesync.try_acquire(*order))
        self.settled(call, before)
        call(ratesync.get_limiter("there").reset())
        assert call(ratesync.try_acquire("here", cost=4))
        call(ratesync.get_limiter("here").release())
        assert not call(ratesync.try_acquire(*order))
        self.settled(call, {"here": (0, 0), "there": (2, 0)})

    async def test_two_stores_many_refused_at_once_charge_nothing(self) -> None:
        ratesync.configure_store("other", "memory")
        here = self.limit("here", "other", rate_per_second=SLOW, burst=50)
        there = self.limit("there", rate_per_second=SLOW, burst=1)
        assert await there.try_acquire()
        await asyncio.gather(*(ratesync.try_acquire("here", "there", timeout=5) for _ in range(40)))

        async def all_back() -> bool:
            return (await here.peek()).remaining == 50

        await eventually(all_back)

    def test_settle_corrects_every_limit(self, call: Caller) -> None:
        self.limit("a", rate_per_second=SLOW, burst=10)
        self.limit("b", rate_per_second=SLOW, burst=10, max_concurrent=1)
        with call.holding(ratesync.acquire("a", "b", cost=5)) as permit:
            call(permit.settle(2))
            self.settled(call, {"a": (8, 0), "b": (0, 1)})
            call(permit.settle(3))
        self.settled(call, {"a": (7, 0), "b": (1, 0)})

    def test_metrics_count_at_each_limit(self, call: Caller) -> None:
        a, b = self.limit("a", rate_per_second=SLOW, burst=3), self.limit("b", max_concurrent=1)
        with call.holding(ratesync.acquire("a", "b")):
            assert b.get_metrics().current_concurrent == 1
            assert not call(ratesync.try_acquire("a", "b"))
        assert [m.get_metrics().total_acquisitions for m in (a, b)] == [1, 1]
        assert [m.get_metrics().timeouts for m in (a, b)] == [0, 1]
        assert b.get_metrics().max_concurrent_reached == 1
        self.settled(call, {"b": (1, 0)})

    # Names ------------------------------------------------------------------------------------------

    def test_a_name_with_a_key_is_the_limit_of_that_key(self, call: Caller) -> None:
        self.limit("tenant", rate_per_second=SLOW, burst=4)
        self.limit("all", rate_per_second=SLOW, burst=9)
        registered = set(ratesync.list_limiters())
        assert call(ratesync.try_acquire("all", "tenant:a:7"))
        assert call(ratesync.try_acquire("tenant:a:7"))
        assert call(ratesync.try_acquire("tenant", key="a:7"))
        assert set(ratesync.list_limiters()) == registered
        clone = call(ratesync.get_or_clone_limiter("tenant", "a:7"))
        assert call(clone.peek()).remaining == 1
        assert self.seen(call, "tenant") == {"tenant": (4, 0)}
        with call.holding(ratesync.acquire("tenant:b", "tenant:c")) as permit:
            assert permit.limiter_id == "tenant:b, tenant:c"
        # A limiter of exactly that name comes first.
        self.limit("tenant:own", rate_per_second=SLOW, burst=1)
        assert call(ratesync.try_acquire("tenant:own", "all"))
        assert not call(ratesync.try_acquire("all", "tenant:own"))

    def test_mistakes_are_told_before_anything_is_charged(self, call: Caller) -> None:
        self.limit("a", rate_per_second=SLOW, burst=3)
        self.limit("b", max_concurrent=3)
        for wrong in (
            lambda: ratesync.acquire("a", "b", "a"),
            lambda: ratesync.acquire("a:1", "a:1"),
            lambda: ratesync.acquire("a", "b", key="7"),  # type: ignore[call-overload]
            lambda: ratesync.acquire("a", "b", cost=4),
            lambda: ratesync.acquire("a", "b", cost=0),
            lambda: ratesync.acquire("a", "b", timeout=-1),
            lambda: ratesync.acquire(*[f"a:{n}" for n in range(65)]),
            lambda: ratesync.acquire("a:1", key="2"),
            lambda: ratesync.try_acquire("a", "b", "b", 1),
        ):
            with pytest.raises(ConfigValidationError):
                wrong()
        for unknown in ("nobody", "nobody:7", ":7", "a:"):
            with pytest.raises(LimiterNotFoundError):
                ratesync.acquire("a", unknown)
        call(ratesync._engine.attempt(ratesync.acquire(*[f"b:{n}" for n in range(64)])))
        assert self.seen(call, "a", "b") == {"a": (3, 0), "b": (3, 0)}

    # Waiting ----------------------------------------------------------------------------------------

    async def test_waiters_are_served_in_the_order_they_came(self) -> None:
        self.limit("a", max_concurrent=1)
        self.limit("b", max_concurrent=1)
        order: list[int] = []

        async def work(number: int) -> None:
            async with ratesync.acquire(*(("a", "b") if number % 2 else ("b", "a"))):
                order.append(number)

        async with ratesync.acquire("b", "a"):
            tasks = []
            for number in range(10):
                tasks.append(asyncio.create_task(work(number)))
                await asyncio.sleep(0)
            await self.refused()
            assert order == []
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        assert order == list(range(10))

    async def test_both_kinds_of_callers_get_slots_and_none_is_starved(self) -> None:
        self.limit("a", max_concurrent=1)
        self.limit("b", max_concurrent=1)
        done: list[str] = []

        async def work(name: str, *limits: str) -> None:
            async with ratesync.acquire(*limits):
                done.append(name)
                await asyncio.sleep(0)

        async with ratesync.acquire("a"):
            tasks = [asyncio.create_task(work("both", "a", "b"))]
            await self.refused()
            tasks += [asyncio.create_task(work("one", "a")) for _ in range(20)]
            await self.refused()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        assert sorted(done) == ["both"] + ["one"] * 20
        # Whoever asks while the answer of the first one is under way may be before it.
        assert done.index("both") <= 3

    def test_waits_for_the_latest_of_the_times(self, call: Caller) -> None:
        self.limit("fast", rate_per_second=1000.0)
        self.limit("slow", rate_per_second=20.0)
        begin = time.monotonic()
        for _ in range(5):
            with call.holding(ratesync.acquire("fast", "slow")):
                pass
        # Four intervals of 50 ms; the margin forgives 10 ms at each.
        assert time.monotonic() - begin >= 4 * 0.04 - 0.01

    async def test_cancelling_at_any_moment_leaves_nothing(self) -> None:
        ratesync.configure_store("other", "memory")
        a = self.limit("a", max_concurrent=2)
        b = self.limit("b", "other", max_concurrent=2)
        rate = self.limit("rate", rate_per_second=SLOW, burst=100_000)

        async def enter() -> None:
            async with ratesync.acquire("a", "b", "rate"):
                await asyncio.sleep(0)

        for turns in range(40):
            tasks = [asyncio.create_task(enter()) for _ in range(4)]
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            if turns % 3 == 0:
                await asyncio.sleep(0.001 * (turns % 5))
            tasks[turns % 4].cancel()
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

        async def nothing_held() -> bool:
            return (await a.peek()).in_use == 0 and (await b.peek()).in_use == 0

        await eventually(nothing_held)
        assert (await rate.peek()).remaining >= 100_000 - 160
        assert [m.get_metrics().current_concurrent for m in (a, b)] == [0, 0]
        (await ratesync.acquire("a", "b", "rate")).release()

    async def test_a_bare_grant_is_released_by_its_permit_or_its_limiters(self) -> None:
        a, b = self.limit("a", max_concurrent=2), self.limit("b", max_concurrent=2)
        permit = await ratesync.acquire("a", "b")
        assert await ratesync.try_acquire("a", "b", timeout=PATIENCE)
        permit.release()
        permit.release()
        assert await a.release()
        assert await b.release()
        assert not await a.release()

        async def nothing_held() -> bool:
            return (await a.peek()).in_use == 0 and (await b.peek()).in_use == 0

        await eventually(nothing_held)

    # Threads and processes --------------------------------------------------------------------------

    def test_threads_and_loops_with_overlapping_limits_in_any_order(self) -> None:
        names = [f"slot-{n}" for n in range(6)]
        for name in names:
            self.limit(name, max_concurrent=1)
        inside = dict.fromkeys(names, 0)
        lock = threading.Lock()
        worst = [0]

        def mark(chosen: list[str], by: int) -> None:
            with lock:
                for name in chosen:
                    inside[name] += by
                    worst[0] = max(worst[0], inside[name])

        def plain(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(25):
                chosen = chance.sample(names, 3)
                with ratesync.acquire(*chosen, timeout=PATIENCE):
                    mark(chosen, 1)
                    mark(chosen, -1)

        async def many(seed: int) -> None:
            chance = random.Random(seed)

            async def one() -> None:
                chosen = chance.sample(names, 2)
                async with ratesync.acquire(*chosen, timeout=PATIENCE):
                    mark(chosen, 1)
                    await asyncio.sleep(0)
                    mark(chosen, -1)

            await asyncio.gather(*(one() for _ in range(25)))

        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(plain, seed) for seed in range(3)]
            loops = [pool.submit(asyncio.run, many(seed)) for seed in range(3, 6)]
            for job in [*jobs, *loops]:
                job.result(timeout=120)
        assert worst[0] == 1

    def _children(
        self, store_options: dict[str, Any], limiters: dict[str, Any], body: str, count: int
    ) -> Any:
        if not ratesync.get_store("contract").capabilities["shared"]:
            pytest.skip("the store belongs to one process")
        for name, options in limiters.items():
            self.limit(name, **options)
        ratesync.initialize_all_limiters().wait()
        command = [sys.executable, "-c", CHILD + body, json.dumps(store_options), json.dumps(limiters)]
        return [
            subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
            for n in range(count)
        ]

    def test_processes_with_overlapping_limits_in_any_order_share_them(
        self, store_options: dict[str, Any]
    ) -> None:
        limiters: dict[str, Any] = {f"slot-{n}": {"max_concurrent": 1} for n in range(4)}
        limiters["total"] = {"rate_per_second": 1e-5, "burst": 50}
        body = """
    chance = random.Random(int(sys.argv[3]))
    granted = 0
    for _ in range(30):
        names = chance.sample(sorted(limiters), 3)
        names = [*names, "total"] if "total" not in names else names
        try:
            with ratesync.acquire(*names, timeout=60):
                granted += 1
        except ratesync.AcquireTimeoutError as error:
            assert error.group_id == "total", error
    print(granted)
"""
        children = self._children(store_options, limiters, body, 3)
        counts = [int(child.communicate(timeout=120)[0]) for child in children]
        assert sum(counts) == 50
        state = ratesync.get_limiter("slot-0").peek().wait()
        assert state.in_use == 0

    def test_a_release_wakes_those_of_another_process(self, store_options: dict[str, Any]) -> None:
        limiters: dict[str, Any] = {
            "slot": {"max_concurrent": 1},
            "rate": {"rate_per_second": 1e6, "burst": 9},
        }
        body = """
    print("ready", flush=True)
    sys.stdin.readline()
    with ratesync.acquire("rate", "slot") as permit:
        print(permit.waited > 0, flush=True)
"""
        children = self._children(store_options, limiters, body, 3)
        with ratesync.acquire("slot", "rate"):
            for child in children:
                assert child.stdout.readline() == "ready\n"
                child.stdin.write("go\n")
                child.stdin.flush()
            time.sleep(0.3)
            assert all(child.poll() is None for child in children)
        # Each ends right after its turn, and gives the slot back before it is gone.
        assert [child.communicate(timeout=60)[0] for child in children] == ["True\n"] * 3
        assert ratesync.get_limiter("slot").peek().wait().in_use == 0
