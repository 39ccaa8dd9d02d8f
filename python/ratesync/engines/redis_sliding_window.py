"""`RedisSlidingWindowRateLimiter`: a sliding window in Redis, under the name that existing code imports."""

from __future__ import annotations

from typing import Unpack

from ratesync.engines.redis import RedisExtras, RedisRateLimiter

__all__ = ["RedisSlidingWindowRateLimiter"]


class RedisSlidingWindowRateLimiter(RedisRateLimiter):
    """A `RedisRateLimiter` with a limit per window; what the registry makes of `sliding_window` on Redis.

    Args:
        url: as in `RedisRateLimiter`, like all that is not named here.
        group_id: the name of the limit, 1 to 255 characters.
        limit: grants in any window.
        window_seconds: length of the window in seconds.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).
    """

    def __init__(
        self,
        url: str = "",
        group_id: str = "",
        limit: int | None = None,
        window_seconds: float | None = None,
        db: int = 0,
        password: str | None = None,
        pool_min_size: int = 2,
        pool_max_size: int = 10,
        key_prefix: str = "rate_limit",
        socket_timeout: float = 5.0,
        socket_connect_timeout: float = 5.0,
        default_timeout: float | None = None,
        fail_closed: bool = False,
        **options: Unpack[RedisExtras],
    ) -> None:
        options.setdefault("algorithm", "sliding_window")
        super().__init__(
            url,
            group_id,
            limit=limit,
            window_seconds=window_seconds,
            db=db,
            password=password,
            pool_min_size=pool_min_size,
            pool_max_size=pool_max_size,
            key_prefix=key_prefix,
            socket_timeout=socket_timeout,
            socket_connect_timeout=socket_connect_timeout,
            default_timeout=default_timeout,
            fail_closed=fail_closed,
            **options,
        )
