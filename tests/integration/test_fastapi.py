"""Dependency and middleware in real applications: status, headers, slots given back, whatever happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import ratesync
from ratesync._schemas import ENGINES
from ratesync.contrib.fastapi import (
    CompositeRateLimitDependency,
    RateLimitDependency,
    RateLimitExceededError,
    RateLimitMiddleware,
    dependency,
    rate_limit,
    rate_limit_exception_handler,
)
from ratesync.testing.contract import eventually

pytestmark = pytest.mark.usefixtures("ratesync_registry")

SOON = 60  # seconds that a few requests take at most, on a machine that stands still now and then


@pytest.fixture(params=[engine for engine in ("memory", "postgres", "redis") if engine in ENGINES])
def store(request: pytest.FixtureRequest) -> str:
    options = {}
    if request.param != "memory":
        options["url"] = request.getfixturevalue(f"ratesync_{request.param}_url")
    if request.param == "postgres":
        options["auto_create"] = True
    ratesync.configure_store("s", request.param, **options)
    return "s"


@pytest.fixture(autouse=True)
def _say_everything_again() -> None:
    dependency._said.clear()


def client_of(app: Any, host: str = "192.0.2.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(host, 1234), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def app_with(limit: Any, **routes: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limit)])
    async def index() -> str:
        return "hello"

    return app


# Answers ------------------------------------------------------------------------------------------


async def test_depends_limits_and_tells_what_the_store_answered(store: str) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=0.01, burst=3)
    async with client_of(app_with(RateLimitDependency("api", headers="both"))) as client:
        answers = [await client.get("/") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit"] for answer in answers} == {"3"}
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"api";q=3;w=300'}
    state = [answer.headers["ratelimit"].rpartition("=") for answer in answers]
    assert [start for start, _, _ in state] == ['"api";r=2;t', '"api";r=1;t', '"api";r=0;t', '"api";r=0;t']
    # Since the first request a moment has passed.
    for (_, _, left), most in zip(state, (100, 200, 300, 100), strict=True):
        assert most - SOON <= int(left) <= most
    refused = answers[3]
    wait = int(refused.headers["retry-after"])
    assert 100 - SOON <= wait <= 100
    assert refused.json() == {
        "detail": [
            {
                "type": "rate_limit_exceeded",
                "msg": f"Rate limit exceeded. Try again in {wait} seconds.",
                "context": {"retry_after_seconds": wait, "limit": 3, "limiter": "api"},
            }
        ]
    }
    assert "retry-after" not in answers[0].headers


async def test_the_handler_gives_the_same_response_as_none(store: str) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=0.01)
    plain, handled = app_with(rate_limit("api")), app_with(rate_limit("api"))
    handled.add_exception_handler(RateLimitExceededError, rate_limit_exception_handler)
    answers = []
    for app in (plain, handled):
        await ratesync.get_limiter("api").reset("192.0.2.1")
        async with client_of(app) as client:
            await client.get("/")
            answers.append(await client.get("/"))
    assert answers[0].status_code == answers[1].status_code == 429
    assert answers[0].json().keys() == answers[1].json().keys()
    assert answers[0].headers.keys() == answers[1].headers.keys()
    assert "ratelimit" not in answers[0].headers


async def test_each_client_has_its_own_limit_and_nothing_is_registered() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    app = app_with(RateLimitDependency("api"))
    for host in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
        async with client_of(app, host) as client:
            assert (await client.get("/")).status_code == 200
            assert (await client.get("/")).status_code == 429
    assert list(ratesync.list_limiters()) == ["api"]


async def test_behind_a_proxy_the_client_is_limited_and_cannot_choose_who_it_is() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    app = app_with(RateLimitDependency("api", trusted_proxies=["10.0.0.0/8"]))
    async with client_of(app, "10.0.0.1") as client:
        codes = []
        for lie in ("1.1.1.1", "2.2.2.2", "3.3.3.3"):
            answer = await client.get("/", headers={"x-forwarded-for": f"{lie}, 203.0.113.9"})
            codes.append(answer.status_code)
    assert codes == [200, 429, 429]


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_an_extractor_names_who_is_limited(kind: str) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)

    def plain(request: Request) -> str:
        return request.headers["x-api-key"]

    async def late(request: Request) -> str:
        return request.headers["x-api-key"]

    app = app_with(RateLimitDependency("api", plain if kind == "plain" else late))
    async with client_of(app) as client:
        codes = [(await client.get("/", headers={"x-api-key": key})).status_code for key in "aba"]
    assert codes == [200, 200, 429]


@pytest.mark.parametrize("key", ["x" * 5000, ":" * 200, "\\" * 200, "é" * 400, "\x7f"])
async def test_an_odd_identifier_is_limited_like_any_other(key: str) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    app = app_with(RateLimitDependency("api", lambda request: key))
    async with client_of(app) as client:
        assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("key", ["", None, 7, "a\0b", "\ud800", b"bytes"])
async def test_an_extractor_that_gives_nonsense_does_not_open_the_door(key: Any) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    app = app_with(RateLimitDependency("api", lambda request: key))
    async with client_of(app) as client:
        assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]


async def test_a_failing_extractor_limits_the_address_and_an_http_exception_is_the_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)

    def extractor(request: Request) -> str:
        if "x-deny" in request.headers:
            raise HTTPException(401)
        return request.headers["x-api-key"]

    async with client_of(app_with(RateLimitDependency("api", extractor))) as client:
        assert (await client.get("/", headers={"x-deny": "1"})).status_code == 401
        assert [(await client.get("/")).status_code for _ in range(3)] == [200, 429, 429]
    assert caplog.text.count("identifier_extractor") == 1


async def test_a_timeout_waits_for_the_turn() -> None:
    ratesync.configure_limiter("api", rate_per_second=20.0)
    async with client_of(app_with(RateLimitDependency("api", timeout=5))) as client:
        assert [(await client.get("/")).status_code for _ in range(3)] == [200] * 3


def test_bad_arguments_are_said_at_once() -> None:
    with pytest.raises(ratesync.ConfigValidationError, match="trusted_proxies"):
        RateLimitDependency("api", trusted_proxies=["nowhere"])
    with pytest.raises(ratesync.ConfigValidationError, match="headers"):
        RateLimitDependency("api", headers="modern")  # type: ignore[arg-type]
    with pytest.raises(ratesync.ConfigValidationError, match="exclude_paths"):
        RateLimitMiddleware(FastAPI(), "api", exclude_paths=["("])
    with pytest.raises(ratesync.ConfigValidationError, match="include_paths"):
        RateLimitMiddleware(FastAPI(), "api", include_paths="/api")
    with pytest.raises(ratesync.ConfigValidationError, match="strategy"):
        CompositeRateLimitDependency({"a": "api"}, lambda request: {}, strategy="some")
    with pytest.raises(ratesync.ConfigValidationError, match="limiters"):
        CompositeRateLimitDependency({}, lambda request: {})


def test_the_openapi_schema_asks_for_no_parameters() -> None:
    schema = app_with(RateLimitDependency("api")).openapi()
    assert "parameters" not in schema["paths"]["/"]["get"]


# Slots --------------------------------------------------------------------------------------------


def held(limiter_id: str, key: str = "192.0.2.1") -> int:
    return ratesync.get_limiter(limiter_id).peek(key).wait().in_use


async def held_now(limiter_id: str, key: str = "192.0.2.1") -> int:
    return (await ratesync.get_limiter(limiter_id).peek(key)).in_use


async def nobody_holds(limiter_id: str) -> None:
    """Soon: a cancelled wait that met its grant gives it back behind the cancellation."""

    async def free() -> bool:
        return await held_now(limiter_id) == 0

    await eventually(free, 15)  # less than a lease


class Seen:
    """How many slots were held at which point of a request."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}

    async def note(self, name: str) -> None:
        self.at[name] = await held_now("slots")


def slots_app(seen: Seen) -> FastAPI:
    app = FastAPI()
    limit = Depends(RateLimitDependency("slots"))

    @app.get("/ok", dependencies=[limit])
    async def ok(tasks: BackgroundTasks) -> str:
        await seen.note("body")
        tasks.add_task(seen.note, "background")
        return "hello"

    @app.get("/fails", dependencies=[limit])
    async def fails() -> str:
        await seen.note("body")
        raise RuntimeError("a bug")

    @app.get("/denies", dependencies=[limit])
    async def denies() -> str:
        await seen.note("body")
        raise HTTPException(418)

    @app.get("/plain", dependencies=[limit])
    def plain() -> str:
        seen.at["body"] = held("slots")
        return "from a thread"

    @app.get("/stream", dependencies=[limit])
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            await seen.note("stream")
            yield b"two"

        return StreamingResponse(chunks())

    @app.get("/injected")
    async def injected(_: None = limit) -> str:
        await seen.note("body")
        return "hello"

    @app.get("/invalid/{number}", dependencies=[limit])
    async def invalid(number: int) -> str:
        return "hello"

    return app


@pytest.mark.parametrize(
    ("path", "status", "points"),
    [
        ("/ok", 200, {"body", "background"}),
        ("/fails", 500, {"body"}),
        ("/denies", 418, {"body"}),
        ("/plain", 200, {"body"}),
        ("/stream", 200, {"stream"}),
        ("/injected", 200, {"body"}),
        ("/invalid/x", 422, set()),
    ],
)
async def test_the_slot_is_held_during_the_request_and_given_back_after_it(
    store: str, path: str, status: int, points: set[str]
) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=1, timeout=0)
    seen = Seen()
    async with client_of(slots_app(seen)) as client:
        for _ in range(2):
            seen.at.clear()
            assert (await client.get(path)).status_code == status
            assert seen.at == dict.fromkeys(points, 1)
    await nobody_holds("slots")


async def test_a_client_that_goes_away_leaves_no_slot(store: str) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=1)
    app = FastAPI()
    reached = asyncio.Event()

    @app.get("/", dependencies=[Depends(RateLimitDependency("slots"))])
    async def index() -> str:
        reached.set()
        await asyncio.Event().wait()
        return "never"

    async with client_of(app) as client:
        request = asyncio.create_task(client.get("/"))
        await reached.wait()
        assert await held_now("slots") == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    await nobody_holds("slots")


async def test_a_client_that_goes_away_while_waiting_for_a_turn_leaves_nothing(store: str) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=1)
    app = app_with(RateLimitDependency("slots", timeout=60))
    async with ratesync.acquire("slots", key="192.0.2.1"), client_of(app) as client:
        request = asyncio.create_task(client.get("/"))
        await asyncio.sleep(0.05)
        assert not request.done()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    await nobody_holds("slots")


@pytest.mark.parametrize("where", ["dependency", "middleware"])
async def test_a_client_that_leaves_a_stream_leaves_no_slot(store: str, where: str) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=1)
    app = FastAPI()
    dependencies = [Depends(RateLimitDependency("slots"))] if where == "dependency" else []

    @app.get("/", dependencies=dependencies)
    async def index() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"x"
                await asyncio.sleep(0.001)

        return StreamingResponse(chunks())

    if where == "middleware":
        app.add_middleware(RateLimitMiddleware, limiter_id="slots")
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            assert await held_now("slots") == 1
            gone.set()

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [],
        "query_string": b"",
        "client": ("192.0.2.1", 1),
    }
    await asyncio.wait_for(app(scope, receive, send), 20)
    await nobody_holds("slots")


async def test_a_cancelled_composite_gives_everything_back(store: str) -> None:
    ratesync.configure_limiter("first", store, rate_per_second=0.01, burst=5, max_concurrent=5)
    ratesync.configure_limiter("second", store, max_concurrent=1)
    limit = CompositeRateLimitDependency(
        {"a": "first", "b": "second"}, lambda request: {"a": "x", "b": "x"}, timeout=60
    )
    async with ratesync.acquire("second", key="x"), client_of(app_with(limit)) as client:
        request = asyncio.create_task(client.get("/"))
        for _ in range(30):
            state = await ratesync.get_limiter("first").peek("x")
            assert (state.remaining, state.in_use) == (5, 0), "who waits reserves nothing"
            await asyncio.sleep(0.01)
        assert not request.done()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        state = await ratesync.get_limiter("first").peek("x")
    assert (state.remaining, state.in_use) == (5, 0)


async def test_a_full_limit_says_429_with_what_is_known(store: str) -> None:
    ratesync.configure_limiter("slots", store, rate_per_second=1000.0, burst=5, max_concurrent=2)
    app = app_with(RateLimitDependency("slots", headers="both"))
    held = [await ratesync.acquire("slots", key="192.0.2.1") for _ in range(2)]
    async with client_of(app) as client:
        answer = await client.get("/")
    for permit in held:
        permit.release()
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-ratelimit-limit"] == "2"
    assert answer.headers["ratelimit"] == '"slots:concurrent";r=0'
    assert (
        answer.headers["ratelimit-policy"]
        == '"slots";q=1000;w=1, "slots:concurrent";q=2;qu="concurrent-requests"'
    )


async def test_awaited_by_hand_the_slot_is_held_until_the_request_ends(store: str) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=1, timeout=0)
    limit = RateLimitDependency("slots")
    seen = Seen()
    app = FastAPI()

    async def wrapped(request: Request, response: Response) -> None:
        await limit(request, response)

    @app.get("/", dependencies=[Depends(wrapped)])
    async def index() -> str:
        await seen.note("body")
        return "hello"

    async with client_of(app) as client:
        for _ in range(2):
            answer = await client.get("/")
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-remaining"] == "0"
    assert seen.at == {"body": 1}
    await nobody_holds("slots")


async def test_in_plain_starlette_the_slot_goes_with_the_request(store: str) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=1, timeout=0)
    limit = RateLimitDependency("slots")
    seen = Seen()

    async def index(request: Request) -> Response:
        response = PlainTextResponse("hello")
        await limit(request, response)
        await seen.note("body")
        return response

    app = Starlette(routes=[Route("/", index)])
    app.add_exception_handler(RateLimitExceededError, rate_limit_exception_handler)
    async with client_of(app) as client:
        assert (await client.get("/")).headers["x-ratelimit-limit"] == "1"
        assert (await client.get("/")).status_code == 200
        async with ratesync.acquire("slots", key="192.0.2.1"):
            assert (await client.get("/")).status_code == 429
    assert seen.at == {"body": 1}
    await nobody_holds("slots")


# Failures -----------------------------------------------------------------------------------------


async def test_an_unknown_limiter_passes_with_a_warning_a_minute_or_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with client_of(app_with(RateLimitDependency("nope"))) as client:
        answers = [await client.get("/") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert "x-ratelimit-limit" not in answers[0].headers
    assert caplog.text.count("not configured; requests pass") == 1
    dependency._said = {subject: at - 60 for subject, at in dependency._said.items()}
    async with client_of(app_with(RateLimitDependency("nope"))) as client:
        await client.get("/")
    assert caplog.text.count("not configured; requests pass") == 2
    async with client_of(app_with(RateLimitDependency("nope", fail_open=False))) as client:
        assert (await client.get("/")).status_code == 503


@pytest.mark.parametrize(
    ("fail_closed", "fail_open", "status"), [(False, True, 200), (True, True, 503), (True, False, 503)]
)
async def test_during_an_outage_the_limiter_decides(fail_closed: bool, fail_open: bool, status: int) -> None:
    ratesync.configure_store("dead", "postgres", url="postgresql://nobody@127.0.0.1:1/none")
    ratesync.configure_limiter("api", "dead", rate_per_second=1.0, fail_closed=fail_closed)
    async with client_of(app_with(RateLimitDependency("api", fail_open=fail_open))) as client:
        answer = await client.get("/")
    assert answer.status_code == status
    assert "x-ratelimit-limit" not in answer.headers
    assert "postgres" not in answer.text


async def test_an_error_of_the_store_follows_fail_open(
    ratesync_postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    ratesync.configure_store("db", "postgres", url=ratesync_postgres_url)  # no table
    ratesync.configure_limiter("api", "db", rate_per_second=1.0)
    async with client_of(app_with(RateLimitDependency("api"))) as client:
        assert (await client.get("/")).status_code == 200
    assert "rate_limiter_state" in caplog.text
    async with client_of(app_with(RateLimitDependency("api", fail_open=False))) as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()) == (503, {"detail": "Rate limiter unavailable"})


async def test_an_undecided_request_is_also_a_runtime_error() -> None:
    request = Request({"type": "http", "headers": [], "client": ("192.0.2.1", 1)})
    with pytest.raises(RuntimeError, match="nope"):
        await RateLimitDependency("nope", fail_open=False)(request, Response())


# Several limiters ---------------------------------------------------------------------------------


def composite_app(strategy: str, headers: Any = "both") -> FastAPI:
    return app_with(
        CompositeRateLimitDependency(
            {"address": "by-address", "user": "by-user"},
            lambda request: {"address": "a", "user": request.headers["x-user"]},
            strategy,
            headers=headers,
        )
    )


@pytest.mark.parametrize("strategy", ["most_restrictive", "all_must_pass"])
async def test_a_refusal_of_one_gives_back_what_others_granted(store: str, strategy: str) -> None:
    ratesync.configure_limiter("by-address", store, rate_per_second=0.01, burst=5, max_concurrent=9)
    ratesync.configure_limiter("by-user", store, rate_per_second=0.01, burst=1)
    async with client_of(composite_app(strategy)) as client:
        first = await client.get("/", headers={"x-user": "u"})
        assert first.status_code == 200
        assert first.headers["ratelimit"] == '"by-address";r=4;t=100, "by-user";r=0;t=100'
        assert first.headers["x-ratelimit-limit"] == "1"
        for _ in range(3):
            refused = await client.get("/", headers={"x-user": "u"})
            assert refused.status_code == 429
            assert refused.json()["detail"][0]["context"]["limiter"] == "by-user"
        other = await client.get("/", headers={"x-user": "v"})
        assert other.headers["ratelimit"].startswith('"by-address";r=3;')
    limiter = ratesync.get_limiter("by-address")
    async with asyncio.timeout(20):  # the slot of the last request is on its way back
        while (state := await limiter.peek("a")).in_use > 0:
            await asyncio.sleep(0.01)
    assert state.remaining == 3


async def test_all_limits_are_decided_in_one_round_trip(store: str) -> None:
    ratesync.configure_limiter("by-address", store, rate_per_second=0.01, burst=50)
    ratesync.configure_limiter("by-user", store, rate_per_second=0.01, burst=1, max_concurrent=1)
    trips: dict[int, list[int]] = {200: [], 429: []}
    async with client_of(composite_app("all_must_pass")) as client:
        await client.get("/", headers={"x-user": "first"})  # looks at tables, loads scripts
        for user in "abcd":
            for code, seen in trips.items():
                before = (await ratesync.get_store(store).stats())["round_trips"]
                assert (await client.get("/", headers={"x-user": user})).status_code == code
                seen.append((await ratesync.get_store(store).stats())["round_trips"] - before)
    # Now and then a purge, or a slot that comes back late, is counted as well.
    assert min(trips[429]) <= 1, "a refusal has nothing to give back"
    assert min(trips[200]) <= 2, "the other one gives the slot back"


async def test_limits_of_several_stores_and_an_unknown_one(store: str) -> None:
    ratesync.configure_store("other", "memory")
    ratesync.configure_limiter("here", store, rate_per_second=0.01, burst=5)
    ratesync.configure_limiter("there", "other", rate_per_second=0.01, burst=1)
    for names in (["here", "there"], ["here", "there", "unknown"]):
        await ratesync.get_limiter("there").reset("x")
        limit = CompositeRateLimitDependency(
            {name: name for name in names}, lambda request, names=names: dict.fromkeys(names, "x")
        )
        async with client_of(app_with(limit)) as client:
            codes = [(await client.get("/")).status_code for _ in range(3)]
        assert codes == [200, 429, 429]
    assert (await ratesync.get_limiter("here").peek("x")).remaining == 3, "refusals charge nothing"


async def test_one_limit_under_two_names_is_charged_once(store: str) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=0.01, burst=5)
    limit = CompositeRateLimitDependency(
        {"a": "api", "b": "api"}, lambda request: {"a": "x", "b": "x"}, headers="ietf"
    )
    async with client_of(app_with(limit)) as client:
        assert (await client.get("/")).status_code == 200
    assert (await ratesync.get_limiter("api").peek("x")).remaining == 4


async def test_any_must_pass_needs_one() -> None:
    ratesync.configure_limiter("by-address", rate_per_second=0.01, burst=2)
    ratesync.configure_limiter("by-user", rate_per_second=0.01, burst=1)
    async with client_of(composite_app("any_must_pass")) as client:
        codes = [(await client.get("/", headers={"x-user": "u"})).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        assert (await client.get("/", headers={"x-user": "v"})).status_code == 200


async def test_identifiers_have_to_match_the_limiters() -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    limit = CompositeRateLimitDependency({"a": "api"}, lambda request: {"b": "x"})
    request = Request({"type": "http", "headers": [], "client": None})
    with pytest.raises(ValueError, match="must match limiter keys"):
        await limit(request, Response())


async def test_two_dependencies_and_a_middleware_tell_of_all() -> None:
    for name, burst in (("outer", 9), ("one", 5), ("two", 3)):
        ratesync.configure_limiter(name, rate_per_second=0.01, burst=burst)
    app = FastAPI()

    @app.get(
        "/",
        dependencies=[
            Depends(RateLimitDependency("two", headers="both")),
            Depends(RateLimitDependency("one", headers="both")),
        ],
    )
    async def index() -> str:
        return "hello"

    app.add_middleware(RateLimitMiddleware, limiter_id="outer", headers="both")
    async with client_of(app) as client:
        answer = await client.get("/")
    assert answer.headers["x-ratelimit-remaining"] == "2"
    assert answer.headers["x-ratelimit-limit"] == "3"
    assert answer.headers["ratelimit"] == '"two";r=2;t=100, "one";r=4;t=100, "outer";r=8;t=100'
    assert answer.headers.get_list("x-ratelimit-limit") == ["3"]


# Middleware ---------------------------------------------------------------------------------------


def middleware_app(**options: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/api/items")
    async def items() -> str:
        return "items"

    @app.get("/health")
    async def health() -> str:
        return "fine"

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x"
                await asyncio.sleep(0)

        return StreamingResponse(chunks())

    @app.get("/fails")
    async def fails() -> str:
        raise RuntimeError("a bug")

    options = {"limiter_id": "api", **options}
    app.add_middleware(RateLimitMiddleware, **options)
    return app


async def test_the_middleware_limits_a_token_bucket(store: str) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=0.01, burst=2)
    async with client_of(middleware_app()) as client:
        answers = [await client.get("/api/items") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
    assert 100 - SOON <= int(answers[2].headers["retry-after"]) <= 100
    assert answers[2].json()["detail"][0]["context"]["limiter"] == "api"


async def test_an_http_exception_of_the_middlewares_extractor_is_the_response() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)

    async def account(request: Request) -> str:
        if "x-account" not in request.headers:
            raise HTTPException(401, "who are you?", {"www-authenticate": "Bearer"})
        return request.headers["x-account"]

    async with client_of(middleware_app(identifier_extractor=account)) as client:
        refused = await client.get("/api/items")
        assert (refused.status_code, refused.json()) == (401, {"detail": "who are you?"})
        assert refused.headers["www-authenticate"] == "Bearer"
        codes = [(await client.get("/api/items", headers={"x-account": "a"})).status_code for _ in range(2)]
    assert codes == [200, 429]


async def test_paths_are_included_and_excluded_and_excludes_win() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    app = middleware_app(include_paths=["/api", "/health"], exclude_paths=["/health$"])
    async with client_of(app) as client:
        assert [(await client.get("/health")).status_code for _ in range(3)] == [200] * 3
        assert [(await client.get("/stream")).status_code for _ in range(3)] == [200] * 3
        assert [(await client.get("/api/items")).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("path", ["/api/items", "/stream", "/fails", "/missing"])
async def test_the_middleware_gives_the_slot_back(store: str, path: str) -> None:
    ratesync.configure_limiter("api", store, max_concurrent=1, timeout=0)
    async with client_of(middleware_app()) as client:
        codes = {(await client.get(path)).status_code for _ in range(3)}
    assert len(codes) == 1
    assert 429 not in codes
    await nobody_holds("api")


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_websockets_and_lifespan_pass_through(kind: str) -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    passed = []

    async def app(*arguments: Any) -> None:
        passed.append(arguments)

    middleware = RateLimitMiddleware(app, "api")
    arguments = ({"type": kind, "path": "/", "headers": [], "client": None}, object(), object())
    for _ in range(3):
        await middleware(*arguments)  # type: ignore[arg-type]
    assert passed == [arguments] * 3  # the very objects


async def test_a_stream_stays_a_stream() -> None:
    ratesync.configure_limiter("api", rate_per_second=10.0, burst=10)
    app = middleware_app(headers="ietf")
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/stream",
        "headers": [],
        "query_string": b"",
        "client": ("192.0.2.1", 1),
    }
    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 4
    assert [message["body"] for message in sent[1:]] == [b"x", b"x", b"x", b""]
    assert (b"ratelimit", b'"api";r=9;t=1') in sent[0]["headers"]


async def test_a_failing_limiter_passes_refuses_or_raises(caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(middleware_app(limiter_id="nope")) as client:
        assert (await client.get("/health")).status_code == 200
    async with client_of(middleware_app(limiter_id="nope", fail_open=False)) as client:
        assert (await client.get("/health")).status_code == 500
    ratesync.configure_store("dead", "postgres", url="postgresql://nobody@127.0.0.1:1/none")
    ratesync.configure_limiter("api", "dead", rate_per_second=1.0, fail_closed=True)
    caplog.set_level(logging.CRITICAL)
    async with client_of(middleware_app()) as client:
        answer = await client.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
