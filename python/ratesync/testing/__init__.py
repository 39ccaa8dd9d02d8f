"""What tests of code that uses ratesync need: resets, a manual clock, real servers, faults on command.

`reset_limiter`, `reset_all_limiters` and `reset_backend_store` bring limits back to their beginning.
`ManualClock`, `PostgresServer`, `PostgresPair`, `RedisServer`, `RedisCluster`, `RedisSentinel`, `TcpProxy`
and the contract suites (`LimitContract`, `StateContract`, `LockContract`, `IdempotencyContract` ...) are
loaded at first use. The pytest plugin (`ratesync.testing.plugin`, active wherever ratesync is installed)
offers servers, clock and proxy as fixtures.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ratesync import _registry
from ratesync._pending import Pending, script
from ratesync.errors import RateLimiterError, StoreNotFoundError
from ratesync.limits import RateLimiter

if TYPE_CHECKING:
    from ratesync.testing.clock import ManualClock
    from ratesync.testing.idempotency_contract import IdempotencyContract
    from ratesync.testing.limit_contract import LimitContract
    from ratesync.testing.lock_contract import LockContract
    from ratesync.testing.multi_contract import MultiLimitContract
    from ratesync.testing.postgres import PostgresServer
    from ratesync.testing.postgres_pair import PostgresPair
    from ratesync.testing.proxy import TcpProxy
    from ratesync.testing.redis import RedisServer
    from ratesync.testing.redis_topology import RedisCluster, RedisSentinel
    from ratesync.testing.state_contract import StateContract

__all__ = [
    "IdempotencyContract",
    "LimitContract",
    "LockContract",
    "ManualClock",
    "MultiLimitContract",
    "PostgresPair",
    "PostgresServer",
    "RedisCluster",
    "RedisSentinel",
    "RedisServer",
    "StateContract",
    "TcpProxy",
    "reset_all_limiters",
    "reset_backend_store",
    "reset_limiter",
]

log = logging.getLogger("ratesync")
_LAZY = {
    "IdempotencyContract": "idempotency_contract",
    "LimitContract": "limit_contract",
    "LockContract": "lock_contract",
    "ManualClock": "clock",
    "MultiLimitContract": "multi_contract",
    "PostgresPair": "postgres_pair",
    "PostgresServer": "postgres",
    "RedisCluster": "redis_topology",
    "RedisSentinel": "redis_topology",
    "RedisServer": "redis",
    "StateContract": "state_contract",
    "TcpProxy": "proxy",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@script
def reset_limiter(limiter: RateLimiter | str) -> Generator[Pending[Any], Any, None]:
    """Forgets what the limiter consumed and who holds its slots. Takes the object or its id.

    Await it, or `.wait()` for it.

    Raises:
        LimiterNotFoundError: no limiter of that id.
        StoreError: the store did not do it.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("reset-doc", rate_per_second=0.1)
        >>> ratesync.try_acquire("reset-doc").wait(), ratesync.try_acquire("reset-doc").wait()
        (True, False)
        >>> reset_limiter("reset-doc").wait()
        >>> ratesync.try_acquire("reset-doc").wait()
        True
    """
    found = _registry._registry.limiter(limiter) if isinstance(limiter, str) else limiter
    yield found.reset()


@script
def reset_all_limiters() -> Generator[Pending[Any], Any, None]:
    """Resets every configured limiter. One that cannot be reset is logged, and the others go on.

    Limits of single keys (`key=`) are not configured by name; `reset_backend_store` reaches them too.
    """
    for limiter_id in list(_registry._registry._limiters):
        try:
            yield _registry._registry.limiter(limiter_id).reset()
        except RateLimiterError as error:
            log.warning("limiter %r was not reset: %s", limiter_id, error)


@script
def reset_backend_store(store_id: str) -> Generator[Pending[Any], Any, None]:
    """Resets everything in a store: all limiters and keys, also those of other processes.

    Raises:
        ValueError: the store is not configured; the message names it and says "not found".
        StoreError: the store did not do it.
    """
    try:
        _registry._registry.store_config(store_id)
    except StoreNotFoundError as error:
        raise ValueError(f"store {store_id!r} not found: {error}") from None
    users = [
        limiter_id
        for limiter_id, options in _registry._registry._limiters.items()
        if options.store == store_id
    ]
    if not users:
        log.warning("store %r has no configured limiter: nothing was reset", store_id)
        return
    yield _registry._registry.limiter(users[0]).reset_all()
