"""Configuration that changes while it is used: no call fails, no slot stays held."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import ratesync
from ratesync import acquire
from ratesync.testing.proxy import TcpProxy

FILE = """
[stores.db]
engine = "postgres"
url = "{url}"
auto_create = true
pool_max_size = {pool}

[limiters.remote]
store = "db"
rate_per_second = 1e6
burst = 100000
max_concurrent = {slots}
fail_closed = true
outage_budget = 20

[limiters.local]
rate_per_second = 1e6
burst = 100000
max_concurrent = {slots}
"""


async def nobody_holds(name: str) -> None:
    async with asyncio.timeout(20):
        while (await ratesync.get_limiter(name).get_state()).in_use:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("changed", ["store", "limiters", "both"])
async def test_a_file_loaded_again_and_again_under_load_costs_no_call_and_no_slot(
    ratesync_registry: Path, ratesync_postgres_url: str, changed: str
) -> None:
    """A lease lasts longer than this test waits, so a slot left behind by a store that went is seen."""
    file = ratesync_registry / "live.toml"

    def load(turn: int) -> None:
        fields: dict[str, Any] = {"url": ratesync_postgres_url, "pool": 3, "slots": 4}
        fields["pool"] += turn % 2 if changed != "limiters" else 0
        fields["slots"] += turn % 2 if changed != "store" else 0
        file.write_text(FILE.format(**fields))
        ratesync.load_config(file)

    load(0)
    stop = threading.Event()

    async def task() -> int:
        calls = 0
        while not stop.is_set():
            async with acquire("remote", timeout=30), acquire("local", timeout=30):
                await asyncio.sleep(0)
            async with acquire("local", "remote", timeout=30):
                calls += 1
        return calls

    def thread() -> None:
        while not stop.is_set():
            with acquire("remote", timeout=30):
                pass

    threads = [threading.Thread(target=thread) for _ in range(2)]
    for each in threads:
        each.start()
    tasks = [asyncio.create_task(task()) for _ in range(10)]
    for turn in range(1, 25):
        load(turn)
        await asyncio.sleep(0.03)
    stop.set()
    calls = await asyncio.gather(*tasks)
    for each in threads:
        await asyncio.to_thread(each.join)
    assert sum(calls) > 0
    gc.collect()
    await nobody_holds("remote")
    await nobody_holds("local")


@pytest.mark.parametrize("engine", ["postgres", "redis"])
async def test_a_store_that_is_closed_gives_back_what_was_released_while_it_spoke(
    ratesync_registry: Path, request: pytest.FixtureRequest, engine: str
) -> None:
    url = request.getfixturevalue(f"ratesync_{engine}_url")
    parts = urlsplit(url)
    with TcpProxy(parts.hostname or "127.0.0.1", parts.port or 0) as proxy:
        options = {"auto_create": True} if engine == "postgres" else {}
        ratesync.configure_store("db", engine, url=proxy.through(url), **options)
        ratesync.configure_limiter("slots", "db", max_concurrent=5, fail_closed=True, outage_budget=20)
        store = ratesync.get_store("db")
        permits = [acquire("slots") for _ in range(3)]
        for permit in permits:
            await permit.__aenter__()
        proxy.stall("replies")
        permits[0].release()
        await store.stats()  # what was submitted before it is on its way now
        for permit in permits[1:]:
            permit.release()
        await store.stats()
        closing = asyncio.ensure_future(store.close())
        await asyncio.sleep(0)
        proxy.resume()
        await closing
        assert (await ratesync.get_limiter("slots").get_state()).in_use == 0
        ratesync.shutdown()
