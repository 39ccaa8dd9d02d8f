"""Names from before limiters had stores. They say what to use instead, and work where they can."""

from __future__ import annotations

from typing import Any, NoReturn

from ratesync import registry
from ratesync._engine import log
from ratesync._pending import Pending
from ratesync.core import RateLimiter

__all__ = ["configure_rate_limiter", "get_rate_limiter", "initialize_rate_limiter"]


def _warn(name: str, instead: str) -> None:
    log.warning("%s() is the name of an old version: use %s", name, instead)


def configure_rate_limiter(*args: Any, **kwargs: Any) -> NoReturn:
    """Logs a warning and raises NotImplementedError: use `configure_store` and `configure_limiter`."""
    _warn("configure_rate_limiter", "configure_store() and configure_limiter()")
    raise NotImplementedError(
        "configure_rate_limiter() had its store among its arguments: call configure_store(store_id, engine, "
        "...) and then configure_limiter(limiter_id, store_id, ...)"
    )


def get_rate_limiter(name: str) -> RateLimiter:
    """The same as `get_limiter`, with a warning in the log.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("legacy-doc", rate_per_second=1.0)
        >>> get_rate_limiter("legacy-doc").group_id
        'legacy-doc'
    """
    _warn("get_rate_limiter", "get_limiter()")
    return registry.get_limiter(name)


def initialize_rate_limiter(name: str) -> Pending[None]:
    """The same as `initialize_limiter`, with a warning in the log."""
    _warn("initialize_rate_limiter", "initialize_limiter()")
    return registry.initialize_limiter(name)
