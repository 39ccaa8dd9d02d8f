# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""Locks on PostgreSQL when answers stay away: what was sent comes back, what is held is lost in time.

A proxy holds answers back, so that a question has been sent and decided when its caller goes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from ratesync._core import Lock
from ratesync._engine import Engine
from ratesync.errors import LockLostError, StoreError


class Remote:
    """Two engines on PostgreSQL, one of them through a proxy."""

    def __init__(self, url: str, proxied: str) -> None:
        self.engines = [Engine(), Engine()]
        # So that whatever waits for a silent server waits for long.
        options = {"auto_create": True, "connect_timeout": 10.0, "command_timeout": 60.0}
        self.direct = self.engines[0].add_store("direct", "postgres", {"url": url, **options})
        self.proxied = self.engines[1].add_store("proxied", "postgres", {"url": proxied, **options})

    async def migrate(self) -> None:
        await self.direct.migrate_state("acteon_", False)

    def lock(self, store: object, name: str = "a", **options: object) -> Lock:
        return Lock(store, "acteon_", "default", "default", name, **options)


@pytest.fixture
async def remote(ratesync_postgres_url, ratesync_proxy) -> AsyncIterator[Remote]:
    remote = Remote(ratesync_postgres_url, ratesync_proxy.through(ratesync_postgres_url))
    await remote.migrate()
    yield remote
    ratesync_proxy.resume()
    for engine in remote.engines:
        await asyncio.to_thread(engine.shutdown)


async def test_sent_and_cancelled_the_lock_comes_back(remote: Remote, ratesync_proxy) -> None:
    async with remote.lock(remote.proxied):
        pass  # connected
    for _ in range(5):
        ratesync_proxy.stall("replies")
        task = asyncio.create_task(remote.lock(remote.proxied, ttl=30).__aenter__())
        while not (await remote.direct.locks("acteon_", 10)):  # it has been decided
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ratesync_proxy.resume()
        lease = await remote.lock(remote.direct, timeout=60).acquire()
        assert lease is not None, "the cancelled one keeps it"
        await lease.release()


async def test_a_silent_server_ends_in_an_error_and_it_recovers(remote: Remote, ratesync_proxy) -> None:
    async with remote.lock(remote.proxied):
        pass
    ratesync_proxy.stall()
    start = asyncio.get_running_loop().time()
    with pytest.raises(StoreError):
        await remote.lock(remote.proxied, timeout=0.5).acquire()
    assert asyncio.get_running_loop().time() - start < 30
    ratesync_proxy.resume()
    lease = await remote.lock(remote.proxied, timeout=60).acquire()
    assert lease is not None
    assert lease.held
    assert await lease.release()


async def test_released_in_one_process_it_is_had_in_the_other(remote: Remote) -> None:
    tokens: list[int] = []

    async def work(store: object) -> None:
        for _ in range(10):
            async with remote.lock(store, timeout=60) as lease:
                tokens.append(lease.token)

    await asyncio.gather(*(work(store) for store in (remote.direct, remote.proxied) for _ in range(4)))
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == 80


async def test_a_lease_is_kept_while_python_is_busy_and_lost_when_the_server_is_gone(
    remote: Remote, ratesync_proxy
) -> None:
    lease = await remote.lock(remote.proxied, ttl=9).acquire()
    async with remote.lock(remote.direct, "b"):
        pass  # connected
    before, now = 9.0, lease.remaining
    while lease.held and now <= before:  # until it was renewed
        sum(range(10_000))  # no turn of the loop
        before, now = now, lease.remaining
    assert lease.held
    assert await remote.lock(remote.direct).acquire(timeout=0) is None
    signal = asyncio.ensure_future(lease.lost_signal())
    ratesync_proxy.refuse_new()
    ratesync_proxy.cut()
    assert await asyncio.wait_for(signal, 60) is True
    assert lease.lost
    assert lease.remaining == 0
    heir = await remote.lock(remote.direct, timeout=60).acquire()
    assert heir is not None
    assert heir.token > lease.token
    await heir.release()


async def test_leaving_a_body_whose_lock_was_lost_to_an_outage_raises_at_once(
    remote: Remote, ratesync_proxy
) -> None:
    async with remote.lock(remote.proxied):
        pass
    clock = asyncio.get_running_loop().time
    left = 0.0
    with pytest.raises(LockLostError):
        async with remote.lock(remote.proxied, ttl=0.3) as lease:
            ratesync_proxy.stall()
            assert await lease.lost_signal() is True
            left = clock()
    assert clock() - left < 8, "it waited for a store that is out of reach"
    with pytest.raises(KeyError):  # what the body raised comes first
        async with await remote.lock(remote.direct, ttl=0.3).acquire(auto_renew=False) as lease:
            assert await lease.lost_signal() is True
            raise KeyError("of the body")


async def test_leaving_a_body_does_not_wait_long_for_a_silent_server(remote: Remote, ratesync_proxy) -> None:
    async with remote.lock(remote.proxied):
        pass
    clock = asyncio.get_running_loop().time
    async with remote.lock(remote.proxied, ttl=300) as lease:
        ratesync_proxy.stall("replies")
        left = clock()
    assert clock() - left < 20, "it waited for a server that does not answer"
    assert not lease.held
    assert not lease.lost
    # The release had been sent; its answer is all that is missing.
    heir = await remote.lock(remote.direct, timeout=60).acquire()
    assert heir is not None
    assert heir.token > lease.token
    ratesync_proxy.resume()
    await heir.release()


async def test_leaving_a_body_tells_what_a_slow_server_says(remote: Remote, ratesync_proxy) -> None:
    async with remote.lock(remote.proxied):
        pass
    clock = asyncio.get_running_loop().time
    for _ in range(10):
        try:
            async with remote.lock(remote.proxied, ttl=30) as lease:
                assert await remote.direct.break_lock("acteon_", "default", "default", "a", lease.token)
                ratesync_proxy.delay(0.3, "replies")
                left = clock()
        except LockLostError:
            break
        # It took so long that nobody waits for what it says.
        assert clock() - left > 0.9
        ratesync_proxy.resume()
    else:
        pytest.fail("nobody was told")


def test_a_thread_does_not_wait_long_for_a_silent_server_either(
    ratesync_postgres_url, ratesync_proxy
) -> None:
    engine = Engine()
    options = {
        "auto_create": True,
        "connect_timeout": 10.0,
        "command_timeout": 60.0,
        "url": ratesync_proxy.through(ratesync_postgres_url),
    }
    store = engine.add_store("proxied", "postgres", options)
    lock = Lock(store, "acteon_", "default", "default", "a", ttl=300)
    with lock:
        pass
    with lock:
        ratesync_proxy.stall()
        left = time.monotonic()
    assert time.monotonic() - left < 20
    ratesync_proxy.resume()
    with lock:  # given back meanwhile
        pass
    engine.shutdown()
