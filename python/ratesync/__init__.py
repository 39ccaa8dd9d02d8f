"""Rate and concurrency limits that hold across tasks, threads, processes and machines.

    from ratesync import acquire

    async with acquire("api"):      # asyncio
        ...
    with acquire("api"):            # the same in plain threads
        ...

Limits are configured in `rate-sync.toml` or with `configure_store` and `configure_limiter`.
"""

from typing import TYPE_CHECKING

from ratesync._engine import Lease, Permit, acquire, shutdown
from ratesync._pending import Pending
from ratesync._states import configure_state, idempotent, lock, state, try_lock
from ratesync._version import __version__
from ratesync.errors import (
    AcquireTimeoutError,
    ConfigFileNotFoundError,
    ConfigValidationError,
    CounterOverflowError,
    IdempotencyError,
    IdempotencyMismatchError,
    InDoubtError,
    InternalError,
    LeaseLostError,
    LimiterNotFoundError,
    LockError,
    LockLostError,
    LockTimeoutError,
    NotAnIntegerError,
    OperationCancelledError,
    OperationFailedError,
    OperationInProgressError,
    RateLimiterAcquisitionError,
    RateLimiterAlreadyConfiguredError,
    RateLimiterError,
    RateLimiterNotConfiguredError,
    RateLimiterNotInitializedError,
    RolledBackError,
    StaleVersionError,
    StateError,
    StoreClosedError,
    StoreError,
    StoreExhaustedError,
    StoreNotFoundError,
    StoreProtocolError,
    StoreServerError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from ratesync.identifiers import combine_identifiers, hash_identifier
from ratesync.limits import LimiterReadOnlyConfig, LimiterState, RateLimiter, RateLimiterMetrics
from ratesync.registry import (
    clone_limiter,
    configure_fastapi,
    configure_limiter,
    configure_store,
    get_fastapi_config,
    get_limiter,
    get_or_clone_limiter,
    get_store,
    initialize_all_limiters,
    initialize_limiter,
    list_limiters,
    list_stores,
    load_config,
    try_acquire,
)
from ratesync.stores import Store

if TYPE_CHECKING:
    from ratesync import fencing, ops, testing
    from ratesync._legacy import configure_rate_limiter, get_rate_limiter, initialize_rate_limiter
    from ratesync.checks import check_limiter, check_multi_limiters
    from ratesync.composite import CompositeLimitCheck, CompositeRateLimiter, StrategyType
    from ratesync.decorators import rate_limited
    from ratesync.engines.memory import MemoryRateLimiter
    from ratesync.engines.postgres import PostgresRateLimiter
    from ratesync.engines.redis import RedisRateLimiter
    from ratesync.idempotency import Idempotent, Operation
    from ratesync.locks import Lock
    from ratesync.schemas import MultiLimiterResult, RateLimitResult
    from ratesync.states import Due, State, Versioned

__all__ = [
    "AcquireTimeoutError",
    "CompositeLimitCheck",
    "CompositeRateLimiter",
    "ConfigFileNotFoundError",
    "ConfigValidationError",
    "CounterOverflowError",
    "Due",
    "IdempotencyError",
    "IdempotencyMismatchError",
    "Idempotent",
    "InDoubtError",
    "InternalError",
    "Lease",
    "LeaseLostError",
    "LimiterNotFoundError",
    "LimiterReadOnlyConfig",
    "LimiterState",
    "Lock",
    "LockError",
    "LockLostError",
    "LockTimeoutError",
    "MemoryRateLimiter",
    "MultiLimiterResult",
    "NotAnIntegerError",
    "Operation",
    "OperationCancelledError",
    "OperationFailedError",
    "OperationInProgressError",
    "Pending",
    "Permit",
    "PostgresRateLimiter",
    "RateLimitResult",
    "RateLimiter",
    "RateLimiterAcquisitionError",
    "RateLimiterAlreadyConfiguredError",
    "RateLimiterError",
    "RateLimiterMetrics",
    "RateLimiterNotConfiguredError",
    "RateLimiterNotInitializedError",
    "RedisRateLimiter",
    "RolledBackError",
    "StaleVersionError",
    "State",
    "StateError",
    "Store",
    "StoreClosedError",
    "StoreError",
    "StoreExhaustedError",
    "StoreNotFoundError",
    "StoreProtocolError",
    "StoreServerError",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "StrategyType",
    "Versioned",
    "__version__",
    "acquire",
    "check_limiter",
    "check_multi_limiters",
    "clone_limiter",
    "combine_identifiers",
    "configure_fastapi",
    "configure_limiter",
    "configure_rate_limiter",
    "configure_state",
    "configure_store",
    "fencing",
    "get_fastapi_config",
    "get_limiter",
    "get_or_clone_limiter",
    "get_rate_limiter",
    "get_store",
    "hash_identifier",
    "idempotent",
    "initialize_all_limiters",
    "initialize_limiter",
    "initialize_rate_limiter",
    "list_limiters",
    "list_stores",
    "load_config",
    "lock",
    "ops",
    "rate_limited",
    "shutdown",
    "state",
    "testing",
    "try_acquire",
    "try_lock",
]


# Imported at their first use, so that `import ratesync` stays quick.
_LAZY = {
    "CompositeLimitCheck": "composite",
    "CompositeRateLimiter": "composite",
    "Due": "states",
    "Idempotent": "idempotency",
    "Lock": "locks",
    "MemoryRateLimiter": "engines.memory",
    "MultiLimiterResult": "schemas",
    "Operation": "idempotency",
    "PostgresRateLimiter": "engines.postgres",
    "RateLimitResult": "schemas",
    "RedisRateLimiter": "engines.redis",
    "State": "states",
    "StrategyType": "composite",
    "Versioned": "states",
    "check_limiter": "checks",
    "check_multi_limiters": "checks",
    "configure_rate_limiter": "_legacy",
    "get_rate_limiter": "_legacy",
    "initialize_rate_limiter": "_legacy",
    "rate_limited": "decorators",
    "fencing": "fencing",
    "ops": "ops",
    "testing": "testing",
}


def __getattr__(name: str) -> object:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{home}")
    value: object = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_about_rate_sync() -> None:
    """`rate-sync` installs files over ours. Looks for its metadata by name: importing importlib is slow."""
    import os
    import sys

    for directory in sys.path:
        if directory.endswith("-packages"):
            try:
                names = os.listdir(directory)
            except OSError:
                continue
            if any(
                name.startswith("rate_sync-") and name.endswith((".dist-info", ".egg-info")) for name in names
            ):
                import warnings

                warnings.warn(
                    "the distribution 'rate-sync' is installed beside 'ratesync' and both own the import "
                    f"name 'ratesync' ({directory}): uninstall both, then install ratesync again",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return


_warn_about_rate_sync()
