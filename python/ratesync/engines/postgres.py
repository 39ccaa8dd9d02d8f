"""`PostgresRateLimiter`: limits that all processes on one PostgreSQL database share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

from ratesync.engines._engine_limiter import EngineLimiter, LimiterExtras

__all__ = ["PostgresRateLimiter"]


class PostgresExtras(LimiterExtras, total=False):
    """Further options of the store and of the limiter."""

    url: str
    command_timeout: float
    connect_timeout: float
    synchronous_commit: Literal["auto", "on", "off"]
    unlogged: bool
    statement_cache: Literal["auto", "on", "off"]
    listen_url: str


class PostgresRateLimiter(EngineLimiter):
    """A limit kept in PostgreSQL, made without configuration.

    Processes with the same url, table and `group_id` share the limit. Objects with equal store options
    share one pool of connections, opened at the first use.

    Args:
        connection_url: libpq URL or key=value string; `url=` means the same.
        group_id: the name of the limit in the table, 1 to 255 characters.
        rate_per_second: grants per second over all processes; excludes limit and window_seconds.
        limit: grants per window over all processes.
        window_seconds: length of the window in seconds.
        max_concurrent: slots held at the same time over all processes.
        table_name: table of the states.
        schema_name: its schema.
        auto_create: create what is missing at the first use.
        pool_min_size: connections kept open while idle.
        pool_max_size: upper bound of the connections of this process.
        timing_margin_ms: milliseconds by which an early arrival is forgiven.
        default_timeout: seconds that `acquire` waits at most; None: as long as it takes.
        fail_closed: an outage refuses calls (True) or lets them pass (False).
        **options: `command_timeout`, `connect_timeout`, `synchronous_commit`, `unlogged`,
            `statement_cache`, `listen_url` of the store; `algorithm`, `burst`, `lease_seconds`,
            `max_hold_seconds`, `outage_budget` of the limiter; all as in `configure_store` and
            `configure_limiter`.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> limiter = PostgresRateLimiter("postgresql://localhost/app", "example", rate_per_second=5.0)
        >>> limiter.group_id, limiter.is_initialized
        ('example', False)
    """

    engine: ClassVar[str] = "postgres"

    def __init__(
        self,
        connection_url: str = "",
        group_id: str = "",
        rate_per_second: float | None = None,
        limit: int | None = None,
        window_seconds: float | None = None,
        max_concurrent: int | None = None,
        table_name: str = "rate_limiter_state",
        schema_name: str = "public",
        auto_create: bool = False,
        pool_min_size: int = 2,
        pool_max_size: int = 10,
        timing_margin_ms: float = 10.0,
        default_timeout: float | None = None,
        fail_closed: bool = False,
        **options: Unpack[PostgresExtras],
    ) -> None:
        given: dict[str, Any] = {
            "url": connection_url,
            "rate_per_second": rate_per_second,
            "limit": limit,
            "window_seconds": window_seconds,
            "max_concurrent": max_concurrent,
            "table_name": table_name,
            "schema_name": schema_name,
            "auto_create": auto_create,
            "pool_min_size": pool_min_size,
            "pool_max_size": pool_max_size,
            "timing_margin_ms": timing_margin_ms,
            "default_timeout": default_timeout,
            "fail_closed": fail_closed,
            **options,
        }
        self._construct(group_id, given)
