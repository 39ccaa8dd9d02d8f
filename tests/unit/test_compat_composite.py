"""Section 6 of the compatibility contract: `CompositeRateLimiter`."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

import ratesync
from ratesync import CompositeLimitCheck, CompositeRateLimiter, configure_limiter, get_limiter
from ratesync.testing import ManualClock

pytestmark = pytest.mark.usefixtures("ratesync_registry")

IDENTIFIERS = {"ip": "192.0.2.7", "user": "ada"}


@pytest.fixture(autouse=True)
def limiters(ratesync_registry: object) -> None:
    configure_limiter("login-ip", rate_per_second=1.0, burst=10)
    configure_limiter("login-user", rate_per_second=1.0, burst=3)


def composite(strategy: Any = "most_restrictive") -> CompositeRateLimiter:
    return CompositeRateLimiter(limiters={"ip": "login-ip", "user": "login-user"}, strategy=strategy)


async def remaining(limiter_id: str, identifier: str) -> int:
    return (await get_limiter(limiter_id).peek(identifier)).remaining


@pytest.mark.parametrize("strategy", ["most_restrictive", "all_must_pass"])
async def test_all_have_to_pass_and_a_refusal_charges_none(strategy: str) -> None:
    login = composite(strategy)
    with ManualClock():
        for left in (2, 1, 0):
            check = await login.check(IDENTIFIERS)
            assert (check.allowed, check.triggered_by) == (True, None)
            assert check.most_restrictive.remaining == left
            assert check.results["user"].limiter_id == "login-user"
        for _ in range(5):
            check = await login.check(IDENTIFIERS)
            assert (check.allowed, check.triggered_by) == (False, "user")
            assert check.most_restrictive is check.results["user"]
            assert check.results["ip"].allowed
        assert await remaining("login-ip", "192.0.2.7") == 7
        assert (await login.check({"ip": "192.0.2.7", "user": "bob"})).allowed


async def test_the_two_strategies_differ_in_what_they_tell() -> None:
    with ManualClock():
        for _ in range(10):
            await get_limiter("login-ip").acquire(key="192.0.2.7")
        for _ in range(3):
            await get_limiter("login-user").acquire(key="ada")
        first = await composite("all_must_pass").check(IDENTIFIERS)
        assert (first.triggered_by, first.most_restrictive) == ("ip", first.results["ip"])
        least = await composite("most_restrictive").check(IDENTIFIERS)
        assert (least.triggered_by, least.most_restrictive.remaining) == ("ip", 0)
        assert [result.allowed for result in least.results.values()] == [False, False]


async def test_one_is_enough_when_any_must_pass() -> None:
    login = composite("any_must_pass")
    with ManualClock():
        for _ in range(3):
            check = await login.check(IDENTIFIERS)
            assert (check.allowed, check.triggered_by) == (True, None)
        check = await login.check(IDENTIFIERS)
        assert check.allowed
        assert [result.allowed for result in check.results.values()] == [True, False]
        for _ in range(6):
            assert (await login.check(IDENTIFIERS)).allowed
        check = await login.check(IDENTIFIERS)
        assert (check.allowed, check.triggered_by) == (False, "all")
        assert await remaining("login-ip", "192.0.2.7") == 0


@pytest.mark.parametrize("strategy", ["most_restrictive", "any_must_pass"])
async def test_a_check_waits_as_long_as_it_is_told(strategy: str) -> None:
    login = composite(strategy)
    with ManualClock() as clock:
        for _ in range(10):
            await get_limiter("login-ip").acquire(key="192.0.2.7")
        for _ in range(3):
            await get_limiter("login-user").acquire(key="ada")
        assert not (await login.check(IDENTIFIERS)).allowed
        assert not (await login.check(IDENTIFIERS, timeout=0.9)).allowed
        waiting = asyncio.ensure_future(login.check(IDENTIFIERS, timeout=1.5))
        await clock.run(1.0)
        await clock.run(0.2)
        assert (await waiting).allowed


@pytest.mark.parametrize("strategy", ["most_restrictive", "all_must_pass", "any_must_pass"])
async def test_no_slot_stays_held(strategy: str) -> None:
    configure_limiter("slots", max_concurrent=1)
    configure_limiter("more-slots", max_concurrent=2)
    both = CompositeRateLimiter({"a": "slots", "b": "more-slots"}, strategy=strategy)  # type: ignore[arg-type]
    for _ in range(4):
        assert (await both.check({"a": "x", "b": "y"})).allowed
    assert (await get_limiter("slots").peek("x")).in_use == 0
    assert (await get_limiter("more-slots").peek("y")).in_use == 0


async def test_the_limits_are_those_of_clones_and_keys() -> None:
    clone = await ratesync.get_or_clone_limiter("login-user", "ada")
    with ManualClock():
        await composite().check(IDENTIFIERS)
        assert await remaining("login-user", "ada") == 2
    assert clone.group_id == "login-user:ada"


@pytest.mark.parametrize("identifier", ["a:b", "a\\b", "login-user:x", "ü", 7])
async def test_identifiers_are_any_text(identifier: Any) -> None:
    with ManualClock():
        assert (await composite().check({"ip": "x", "user": identifier})).allowed
        assert await remaining("login-user", str(identifier)) == 2
        assert await remaining("login-user", "a") == 3


@pytest.mark.parametrize(
    "identifiers", [{}, {"ip": "x"}, {"ip": "x", "user": "y", "more": "z"}, {"ip": "x", "usr": "y"}]
)
async def test_the_keys_must_match(identifiers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must match limiter keys"):
        await composite().check(identifiers)


async def test_an_empty_identifier_is_refused_and_nothing_is_charged() -> None:
    with ManualClock():
        with pytest.raises(ratesync.ConfigValidationError):
            await composite().check({"ip": "x", "user": ""})
        assert await remaining("login-ip", "x") == 10


def test_mistakes_are_found_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="empty"):
        CompositeRateLimiter({})
    with pytest.raises(ValueError, match="did you mean 'all_must_pass'"):
        CompositeRateLimiter({"a": "login-ip"}, "all_must_pas")  # type: ignore[arg-type]


async def test_an_unknown_limiter_is_an_error_and_nothing_is_charged() -> None:
    broken = CompositeRateLimiter({"ip": "login-ip", "user": "nope"})
    with ManualClock():
        with pytest.raises(ratesync.LimiterNotFoundError):
            await broken.check(IDENTIFIERS)
        assert await remaining("login-ip", "192.0.2.7") == 10


def test_a_check_works_in_a_plain_thread_and_its_answer_is_frozen() -> None:
    check = composite().check(IDENTIFIERS).wait()
    assert isinstance(check, CompositeLimitCheck)
    with pytest.raises(dataclasses.FrozenInstanceError):
        check.allowed = False  # type: ignore[misc]


async def test_many_checks_at_once_never_exceed_the_smallest_burst() -> None:
    configure_limiter("a", rate_per_second=0.001, burst=7)
    configure_limiter("b", rate_per_second=0.001, burst=9)
    both = CompositeRateLimiter({"a": "a", "b": "b"})
    checks = await asyncio.gather(*(both.check({"a": "x", "b": "y"}) for _ in range(40)))
    granted = sum(check.allowed for check in checks)
    assert granted == 7
    assert 9 - await remaining("b", "y") == granted


async def test_two_names_of_one_limit_count_once() -> None:
    twice = CompositeRateLimiter({"sender": "login-user", "receiver": "login-user"})
    with ManualClock():
        check = await twice.check({"sender": "ada", "receiver": "ada"})
        assert [result.remaining for result in check.results.values()] == [2, 2]
        check = await twice.check({"sender": "ada", "receiver": "bob"})
        assert [result.remaining for result in check.results.values()] == [1, 2]
