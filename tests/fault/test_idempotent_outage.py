# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""Who waits for the result of an operation outlasts an outage, and knows its own record again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

import ratesync
from ratesync.idempotency import KIND, Idempotent
from ratesync.testing import TcpProxy

KEY = "order-17"


@pytest.fixture(params=["postgres", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"ratesync_{request.param}_url"))


@pytest.fixture
def proxy(url: str) -> Iterator[TcpProxy]:
    server = urlsplit(url)
    with TcpProxy(server.hostname or "127.0.0.1", server.port or 0) as between:
        yield between
        ratesync.shutdown()


@pytest.fixture
async def stores(
    url: str, ratesync_registry: object, proxy: TcpProxy
) -> tuple[ratesync.Store, ratesync.Store]:
    """Two processes, as far as the server can tell; the second goes through the proxy."""
    for name, way in (("here", url), ("there", proxy.through(url))):
        if way.startswith("redis"):
            ratesync.configure_store(name, "redis", url=way, socket_timeout=1.0)
        else:
            ratesync.configure_store(name, "postgres", url=way, command_timeout=1.0, auto_create=True)
        await ratesync.get_store(name).state().initialize()
    return ratesync.get_store("here"), ratesync.get_store("there")


@dataclass
class Looks:
    """What became of looks at the key, of both processes together."""

    answered: int = 0
    errors: list[ratesync.StoreError] = field(default_factory=list)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    looks = Looks()
    create = Idempotent._create

    def watched(self: Idempotent, mine: dict[str, Any]) -> Any:
        try:
            found = yield from create(self, mine)
        except ratesync.StoreError as error:
            looks.errors.append(error)
            raise
        looks.answered += 1
        return found

    monkeypatch.setattr(Idempotent, "_create", watched)
    return looks


async def result_of(store: ratesync.Store, key: str = KEY, **options: Any) -> Any:
    async with store.idempotent(key, wait=120, **options) as op:
        if not op.done:
            op.result = "again"
        return op.result


async def until(what: Any) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.02)


async def test_a_waiter_outlasts_an_outage(
    stores: tuple[ratesync.Store, ratesync.Store], proxy: TcpProxy, looks: Looks
) -> None:
    here, there = stores
    async with here.idempotent(KEY, lease=300) as op:
        waiter = asyncio.create_task(result_of(there))
        await until(lambda: looks.answered >= 2)
        proxy.refuse_new()
        proxy.cut()
        await until(lambda: len(looks.errors) >= 3)
        assert not waiter.done(), waiter
        proxy.resume()
        op.result = "done"
    assert await asyncio.wait_for(waiter, 60) == "done"


async def test_a_first_question_is_answered_at_once(
    stores: tuple[ratesync.Store, ratesync.Store], proxy: TcpProxy, looks: Looks
) -> None:
    _, there = stores
    proxy.refuse_new()
    proxy.cut()
    with pytest.raises(ratesync.StoreError):
        await result_of(there)
    assert len(looks.errors) == 1


async def test_a_record_whose_answer_was_lost_is_known_again(
    stores: tuple[ratesync.Store, ratesync.Store], proxy: TcpProxy, looks: Looks
) -> None:
    here, there = stores
    state = here.state()
    for attempt in range(
        10
    ):  # until a look leaves between the end of the first operation and its own timeout
        key = f"{KEY}-{attempt}"
        looks.answered = 0
        with pytest.raises(ZeroDivisionError):
            async with here.idempotent(key, lease=300):
                waiter = asyncio.create_task(result_of(there, key, lease=300))
                await until(lambda: looks.answered >= 3)  # its next look comes in a while
                proxy.stall("replies")
                raise ZeroDivisionError
        looks.errors.clear()
        while await state.get(key, kind=KIND) is None and not looks.errors:
            await asyncio.sleep(0.02)
        if await state.get(key, kind=KIND) is not None:
            break
        proxy.resume()
        assert await asyncio.wait_for(waiter, 60) == "again"
    await until(lambda: looks.errors)
    assert not waiter.done(), waiter
    proxy.resume()
    assert await asyncio.wait_for(waiter, 60) == "again"
    assert "again" in await state.get(key, kind=KIND)
