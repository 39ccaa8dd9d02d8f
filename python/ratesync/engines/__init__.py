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

__all__ = ["MemoryRateLimiter", "PostgresRateLimiter", "limiter_class"]

_HOMES = {
    "MemoryRateLimiter": "memory",
    "PostgresRateLimiter": "postgres",
}
_CLASSES = {
    "memory": "MemoryRateLimiter",
    "postgres": "PostgresRateLimiter",
}


def limiter_class(engine: str, algorithm: str) -> type[EngineLimiter]:
    """The class of limiters on stores of that engine."""
    return cast("type[EngineLimiter]", __getattr__(_CLASSES[engine]))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
