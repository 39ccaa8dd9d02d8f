"""Stale holders are refused by PostgreSQL itself: the triggers of ratesync.fencing."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import asyncpg
import pytest

import ratesync
from ratesync import fencing
from ratesync.errors import ConfigValidationError

pytestmark = pytest.mark.asyncio

HOSTILE = "t \"'\\%I{}$ratesync$ %s"


async def refused(state: str, write: Any) -> asyncpg.PostgresError:
    with pytest.raises(asyncpg.PostgresError) as caught:
        await write
    assert caught.value.sqlstate == state
    assert fencing.is_stale(caught.value) is (state == fencing.STALE_TOKEN)
    return caught.value


async def until_blocked(pool: Any, write: asyncio.Future[Any]) -> None:
    # Not inside a transaction, which would see the same activity all the time.
    while await pool.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == 0:
        assert not write.done()
        await asyncio.sleep(0.01)


@pytest.fixture
async def invoices(ratesync_asyncpg: Any) -> Any:
    await ratesync_asyncpg.execute("CREATE TABLE invoices (id int PRIMARY KEY, state text)")
    await ratesync_asyncpg.execute("INSERT INTO invoices VALUES (1, 'old')")
    await fencing.guard(ratesync_asyncpg, "invoices", add_column=True)
    return ratesync_asyncpg


SET = "UPDATE invoices SET state = $1, fence = $2 WHERE id = 1"


async def test_a_write_with_an_older_token_is_refused_and_says_why(invoices: Any) -> None:
    await invoices.execute(SET, "a", 5)  # a row from before the guard accepts any token
    await invoices.execute(SET, "b", 5)
    await invoices.execute(SET, "c", 9)
    error = await refused(fencing.STALE_TOKEN, invoices.execute(SET, "stale", 8))
    assert "stale fencing token 8" in str(error)
    assert "public.invoices" in str(error)
    assert "token 9" in str(error)
    assert "acquire" in error.hint
    assert (error.schema_name, error.table_name) == ("public", "invoices")
    assert await invoices.fetchval("SELECT state FROM invoices") == "c"


async def test_a_write_without_a_token_is_refused_where_it_shows(invoices: Any) -> None:
    await refused(fencing.TOKEN_MISSING, invoices.execute("INSERT INTO invoices VALUES (2, 'x')"))
    await refused(fencing.TOKEN_MISSING, invoices.execute(SET, "x", None))
    await invoices.execute(SET, "a", 5)
    # The documented gap: an UPDATE that leaves the column alone keeps its token.
    await invoices.execute("UPDATE invoices SET state = 'unseen'")


async def test_strict_refuses_an_update_that_does_not_set_the_column(invoices: Any) -> None:
    await fencing.guard(invoices, "invoices", strict=True)
    await invoices.execute(SET, "a", 5)
    await refused(fencing.TOKEN_MISSING, invoices.execute("UPDATE invoices SET state = 'x'"))
    await invoices.execute(SET, "b", 5)
    async with invoices.acquire() as connection, connection.transaction():
        await connection.execute(SET, "c", 6)
        await refused(fencing.TOKEN_MISSING, connection.fetch("UPDATE invoices SET state = 'x' RETURNING 1"))
    upsert = "INSERT INTO invoices VALUES (1, $1, $2) ON CONFLICT (id) DO UPDATE SET state = excluded.state"
    await refused(fencing.TOKEN_MISSING, invoices.execute(upsert, "x", 7))
    await invoices.execute(upsert + ", fence = excluded.fence", "d", 7)
    await refused(fencing.STALE_TOKEN, invoices.execute(upsert + ", fence = excluded.fence", "e", 6))
    # Installed again without it, the strictness is gone.
    await fencing.guard(invoices, "invoices")
    await invoices.execute("UPDATE invoices SET state = 'y'")


async def test_of_two_writes_at_the_same_moment_the_stale_one_loses(invoices: Any) -> None:
    await invoices.execute(SET, "a", 1)
    async with invoices.acquire() as fresh:
        transaction = fresh.transaction()
        await transaction.start()
        await fresh.execute(SET, "fresh", 3)
        stale = asyncio.ensure_future(invoices.execute(SET, "stale", 2))
        await until_blocked(invoices, stale)
        await transaction.commit()
        await refused(fencing.STALE_TOKEN, stale)
    assert await invoices.fetchval("SELECT state FROM invoices") == "fresh"


async def test_with_a_scope_also_new_rows_of_a_stale_holder_are_refused(ratesync_asyncpg: Any) -> None:
    pool = ratesync_asyncpg
    await pool.execute("CREATE TABLE payments (n serial, invoice text, tenant int, fence bigint)")
    await fencing.guard(pool, "payments", scope=["invoice", "tenant"])
    insert = "INSERT INTO payments (invoice, tenant, fence) VALUES ($1, $2, $3)"
    await pool.execute(insert, "a", 1, 5)
    await pool.execute(insert, "a", 1, 5)
    await pool.execute(insert, "a", 1, 8)
    await pool.execute(insert, "a", 2, 3)  # another scope
    await pool.execute(insert, 'a", 1', None, 3)
    await refused(fencing.STALE_TOKEN, pool.execute(insert, "a", 1, 7))
    await refused(fencing.STALE_TOKEN, pool.execute("UPDATE payments SET fence = 7 WHERE tenant = 1"))
    # One stale row fails all of them, and leaves no mark.
    many = "INSERT INTO payments (invoice, tenant, fence) SELECT 'a', 1, f FROM unnest($1::int8[]) AS f"
    await refused(fencing.STALE_TOKEN, pool.execute(many, [9, 10, 4]))
    await pool.execute(insert, "a", 1, 8)
    await pool.execute("DELETE FROM payments")
    await refused(fencing.STALE_TOKEN, pool.execute(insert, "a", 1, 7))


async def test_two_inserts_of_one_scope_at_once_are_decided_one_after_the_other(
    ratesync_asyncpg: Any,
) -> None:
    pool = ratesync_asyncpg
    await pool.execute("CREATE TABLE payments (invoice int, fence bigint)")
    await fencing.guard(pool, "payments", scope=["invoice"])
    async with pool.acquire() as fresh:
        transaction = fresh.transaction()
        await transaction.start()
        await fresh.execute("INSERT INTO payments VALUES (1, 9)")
        stale = asyncio.ensure_future(pool.execute("INSERT INTO payments VALUES (1, 8)"))
        await until_blocked(pool, stale)
        await transaction.commit()
    await refused(fencing.STALE_TOKEN, stale)


async def test_names_may_hold_anything(ratesync_asyncpg: Any) -> None:
    pool = ratesync_asyncpg

    def quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    await pool.execute(f"CREATE SCHEMA {quoted(HOSTILE)}")
    table = f"{quoted(HOSTILE)}.{quoted(HOSTILE)}"
    await pool.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, {quoted(HOSTILE)} bigint)")
    for standard in ("on", "off"):
        async with pool.acquire() as connection:
            await connection.execute(f"SET standard_conforming_strings = {standard}")
            for scope in ([], ["id"]):
                options: dict[str, Any] = {"schema": HOSTILE, "column": HOSTILE, "scope": scope}
                await fencing.guard(connection, HOSTILE, **options, strict=True)
                await connection.execute(f"DELETE FROM {table}")
                token = 10 if standard == "on" else 20
                await connection.execute(f"INSERT INTO {table} VALUES (1, {token})")
                stale = f"UPDATE {table} SET {quoted(HOSTILE)} = 9"
                await refused(fencing.STALE_TOKEN, connection.execute(stale))
                error = await refused(fencing.TOKEN_MISSING, connection.execute(f"UPDATE {table} SET id = 1"))
                assert error.table_name == HOSTILE
                await fencing.unguard(connection, HOSTILE, **options)
                await connection.execute(stale)
            await connection.reset()
    assert await pool.fetchval("SELECT count(*) FROM pg_proc WHERE proname LIKE 'ratesync_fence%'") == 0


async def test_two_columns_of_one_name_prefix_and_two_tables_do_not_meet(ratesync_asyncpg: Any) -> None:
    pool = ratesync_asyncpg
    names = ["x" * 62 + "a", "x" * 62 + "b"]
    for name in names:
        await pool.execute(f"CREATE TABLE {name} (id int, fence bigint)")
        await fencing.guard(pool, name)
        await pool.execute(f"INSERT INTO {name} VALUES (1, 5)")
    await fencing.unguard(pool, names[0])
    await pool.execute(f"UPDATE {names[0]} SET fence = 1")
    await refused(fencing.STALE_TOKEN, pool.execute(f"UPDATE {names[1]} SET fence = 1"))


async def test_who_writes_to_the_table_needs_no_rights_on_the_marks(
    ratesync_asyncpg: Any, ratesync_postgres_url: str
) -> None:
    pool = ratesync_asyncpg
    await pool.execute("CREATE TABLE payments (invoice int, fence bigint)")
    await fencing.guard(pool, "payments", scope=["invoice"])
    await pool.execute("DROP ROLE IF EXISTS fencing_writer; CREATE ROLE fencing_writer")
    try:
        await pool.execute("GRANT INSERT ON payments TO fencing_writer")
        async with pool.acquire() as connection:
            await connection.execute("SET ROLE fencing_writer")
            await connection.execute("INSERT INTO payments VALUES (1, 5)")
            await refused(fencing.STALE_TOKEN, connection.execute("INSERT INTO payments VALUES (1, 4)"))
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("UPDATE payments_fences SET fence = 0")
            await connection.execute("RESET ROLE")
    finally:
        await pool.execute("DROP OWNED BY fencing_writer; DROP ROLE fencing_writer")


@pytest.mark.parametrize(
    "options",
    [
        {"table": ""},
        {"table": "x" * 64},
        {"table": "é" * 32},
        {"table": "a\0b"},
        {"table": "\ud800"},
        {"table": 5},
        {"table": "t", "schema": ""},
        {"table": "t", "column": "x" * 64},
        {"table": "t", "scope": "invoice"},
        {"table": "t", "scope": ["a", ""]},
        {"table": "x" * 57, "scope": ["a"]},
    ],
)
async def test_names_that_postgresql_cannot_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigValidationError):
        fencing.guard_sql(**options)


HOLDER = """
import asyncio, sys, asyncpg, ratesync

async def main(url):
    ratesync.configure_store("db", engine="postgres", url=url, auto_create=True)
    connection = await asyncpg.connect(url)
    # A try whose answer took longer than the lease runs would be none.
    lease = await ratesync.get_store("db").lock("invoice-1", ttl=1, timeout=60).acquire()
    print(lease.token, flush=True)
    sys.stdin.readline()  # suspended here: also the thread that renews
    try:
        await connection.execute("UPDATE invoices SET state = 'stale', fence = $1 WHERE id = 1", lease.token)
        print("written", flush=True)
    except asyncpg.PostgresError as error:
        print(error.sqlstate, flush=True)
    await connection.close()

asyncio.run(main(sys.argv[1]))
"""


async def test_a_holder_that_was_suspended_cannot_write_any_more(
    ratesync_registry: object, ratesync_postgres_url: str, invoices: Any
) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HOLDER,
        ratesync_postgres_url,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        token = int(await holder.stdout.readline())
        holder.send_signal(signal.SIGSTOP)
        ratesync.configure_store("db", engine="postgres", url=ratesync_postgres_url)
        async with ratesync.get_store("db").lock("invoice-1", ttl=60, timeout=60) as lease:
            assert lease.token > token
            await invoices.execute(SET, "fresh", lease.token)
            holder.stdin.write(b"\n")
            holder.send_signal(signal.SIGCONT)
            assert (await holder.stdout.readline()).decode().strip() == fencing.STALE_TOKEN
        assert await invoices.fetchval("SELECT state FROM invoices") == "fresh"
    finally:
        holder.kill()
        await holder.wait()
