"""Rate and concurrency limits that hold across tasks, threads, processes and machines.

    from ratesync import acquire

    async with acquire("api"):      # asyncio
        ...
    with acquire("api"):            # the same in plain threads
        ...

Limits are configured in `rate-sync.toml` or with `configure_store` and `configure_limiter`.
"""

from ratesync._engine import Permit, acquire, shutdown
from ratesync._pending import Pending
from ratesync._version import __version__
from ratesync.errors import (
    AcquireTimeoutError,
    ConfigFileNotFoundError,
    ConfigValidationError,
    InDoubtError,
    InternalError,
    LimiterNotFoundError,
    OperationCancelledError,
    RateLimiterAcquisitionError,
    RateLimiterAlreadyConfiguredError,
    RateLimiterError,
    RateLimiterNotConfiguredError,
    RateLimiterNotInitializedError,
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

__all__ = [
    "AcquireTimeoutError",
    "ConfigFileNotFoundError",
    "ConfigValidationError",
    "InDoubtError",
    "InternalError",
    "LimiterNotFoundError",
    "LimiterReadOnlyConfig",
    "LimiterState",
    "OperationCancelledError",
    "Pending",
    "Permit",
    "RateLimiter",
    "RateLimiterAcquisitionError",
    "RateLimiterAlreadyConfiguredError",
    "RateLimiterError",
    "RateLimiterMetrics",
    "RateLimiterNotConfiguredError",
    "RateLimiterNotInitializedError",
    "Store",
    "StoreClosedError",
    "StoreError",
    "StoreExhaustedError",
    "StoreNotFoundError",
    "StoreProtocolError",
    "StoreServerError",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "__version__",
    "acquire",
    "clone_limiter",
    "combine_identifiers",
    "configure_fastapi",
    "configure_limiter",
    "configure_store",
    "get_fastapi_config",
    "get_limiter",
    "get_or_clone_limiter",
    "get_store",
    "hash_identifier",
    "initialize_all_limiters",
    "initialize_limiter",
    "list_limiters",
    "list_stores",
    "load_config",
    "shutdown",
    "try_acquire",
]


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
