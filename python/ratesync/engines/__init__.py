"""The limiter classes, one per engine. `configure_limiter` and `get_limiter` choose by the store's engine.

Constructed directly, a limiter needs no configuration by name:

    from ratesync.engines.postgres import PostgresRateLimiter

    limiter = PostgresRateLimiter("postgresql://localhost/app", "api", rate_per_second=100.0)
    async with limiter:
        ...

Objects with equal store options share one pool of connections. No driver is needed: the engines are
compiled in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ratesync.engines._engine_limiter import EngineLimiter
    from ratesync.engines.memory import MemoryRateLimiter
    from ratesync.engines.postgres import PostgresRateLimiter
    from ratesync.engines.redis import RedisRateLimiter

__all__ = ["MemoryRateLimiter", "PostgresRateLimiter", "RedisRateLimiter", "limiter_class"]

_HOMES = {
    "MemoryRateLimiter": "memory",
    "PostgresRateLimiter": "postgres",
    "RedisRateLimiter": "redis",
}
_CLASSES = {home: name for name, home in _HOMES.items()}


def limiter_class(engine: str, algorithm: str) -> type[EngineLimiter]:
    """The class of limiters on stores of that engine."""
    if engine == "redis" and algorithm == "sliding_window":
        from ratesync.engines.redis_sliding_window import RedisSlidingWindowRateLimiter

        return RedisSlidingWindowRateLimiter
    return cast("type[EngineLimiter]", __getattr__(_CLASSES[engine]))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
