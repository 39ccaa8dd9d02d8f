"""Records that go in and out: answers of checks, and the parameters of stores and limiters as dataclasses.

The configuration records check their values when they are made; what is legal is said in one place,
`ratesync._schemas`, which is imported at the first use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ratesync.limits import LimiterReadOnlyConfig, LimiterState

__all__ = [
    "ENGINE_SCHEMAS",
    "LimiterConfig",
    "LimiterReadOnlyConfig",
    "LimiterState",
    "MemoryEngineConfig",
    "MultiLimiterResult",
    "PostgresEngineConfig",
    "RateLimitResult",
    "RedisEngineConfig",
]


# Answers ------------------------------------------------------------------------------------------


class _Reset:
    """The moment of `reset_in`, for headers. Both are counted from now at each access."""

    __slots__ = ()
    reset_in: float

    @property
    def reset_at(self) -> int:
        """Epoch second of the reset, cut to a whole one."""
        return int(time.time() + self.reset_in)

    @property
    def retry_after(self) -> int:
        """`reset_in` in whole seconds, rounded up, at least 1: who waits so long is not early."""
        return max(1, math.ceil(self.reset_in))


@dataclass(frozen=True, slots=True)
class RateLimitResult(_Reset):
    """The answer of one limiter to one check.

    Attributes:
        allowed: whether the call may go on.
        limit: units that the limiter has: the burst or the window's limit, or its slots.
        remaining: units (or slots) that were left, in the store.
        reset_in: seconds until all units are available again; for a refused call, until it may be tried
            again. 0 where nobody can know, as with slots that others hold.
        limiter_id: the limiter.

    Example:
        >>> RateLimitResult(allowed=False, limit=100, remaining=0, reset_in=29.2).retry_after
        30
    """

    allowed: bool
    limit: int
    remaining: int
    reset_in: float
    limiter_id: str | None = None


@dataclass(frozen=True, slots=True)
class MultiLimiterResult(_Reset):
    """The answer of several limiters to one check; made by `from_results`.

    Attributes:
        allowed: whether all of them allow the call.
        limit: that of the limiter with the least remaining.
        remaining: the least of all.
        reset_in: the longest of all, in seconds.
        blocking_limiter_id: the first limiter that refused, else None.
        results: the answers, in the order of the limiters.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_in: float
    blocking_limiter_id: str | None = None
    results: list[RateLimitResult] = field(default_factory=list)

    @classmethod
    def from_results(cls, results: Sequence[RateLimitResult]) -> MultiLimiterResult:
        """Combines answers. Of none, everything is allowed: 999 of 1000 for 60 seconds.

        Example:
            >>> parts = [RateLimitResult(True, 10, 4, 1.0, "user"), RateLimitResult(False, 5, 0, 9.0, "ip")]
            >>> combined = MultiLimiterResult.from_results(parts)
            >>> combined.allowed, combined.blocking_limiter_id, combined.limit, combined.reset_in
            (False, 'ip', 5, 9.0)
        """
        if not results:
            return cls(True, 1000, 999, 60.0)
        tightest = min(results, key=lambda result: result.remaining)
        refused = [result for result in results if not result.allowed]
        return cls(
            allowed=not refused,
            limit=tightest.limit,
            remaining=tightest.remaining,
            reset_in=max(result.reset_in for result in results),
            blocking_limiter_id=refused[0].limiter_id if refused else None,
            results=list(results),
        )


# Configuration ------------------------------------------------------------------------------------


class _Checked:
    """A record of the options of one engine, checked when it is made."""

    engine: str

    def __post_init__(self) -> None:
        from ratesync._schemas import build_store

        # What the dataclass leaves at None is not given: absent options have defaults, not nulls.
        build_store(self.engine, self.options(), type(self).__name__)

    def options(self) -> dict[str, Any]:
        """The options without the engine's name, as `configure_store` takes them; None is left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if name != "engine" and value is not None}


@dataclass(frozen=True)
class MemoryEngineConfig(_Checked):
    """The embedded store has no options.

    Example:
        >>> MemoryEngineConfig().engine
        'memory'
    """

    engine: Literal["memory"] = "memory"


@dataclass(frozen=True)
class RedisEngineConfig(_Checked):
    """Options of a Redis store; units and ranges as in `configure_store`.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).
    """

    url: str = field(repr=False)
    db: int = 0
    password: str | None = field(default=None, repr=False)
    pool_min_size: int = 2
    pool_max_size: int = 10
    key_prefix: str = "rate_limit"
    hash_tag: str | None = None
    timing_margin_ms: float = 10.0
    socket_timeout: float = 5.0
    socket_connect_timeout: float = 5.0
    engine: Literal["redis"] = "redis"


@dataclass(frozen=True)
class PostgresEngineConfig(_Checked):
    """Options of a PostgreSQL store; units and ranges as in `configure_store`.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> PostgresEngineConfig(url="postgresql://localhost/app", pool_max_size=20).pool_max_size
        20
    """

    url: str = field(repr=False)
    table_name: str = "rate_limiter_state"
    schema_name: str = "public"
    auto_create: bool = False
    pool_min_size: int = 2
    pool_max_size: int = 10
    timing_margin_ms: float = 10.0
    command_timeout: float = 5.0
    connect_timeout: float = 5.0
    synchronous_commit: Literal["auto", "on", "off"] = "auto"
    unlogged: bool = False
    statement_cache: Literal["auto", "on", "off"] = "auto"
    listen_url: str = field(default="", repr=False)
    engine: Literal["postgres"] = "postgres"


ENGINE_SCHEMAS: dict[str, type[_Checked]] = {
    "memory": MemoryEngineConfig,
    "redis": RedisEngineConfig,
    "postgres": PostgresEngineConfig,
}


@dataclass(frozen=True)
class LimiterConfig:
    """The fields of a limiter; units and ranges as in `configure_limiter`.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> LimiterConfig(store="memory", rate_per_second=5.0).algorithm
        'token_bucket'
    """

    store: str
    algorithm: str = "token_bucket"
    rate_per_second: float | None = None
    max_concurrent: int | None = None
    limit: int | None = None
    window_seconds: float | None = None
    timeout: float | None = None
    fail_closed: bool = False

    def __post_init__(self) -> None:
        from ratesync._schemas import build_limiter

        build_limiter({item.name: getattr(self, item.name) for item in fields(self)}, "limiter")
