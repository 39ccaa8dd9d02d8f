"""What the contract suites have in common: how a test calls the product, and how it gets a limiter.

A suite is a class of tests to inherit, with a fixture `store_options` that says how to configure the
store under test. Tests with the fixture `call` run twice, from asyncio and from a plain thread.
Needs pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import ratesync
from ratesync import ConfigValidationError, Pending, RateLimiter, Store

__all__ = [
    "PATIENCE",
    "SLOW",
    "Caller",
    "Contract",
    "MakeLimiter",
    "StoreContract",
    "eventually",
    "patient_state",
    "refused",
]

T = TypeVar("T")
SLOW = 0.01  # units per second: the next one comes after 100 s, that is never
PATIENCE = 60.0  # seconds to wait for what has to come, on a machine that may stand still for some of them
MakeLimiter = Callable[..., RateLimiter]


class Caller:
    """Calls the product the way one of its two kinds of users does."""

    def __init__(self, kind: str) -> None:
        self._runner = asyncio.Runner() if kind == "asyncio" else None

    def __call__(self, pending: Pending[T]) -> T:
        """The result of a call."""
        if self._runner is None:
            return pending.wait()

        async def result() -> T:
            return await pending

        return self._runner.run(result())

    @contextlib.contextmanager
    def holding(self, manager: Any) -> Iterator[Any]:
        """`with` or `async with` of a permit, a lock, or an idempotent operation."""
        if self._runner is None:
            with manager as entered:
                yield entered
            return

        async def enter() -> Any:
            return await manager.__aenter__()

        async def leave(*exc: Any) -> Any:
            return await manager.__aexit__(*exc)

        entered = self._runner.run(enter())
        try:
            yield entered
        except BaseException:
            if not self._runner.run(leave(*sys.exc_info())):
                raise
        else:
            self._runner.run(leave(None, None, None))

    def each(self, items: Any) -> list[Any]:
        """What `for` or `async for` yields."""
        if self._runner is None:
            return list(items)

        async def collect() -> list[Any]:
            return [item async for item in items]

        return self._runner.run(collect())

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


@contextlib.contextmanager
def refused(argument: str) -> Iterator[None]:
    """The block raises for this argument, before anything is sent, and says what would do."""
    with pytest.raises((ConfigValidationError, TypeError)) as caught:
        yield
    error = caught.value
    assert argument in f"{getattr(error, 'field', '')} {error}", f"{error!r} does not name {argument}"
    if isinstance(error, ConfigValidationError):
        assert isinstance(error, ValueError)


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = PATIENCE) -> None:
    """For effects that a store learns a moment later: a release, a refund."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.005)


def patient_state(monkeypatch: pytest.MonkeyPatch, seconds: float = PATIENCE) -> None:
    """The calls on state that a test makes have so much time, unless it says how much, instead of 5 s."""
    for function in (Store.state, Store.idempotent, ratesync.configure_state):
        assert function.__kwdefaults__ is not None
        monkeypatch.setitem(function.__kwdefaults__, "timeout", seconds)


class StoreContract:
    """Inherit, and say in the fixture `store_options` how to configure the store."""

    @pytest.fixture
    def store_options(self) -> dict[str, Any]:
        """Arguments of `configure_store` for an empty store of its own."""
        raise NotImplementedError

    @pytest.fixture
    def store(
        self, ratesync_registry: Path, store_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> Store:
        """The store under test, configured as "contract", and connected. Calls have time for its answers."""
        patient_state(monkeypatch)
        ratesync.configure_store("contract", **store_options)
        store = ratesync.get_store("contract")
        store.state().initialize().wait()
        return store

    @pytest.fixture(params=["asyncio", "threads"])
    def call(self, request: pytest.FixtureRequest, ratesync_registry: Path) -> Iterator[Caller]:
        caller = Caller(request.param)
        yield caller
        caller.close()


class Contract(StoreContract):
    """The contracts of limits."""

    @pytest.fixture
    def limit(self, ratesync_registry: Path, store_options: dict[str, Any]) -> MakeLimiter:
        """A function that configures a limiter with a name of its own and returns it."""
        ratesync.configure_store("contract", **store_options)
        numbers = itertools.count()

        def make(**options: Any) -> RateLimiter:
            limiter_id = f"limit-{next(numbers)}"
            ratesync.configure_limiter(limiter_id, "contract", fail_closed=True, outage_budget=30, **options)
            return ratesync.get_limiter(limiter_id)

        return make

    @staticmethod
    async def enter(limiter: RateLimiter) -> None:
        async with limiter:
            await asyncio.sleep(0)
