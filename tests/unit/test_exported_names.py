"""The public surface: exactly these names, all documented; whatever else is added has to be added here."""

from __future__ import annotations

import inspect

import pytest

import ratesync

FUNCTIONS = {
    "acquire": "(limiter_id, *more, timeout=None, cost=1, key=None)",
    "check_limiter": None,
    "check_multi_limiters": None,
    "clone_limiter": "(source_id: 'str', new_id: 'str', *, rate_per_second: 'float | None' = None, "
    "max_concurrent: 'int | None' = None, timeout: 'float | None' = None, limit: 'int | None' = None, "
    "window_seconds: 'float | None' = None) -> 'None'",
    "combine_identifiers": "(*identifiers: 'object', separator: 'str' = ':') -> 'str'",
    "configure_fastapi": "(trusted_proxy_networks: 'list[str] | None' = None) -> 'None'",
    "configure_limiter": "(limiter_id: 'str', store_id: 'str' = 'memory', "
    "rate_per_second: 'float | None' = None, "
    "max_concurrent: 'int | None' = None, timeout: 'float | None' = None, algorithm: 'str' = 'token_bucket', "
    "limit: 'int | None' = None, window_seconds: 'float | None' = None, fail_closed: 'bool' = False, *, "
    "burst: 'int' = 1, outage_budget: 'float' = 0.25, lease_seconds: 'float' = 30.0, "
    "max_hold_seconds: 'float | None' = None) -> 'None'",
    "configure_rate_limiter": None,
    "configure_state": "(backend: 'str | None' = None, *, store: 'str | None' = None, "
    "prefix: 'str' = 'acteon_', namespace: 'str' = 'default', tenant: 'str' = 'default', "
    "timeout: 'float' = 5.0, **options: 'Any') -> 'None'",
    "configure_store": "(store_id: 'str', strategy: 'str | None' = None, *, engine: 'str | None' = None, "
    "**options: 'Any') -> 'None'",
    "get_fastapi_config": "() -> 'FastAPIConfig'",
    "get_limiter": "(limiter_id: 'str') -> 'RateLimiter'",
    "get_or_clone_limiter": None,
    "get_rate_limiter": None,
    "get_store": "(store_id: 'str') -> 'Store'",
    "hash_identifier": "(identifier: 'str', *, length: 'int' = 16, salt: 'str' = '', "
    "algorithm: 'str' = 'sha256') -> 'str'",
    "idempotent": "(key: 'str', fingerprint: 'str | bytes | None' = None, "
    "ttl: 'float | timedelta | None' = 86400, lease: 'float | timedelta' = 30, "
    "wait: 'float | timedelta | None' = None, *, on_error: \"Literal['free', 'keep']\" = 'free', "
    "namespace: 'str | None' = None, tenant: 'str | None' = None) -> 'Idempotent'",
    "initialize_all_limiters": None,
    "initialize_limiter": None,
    "initialize_rate_limiter": None,
    "list_limiters": "() -> 'dict[str, dict[str, Any]]'",
    "list_stores": "() -> 'dict[str, dict[str, Any]]'",
    "load_config": "(config_path: 'str | os.PathLike[str]') -> 'None'",
    "lock": "(name: 'str', ttl: 'float | timedelta' = 30, timeout: 'float | None' = None, *, "
    "auto_renew: 'bool' = True, cancel_on_loss: 'bool' = False, namespace: 'str | None' = None, "
    "tenant: 'str | None' = None) -> 'Lock'",
    "rate_limited": "(limiter_or_factory: 'Limited | Factory', *, timeout: 'float | None' = None, "
    "mode: \"Literal['wait', 'try']\" = 'wait') -> 'Any'",
    "shutdown": "() -> 'None'",
    "state": "(namespace: 'str | None' = None, tenant: 'str | None' = None, *, kind: 'str' = 'state', "
    "codec: \"Literal['json'] | None\" = None) -> 'State'",
    "try_acquire": "(limiter_id: 'str', *more: 'str | float | None', timeout: 'float | None' = 0, "
    "cost: 'int' = 1, key: 'str | None' = None) -> 'Pending[bool]'",
    "try_lock": "(name: 'str', ttl: 'float | timedelta' = 30, *, auto_renew: 'bool' = True, "
    "namespace: 'str | None' = None, tenant: 'str | None' = None) -> 'Pending[Lease | None]'",
}
CLASSES = {
    "CompositeLimitCheck",
    "CompositeRateLimiter",
    "Due",
    "Idempotent",
    "Lease",
    "LimiterReadOnlyConfig",
    "LimiterState",
    "Lock",
    "MemoryRateLimiter",
    "MultiLimiterResult",
    "Operation",
    "Pending",
    "Permit",
    "PostgresRateLimiter",
    "RateLimitResult",
    "RateLimiter",
    "RateLimiterMetrics",
    "RedisRateLimiter",
    "State",
    "Store",
    "Versioned",
}
ERRORS = {
    "AcquireTimeoutError",
    "ConfigFileNotFoundError",
    "ConfigValidationError",
    "CounterOverflowError",
    "IdempotencyError",
    "IdempotencyMismatchError",
    "InDoubtError",
    "InternalError",
    "LeaseLostError",
    "LimiterNotFoundError",
    "LockError",
    "LockLostError",
    "LockTimeoutError",
    "NotAnIntegerError",
    "OperationCancelledError",
    "OperationFailedError",
    "OperationInProgressError",
    "RateLimiterAcquisitionError",
    "RateLimiterAlreadyConfiguredError",
    "RateLimiterError",
    "RateLimiterNotConfiguredError",
    "RateLimiterNotInitializedError",
    "RolledBackError",
    "StaleVersionError",
    "StateError",
    "StoreClosedError",
    "StoreError",
    "StoreExhaustedError",
    "StoreNotFoundError",
    "StoreProtocolError",
    "StoreServerError",
    "StoreTimeoutError",
    "StoreUnavailableError",
}


OTHERS = {"__version__", "StrategyType", "fencing", "ops", "testing"}


def test_the_package_exports_exactly_these_names() -> None:
    assert set(ratesync.__all__) == {*FUNCTIONS, *CLASSES, *ERRORS, *OTHERS}
    assert len(ratesync.__all__) == len(set(ratesync.__all__))
    assert set(ratesync.errors.__all__) == ERRORS


def test_names_that_are_imported_late_are_listed_like_the_others() -> None:
    assert set(ratesync.__all__) <= set(dir(ratesync))
    assert set(ratesync._LAZY) <= set(ratesync.__all__)
    for name in ratesync._LAZY:
        assert getattr(ratesync, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'acquire_all'"):
        _ = ratesync.acquire_all


@pytest.mark.parametrize("name", [name for name, signature in FUNCTIONS.items() if signature])
def test_signatures_are_what_existing_code_calls(name: str) -> None:
    assert str(inspect.signature(getattr(ratesync, name))) == FUNCTIONS[name]


@pytest.mark.parametrize("name", sorted(set(ratesync.__all__) - {"__version__", "StrategyType"}))
def test_every_public_name_is_documented(name: str) -> None:
    member = getattr(ratesync, name)
    assert inspect.getdoc(member), name
    if inspect.isclass(member):
        for attribute, value in vars(member).items():
            if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(member, attribute)), f"{name}.{attribute}"


def test_the_version_is_a_version() -> None:
    assert ratesync.__version__.split(".")[0].isdigit()
