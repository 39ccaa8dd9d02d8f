"""Section 2.1 of the compatibility contract: `rate_limited`, as existing code decorates with it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, MagicMock, patch

import pytest

import ratesync
from ratesync import (
    AcquireTimeoutError,
    RateLimiterAcquisitionError,
    configure_limiter,
    get_limiter,
    rate_limited,
)
from ratesync.testing import ManualClock

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForCheckers

pytestmark = pytest.mark.usefixtures("ratesync_registry")


@pytest.fixture(autouse=True)
def limiters(ratesync_registry: object) -> None:
    configure_limiter("api", rate_per_second=0.001)
    configure_limiter("free", rate_per_second=1e6, burst=1000)
    configure_limiter("slots", max_concurrent=1)


async def used(limiter_id: str, key: str | None = None) -> int:
    return (await get_limiter(limiter_id).peek(key)).current_usage


# Kinds of functions -------------------------------------------------------------------------------


async def test_a_coroutine_function_stays_one_and_returns_its_value() -> None:
    @rate_limited("free")
    async def fetch(url: str, *, retries: int = 3) -> str:
        """Fetches."""
        return f"{url} {retries}"

    assert inspect.iscoroutinefunction(fetch)
    assert (fetch.__name__, fetch.__doc__) == ("fetch", "Fetches.")
    assert await fetch("x", retries=1) == "x 1"


def test_a_plain_function_is_limited_in_a_thread() -> None:
    @rate_limited("api", timeout=0)
    def work(value: int) -> int:
        return value + 1

    assert not inspect.iscoroutinefunction(work)
    assert work(1) == 2
    with pytest.raises(AcquireTimeoutError):
        work(1)


async def test_a_plain_function_in_a_running_loop_runs_when_it_need_not_wait() -> None:
    @rate_limited("api")
    def work() -> str:
        return "done"

    assert work() == "done"
    with pytest.raises(RuntimeError, match=r"work\(\) would have to wait .*async def") as caught:
        work()
    assert not isinstance(caught.value, RateLimiterAcquisitionError)


async def test_an_error_about_loops_from_the_body_is_the_bodys() -> None:
    @rate_limited("free")
    def work() -> None:
        raise RuntimeError("this event loop is already running")

    with pytest.raises(RuntimeError, match="already running"):
        work()


async def test_methods_of_every_kind_are_limited() -> None:
    class Client:
        @rate_limited("free")
        async def get(self) -> Any:
            return self

        @rate_limited("free")
        @classmethod
        async def make(cls) -> Any:
            return cls

        @classmethod
        @rate_limited("free")
        async def build(cls) -> Any:
            return cls

        @rate_limited("free")
        @staticmethod
        def double(value: int) -> int:
            return 2 * value

    client = Client()
    assert await client.get() is client
    assert await Client.make() is await client.build() is Client
    assert client.double(4) == 8
    assert get_limiter("free").get_metrics().total_acquisitions == 4


async def test_callable_objects_and_partials_are_functions_too() -> None:
    class Job:
        async def __call__(self, value: int) -> int:
            return value

    async def add(a: int, b: int) -> int:
        return a + b

    assert await rate_limited("free")(Job())(5) == 5
    assert await rate_limited("free")(functools.partial(add, 1))(2) == 3


def test_functions_written_in_c_need_no_signature() -> None:
    assert rate_limited("free")(min)(3, 2) == 2
    assert rate_limited(lambda: "free")(min)(3, 2) == 2
    assert rate_limited(lambda **arguments: arguments.get("id", "free"))(min)(3, 2) == 2


async def test_a_plain_function_does_not_return_a_coroutine_past_its_limit() -> None:
    async def fetch() -> int:
        return await used("slots")

    @rate_limited("slots")
    @functools.wraps(fetch)
    def logged() -> Any:  # what a decorator that forgot about coroutines makes
        return fetch()

    with pytest.raises(TypeError, match=r"returned a coroutine .*async def"):
        logged()
    assert await used("slots") == 0


async def test_an_async_generator_holds_its_slot_from_start_to_end() -> None:
    @rate_limited("slots")
    async def numbers(count: int) -> AsyncGenerator[int, None]:
        for number in range(count):
            yield number

    assert inspect.isasyncgenfunction(numbers)
    stream = numbers(3)
    assert await used("slots") == 0, "nothing is taken before the iteration"
    assert await anext(stream) == 0
    assert await used("slots") == 1
    assert [item async for item in stream] == [1, 2]
    assert await used("slots") == 0


async def test_an_async_generator_that_is_closed_or_fails_gives_its_slot_back() -> None:
    @rate_limited("slots")
    async def echo() -> AsyncGenerator[Any, Any]:
        received: Any = "ready"
        while True:
            try:
                received = yield received
            except ValueError as error:
                received = error.args[0]

    stream = echo()
    assert await anext(stream) == "ready"
    assert await stream.asend(5) == 5
    assert await stream.athrow(ValueError("thrown")) == "thrown"
    await stream.aclose()
    assert await used("slots") == 0

    stream = echo()
    await anext(stream)
    with pytest.raises(KeyError):
        await stream.athrow(KeyError("passes"))
    assert await used("slots") == 0


def test_a_generator_holds_its_slot_from_start_to_end() -> None:
    @rate_limited("slots")
    def talk() -> Generator[str, str, str]:
        heard = yield "hello"
        yield heard
        return "bye"

    conversation = talk()
    assert get_limiter("slots").peek().wait().in_use == 0
    assert next(conversation) == "hello"
    assert conversation.send("you") == "you"
    assert get_limiter("slots").peek().wait().in_use == 1
    with pytest.raises(StopIteration) as end:
        next(conversation)
    assert end.value.value == "bye"
    assert get_limiter("slots").peek().wait().in_use == 0

    conversation = talk()
    next(conversation)
    conversation.close()
    assert get_limiter("slots").peek().wait().in_use == 0


async def test_the_slot_is_held_while_the_body_runs_and_given_back_after_an_error() -> None:
    seen = []

    @rate_limited("slots")
    async def body(fails: bool) -> None:
        seen.append(await used("slots"))
        if fails:
            raise KeyError("body")

    await body(False)
    with pytest.raises(KeyError):
        await body(True)
    assert seen == [1, 1]
    assert await used("slots") == 0


async def test_a_cancelled_call_gives_its_slot_back() -> None:
    started = asyncio.Event()

    @rate_limited("slots")
    async def body() -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await used("slots") == 0


# Modes and timeouts -------------------------------------------------------------------------------


async def test_mode_try_returns_none_when_refused() -> None:
    calls = []

    @rate_limited("api", timeout=0, mode="try")
    async def work() -> str:
        calls.append(1)
        return "done"

    assert [await work(), await work()] == ["done", None]
    assert calls == [1]


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_mode_try_never_swallows_an_error_of_the_body(kind: str) -> None:
    error = RateLimiterAcquisitionError("of a limiter in the body", "inner")

    @rate_limited("free", timeout=0, mode="try")
    async def coroutine() -> None:
        raise error

    @rate_limited("free", timeout=0, mode="try")
    def plain() -> None:
        raise error

    with pytest.raises(RateLimiterAcquisitionError) as caught:
        await coroutine() if kind == "async" else plain()
    assert caught.value is error


async def test_a_timeout_of_zero_is_honoured_and_none_takes_the_limiters() -> None:
    configure_limiter("patient", rate_per_second=1.0, timeout=0.5)

    @rate_limited("patient")
    async def by_default() -> None: ...

    @rate_limited("patient", timeout=0)
    async def never_waits() -> None: ...

    with ManualClock() as clock:
        await by_default()
        with pytest.raises(AcquireTimeoutError):
            await never_waits()
        with pytest.raises(AcquireTimeoutError):
            await by_default()
        await clock.run(0.6)
        task = asyncio.create_task(by_default())
        await clock.run(0.5)
        await task


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"mode": "maybe"}, ValueError, "mode"),
        ({"mode": "try"}, ValueError, "needs a timeout"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": "1"}, ValueError, "timeout"),
        ({"timeout": True}, ValueError, "timeout"),
    ],
)
def test_bad_arguments_are_refused_at_decoration(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rate_limited("api", **arguments)


@pytest.mark.parametrize("what", [5, "text", dict, None])
def test_what_is_no_function_is_refused_at_decoration(what: Any) -> None:
    with pytest.raises(TypeError, match="decorates a function"):
        rate_limited("api")(what)


def test_a_limiter_of_another_kind_is_refused_at_decoration() -> None:
    with pytest.raises(TypeError, match="not int"):
        rate_limited(5)  # type: ignore[call-overload]


def test_mode_try_is_refused_for_generators() -> None:
    def plain() -> Iterator[int]:
        yield 1

    async def asynchronous() -> AsyncGenerator[int, None]:
        yield 1

    for function in (plain, asynchronous):
        with pytest.raises(ValueError, match="empty iteration"):
            rate_limited("api", timeout=0, mode="try")(function)


# Which limiter ------------------------------------------------------------------------------------


async def test_an_unknown_limiter_is_an_error_at_the_call() -> None:
    calls = []

    @rate_limited("aip")
    async def work() -> None:
        calls.append(1)

    with pytest.raises(ratesync.LimiterNotFoundError, match="did you mean 'api'"):
        await work()
    assert calls == []
    configure_limiter("aip", rate_per_second=1.0)  # configured later: found
    await work()


async def test_factories_return_ids_or_limiters_and_are_of_any_kind() -> None:
    direct = ratesync.MemoryRateLimiter("direct", rate_per_second=0.001, burst=5)

    async def by_id(tenant: str) -> str:
        return f"tenant-{tenant}"

    async def by_object(tenant: str) -> ratesync.RateLimiter:
        return await ratesync.get_or_clone_limiter("base", tenant)

    configure_limiter("base", rate_per_second=0.001, burst=5)
    configure_limiter("tenant-a", rate_per_second=0.001, burst=5)
    sources: list[Any] = [
        direct,
        lambda: direct,
        lambda tenant: f"tenant-{tenant}",
        lambda tenant: get_limiter(f"tenant-{tenant}"),
        by_id,
        by_object,
    ]
    for source in sources:

        @rate_limited(source)
        async def work(tenant: str) -> str:
            return tenant

        assert await work("a") == "a"
    assert (await direct.peek()).current_usage == 2
    assert await used("tenant-a") == 3
    assert await used("base:a") == 1


async def test_factories_get_the_arguments_that_they_name() -> None:
    seen: list[Any] = []

    def some(region: str, tenant: str = "?") -> str:
        seen.append((tenant, region))
        return "free"

    def everything(**arguments: Any) -> str:
        seen.append(arguments)
        return "free"

    def positional(tenant: str, /) -> str:
        seen.append(tenant)
        return "free"

    def nothing() -> str:
        return "free"

    for factory in (some, everything, positional, nothing):

        @rate_limited(factory)
        async def work(tenant: str, *rest: int, region: str = "eu", **more: int) -> None: ...

        await work("t", 1, 2, extra=3)
    assert seen == [("t", "eu"), {"tenant": "t", "rest": (1, 2), "region": "eu", "extra": 3}, "t"]


async def test_a_factory_of_a_method_may_use_self() -> None:
    class Client:
        name = "free"

        @rate_limited(lambda self: self.name)
        async def get(self) -> str:
            return "got"

    assert await Client().get() == "got"


def test_a_factory_that_needs_what_the_function_has_not_is_refused_at_decoration() -> None:
    with pytest.raises(TypeError, match=r"needs the argument 'tenant', which .*work\(\) does not have"):

        @rate_limited(lambda tenant: "free")
        async def work(user: str) -> None: ...


async def test_errors_of_a_factory_and_wrong_results_pass_through() -> None:
    def broken() -> str:
        raise LookupError("no tenant")

    @rate_limited(broken, timeout=0, mode="try")
    async def first() -> None: ...

    @rate_limited(lambda: 5)  # type: ignore[arg-type,return-value]
    async def second() -> None: ...

    with pytest.raises(LookupError):
        await first()
    with pytest.raises(TypeError, match="returned int"):
        await second()


async def test_mode_try_never_swallows_a_refusal_that_its_factory_met() -> None:
    await get_limiter("api").acquire()

    def find() -> str:
        with ratesync.acquire("api", timeout=0):
            return "free"

    async def find_async() -> str:
        return find()

    async def body() -> str:
        return "ran"

    with pytest.raises(AcquireTimeoutError, match="api"):
        rate_limited(find, timeout=0, mode="try")(lambda: "ran")()
    with pytest.raises(AcquireTimeoutError, match="api"):
        await rate_limited(find, timeout=0, mode="try")(body)()
    with pytest.raises(AcquireTimeoutError, match="api"):
        await rate_limited(find_async, timeout=0, mode="try")(body)()


def test_an_async_factory_is_not_for_a_plain_function() -> None:
    async def asynchronous() -> str:
        return "free"

    with pytest.raises(TypeError, match="make both of one kind"):
        rate_limited(asynchronous)(lambda: None)

    hidden = rate_limited(lambda: asynchronous())(lambda: None)
    with pytest.raises(TypeError, match="make both of one kind"):
        hidden()


# What frameworks and test suites look at ----------------------------------------------------------


def test_the_signature_is_evaluated() -> None:
    @rate_limited("free")
    async def endpoint(request: asyncio.Event, limit: int | None = None) -> dict[str, int]:
        return {}

    signature = inspect.signature(endpoint, follow_wrapped=False)
    assert signature.parameters["request"].annotation is asyncio.Event
    assert signature.parameters["limit"].annotation == int | None
    assert signature.return_annotation == dict[str, int]


def test_a_signature_that_cannot_be_evaluated_stays_as_written() -> None:
    @rate_limited("free")
    async def endpoint(amount: OnlyForCheckers) -> None: ...

    assert inspect.signature(endpoint).parameters["amount"].annotation == "OnlyForCheckers"


async def test_a_suite_may_put_a_mock_in_place_of_get_limiter() -> None:
    limiter = MagicMock(is_initialized=False, default_timeout=7.0)
    limiter.initialize = AsyncMock()
    limiter.acquire_context.return_value = AsyncMock()

    @rate_limited("anything")
    async def work() -> str:
        return "done"

    with patch("ratesync.decorators.get_limiter", return_value=limiter) as get:
        assert await work() == "done"
    get.assert_called_once_with("anything")
    limiter.initialize.assert_awaited_once()
    limiter.acquire_context.assert_called_once_with(timeout=7.0)


def test_threads_share_the_limit_of_a_decorated_function() -> None:
    configure_limiter("three", rate_per_second=0.001, burst=3)
    granted = []

    @rate_limited("three", timeout=0, mode="try")
    def work() -> bool:
        return True

    def run() -> None:
        granted.extend(work() for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert granted.count(True) == 3
    assert granted.count(None) == 17
