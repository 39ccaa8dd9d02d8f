"""Operations for `State.many`: small frozen records, made by the functions of this module.

Each function takes what the method of `State` of the same name takes, and does nothing by itself. The
core reads an `Op` as the tuple that it is; the order of its fields is an agreement with it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from ratesync._engine import KEEP, KeepType

__all__ = [
    "KEEP",
    "Op",
    "check_and_set",
    "compare_and_swap",
    "delete",
    "get",
    "get_versioned",
    "increment",
    "schedule",
    "set",
    "touch",
    "unschedule",
]

Ttl = int | float | timedelta | None
Verb = Literal[
    "check_and_set",
    "get",
    "get_versioned",
    "set",
    "delete",
    "increment",
    "compare_and_swap",
    "touch",
    "schedule",
    "unschedule",
]


class Op(NamedTuple):
    """One operation of a `State.many`. Make it with the functions of `ratesync.ops`.

    Fields that an operation has no use for keep their defaults.

    Example:
        >>> from ratesync import ops
        >>> ops.increment("visits", 2, ttl=60).verb
        'increment'
    """

    verb: Verb
    key: str
    kind: str | None = None
    value: Any = None
    ttl: Ttl | KeepType = None
    expected: int | None = None
    delta: int = 1
    renew: bool = False
    at: datetime | timedelta | float | None = None


def check_and_set(key: str, value: Any = "1", ttl: Ttl = None, *, kind: str | None = None) -> Op:
    """Creates the key when it is absent; the result is whether it was: `State.check_and_set`."""
    return Op("check_and_set", key, kind, value, ttl)


def get(key: str, *, kind: str | None = None) -> Op:
    """The value, or None: `State.get`."""
    return Op("get", key, kind)


def get_versioned(key: str, *, kind: str | None = None) -> Op:
    """The value with version and expiry, or None: `State.get_versioned`."""
    return Op("get_versioned", key, kind)


def set(  # noqa: A001 - as the method is called
    key: str, value: Any, ttl: Ttl = None, *, kind: str | None = None
) -> Op:
    """Writes whatever is there; the result is the new version: `State.set`."""
    return Op("set", key, kind, value, ttl)


def delete(key: str, expected: int | None = None, *, kind: str | None = None) -> Op:
    """Removes the key; the result is whether it was there: `State.delete`."""
    return Op("delete", key, kind, expected=expected)


def increment(
    key: str, delta: int = 1, ttl: Ttl = None, renew: bool = False, *, kind: str | None = None
) -> Op:
    """Adds to a counter; the result is the sum: `State.increment`."""
    return Op("increment", key, kind, ttl=ttl, delta=delta, renew=renew)


def compare_and_swap(
    key: str, *, expected: int, value: Any, ttl: Ttl | KeepType = KEEP, kind: str | None = None
) -> Op:
    """Writes where the version is `expected`, 0: creates; the result is the new version."""
    return Op("compare_and_swap", key, kind, value, ttl, expected)


def touch(key: str, ttl: Ttl, *, expected: int | None = None, kind: str | None = None) -> Op:
    """Gives the key a new time to live; the result is whether it was there: `State.touch`."""
    return Op("touch", key, kind, ttl=ttl, expected=expected)


def schedule(key: str, at: datetime | timedelta | float, *, kind: str | None = None) -> Op:
    """Sets the timeout of the key: `State.schedule`."""
    return Op("schedule", key, kind, at=at)


def unschedule(key: str, *, claim: int | None = None, kind: str | None = None) -> Op:
    """Removes the timeout of the key; the result is whether it had one: `State.unschedule`."""
    return Op("unschedule", key, kind, expected=claim)
