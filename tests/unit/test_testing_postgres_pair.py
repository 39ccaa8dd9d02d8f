"""The pair of PostgreSQL servers of ratesync.testing: what was acknowledged outlives the primary."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ratesync.testing._sql import execute
from ratesync.testing.postgres import PostgresNotFoundError, find_bin_dir
from ratesync.testing.postgres_pair import PostgresPair

try:
    find_bin_dir()
except PostgresNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def pair() -> Iterator[PostgresPair]:
    with PostgresPair() as pair:
        yield pair


def test_the_url_leads_to_whoever_accepts_writes_and_what_was_acknowledged_is_there(
    pair: PostgresPair,
) -> None:
    url = pair.create_database()
    assert pair.standby is not None
    execute(url, "CREATE TABLE t (n int PRIMARY KEY)")
    assert execute(url, "SELECT inet_server_port()")[0][0] == pair.primary.port

    acknowledged: list[int] = []
    started = threading.Event()

    def write() -> None:
        import asyncio

        import asyncpg

        async def work() -> None:
            connection = await asyncpg.connect(url)
            for n in range(1_000_000):
                await connection.execute("INSERT INTO t VALUES ($1)", n)
                acknowledged.append(n)
                started.set()

        try:
            asyncio.run(work())
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            started.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert started.wait(30)
    pair.kill_primary()
    writer.join(30)
    assert not writer.is_alive()
    pair.promote()

    assert acknowledged
    assert execute(url, "SELECT inet_server_port()")[0][0] == pair.standby.port
    there: set[Any] = {row[0] for row in execute(url, "SELECT n FROM t")}
    assert set(acknowledged) <= there
    assert len(there - set(acknowledged)) <= 1, "one insert was under way"
    execute(url, "INSERT INTO t VALUES (-1)")  # nobody is waited for any more


def test_without_synchronous_replication_the_primary_does_not_wait() -> None:
    with PostgresPair(synchronous=False) as pair:
        assert pair.standby is not None
        assert pair.primary.execute("SELECT sync_state FROM pg_stat_replication")[0][0] == "async"
        pair.standby.freeze()
        try:
            pair.primary.execute("CREATE TABLE t (n int)")
        finally:
            pair.standby.thaw()
