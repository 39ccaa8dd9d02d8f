"""Every store carries state as the memory store does: random histories on both, compared at every step.

Nothing in a history expires by itself, so that the time a test takes cannot matter: what is to be
expired gets a moment, and both stores are asked until it is gone. Moments are compared by their order,
since each store has a clock of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ratesync
from ratesync import ops

LARGEST = 2**63 - 1
HISTORIES = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)

KEYS = st.sampled_from(["a", "a:b", "%", "k"])
KINDS = st.sampled_from([None, "chain", "a"])
VALUES = st.one_of(
    st.sampled_from(["", "text", "5", b"", b"\x00\xff", 0, LARGEST, -LARGEST - 1, LARGEST - 2]),
    st.text(max_size=5).filter(lambda text: text.isprintable()),
    st.binary(max_size=5),
    st.integers(-5, 5),
)
DELTAS = st.one_of(st.integers(-3, 3), st.sampled_from([LARGEST, -LARGEST - 1]))
TTLS = st.sampled_from([None, 1000, 5000])
EXPECTED = st.integers(1, 6)  # of the versions there were; see `Side.given`

OPERATIONS = st.one_of(
    st.builds(ops.get, KEYS, kind=KINDS),
    st.builds(ops.get_versioned, KEYS, kind=KINDS),
    st.builds(ops.check_and_set, KEYS, VALUES, TTLS, kind=KINDS),
    st.builds(ops.set, KEYS, VALUES, TTLS, kind=KINDS),
    st.builds(ops.delete, KEYS, st.none() | EXPECTED, kind=KINDS),
    st.builds(ops.increment, KEYS, DELTAS, TTLS, st.booleans(), kind=KINDS),
    st.builds(
        ops.compare_and_swap,
        KEYS,
        expected=st.just(0) | EXPECTED,
        value=VALUES,
        ttl=TTLS | st.just(ops.KEEP),
        kind=KINDS,
    ),
    st.builds(ops.touch, KEYS, TTLS, expected=st.none() | EXPECTED, kind=KINDS),
    st.builds(ops.schedule, KEYS, st.integers(0, 3), kind=KINDS),
    st.builds(ops.schedule, KEYS, st.just(timedelta(hours=1)), kind=KINDS),
    st.builds(ops.unschedule, KEYS, claim=st.none() | EXPECTED, kind=KINDS),
)
STEPS = st.one_of(
    OPERATIONS,
    OPERATIONS,
    st.tuples(st.just("many"), st.lists(OPERATIONS, max_size=5)),
    st.tuples(st.just("atomic"), st.lists(OPERATIONS, max_size=4, unique_by=lambda op: (op.key, op.kind))),
    st.tuples(st.just("expire"), KEYS, KINDS),
    st.tuples(st.just("claim"), st.integers(1, 3), KINDS),
    st.tuples(st.just("scan"), st.sampled_from(["", "a", "a:", "%"]), KINDS),
    st.tuples(st.just("purge")),
)


class Side:
    """One store: its versions, claims and moments are replaced by what two stores must have in common."""

    def __init__(self, store: str, tenant: str) -> None:
        self.state = ratesync.get_store(store).state(tenant=tenant, timeout=60)
        self.versions: dict[tuple[str, str | None], list[int]] = {}
        self.claims: dict[tuple[str, str], int] = {}
        self.moments: list[datetime] = []

    def given(self, op: ops.Op) -> ops.Op:
        """The operation with this store's versions and claims in it."""
        if op.verb == "unschedule" and op.expected is not None:
            claim = self.claims.get((op.key, op.kind or self.state.kind), 0)
            return op._replace(expected=claim + op.expected % 2 if claim else 10**9)
        if not op.expected:
            return op
        seen = self.versions.get((op.key, op.kind)) or [0]
        # Mostly the newest; sometimes one that was, or one that has yet to come.
        choice = {4: seen[0], 5: seen[-1] + 1, 6: seen[len(seen) // 2]}.get(op.expected, seen[-1])
        return op._replace(expected=max(choice, 1))

    def version(self, op: ops.Op, version: int) -> int:
        """Which of the versions of the key this is: a store may leave some out after a deletion."""
        seen = self.versions.setdefault((op.key, op.kind), [])
        if version and version not in seen:
            assert not seen or version > seen[-1], "a version went back"
            seen.append(version)
        return seen.index(version) + 1 if version else 0

    def moment(self, expires_at: datetime | None) -> str:
        """A ttl is one of two lengths, which no clock confuses; None: never."""
        if expires_at is None:
            return "never"
        left = expires_at - datetime.now(expires_at.tzinfo)
        return "short" if left < timedelta(seconds=2500) else "long"

    def plain(self, op: ops.Op, answer: Any) -> Any:
        """The answer in terms that two stores have in common."""
        if isinstance(answer, ratesync.StaleVersionError):
            return "stale", self.version(op, answer.actual)
        if isinstance(answer, ratesync.StateError):
            return type(answer).__name__
        if isinstance(answer, ratesync.Versioned):
            return answer.value, self.version(op, answer.version), self.moment(answer.expires_at)
        if op.verb in ("set", "compare_and_swap"):
            return "written", self.version(op, answer)
        return answer

    async def one(self, op: ops.Op) -> Any:
        (answer,) = await self.state.many([self.given(op)])
        return self.plain(op, answer)

    async def step(self, step: Any) -> Any:
        if isinstance(step, ops.Op):
            return await self.one(step)
        match step:
            case ("many", batch):
                answers = await self.state.many([self.given(op) for op in batch])
                return [self.plain(op, answer) for op, answer in zip(batch, answers, strict=True)]
            case ("atomic", batch):
                try:
                    answers = await self.state.many([self.given(op) for op in batch], atomic=True)
                except ratesync.RolledBackError as error:
                    return "rolled back", len(error.outcomes)
                return [self.plain(op, answer) for op, answer in zip(batch, answers, strict=True)]
            case ("expire", key, kind):
                if not await self.state.touch(key, 0.001, kind=kind):
                    return "absent"
                async with asyncio.timeout(60):
                    while await self.state.get_versioned(key, kind=kind):
                        await asyncio.sleep(0.001)
                return "expired"
            case ("claim", limit, kind):
                found = await self.state.claim_due(limit=limit, lease=10_000, kind=kind)
                for due in found:
                    assert due.claim > self.claims.get((due.key, due.kind), 0)
                    self.claims[due.key, due.kind] = due.claim
                # Of those that fell due at the same moment, a store takes any.
                return [due.due_at for due in found]
            case ("scan", prefix, kind):
                return sorted(
                    [item async for item in self.state.scan(kind=kind, prefix=prefix, page_size=2)], key=repr
                )
            case _:
                await self.state.purge()
                return None

    async def everything(self) -> Any:
        """All that is there."""
        found = []
        for kind in (None, "chain", "a"):
            for key, value in sorted([item async for item in self.state.scan(kind=kind)], key=repr):
                op = ops.get_versioned(key, kind=kind)
                answer = await self.one(op)
                assert answer[0] == value
                found.append((kind, key, answer))
        return found


_tenants = itertools.count()


async def compare(store: str, steps: Sequence[Any]) -> None:
    """The store, which is configured under that name, against the memory store."""
    ratesync.configure_store("mem", strategy="memory")
    tenant = f"tenant-{next(_tenants)}"
    memory, other = sides = [Side("mem", tenant), Side(store, tenant)]
    for step in steps:
        answers = [await side.step(step) for side in sides]
        assert answers[0] == answers[1], step
        if isinstance(step, tuple) and step[0] == "claim":
            # Which of several keys was taken is the store's choice, so both finish all that are due.
            for side in sides:
                while found := await side.state.claim_due():
                    for due in found:
                        side.claims[due.key, due.kind] = due.claim
            assert set(memory.claims) == set(other.claims)
    assert await memory.everything() == await other.everything()


def postgres(url: str, steps: Sequence[Any]) -> None:
    async def main() -> None:
        ratesync.configure_store("db", strategy="postgres", url=url, auto_create=True)
        await compare("db", steps)

    asyncio.run(main())


def redis(url: str, steps: Sequence[Any]) -> None:
    async def main() -> None:
        ratesync.configure_store("db", strategy="redis", url=url)
        await compare("db", steps)

    asyncio.run(main())


@pytest.mark.timeout(480)
@HISTORIES
@given(st.lists(STEPS, max_size=25))
def test_postgres_carries_state_as_memory_does(ratesync_postgres_url, steps):
    postgres(ratesync_postgres_url, steps)


@pytest.mark.timeout(480)
@HISTORIES
@given(st.lists(STEPS, max_size=25))
def test_redis_carries_state_as_memory_does(ratesync_redis_url, steps):
    redis(ratesync_redis_url, steps)
