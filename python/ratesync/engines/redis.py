"""`RedisRateLimiter`: limits that all processes on one Redis share."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from ratesync.engines._engine_limiter import EngineLimiter, LimiterExtras

__all__ = ["RedisRateLimiter"]


class RedisExtras(LimiterExtras, total=False):
    """Further options of the store and of the limiter."""

    connection_url: str
    hash_tag: str | None


class RedisRateLimiter(EngineLimiter):
    """A limit kept in Redis, made without configuration.

    Processes with the same url, key_prefix and `group_id` share the limit. Objects with equal store options
    share one set of connections, opened at the first use.

    Args:
        url: `redis://`, `rediss://` or another address that `configure_store` takes; `connection_url=` means
            the same.
        group_id: the name of the limit, 1 to 255 characters.
        rate_per_second: grants per second over all processes; excludes limit and window_seconds.
        limit: grants per window over all processes.
        window_seconds: length of the window in seconds.
        max_concurrent: slots held at the same time over all processes.
        db: number of the database, where the url names none.
        password: where the url has none.
        pool_min_size: without effect; taken from existing code.
        pool_max_size: upper bound of the connections of this process.
        key_prefix: what the keys start with.
        timing_margin_ms: milliseconds by which an early arrival is forgiven.
        socket_timeout: seconds until a command without answer counts as lost.
        socket_connect_timeout: seconds for one attempt to connect.
        default_timeout: seconds that `acquire` waits at most; None: as long as it takes.
        fail_closed: an outage refuses calls (True) or lets them pass (False).
        **options: `hash_tag` of the store, as in `configure_store`; `algorithm`, `burst`, `lease_seconds`,
            `max_hold_seconds`, `outage_budget` of the limiter, as in `configure_limiter`.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> limiter = RedisRateLimiter("redis://localhost:6379/0", "example", rate_per_second=5.0)
        >>> limiter.group_id, limiter.is_initialized
        ('example', False)
    """

    engine: ClassVar[str] = "redis"

    def __init__(
        self,
        url: str = "",
        group_id: str = "",
        rate_per_second: float | None = None,
        limit: int | None = None,
        window_seconds: float | None = None,
        max_concurrent: int | None = None,
        db: int = 0,
        password: str | None = None,
        pool_min_size: int = 2,
        pool_max_size: int = 10,
        key_prefix: str = "rate_limit",
        timing_margin_ms: float = 10.0,
        socket_timeout: float = 5.0,
        socket_connect_timeout: float = 5.0,
        default_timeout: float | None = None,
        fail_closed: bool = False,
        **options: Unpack[RedisExtras],
    ) -> None:
        given: dict[str, Any] = dict(options)
        given.update(
            url=given.pop("connection_url", "") or url,
            rate_per_second=rate_per_second,
            limit=limit,
            window_seconds=window_seconds,
            max_concurrent=max_concurrent,
            db=db,
            pool_min_size=pool_min_size,
            pool_max_size=pool_max_size,
            key_prefix=key_prefix,
            timing_margin_ms=timing_margin_ms,
            socket_timeout=socket_timeout,
            socket_connect_timeout=socket_connect_timeout,
            default_timeout=default_timeout,
            fail_closed=fail_closed,
        )
        if password is not None:
            given["password"] = password
        self._construct(group_id, given)
