"""Checks of one table of configuration, without configuring anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ratesync.schemas import (
    ENGINE_SCHEMAS,
    LimiterConfig,
    MemoryEngineConfig,
    PostgresEngineConfig,
    RedisEngineConfig,
)

__all__ = ["validate_limiter_config", "validate_store_config"]


def validate_store_config(
    engine: str, params: Mapping[str, Any]
) -> MemoryEngineConfig | RedisEngineConfig | PostgresEngineConfig:
    """The options of a store, checked: a record of its engine.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> validate_store_config("postgres", {"url": "postgresql://localhost/app"}).pool_max_size
        10
    """
    from ratesync._schemas import build_store

    options = {name: value for name, value in params.items() if name != "engine"}
    build_store(engine, options, f"engine {engine!r}")  # says more about what is unknown
    return ENGINE_SCHEMAS[engine](**options)  # type: ignore[return-value]


def validate_limiter_config(params: Mapping[str, Any]) -> LimiterConfig:
    """The fields of a limiter, checked.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> validate_limiter_config({"store": "memory", "max_concurrent": 5}).max_concurrent
        5
    """
    from ratesync._schemas import build_limiter

    options = build_limiter(params, "limiter")
    return LimiterConfig(**{name: getattr(options, name) for name in LimiterConfig.__annotations__})
