"""What type checkers see of the public API. Checked by test_public_api.py, never run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, assert_type

from starlette.requests import Request
from starlette.responses import Response

import ratesync
from ratesync.contrib.fastapi import RateLimitDependency, get_client_ip, validate_ip
from ratesync.contrib.otel import traced_acquire


async def in_asyncio() -> None:
    async with ratesync.acquire("api", timeout=2, cost=3, key="tenant-7") as permit:
        assert_type(permit, ratesync.Permit)
        assert_type(permit.waited, float)
        assert_type(permit.lost, bool)
        assert_type(permit.reset_after, float | None)
        assert_type(permit.passed_open, bool)
    assert_type(await ratesync.acquire("api"), ratesync.Permit)
    async with ratesync.acquire("global", "tenant:7", "upload", timeout=30, cost=2) as permit:
        assert_type(permit, ratesync.Permit)
    assert_type(await ratesync.acquire("global", "tenant:7", 2.5), ratesync.Permit)
    assert_type(await ratesync.try_acquire("global", "tenant:7", 1.5), bool)
    assert_type(await ratesync.try_acquire("api", 1.5, key="k"), bool)
    limiter = await ratesync.get_or_clone_limiter("api", "tenant")
    assert_type(limiter, ratesync.RateLimiter)
    assert_type(await limiter.try_acquire(), bool)
    assert_type(await limiter.release(), bool)
    assert_type(await limiter.get_state(), ratesync.LimiterState)
    async with limiter.acquire_context(timeout=1.0) as permit:
        assert_type(permit, ratesync.Permit)
    async with limiter:
        pass
    await limiter.acquire(2.0, cost=2)
    await ratesync.initialize_all_limiters()


def in_threads() -> None:
    with ratesync.acquire("api", 2) as permit:
        assert_type(permit, ratesync.Permit)
    assert_type(ratesync.try_acquire("api").wait(), bool)
    limiter = ratesync.get_limiter("api")
    assert_type(limiter.acquire().wait(), None)
    assert_type(limiter.rate_per_second, float | None)
    assert_type(limiter.get_metrics().total_acquisitions, int)
    assert_type(limiter.get_metrics().last_acquisition_at, float | None)
    store = ratesync.get_store("db")
    for step in store.migrate(dry_run=True).wait():
        assert_type(step["sql"], str)
    for holder in store.list(5).wait()["holders"]:
        assert_type(holder["held_for"], float)


def results_can_be_passed_on(pending: ratesync.Pending[bool]) -> bool:
    return pending.wait()


def uses() -> None:
    results_can_be_passed_on(ratesync.try_acquire("api"))
    results_can_be_passed_on(ratesync.get_limiter("api").release())


async def checks_and_composites() -> None:
    result = await ratesync.check_limiter("api", acquire_if_allowed=False, timeout=1)
    assert_type(result, ratesync.RateLimitResult)
    assert_type(result.retry_after, int)
    several = ratesync.check_multi_limiters(["api", "global"]).wait()
    assert_type(several, ratesync.MultiLimiterResult)
    assert_type(several.results[0], ratesync.RateLimitResult)
    composite = ratesync.CompositeRateLimiter({"ip": "api"}, "all_must_pass")
    check = await composite.check({"ip": "192.0.2.1"}, timeout=1)
    assert_type(check, ratesync.CompositeLimitCheck)
    assert_type(check.triggered_by, str | None)


@ratesync.rate_limited("api", timeout=2)
async def fetch(url: str) -> bytes:
    return url.encode()


@ratesync.rate_limited(lambda url: f"host:{url}", timeout=0, mode="try")
async def fetch_or_not(url: str) -> bytes:
    return url.encode()


@ratesync.rate_limited(ratesync.MemoryRateLimiter("api", rate_per_second=1.0), timeout=0, mode="try")
def compute(value: int) -> int:
    return value


async def decorated() -> None:
    assert_type(await fetch("x"), bytes)
    assert_type(await fetch_or_not("x"), bytes | None)
    assert_type(compute(5), int | None)
    await fetch(5)  # type: ignore[arg-type]


async def constructed_directly() -> None:
    limiter: ratesync.RateLimiter = ratesync.PostgresRateLimiter(
        "postgresql://localhost/app", "api", rate_per_second=5.0, burst=3, unlogged=True
    )
    assert_type(await limiter.try_acquire(), bool)
    assert_type(ratesync.MemoryRateLimiter.from_config({}, group_id="a"), ratesync.MemoryRateLimiter)
    ratesync.MemoryRateLimiter("api", rate_per_second="1")  # type: ignore[arg-type]
    ratesync.CompositeRateLimiter({"ip": "api"}, "all")  # type: ignore[arg-type]


def mistakes() -> None:
    ratesync.acquire("api", 1, 2)  # type: ignore[call-overload]
    ratesync.acquire("api", "global", key="7")  # type: ignore[call-overload]
    ratesync.configure_limiter("api", rate_per_second="1")  # type: ignore[arg-type]
    ratesync.get_limiter("api").rate_per_second = 5  # type: ignore[misc]
    ratesync.try_acquire("api", key=5)  # type: ignore[arg-type]


async def in_fastapi(request: Request, response: Response) -> None:
    limit = RateLimitDependency("api", lambda request: request.headers["x-user"], headers="ietf")
    await limit(request, response)
    assert_type(get_client_ip(request), str)
    assert_type(validate_ip("::1"), str | None)
    RateLimitDependency("api", headers="modern")  # type: ignore[arg-type]


async def traced() -> None:
    async with traced_acquire("api", 2, key="k") as permit:
        assert_type(permit, ratesync.Permit)
    with traced_acquire("api") as permit:
        assert_type(permit, ratesync.Permit)


async def state_locks_and_idempotency() -> None:
    state = ratesync.state("shop", tenant="acme", codec="json")
    assert_type(state, ratesync.State)
    assert_type(await state.check_and_set("k", ttl=timedelta(minutes=5)), bool)
    assert_type(await state.get_versioned("k"), ratesync.Versioned | None)
    assert_type(await state.increment("n", 2, ttl=60, renew=True), int)
    assert_type(await state.compare_and_swap("k", expected=1, value="v", ttl=ratesync.ops.KEEP), int)
    assert_type(await state.claim_due(), list[ratesync.Due])
    assert_type(await state.many([ratesync.ops.get("k")], atomic=True), list[Any])
    async for key, _ in state.scan(prefix="a"):
        assert_type(key, str)
    for key, _ in state.scan():
        assert_type(key, str)
    async with ratesync.lock("l", ttl=30, timeout=10, cancel_on_loss=True) as lease:
        assert_type(lease, ratesync.Lease)
        assert_type(lease.token, int)
        assert_type(lease.remaining, float)
        assert_type(lease.lost, bool)
    assert_type(await ratesync.try_lock("l"), ratesync.Lease | None)
    async with ratesync.idempotent("k", fingerprint=b"f", wait=5) as op:
        assert_type(op, ratesync.Operation)
        assert_type(op.done, bool)
        op.result = {"a": 1}
        await op.commit_in(object())


def state_in_threads() -> int:
    store = ratesync.get_store("db")
    with store.lock("l") as lease:
        assert_type(lease.release().wait(), bool)
    with store.idempotent("k") as op:
        assert_type(op, ratesync.Operation)
        op.commit_in(object()).wait()
    assert_type(store.locks().wait()[0]["token"], int)
    ratesync.configure_state("postgres", url="postgresql://localhost/app", prefix="p_")
    results_can_be_passed_on(store.state().check_and_set("k"))
    return store.state().set("k", 5).wait()


def mistakes_with_state() -> None:
    ratesync.state(codec="pickle")  # type: ignore[arg-type]
    ratesync.state().compare_and_swap("k", 1, "v")  # type: ignore[call-arg]
    ratesync.state().increment("k", "1")  # type: ignore[arg-type]
    ratesync.idempotent("k", on_error="ignore")  # type: ignore[arg-type]
    ratesync.lock("l", ttl=None)  # type: ignore[arg-type]
