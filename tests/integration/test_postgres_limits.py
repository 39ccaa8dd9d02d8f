"""Limits on PostgreSQL, with asyncpg as the independent witness of what is really stored."""

from __future__ import annotations

import asyncio
import datetime
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

import ratesync

SEED_DDL = """
CREATE TABLE rate_limiter_state (
    group_id VARCHAR(255) PRIMARY KEY,
    last_acquisition_at TIMESTAMPTZ NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    current_concurrent INTEGER NOT NULL DEFAULT 0,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);
CREATE INDEX idx_rate_limiter_state_updated
    ON rate_limiter_state(updated_at);
"""

COLUMNS = """
SELECT column_name, data_type, is_nullable, column_default, character_maximum_length
FROM information_schema.columns WHERE table_schema = $1 AND table_name = $2 ORDER BY ordinal_position
"""


def configure(url: str, **options: object) -> None:
    options.setdefault("auto_create", True)
    ratesync.configure_store("db", strategy="postgres", url=url, **options)


def as_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{host}"))


async def minimal_role(connection: asyncpg.Connection, name: str, grants: str) -> None:
    exists = await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name)
    if not exists:
        await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    await connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    await connection.execute(f"GRANT USAGE ON SCHEMA public TO {name}")
    if grants:
        await connection.execute(f"GRANT {grants} ON rate_limiter_state TO {name}")


async def test_auto_create_makes_the_seeds_table_exactly(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    await ratesync.get_store("db").initialize()
    made = [tuple(row) for row in await ratesync_asyncpg.fetch(COLUMNS, "public", "rate_limiter_state")]
    await ratesync_asyncpg.execute("CREATE SCHEMA seed; SET search_path TO seed;" + SEED_DDL)
    printed = [tuple(row) for row in await ratesync_asyncpg.fetch(COLUMNS, "seed", "rate_limiter_state")]
    assert made == printed
    indexes = await ratesync_asyncpg.fetch(
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' "
        "AND indexname = 'idx_rate_limiter_state_updated'"
    )
    assert len(indexes) == 1
    assert "(updated_at)" in indexes[0]["indexdef"]


async def test_a_grant_writes_the_servers_time_and_counts_the_version(
    ratesync_postgres_url, ratesync_asyncpg
):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("api", "db", rate_per_second=0.001, burst=5)
    async with ratesync.acquire("api"):
        pass
    row = await ratesync_asyncpg.fetchrow("SELECT *, clock_timestamp() AS now FROM rate_limiter_state")
    assert row["group_id"] == "api"
    assert datetime.timedelta(0) <= row["now"] - row["last_acquisition_at"] < datetime.timedelta(seconds=60)
    assert row["version"] == 1
    assert await ratesync.try_acquire("api")
    assert await ratesync_asyncpg.fetchval("SELECT version FROM rate_limiter_state") == 2


async def test_a_refusal_writes_nothing(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("api", "db", rate_per_second=0.001)
    assert await ratesync.try_acquire("api")
    before = await ratesync_asyncpg.fetchrow("SELECT xmin::text, * FROM rate_limiter_state")
    for _ in range(3):
        assert not await ratesync.try_acquire("api")
    with pytest.raises(ratesync.RateLimiterAcquisitionError):
        async with ratesync.acquire("api", timeout=2):
            pass
    assert await ratesync_asyncpg.fetchrow("SELECT xmin::text, * FROM rate_limiter_state") == before


async def test_the_seeds_table_and_grants_are_enough(ratesync_postgres_url, ratesync_asyncpg):
    await ratesync_asyncpg.execute(SEED_DDL)
    await minimal_role(ratesync_asyncpg, "rs_minimal", "SELECT, INSERT, UPDATE")
    configure(as_user(ratesync_postgres_url, "rs_minimal", "secret"), auto_create=False)
    ratesync.configure_limiter("api", "db", rate_per_second=1000.0, max_concurrent=2, timeout=60)
    async with ratesync.acquire("api"), ratesync.acquire("api"):
        assert await ratesync_asyncpg.fetchval("SELECT current_concurrent FROM rate_limiter_state") == 2
        assert not await ratesync.try_acquire("api")
    async with ratesync.acquire("api"):
        pass
    await ratesync.get_limiter("api").reset()
    findings = await ratesync.get_store("db").doctor()
    assert any("lease" in finding["message"] for finding in findings if finding["level"] == "warning")


async def test_a_missing_table_names_the_cure(ratesync_postgres_url):
    configure(ratesync_postgres_url, auto_create=False, table_name="nowhere")
    ratesync.configure_limiter("api", "db", rate_per_second=1.0)
    with pytest.raises(ratesync.RateLimiterError, match=r"(?s)nowhere.*auto_create.*ratesync migrate"):
        async with ratesync.acquire("api"):
            pass


async def test_doctor_does_not_call_a_table_that_auto_create_will_make_an_error(ratesync_postgres_url):
    configure(ratesync_postgres_url)
    findings = await ratesync.get_store("db").doctor()
    assert [finding["level"] for finding in findings if finding["subject"] == "table"] == ["warning"]
    assert not [finding for finding in findings if finding["level"] == "error"]


async def test_missing_grants_name_the_grant_to_run(ratesync_postgres_url, ratesync_asyncpg):
    await ratesync_asyncpg.execute(SEED_DDL)
    await minimal_role(ratesync_asyncpg, "rs_reader", "SELECT")
    configure(as_user(ratesync_postgres_url, "rs_reader", "secret"), auto_create=False)
    ratesync.configure_limiter("api", "db", rate_per_second=1.0)
    with pytest.raises(ratesync.RateLimiterError, match=r"GRANT .*rs_reader"):
        async with ratesync.acquire("api"):
            pass


@pytest.mark.parametrize(
    ("schema", "table"),
    [
        ("public", 'we"ird'),
        ("public", "dots.and spaces"),
        ("public", "Mixed Case; DROP TABLE x"),
        ('sch"ema', "état"),
        ("public", "percent % and {braces}"),
    ],
)
async def test_hostile_names_are_only_names(ratesync_postgres_url, ratesync_asyncpg, schema, table):
    quoted = schema.replace('"', '""')
    await ratesync_asyncpg.execute(f'CREATE SCHEMA IF NOT EXISTS "{quoted}"')
    configure(ratesync_postgres_url, schema_name=schema, table_name=table)
    ratesync.configure_limiter("api", "db", rate_per_second=1000.0, max_concurrent=1)
    async with ratesync.acquire("api"):
        found = await ratesync_asyncpg.fetchval(
            "SELECT count(*) FROM information_schema.tables WHERE table_schema = $1 AND table_name = $2",
            schema,
            table,
        )
    assert found == 1


@pytest.mark.parametrize(
    "name", ["it's", 'q"uote', "a.b c", "x" * 255, "päron€😀", "{a,b}", "\\", "NULL", "%s", "$1"]
)
async def test_any_limiter_name_is_its_own_row(ratesync_postgres_url, ratesync_asyncpg, name):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter(name, "db", rate_per_second=0.001, max_concurrent=3)
    async with ratesync.acquire(name):
        assert await ratesync_asyncpg.fetchval("SELECT group_id FROM rate_limiter_state") == name
    assert not await ratesync.try_acquire(name)


@pytest.mark.parametrize("name", ["", "x" * 256, "nul\0", "\ud800"])
async def test_impossible_names_are_refused_before_anything_is_sent(ratesync_postgres_url, name):
    configure(ratesync_postgres_url)
    with pytest.raises(ratesync.ConfigValidationError):
        ratesync.configure_limiter(name, "db", rate_per_second=1.0)


async def test_a_version_at_the_end_of_integer_wraps(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("api", "db", rate_per_second=1000.0, max_concurrent=4)
    await ratesync.get_store("db").initialize()
    await ratesync_asyncpg.execute(
        "INSERT INTO rate_limiter_state (group_id, last_acquisition_at, version) "
        "VALUES ('api', now(), 2147483647)"
    )
    async with ratesync.acquire("api"):
        assert await ratesync_asyncpg.fetchval("SELECT version FROM rate_limiter_state") == 1


async def test_rows_written_by_hand_are_understood(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("api", "db", rate_per_second=1.0)
    await ratesync.get_store("db").initialize()
    for moment, expected in [
        ("now() + interval '1 hour'", False),
        ("'-infinity'", True),
        ("'infinity'", False),
    ]:
        await ratesync_asyncpg.execute(
            "INSERT INTO rate_limiter_state (group_id, last_acquisition_at) VALUES ('api', "
            f"{moment}) ON CONFLICT (group_id) "
            "DO UPDATE SET last_acquisition_at = excluded.last_acquisition_at"
        )
        assert await ratesync.try_acquire("api") is expected, moment


async def test_the_seeds_cleanup_may_run_at_any_time(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("api", "db", rate_per_second=1000.0, max_concurrent=2)
    async with ratesync.acquire("api"):
        await ratesync_asyncpg.execute("DELETE FROM rate_limiter_state")
        async with ratesync.acquire("api"):
            assert not await ratesync.try_acquire("api")
    assert await ratesync.try_acquire("api")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p._replace(netloc=p.netloc.rpartition(":")[0] + ":1"),
            r"127\.0\.0\.1.*1\b|localhost.*1\b",
        ),
        (lambda p: p._replace(path="/no_such_database"), "no_such_database"),
        (lambda p: p._replace(query="sslmode=require"), "(?i)ssl"),
    ],
)
async def test_a_wrong_url_says_what_is_wrong(ratesync_postgres_url, change, message):
    url = urlunsplit(change(urlsplit(ratesync_postgres_url)))
    configure(url, connect_timeout=20.0)
    with pytest.raises(ratesync.RateLimiterError, match=message):
        await ratesync.get_store("db").initialize()


async def test_a_wrong_password_is_named_but_not_shown(ratesync_postgres_url, ratesync_asyncpg):
    await minimal_role(ratesync_asyncpg, "rs_login", "")
    configure(as_user(ratesync_postgres_url, "rs_nobody_at_all", "hunter2hunter2"))
    with pytest.raises(ratesync.RateLimiterError) as caught:
        await ratesync.get_store("db").initialize()
    assert "hunter2hunter2" not in str(caught.value)
    assert "rs_nobody_at_all" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://x/y",
        "postgresql://h:99999/db",
        "postgresql://h/db?sslmode=maybe",
        "postgresql://h/db?nonsense=1",
    ],
)
def test_a_malformed_url_is_refused_before_connecting(url):
    def use() -> None:
        configure(url)
        ratesync.get_store("db")

    with pytest.raises(ratesync.ConfigValidationError):
        use()


async def test_one_pool_serves_all_limiters_of_a_store(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url, pool_max_size=3)
    for i in range(20):
        ratesync.configure_limiter(f"l{i}", "db", rate_per_second=1e6, burst=1000)

    async def use(i: int) -> None:
        for _ in range(20):
            async with ratesync.acquire(f"l{i}"):
                pass

    await asyncio.gather(*(use(i) for i in range(20)))
    ours = await ratesync_asyncpg.fetchval(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE application_name LIKE 'ratesync%' AND datname = current_database()"
    )
    assert 1 <= ours <= 3


async def test_waiting_holds_no_connection(ratesync_postgres_url):
    configure(ratesync_postgres_url, pool_max_size=2)
    ratesync.configure_limiter("slow", "db", rate_per_second=0.01)
    ratesync.configure_limiter("other", "db", rate_per_second=1000.0)
    assert await ratesync.try_acquire("slow")
    tasks = [asyncio.ensure_future(wait_for_slot("slow")) for _ in range(200)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(60):
        async with ratesync.acquire("other"):
            pass
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_slot(name: str) -> None:
    async with ratesync.acquire(name):
        pass


async def test_cancelled_waiters_give_their_slots_back(ratesync_postgres_url):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("api", "db", rate_per_second=0.001)
    assert await ratesync.try_acquire("api")
    tasks = [asyncio.create_task(wait_for_slot("api")) for _ in range(50)]
    async with asyncio.timeout(60):
        while (
            await ratesync.get_limiter("api").peek()
        ).retry_after < 50_500:  # all have been dealt their time
            await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(60):
        while (await ratesync.get_limiter("api").peek()).retry_after > 1_000:  # by itself it would take hours
            await asyncio.sleep(0.01)


async def test_statements_per_grant_are_counted_by_the_server(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url)
    ratesync.configure_limiter("hot", "db", rate_per_second=1e9, burst=1_000_000)
    await ratesync.get_store("db").initialize()
    store = ratesync.get_store("db")
    version = "SELECT version FROM rate_limiter_state WHERE group_id = 'hot'"

    async def take() -> None:
        for _ in range(20):
            async with ratesync.acquire("hot"):
                pass

    sent, written = [], []
    for _ in range(4):  # who gets no CPU for a while cannot ask for many at once
        statements, writes = (
            (await store._core.stats())["statements"],
            await ratesync_asyncpg.fetchval(version),
        )
        await asyncio.gather(*(take() for _ in range(1000)))
        sent.append((await store._core.stats())["statements"] - statements)
        written.append(await ratesync_asyncpg.fetchval(version) - (writes or 0))
        if sent[-1] <= 0.02 * 20_000 and written[-1] <= 0.02 * 20_000:
            return
    pytest.fail(f"20,000 grants took {sent} statements and {written} writes of the row")
