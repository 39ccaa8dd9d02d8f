"""Section 3 of the compatibility contract: the abstract limiter, records, results and exceptions."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import time
from typing import Any

import pytest

import ratesync
from ratesync import (
    LimiterReadOnlyConfig,
    LimiterState,
    MultiLimiterResult,
    RateLimiter,
    RateLimiterMetrics,
    RateLimitResult,
)

pytestmark = pytest.mark.usefixtures("ratesync_registry")


class Fake(RateLimiter):
    """A limiter of a test suite, with the abstract members and nothing else."""

    def __init__(self, grants: int, default_timeout: float | None = None) -> None:
        self.grants = grants
        self.calls: list[Any] = []
        self._timeout = default_timeout
        self._ready = False

    async def initialize(self) -> None:  # type: ignore[override]
        self._ready = True

    async def acquire(self) -> None:  # type: ignore[override]
        self.calls.append("acquire")

    async def try_acquire(self, timeout: float = 0) -> bool:  # type: ignore[override]
        self.calls.append(timeout)
        self.grants -= 1
        return self.grants >= 0

    async def release(self) -> None:  # type: ignore[override]
        self.calls.append("release")

    def get_metrics(self) -> RateLimiterMetrics:
        return RateLimiterMetrics()

    def get_config(self) -> LimiterReadOnlyConfig:
        return LimiterReadOnlyConfig("fake", "token_bucket", "nowhere", 1.0)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Fake:
        return cls(**kwargs)

    @property
    def group_id(self) -> str:
        return "fake"

    @property
    def rate_per_second(self) -> float | None:
        return 1.0

    @property
    def max_concurrent(self) -> int | None:
        return None

    @property
    def is_initialized(self) -> bool:
        return self._ready

    @property
    def default_timeout(self) -> float | None:
        return self._timeout

    @property
    def fail_closed(self) -> bool:
        return False


def test_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        RateLimiter()  # type: ignore[abstract]


async def test_a_subclass_needs_only_the_abstract_members() -> None:
    fake = Fake(grants=1)
    assert isinstance(fake, RateLimiter)
    async with fake.acquire_context():
        pass
    async with fake.acquire_context(timeout=2.0):
        pass
    with pytest.raises(ratesync.RateLimiterAcquisitionError) as caught:
        async with fake.acquire_context(timeout=3.0):
            pytest.fail("granted")
    assert caught.value.group_id == "fake"
    async with fake:
        pass
    assert fake.calls == ["acquire", "release", 2.0, "release", 3.0, "acquire", "release"]
    assert (fake.limit, fake.window_seconds, fake.algorithm, fake.burst) == (None, None, "token_bucket", 1)
    assert fake.store_id == "nowhere"
    with pytest.raises(NotImplementedError):
        fake.get_state()


async def test_a_subclass_releases_also_after_an_error_and_uses_its_own_timeout() -> None:
    fake = Fake(grants=1, default_timeout=4.0)
    with pytest.raises(KeyError):
        async with fake.acquire_context():
            raise KeyError("body")
    assert fake.calls == [4.0, "release"]


async def test_a_subclass_can_limit_a_function() -> None:
    fake = Fake(grants=0, default_timeout=0)

    @ratesync.rate_limited(fake, timeout=0, mode="try")
    async def work() -> str:
        return "done"

    assert await work() is None
    assert fake.is_initialized


async def test_what_existing_code_calls_on_a_limiter() -> None:
    ratesync.configure_limiter("api", "memory", 1e6, max_concurrent=2, timeout=1.5, burst=99)
    limiter = ratesync.get_limiter("api")
    assert isinstance(limiter, RateLimiter)
    assert isinstance(limiter, ratesync.MemoryRateLimiter)
    await limiter.initialize()
    await limiter.acquire()
    assert await limiter.try_acquire(timeout=1)
    assert not await limiter.try_acquire()
    await limiter.release()
    await limiter.release()
    async with limiter.acquire_context(timeout=1):
        assert limiter.get_metrics().current_concurrent == 1
    state = await limiter.get_state()
    assert state.allowed
    config = limiter.get_config()
    assert (config.id, config.algorithm, config.rate_per_second) == ("api", "token_bucket", 1e6)
    assert limiter.group_id == "api"
    assert limiter.default_timeout == 1.5
    assert limiter.is_initialized
    assert limiter.get_metrics() is limiter.get_metrics()


def test_metrics_can_be_kept_by_hand() -> None:
    metrics = RateLimiterMetrics()
    metrics.record_acquisition(10.0)
    metrics.record_acquisition(30.0)
    metrics.record_timeout()
    metrics.record_cas_failure()
    metrics.record_concurrent_acquire()
    metrics.record_concurrent_release()
    metrics.record_concurrent_release()
    metrics.record_max_concurrent_reached()
    assert (metrics.total_acquisitions, metrics.avg_wait_time_ms, metrics.max_wait_time_ms) == (2, 20.0, 30.0)
    assert (metrics.timeouts, metrics.cas_failures, metrics.current_concurrent) == (1, 1, 0)
    assert (metrics.total_releases, metrics.max_concurrent_reached) == (2, 1)
    assert metrics.last_acquisition_at is not None


# Records ------------------------------------------------------------------------------------------


def test_results_are_frozen_records_without_dict() -> None:
    for record in (
        RateLimitResult(True, 10, 9, 1.0),
        MultiLimiterResult(True, 10, 9, 1.0),
        LimiterState(True, 5, 100, 0),
        LimiterReadOnlyConfig("a", "token_bucket", "memory"),
    ):
        assert not hasattr(record, "__dict__")
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, dataclasses.fields(record)[0].name, False)
        assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.parametrize(("reset_in", "seconds"), [(60.0, 60), (0.0, 1), (0.2, 1), (1.5, 2), (-3.0, 1)])
def test_the_moment_of_a_reset(reset_in: float, seconds: int) -> None:
    for result in (RateLimitResult(False, 10, 0, reset_in), MultiLimiterResult(False, 10, 0, reset_in)):
        assert result.retry_after == seconds
        before = int(time.time() + reset_in)
        assert before <= result.reset_at <= int(time.time() + reset_in)


def test_combining_results() -> None:
    first = RateLimitResult(True, 10, 3, 5.0, "first")
    second = RateLimitResult(False, 20, 0, 2.0, "second")
    third = RateLimitResult(False, 30, 0, 9.0, "third")
    combined = MultiLimiterResult.from_results([first, second, third])
    assert combined == MultiLimiterResult(False, 20, 0, 9.0, "second", [first, second, third])
    assert MultiLimiterResult.from_results([first]).blocking_limiter_id is None
    assert MultiLimiterResult.from_results([]) == MultiLimiterResult(True, 1000, 999, 60.0, None, [])


# Exceptions ---------------------------------------------------------------------------------------


def test_exceptions_carry_what_existing_code_reads() -> None:
    assert ratesync.RateLimiterNotConfiguredError("x").name == "x"
    assert ratesync.RateLimiterAlreadyConfiguredError("x").name == "x"
    not_initialized = ratesync.RateLimiterNotInitializedError("x")
    assert isinstance(not_initialized, RuntimeError)
    assert "not initialized" in str(not_initialized)
    assert ratesync.RateLimiterNotInitializedError().name is None
    acquisition = ratesync.RateLimiterAcquisitionError("no", "group", 3)
    assert (acquisition.group_id, acquisition.attempts, str(acquisition)) == ("group", 3, "no")
    config = ratesync.ConfigValidationError("bad", field="f", expected="int", received="str")
    assert isinstance(config, ValueError)
    assert (config.field, config.expected, config.received) == ("f", "int", "str")
    assert all(part in str(config) for part in ("bad", "int", "str"))
    assert ratesync.StoreNotFoundError("s").store_id == "s"
    assert ratesync.LimiterNotFoundError("l").limiter_id == "l"
    for error in (not_initialized, acquisition, config):
        assert isinstance(error, ratesync.RateLimiterError)


# Module paths -------------------------------------------------------------------------------------

PATHS = {
    "ratesync.composite": ["CompositeLimitCheck", "CompositeRateLimiter", "RateLimitResult", "StrategyType"],
    "ratesync.config": [
        "FastAPIConfig",
        "_expand_env_vars",
        "_validate_config_structure",
        "configure_fastapi",
        "get_fastapi_config",
        "load_config",
    ],
    "ratesync.core": ["RateLimiter", "RateLimiterMetrics"],
    "ratesync.decorators": ["get_limiter", "rate_limited"],
    "ratesync.domain.value_objects": ["combine_identifiers", "hash_identifier"],
    "ratesync.domain.value_objects.identifier": ["combine_identifiers", "hash_identifier"],
    "ratesync.engines": ["MemoryRateLimiter", "PostgresRateLimiter", "RedisRateLimiter"],
    "ratesync.engines.memory": ["MemoryRateLimiter"],
    "ratesync.engines.postgres": ["PostgresRateLimiter"],
    "ratesync.engines.redis": ["RedisRateLimiter"],
    "ratesync.engines.redis_sliding_window": ["RedisSlidingWindowRateLimiter"],
    "ratesync.exceptions": [
        "ConfigValidationError",
        "LimiterNotFoundError",
        "RateLimiterAcquisitionError",
        "RateLimiterAlreadyConfiguredError",
        "RateLimiterError",
        "RateLimiterNotConfiguredError",
        "RateLimiterNotInitializedError",
        "StoreNotFoundError",
    ],
    "ratesync.registry": [
        "AcquireContext",
        "RateLimiterRegistry",
        "_registry",
        "acquire",
        "clone_limiter",
        "configure_limiter",
        "configure_store",
        "get_limiter",
        "get_or_clone_limiter",
        "initialize_all_limiters",
        "initialize_limiter",
        "list_limiters",
        "list_stores",
    ],
    "ratesync.schemas": [
        "ENGINE_SCHEMAS",
        "LimiterConfig",
        "LimiterReadOnlyConfig",
        "LimiterState",
        "MemoryEngineConfig",
        "MultiLimiterResult",
        "PostgresEngineConfig",
        "RateLimitResult",
        "RedisEngineConfig",
    ],
    "ratesync.testing": ["reset_all_limiters", "reset_backend_store", "reset_limiter"],
    "ratesync.validation": ["validate_limiter_config", "validate_store_config"],
}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in PATHS.items() for name in names])
def test_a_name_is_where_existing_code_imports_it_from(path: str, name: str) -> None:
    found = getattr(importlib.import_module(path), name)
    if name in ratesync.__all__:
        assert found is getattr(ratesync, name)


def test_the_registry_of_a_suite_is_cleared_by_its_tables() -> None:
    from ratesync.registry import _registry

    ratesync.configure_store("mem", "memory")
    ratesync.configure_limiter("api", "mem", 1.0)
    assert "mem" in _registry._backends
    assert "api" in _registry._limiters
    _registry._limiters.clear()
    _registry._backends.clear()
    assert ratesync.list_limiters() == {}
    with pytest.raises(ratesync.LimiterNotFoundError):
        ratesync.get_limiter("api")
