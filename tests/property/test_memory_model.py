"""The memory store and the engine's waiting, held against a model written from the specification.

The model is the textbook: GCRA with one number of state (or one of the windows of `window_model`), a
semaphore, a queue of waiters, and a list of slots that were dealt for a later time. Hypothesis plays
random calls against both with a hand-moved clock; after each step every call must have the same outcome
at the same time, and `peek` must agree.
All times are multiples of 1/128 s, so the sums are exact on both sides.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from window_model import MODELS, Model

from ratesync._engine import Engine, Limiter
from ratesync.errors import ConfigValidationError, RateLimiterAcquisitionError

SECOND = 1_000_000_000
TICK = SECOND // 128
FOREVER = 1 << 62

# The model --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """One acquisition: what it asked for, and what became of it."""

    group: Group
    cost: int
    deadline: int
    submitted: int
    outcome: str = "new"  # waiting, sleeping, granted, refused, cancelled, released
    waited: int = 0
    stamp: int = 0
    holds: bool = False
    limit: int = 0  # of the window, when it was asked for

    def end(self, outcome: str, now: int) -> None:
        self.outcome = outcome
        self.waited = now - self.submitted


@dataclass
class Slot:
    """A time that was dealt, and the state of the bucket right after the deal."""

    at: int
    stamp: int


@dataclass(eq=False)
class Group:
    """One limit."""

    interval: int  # 0: no rate
    burst: int
    margin: int
    most: int  # 0: no concurrency
    tat: int = 0
    active: int = 0
    waiters: list[Call] = field(default_factory=list)
    # Sleepers of the same cost that follow each other share their slots in order.
    runs: list[tuple[list[Call], list[Slot]]] = field(default_factory=list)

    def acquire(self, call: Call, now: int) -> None:
        if self.most and (self.active >= self.most or self.waiters):
            if call.deadline <= now:
                call.end("refused", now)
            else:
                call.outcome = "waiting"
                self.waiters.append(call)
            return
        self.deal(call, now)

    @property
    def has_units(self) -> bool:
        return self.interval > 0

    def can_never_be_had(self, cost: int, timeout: int | None) -> bool:
        return timeout == 0 and self.has_units and cost > self.burst

    def deal_units(self, call: Call, now: int) -> int | None:
        """How long to sleep; None: refused."""
        tat = max(self.tat, now) + call.cost * self.interval
        wait = max(0, tat - self.burst * self.interval - now)
        patience = call.deadline - now
        if wait > patience + self.margin:
            return None
        self.tat = tat
        call.stamp = tat
        return 0 if wait <= self.margin else min(wait, patience)

    def give_back(self, call: Call, stamp: int) -> None:
        if stamp == self.tat:
            self.tat -= call.cost * self.interval

    def forget(self) -> None:
        self.tat = 0

    def deal(self, call: Call, now: int) -> None:
        wait = 0
        if self.has_units:
            dealt = self.deal_units(call, now)
            if dealt is None:
                call.end("refused", now)
                return
            wait = dealt
        if self.most:
            self.active += 1
            call.holds = True
        if wait == 0:
            call.end("granted", now)
            return
        call.outcome = "sleeping"
        slot = Slot(now + wait, call.stamp)
        if self.runs:
            calls, slots = self.runs[-1]
            if calls[0].cost == call.cost and slots[-1].at <= slot.at:
                calls.append(call)
                slots.append(slot)
                return
        self.runs.append(([call], [slot]))

    def serve(self, now: int) -> None:
        while self.waiters and self.active < self.most:
            self.deal(self.waiters.pop(0), now)

    def free(self, call: Call, now: int) -> None:
        if call.holds:
            call.holds = False
            self.active -= 1
            self.serve(now)

    def cancel(self, call: Call, now: int) -> None:
        if call.outcome == "waiting":
            self.waiters.remove(call)
        else:
            index = next(i for i, (calls, _) in enumerate(self.runs) if call in calls)
            calls, slots = self.runs[index]
            calls.remove(call)
            spare = slots.pop()
            if not calls:
                del self.runs[index]
            for others, theirs in self.runs:
                if theirs[-1].at <= spare.at:
                    continue
                if others[0].cost != call.cost:
                    break
                theirs.append(spare)
                theirs.sort(key=lambda slot: slot.at)
                spare = theirs.pop()
            self.give_back(call, spare.stamp)
        call.end("cancelled", now)
        self.free(call, now)

    def settle(self, delta: int, now: int) -> None:
        if not self.has_units:
            return
        if delta > 0:
            self.tat = max(self.tat, now) + delta * self.interval
        elif delta < 0:
            self.tat = max(0, self.tat + delta * self.interval)

    def reset(self, holders: list[Call], now: int) -> None:
        self.forget()
        self.active = 0
        for call in holders:
            call.holds = False
        sleepers = [call for calls, _ in self.runs for call in calls]
        self.runs = []
        for call in sleepers:
            self.deal(call, now)
        self.serve(now)

    def pass_time(self, now: int) -> None:
        for calls, slots in self.runs:
            while slots and slots[0].at <= now:
                slots.pop(0)
                calls.pop(0).end("granted", now)
        self.runs = [run for run in self.runs if run[0]]
        for call in [call for call in self.waiters if call.deadline <= now]:
            self.waiters.remove(call)
            call.end("refused", now)

    def peek_units(self, now: int) -> dict[str, Any]:
        ahead = max(self.tat, now) - now
        wait = ahead + self.interval - self.burst * self.interval
        return {
            "available": max(0, (self.burst * self.interval - ahead) // self.interval),
            "full_after": ahead / SECOND,
            "retry_after": max(0, wait - self.margin if wait > self.margin else 0) / SECOND,
        }

    def peek(self, now: int) -> dict[str, Any]:
        seen = {"available": 0, "in_use": self.active, "retry_after": 0.0, "full_after": 0.0, "used": 0}
        if self.has_units:
            seen |= self.peek_units(now)
        else:
            seen["available"] = max(0, self.most - self.active)
        return seen


@dataclass(eq=False)
class WindowGroup(Group):
    """The same with a window in place of the bucket."""

    algorithm: str = "sliding_window"
    limit: int = 1
    window: int = SECOND
    model: Model = field(default_factory=Model)

    def __post_init__(self) -> None:
        self.forget()

    @property
    def has_units(self) -> bool:
        return True

    def can_never_be_had(self, cost: int, timeout: int | None) -> bool:
        return cost > self.limit

    def acquire(self, call: Call, now: int) -> None:
        call.limit = self.limit
        super().acquire(call, now)

    def deal_units(self, call: Call, now: int) -> int | None:
        said = self.model.acquire(call.limit, self.window, now, call.cost, call.deadline - now)
        call.stamp = said["stamp"]
        return said["wait"] if said["granted"] else None

    def give_back(self, call: Call, stamp: int) -> None:
        if stamp == self.model.total:
            self.model.refund(call.limit, self.window, call.cost, stamp)

    def forget(self) -> None:
        self.model = MODELS[self.algorithm]()

    def settle(self, delta: int, now: int) -> None:
        if delta:
            self.model.settle(self.window, now, delta)

    def peek_units(self, now: int) -> dict[str, Any]:
        said = self.model.peek(self.limit, self.window, now)
        return {
            "available": said["remaining"],
            "used": self.limit - said["remaining"],
            "full_after": said["full_after"] / SECOND,
            "retry_after": said["retry_after"] / SECOND,
        }


# The machine ------------------------------------------------------------------------------------------

KEYS = st.sampled_from([None, "a"])
TIMEOUTS = st.one_of(st.none(), st.integers(0, 200).map(lambda ticks: ticks * TICK))
COSTS = st.sampled_from([1, 1, 1, 2, 3])


class MemoryAgainstModel(RuleBasedStateMachine):
    """The same calls to both."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = Engine(manual_clock=True)
        self.limiter: Limiter | None = None
        self.calls: list[tuple[Call, Any, asyncio.Task[Any]]] = []
        self.groups: dict[str | None, Group] = {}
        self.now = 1000 * SECOND

    @initialize(
        rate=st.sampled_from([0, 8, 32]),
        burst=st.integers(1, 4),
        most=st.integers(0, 3),
        margin=st.sampled_from([0, 1, 2]),
    )
    def configure(self, rate: int, burst: int, most: int, margin: int) -> None:
        if not rate and not most:
            most = 1
        self.limiter = Limiter(
            self.engine.add_store("memory", "memory", {}),
            "x",
            rate_per_second=float(rate) or None,
            burst=burst,
            max_concurrent=most or None,
            timing_margin_ms=margin * TICK / 1e6,
        )
        interval = SECOND // rate if rate else 0
        for key in (None, "a"):
            self.groups[key] = Group(interval, burst, min(margin * TICK, interval), most)

    def spin(self) -> None:
        for _ in range(2):
            self.loop.run_until_complete(asyncio.sleep(0))
            self.engine.advance(0)
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def run(self, pending: Any) -> Any:
        async def wait() -> Any:
            return await asyncio.wait_for(pending, 60)

        return self.loop.run_until_complete(wait())

    @rule(key=KEYS, timeout=TIMEOUTS, cost=COSTS)
    def acquire(self, key: str | None, timeout: int | None, cost: int) -> None:
        group = self.groups[key]
        seconds = None if timeout is None else timeout / SECOND
        if group.can_never_be_had(cost, timeout):
            with pytest.raises(ConfigValidationError):
                self.limiter.acquire_context(seconds, cost=cost, key=key)
            return
        permit = self.limiter.acquire_context(seconds, cost=cost, key=key)
        deadline = FOREVER if timeout is None else self.now + timeout

        async def enter() -> None:
            await permit.__aenter__()

        call = Call(group, cost, deadline, self.now)
        self.calls.append((call, permit, self.loop.create_task(enter())))
        group.acquire(call, self.now)
        self.spin()

    @rule(ticks=st.sampled_from([1, 3, 4, 8, 15, 16, 17, 64, 1000]))
    def advance(self, ticks: int) -> None:
        self.engine.advance(ticks / 128)
        self.now += ticks * TICK
        for group in self.groups.values():
            group.pass_time(self.now)
        self.spin()

    def pick(self, data: st.DataObject, *outcomes: str) -> tuple[Call, Any, asyncio.Task[Any]] | None:
        found = [entry for entry in self.calls if entry[0].outcome in outcomes]
        return data.draw(st.sampled_from(found)) if found else None

    @precondition(lambda self: any(call.outcome in ("waiting", "sleeping") for call, _, _ in self.calls))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call, _, task = self.pick(data, "waiting", "sleeping")
        task.cancel()
        call.group.cancel(call, self.now)
        self.spin()

    @precondition(lambda self: any(call.outcome == "granted" for call, _, _ in self.calls))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        call, permit, _ = self.pick(data, "granted")
        permit.release()
        permit.release()
        call.outcome = "released"
        call.group.free(call, self.now)
        self.spin()

    @precondition(lambda self: any(call.outcome == "granted" for call, _, _ in self.calls))
    @rule(data=st.data(), actual=st.integers(0, 4))
    def settle(self, data: st.DataObject, actual: int) -> None:
        call, permit, _ = self.pick(data, "granted")
        self.run(permit.settle(actual))
        call.group.settle(actual - call.cost, self.now)
        call.cost = actual
        self.spin()

    @rule(key=KEYS)
    def reset(self, key: str | None) -> None:
        group = self.groups[key]
        self.run(self.limiter._reset(key))
        group.reset([call for call, _, _ in self.calls if call.group is group], self.now)
        self.spin()

    @invariant()
    def the_states_agree(self) -> None:
        if self.limiter is None:
            return
        for key, group in self.groups.items():
            seen, expected = self.run(self.limiter._peek(key)), group.peek(self.now)
            assert seen == pytest.approx(expected, abs=2e-9)

    @invariant()
    def every_call_has_the_same_outcome(self) -> None:
        for call, permit, task in self.calls:
            if call.outcome in ("waiting", "sleeping"):
                assert not task.done(), call
            elif call.outcome == "cancelled":
                assert task.cancelled()
            elif call.outcome == "refused":
                assert isinstance(task.exception(), RateLimiterAcquisitionError)
            else:
                assert task.done(), call
                assert task.exception() is None
                assert permit.waited == pytest.approx(call.waited / SECOND, abs=2e-9)

    @invariant()
    def the_count_of_slots_held_agrees(self) -> None:
        if self.limiter is not None:
            held = self.limiter._counters()["held"]
            assert held == sum(
                call.outcome in ("granted", "sleeping") and call.group.most > 0 for call, _, _ in self.calls
            )

    def teardown(self) -> None:
        for _, permit, task in self.calls:
            task.cancel()
            permit.release()
        self.spin()
        for _, permit, _ in self.calls:
            permit.release()
        self.engine.advance(0)
        for key in self.groups:
            assert self.run(self.limiter._peek(key))["in_use"] == 0
        self.engine.shutdown()
        self.loop.close()


class WindowsAgainstModel(MemoryAgainstModel):
    """The same calls to windows, whose limit changes while they are in use."""

    @initialize(
        algorithm=st.sampled_from(list(MODELS)),
        limit=st.integers(1, 5),
        ticks=st.sampled_from([16, 64, 100]),
        most=st.sampled_from([0, 0, 2]),
    )
    def configure(self, algorithm: str, limit: int, ticks: int, most: int) -> None:
        self.store = self.engine.add_store("memory", "memory", {})
        for key in (None, "a"):
            self.groups[key] = WindowGroup(0, 1, 0, most, algorithm=algorithm, window=ticks * TICK)
        self.change(limit)

    @rule(limit=st.integers(1, 5))
    def change(self, limit: int) -> None:
        for group in self.groups.values():
            group.limit = limit
        self.limiter = Limiter(
            self.store,
            "x",
            algorithm=group.algorithm,
            limit=limit,
            window_seconds=group.window / SECOND,
            max_concurrent=group.most or None,
        )

    @invariant()
    def the_count_of_slots_held_agrees(self) -> None:
        """Each of the limiters has a count of its own."""


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
MemoryAgainstModel.TestCase.settings = SETTINGS
WindowsAgainstModel.TestCase.settings = SETTINGS
TestMemoryAgainstModel = MemoryAgainstModel.TestCase
TestWindowsAgainstModel = WindowsAgainstModel.TestCase
