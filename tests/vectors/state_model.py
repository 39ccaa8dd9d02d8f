"""State by its specification, in dicts: what one caller must be answered, whatever the store.

The model follows a store: a test moves `now`, hands each operation to the store, and shows the model the
operation with the answer. The model raises AssertionError when no lawful store answers so. It predicts
everything but two things. Where a key is created and no row of it may lie any more, its first version is
only known to be above all it had; the model learns it from the next answer that tells. And of timeouts that
fell due at the same moment, a store may take any.

Times are milliseconds on the store's clock. Keys are one tenant's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import ratesync
from ratesync.ops import KEEP, Op

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SMALLEST, LARGEST = -(2**63), 2**63 - 1
Name = tuple[str, str]  # kind, key


def milliseconds(given: float | timedelta) -> int:
    """Of a ttl or a lease; less than one is one."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    return max(1, round(seconds * 1000))


@dataclass
class Row:
    """A key, living or dead. A dead row is only there for its version, which goes on."""

    value: Any = None
    version: int = 0
    exact: bool = True  # False: `version` is the least it can be
    expires: int | None = None
    removed: bool = False  # deleted, as opposed to expired
    begun: bool = False  # by begin(), and not written since


@dataclass
class Timeout:
    due: int
    claimable: int  # from then on
    claim: int = 0


@dataclass
class StateModel:
    """Everything that is kept under one prefix, namespace and tenant."""

    kind: str = "default"  # of operations that name none
    now: int = 0
    grace: int = 60_000  # an expired row of begin() is kept at least this long for its finish()
    rows: dict[Name, Row] = field(default_factory=dict)
    timeouts: dict[Name, Timeout] = field(default_factory=dict)
    claims: int = 0  # the highest that was given
    any_died: bool = False  # versions of fresh keys need not begin at 1 any more

    # --- rows -------------------------------------------------------------------------------------

    def name(self, op: Op) -> Name:
        return op.kind or self.kind, op.key

    def living(self, name: Name) -> Row | None:
        row = self.rows.get(name)
        if row is None or row.removed:
            return None
        if row.expires is not None and row.expires <= self.now:
            self.any_died = True
            return None
        return row

    def expiry(self, ttl: Any) -> int | None:
        return None if ttl is None or ttl is KEEP else self.now + milliseconds(ttl)

    def write(self, name: Name, value: Any, expires: int | None) -> Row:
        """A new version."""
        row, living = self.rows.get(name) or Row(), self.living(name) is not None
        exact = (row.exact and living) or not self.any_died
        self.rows[name] = Row(value, row.version + 1, exact, expires)
        return self.rows[name]

    def learn(self, row: Row, version: int) -> None:
        """The store says which version a living row has."""
        assert version == row.version if row.exact else version >= row.version, f"version {version} of {row}"
        row.version, row.exact = version, True

    def meant(self, row: Row, expected: int | None, done: bool) -> bool:
        """Whether `expected` is the row's version. Where that is not known: as the answer says."""
        if expected is None or row.exact:
            return expected is None or expected == row.version
        if done:
            self.learn(row, expected)
        return done

    # --- one operation ----------------------------------------------------------------------------

    def check(self, op: Op, answer: Any) -> bool:
        """`answer`: what the method returned, or the exception that it raised.

        Returns whether the operation could be done, as an atomic batch asks it.
        """
        expect = getattr(self, op.verb)
        return bool(expect(op, self.name(op), answer))

    def get(self, op: Op, name: Name, answer: Any) -> bool:
        row = self.living(name)
        same(answer, row.value if row else None)
        return True

    def get_versioned(self, op: Op, name: Name, answer: Any) -> bool:
        row = self.living(name)
        if row is None:
            assert answer is None
            return True
        same(answer.value, row.value)
        self.learn(row, answer.version)
        expires = None if row.expires is None else EPOCH + timedelta(milliseconds=row.expires)
        assert answer.expires_at == expires
        return True

    def check_and_set(self, op: Op, name: Name, answer: Any) -> bool:
        absent = self.living(name) is None
        assert answer is absent
        if absent:
            self.write(name, op.value, self.expiry(op.ttl))
        return absent

    def set(self, op: Op, name: Name, answer: Any) -> bool:
        row = self.living(name)
        expires = row.expires if row and op.ttl is KEEP else self.expiry(op.ttl)
        self.learn(self.write(name, op.value, expires), answer)
        return True

    def delete(self, op: Op, name: Name, answer: Any) -> bool:
        row = self.living(name)
        if row is None:
            assert answer is False
            return True  # gone is what was wanted
        done = self.meant(row, op.expected, answer)
        assert answer is done
        if done:
            row.value, row.removed, self.any_died = None, True, True
        return done

    def increment(self, op: Op, name: Name, answer: Any) -> bool:
        row = self.living(name)
        if row is None:
            same(answer, op.delta)
            self.write(name, op.delta, self.expiry(op.ttl))
            return True
        if type(row.value) is not int:
            assert isinstance(answer, ratesync.NotAnIntegerError)
            return False
        total = row.value + op.delta
        if not SMALLEST <= total <= LARGEST:
            assert isinstance(answer, ratesync.CounterOverflowError)
            return False
        same(answer, total)
        self.write(name, total, self.expiry(op.ttl) if op.renew else row.expires)
        return True

    def compare_and_swap(self, op: Op, name: Name, answer: Any) -> bool:
        row, stale = self.living(name), isinstance(answer, ratesync.StaleVersionError)
        if stale:
            assert answer.expected == op.expected
        if op.expected == 0 and row is None:
            self.learn(self.write(name, op.value, self.expiry(op.ttl)), answer)
            return True
        if row is None:
            assert stale
            assert answer.actual == 0
            return False
        if op.expected and self.meant(row, op.expected, not stale):
            expires = row.expires if op.ttl is KEEP else self.expiry(op.ttl)
            self.learn(self.write(name, op.value, expires), answer)
            return True
        assert stale
        assert answer.actual != op.expected
        self.learn(row, answer.actual)
        return False

    def touch(self, op: Op, name: Name, answer: Any) -> bool:
        row = self.living(name)
        done = row is not None and self.meant(row, op.expected, answer)
        assert answer is done
        if row and done:
            row.expires = self.expiry(op.ttl)
        return done

    def schedule(self, op: Op, name: Name, answer: Any) -> bool:
        assert answer is None
        at = op.at
        if isinstance(at, timedelta):
            due = self.now + round(at.total_seconds() * 1000)
        else:
            due = round((at - EPOCH).total_seconds() * 1000 if isinstance(at, datetime) else at * 1000)
        self.timeouts[name] = Timeout(due, due)
        return True

    def unschedule(self, op: Op, name: Name, answer: Any) -> bool:
        timeout = self.timeouts.get(name)
        done = timeout is not None and op.expected in (None, timeout.claim)
        assert answer is done
        if done:
            del self.timeouts[name]
        return done

    # --- idempotency ------------------------------------------------------------------------------

    def begin(self, key: str, value: Any, ttl: Any, answer: tuple[bool, int, Any]) -> None:
        name = self.kind, key
        created, version, found = answer
        row = self.living(name)
        assert created is (row is None)
        if row is None:
            row = self.write(name, value, self.expiry(ttl))
            row.begun = True
        else:
            same(found, row.value)
        self.learn(row, version)

    def finish(self, key: str, value: Any, version: int, ttl: Any, answer: tuple[bool, int]) -> None:
        """A row that merely expired still counts, for a while."""
        name = self.kind, key
        done, actual = answer
        row, late = self.living(name), self.rows.get(name)
        if row is None and late and not late.removed:
            assert late.expires is not None
            kept = late.begun and late.version == version and self.now < late.expires + self.grace
            assert done or not kept, "the row is thrown away too early"
            row = late if done else None
        if row is None:
            assert answer == (False, 0)
            return
        if not self.meant(row, version, done):
            assert not done
            self.learn(row, actual)
            return
        assert done
        version, row.exact = row.version, True
        written = self.write(name, value, row.expires if ttl is KEEP else self.expiry(ttl))
        written.version, written.exact = version + 1, True  # the row lay there
        self.learn(written, actual)

    # --- several keys -----------------------------------------------------------------------------

    def check_atomic(self, ops: Sequence[Op], answer: Any) -> None:
        """`answer`: the list of `many(atomic=True)`, or the RolledBackError. The versions must be known."""
        if not isinstance(answer, ratesync.RolledBackError):
            assert len(answer) == len(ops)
            done = [self.check(op, one) for op, one in zip(ops, answer, strict=True)]
            assert all(done), "some of it was not done"
            return
        assert len(answer.outcomes) == len(ops)
        assert not all(self.can(op) for op in ops), "nothing stood in the way"

    def can(self, op: Op) -> bool:
        """Whether an atomic batch may contain this."""
        name = self.name(op)
        row = self.living(name)
        known = op.expected is None or (row is not None and row.version == op.expected)
        match op.verb:
            case "get" | "get_versioned" | "set" | "schedule":
                return True
            case "check_and_set":
                return row is None
            case "delete":
                return row is None or known
            case "compare_and_swap":
                return (row is None and op.expected == 0) or (row is not None and known)
            case "touch":
                return row is not None and known
            case "increment":
                if row is None:
                    return True
                return type(row.value) is int and SMALLEST <= row.value + op.delta <= LARGEST
            case "unschedule":
                timeout = self.timeouts.get(name)
                return timeout is not None and op.expected in (None, timeout.claim)

    def check_scan(self, kind: str, prefix: str, items: Iterable[tuple[str, Any]]) -> None:
        """In the order of the keys' bytes; sort before, where the store gives none."""
        names = [name for name in self.rows if name[0] == kind and name[1].startswith(prefix)]
        there = sorted((name for name in names if self.living(name)), key=lambda name: name[1].encode())
        items = list(items)
        assert [key for key, _ in items] == [key for _, key in there]
        for (_, value), name in zip(items, there, strict=True):
            same(value, self.rows[name].value)

    def check_claims(self, limit: int, lease: float, kind: str | None, found: Sequence[Any]) -> None:
        due = {
            name: timeout
            for name, timeout in self.timeouts.items()
            if timeout.claimable <= self.now and kind in (None, name[0])
        }
        assert len(found) == min(limit, len(due))
        times = sorted(timeout.claimable for timeout in due.values())[: len(found)]
        taken = []
        for one in found:
            timeout = due.pop((one.kind, one.key))
            assert one.due_at == EPOCH + timedelta(milliseconds=timeout.due)
            assert one.claim > self.claims
            self.claims = timeout.claim = one.claim
            taken.append(timeout.claimable)
            timeout.claimable = self.now + milliseconds(lease)
        assert taken == times, "not the oldest first"

    def check_purge(self, removed: int) -> None:
        """Dead rows may have been purged before, in the background."""
        dead = sum(self.living(name) is None for name in self.rows)
        assert 0 <= removed <= dead
        self.any_died |= dead > 0


def same(answer: Any, value: Any) -> None:
    assert answer == value
    assert type(answer) is type(value)
