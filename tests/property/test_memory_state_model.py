"""State of the memory store, held against a model written from the specification.

Hypothesis plays random calls of the public interface with a hand-moved clock; every answer must be the one
that the model allows, and at the end everything that is there is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from state_model import LARGEST, SMALLEST, StateModel

import ratesync
from ratesync import ops
from ratesync._registry import _registry
from ratesync.ops import Op
from ratesync.testing import ManualClock

KEYS = st.sampled_from(["a", "ab", "a%", "b", "\xe9", "k" * 40])
KINDS = st.sampled_from([None, None, "chain", "group"])
VALUES = st.one_of(
    st.sampled_from(
        ["", "text", "5", b"", b"\x00\xff", 0, 7, LARGEST, LARGEST - 1, SMALLEST, "x" * 100, b"y" * 70]
    ),
    st.integers(-3, 3),
)
TTLS = st.sampled_from([None, None, 0.0001, 0.003, 0.01, 5, timedelta(hours=2)])
KEEP_OR_TTLS = st.one_of(st.just(ops.KEEP), TTLS)
DELTAS = st.one_of(st.integers(-3, 3), st.sampled_from([LARGEST, SMALLEST]))
# Times pass one millisecond, a little, and more than any grace.
STEPS = st.sampled_from([1, 2, 3, 4, 7, 10, 5_000, 61_000, 7_200_000])


def attempt(call: Callable[[], Any]) -> Any:
    """The answer, or the error by which state says that it could not do what was asked."""
    try:
        return call()
    except ratesync.StateError as error:
        return error


class StateAgainstModel(RuleBasedStateMachine):
    """One state object on the embedded store, and the model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock().start()
        ratesync.configure_store("model", strategy="memory")
        store = ratesync.get_store("model")
        self.state = store.state(prefix="model_", kind="event")
        # Nothing of these may ever be seen by the one above.
        for other in (store.state(prefix="model_", tenant="other"), store.state(prefix="", kind="event")):
            for key in ("a", "b"):
                other.set(key, "not yours").wait()
                other.schedule(key, 0).wait()
        self.model = StateModel(kind="event")
        self.read_clock()

    def read_clock(self) -> None:
        self.model.now = round(self.clock.now * 1000)

    @initialize(count=st.sampled_from([0, 1, 40]))
    def fill(self, count: int) -> None:
        """Tables that grew, and rows that a sweep has to pass over."""
        for i in range(count):
            self.run(ops.set(f"filler{i}", i, ttl=None if i % 2 else 0.01))

    # --- one operation ----------------------------------------------------------------------------

    def call(self, op: Op) -> Any:
        method = getattr(self.state, op.verb)
        match op.verb:
            case "check_and_set" | "set":
                return method(op.key, op.value, op.ttl, kind=op.kind).wait()
            case "delete":
                return method(op.key, op.expected, kind=op.kind).wait()
            case "increment":
                return method(op.key, op.delta, op.ttl, op.renew, kind=op.kind).wait()
            case "compare_and_swap":
                swap = {"expected": op.expected, "value": op.value, "ttl": op.ttl}
                return method(op.key, **swap, kind=op.kind).wait()
            case "touch":
                return method(op.key, op.ttl, expected=op.expected, kind=op.kind).wait()
            case "schedule":
                return method(op.key, op.at, kind=op.kind).wait()
            case "unschedule":
                return method(op.key, claim=op.expected, kind=op.kind).wait()
            case _:
                return method(op.key, kind=op.kind).wait()

    def run(self, op: Op) -> None:
        self.model.check(op, attempt(lambda: self.call(op)))

    def version(self, data: st.DataObject, key: str, kind: str | None, least: int) -> int:
        """Mostly the one that it has, or had; sometimes one before or after it."""
        row = self.model.rows.get((kind or "event", key))
        newest = row.version if row else 1
        return max(least, newest + data.draw(st.sampled_from([0, 0, 0, -1, 1]), "offset"))

    @rule(key=KEYS, kind=KINDS)
    def get(self, key: str, kind: str | None) -> None:
        self.run(ops.get(key, kind=kind))

    @rule(key=KEYS, kind=KINDS)
    def get_versioned(self, key: str, kind: str | None) -> None:
        self.run(ops.get_versioned(key, kind=kind))

    @rule(key=KEYS, kind=KINDS, value=VALUES, ttl=TTLS)
    def check_and_set(self, key: str, kind: str | None, value: Any, ttl: Any) -> None:
        self.run(ops.check_and_set(key, value, ttl, kind=kind))

    @rule(key=KEYS, kind=KINDS, value=VALUES, ttl=TTLS)
    def set(self, key: str, kind: str | None, value: Any, ttl: Any) -> None:
        self.run(ops.set(key, value, ttl, kind=kind))

    @rule(data=st.data(), key=KEYS, kind=KINDS, choose=st.booleans())
    def delete(self, data: st.DataObject, key: str, kind: str | None, choose: bool) -> None:
        expected = self.version(data, key, kind, 1) if choose else None
        self.run(ops.delete(key, expected, kind=kind))

    @rule(key=KEYS, kind=KINDS, delta=DELTAS, ttl=TTLS, renew=st.booleans())
    def increment(self, key: str, kind: str | None, delta: int, ttl: Any, renew: bool) -> None:
        self.run(ops.increment(key, delta, ttl, renew, kind=kind))

    @rule(data=st.data(), key=KEYS, kind=KINDS, value=VALUES, ttl=KEEP_OR_TTLS, create=st.booleans())
    def compare_and_swap(
        self, data: st.DataObject, key: str, kind: str | None, value: Any, ttl: Any, create: bool
    ) -> None:
        expected = 0 if create else self.version(data, key, kind, 0)
        self.run(ops.compare_and_swap(key, expected=expected, value=value, ttl=ttl, kind=kind))

    @rule(data=st.data(), key=KEYS, kind=KINDS, ttl=TTLS, choose=st.booleans())
    def touch(self, data: st.DataObject, key: str, kind: str | None, ttl: Any, choose: bool) -> None:
        expected = self.version(data, key, kind, 1) if choose else None
        self.run(ops.touch(key, ttl, expected=expected, kind=kind))

    # --- idempotency ------------------------------------------------------------------------------

    @rule(key=KEYS, value=VALUES, ttl=TTLS)
    def begin(self, key: str, value: Any, ttl: Any) -> None:
        self.model.begin(key, value, ttl, self.state._begin(key, value, ttl, None).wait())

    @rule(data=st.data(), key=KEYS, value=VALUES, ttl=TTLS)
    def finish(self, data: st.DataObject, key: str, value: Any, ttl: Any) -> None:
        version = self.version(data, key, None, 1)
        answer = self.state._finish(key, value, version, ttl, None).wait()
        self.model.finish(key, value, version, ttl, answer)

    # --- timeouts ---------------------------------------------------------------------------------

    @rule(key=KEYS, kind=KINDS, after=st.integers(-20, 20), form=st.sampled_from(["delta", "number", "date"]))
    def schedule(self, key: str, kind: str | None, after: int, form: str) -> None:
        moment = self.model.now + after
        at = {
            "delta": timedelta(milliseconds=after),
            "number": moment / 1000,
            "date": datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=moment),
        }[form]
        self.run(ops.schedule(key, at, kind=kind))

    @rule(data=st.data(), key=KEYS, kind=KINDS, choose=st.booleans())
    def unschedule(self, data: st.DataObject, key: str, kind: str | None, choose: bool) -> None:
        timeout = self.model.timeouts.get((kind or "event", key))
        claim = None
        if choose:
            claim = max(1, (timeout.claim if timeout else 0) - data.draw(st.integers(0, 1), "before"))
        self.run(ops.unschedule(key, claim=claim, kind=kind))

    @rule(limit=st.integers(1, 4), lease=st.sampled_from([0.002, 5]), kind=KINDS)
    def claim_due(self, limit: int, lease: float, kind: str | None) -> None:
        found = self.state.claim_due(limit, lease, kind=kind).wait()
        self.model.check_claims(limit, lease, kind, found)

    # --- several keys -----------------------------------------------------------------------------

    def draw_op(self, data: st.DataObject) -> Op:
        key, kind = data.draw(KEYS), data.draw(KINDS)
        verb = data.draw(st.sampled_from(["create", "set", "get", "add", "swap", "touch", "delete", "due"]))
        match verb:
            case "create":
                return ops.check_and_set(key, data.draw(VALUES), data.draw(TTLS), kind=kind)
            case "set":
                return ops.set(key, data.draw(VALUES), data.draw(TTLS), kind=kind)
            case "get":
                return ops.get_versioned(key, kind=kind)
            case "add":
                return ops.increment(key, data.draw(DELTAS), data.draw(TTLS), kind=kind)
            case "swap":
                expected = self.version(data, key, kind, 0)
                ttl = data.draw(KEEP_OR_TTLS)
                return ops.compare_and_swap(
                    key, expected=expected, value=data.draw(VALUES), ttl=ttl, kind=kind
                )
            case "touch":
                return ops.touch(key, data.draw(TTLS), kind=kind)
            case "delete":
                return ops.delete(key, kind=kind)
            case _:
                return ops.schedule(key, timedelta(milliseconds=3), kind=kind)

    @rule(data=st.data(), count=st.integers(0, 6))
    def many(self, data: st.DataObject, count: int) -> None:
        batch = [self.draw_op(data) for _ in range(count)]
        answers = self.state.many(batch).wait()
        assert len(answers) == count
        for op, answer in zip(batch, answers, strict=True):
            self.model.check(op, answer)

    @rule(data=st.data(), count=st.integers(1, 4))
    def many_or_none(self, data: st.DataObject, count: int) -> None:
        drawn = {self.model.name(op): op for op in (self.draw_op(data) for _ in range(count))}
        for kind, key in drawn:
            self.run(ops.get_versioned(key, kind=kind))  # all versions are known from here on
        drawn = {
            name: op if op.expected is None else op._replace(expected=self.version(data, op.key, op.kind, 0))
            for name, op in drawn.items()
        }
        batch = list(drawn.values())
        self.model.check_atomic(batch, attempt(lambda: self.state.many(batch, atomic=True).wait()))

    @rule(kind=KINDS, prefix=st.sampled_from(["", "a", "a%", "fill", "zz"]), page_size=st.integers(1, 5))
    def scan(self, kind: str | None, prefix: str, page_size: int) -> None:
        items = list(self.state.scan(kind=kind, prefix=prefix, page_size=page_size))
        self.model.check_scan(kind or "event", prefix, items)

    # --- time -------------------------------------------------------------------------------------

    @rule(step=STEPS)
    def pass_time(self, step: int) -> None:
        self.clock.advance(step / 1000)
        self.read_clock()

    @rule(limit=st.sampled_from([1, 1000]))
    def purge(self, limit: int) -> None:
        removed = self.state.purge(limit).wait()
        assert removed <= limit
        self.model.check_purge(removed)

    # What is drawn must not depend on what was answered: which dead rows are gone is up to the store, and
    # Hypothesis wants the same drawn again when it repeats a history.

    @rule(which=st.integers(0, 59), before=st.integers(0, 1))
    def wait_for_an_expiry(self, which: int, before: int) -> None:
        """To the millisecond at which a row dies, or the one before."""
        if not self.model.rows:
            return
        name = sorted(self.model.rows)[which % len(self.model.rows)]
        expires = self.model.rows[name].expires
        if expires is not None and expires - self.model.now > 1:
            self.pass_time(expires - self.model.now - before)
        self.run(ops.get(name[1], kind=name[0]))

    @rule(which=st.integers(0, 59), before=st.integers(0, 1), kind=KINDS)
    def wait_for_a_timeout(self, which: int, before: int, kind: str | None) -> None:
        """To the millisecond at which it may be claimed, or the one before."""
        if self.model.timeouts:
            name = sorted(self.model.timeouts)[which % len(self.model.timeouts)]
            left = self.model.timeouts[name].claimable - self.model.now
            if left > 1:
                self.pass_time(left - before)
        self.claim_due(4, 0.002, kind)

    @rule(data=st.data(), which=st.integers(0, 59), before=st.integers(0, 1))
    def finish_at_the_last_moment(self, data: st.DataObject, which: int, before: int) -> None:
        """Or one after: of one that began and was not heard of, while dead rows are thrown away."""
        begun = sorted(key for (_, key), row in self.model.rows.items() if row.begun and row.expires)
        key = begun[which % len(begun)] if begun else "a"
        if begun:
            left = self.model.rows["event", key].expires + self.model.grace - self.model.now
            if left > 1:
                self.pass_time(left - before)
            self.purge(1000)
        self.finish(data, key, "late", 5)

    def teardown(self) -> None:
        try:
            for kind, key in list(self.model.rows):
                self.run(ops.get_versioned(key, kind=kind))
            for kind in ("event", "chain", "group"):
                self.model.check_scan(kind, "", self.state.scan(kind=kind))
        finally:
            self.clock.stop()
            _registry.clear()


StateAgainstModel.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStateAgainstModel = pytest.mark.usefixtures("ratesync_registry")(StateAgainstModel.TestCase)
