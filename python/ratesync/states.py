"""State that is shared over tasks, threads, processes and machines: versioned values with a time to live."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

__all__ = ["Due", "Versioned"]


class Versioned(NamedTuple):
    """A value with what `compare_and_swap` needs.

    Attributes:
        value: as `get` returns it.
        version: grows by 1 with every write; never used twice for one key.
        expires_at: when it expires, on the store's clock, in UTC; None: never.

    Example:
        >>> Versioned("shipped", 3, None).version
        3
    """

    value: Any
    version: int
    expires_at: datetime | None


class Due(NamedTuple):
    """A timeout that fell due and was claimed by this caller.

    Attributes:
        key: the key it was set for.
        kind: the kind of that key.
        due_at: when it fell due, on the store's clock, in UTC.
        claim: pass it to `unschedule` when the work is done: it removes the timeout only while nobody
            else has claimed it meanwhile.
    """

    key: str
    kind: str
    due_at: datetime
    claim: int


def make_versioned(value: Any, version: int, expires_at_ms: int) -> Versioned:
    """What the core has read; 0 ms: never expires."""
    return Versioned(value, version, from_ms(expires_at_ms) if expires_at_ms else None)


def make_due(key: str, kind: str, due_ms: int, claim: int) -> Due:
    """What the core has claimed."""
    return Due(key, kind, from_ms(due_ms), claim)


def from_ms(milliseconds: int) -> datetime:
    """Milliseconds since 1970 as a moment in UTC; beyond what datetime can say, its last moment."""
    try:
        seconds, rest = divmod(milliseconds, 1000)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)
    except (OverflowError, ValueError, OSError):
        return datetime.max.replace(tzinfo=UTC)
