"""The PostgreSQL page of rate-sync's documentation, as its reader would follow it: each snippet, option, row.

What users have in their repositories is that page's SQL, TOML and Python, so these tests keep it working
unchanged: the table made by hand, the grants and nothing more, the defaults, the clean-up, the cures.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

import ratesync
from ratesync import acquire, configure_limiter, configure_store
from ratesync.engines import limiter_class

TABLE = """
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
GRANT = "GRANT SELECT, INSERT, UPDATE ON rate_limiter_state TO myapp_user;"
CLEANUP = "DELETE FROM rate_limiter_state\nWHERE last_acquisition_at < NOW() - INTERVAL '7 days';"

QUICK_START = """
[stores.db]
{store}

[limiters.api]
store = "db"
rate_per_second = 100.0
"""
ENGINES = ["memory", "postgres", "redis"]

pytestmark = pytest.mark.usefixtures("ratesync_registry")


@pytest.fixture
def load(ratesync_registry: Path) -> Callable[[str], None]:
    """Writes rate-sync.toml where discovery looks; nothing is loaded explicitly, as in a user's program."""
    return lambda text: (ratesync_registry / "rate-sync.toml").write_text(text) and None


@pytest.fixture
async def app_url(ratesync_postgres_url: str, ratesync_asyncpg: asyncpg.Pool) -> str:
    """The test's database as `myapp_user` sees it, who owns nothing and has no rights yet."""
    if not await ratesync_asyncpg.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'myapp_user'"):
        await ratesync_asyncpg.execute("CREATE ROLE myapp_user LOGIN PASSWORD 'pass'")
    await ratesync_asyncpg.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    parts = urlsplit(ratesync_postgres_url)
    return urlunsplit(parts._replace(netloc=f"myapp_user:pass@{parts.netloc.rpartition('@')[2]}"))


@pytest.fixture(params=ENGINES)
def store_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    engine = request.param
    if engine == "memory":
        return {"engine": engine}
    if engine == "redis":
        from ratesync import _schemas

        if engine not in _schemas.ENGINES:
            pytest.skip("this build has no Redis store")
        return {"engine": engine, "url": request.getfixturevalue("ratesync_redis_url")}
    url = request.getfixturevalue("ratesync_postgres_url")
    return {"engine": engine, "url": url, "auto_create": True}


def as_toml(options: dict[str, Any]) -> str:
    return "\n".join(
        f"{name} = {str(value).lower() if value is True else repr(value)}" for name, value in options.items()
    )


# Quick start and programmatic configuration, on every engine that the page links to ------------------


async def test_the_quick_start_works_from_the_file_that_is_found(load, store_options):
    load(QUICK_START.format(store=as_toml(store_options)))
    async with acquire("api"):
        pass
    assert ratesync.get_limiter("api").get_metrics().total_acquisitions == 1
    assert ratesync.get_limiter("api").rate_per_second == 100.0


async def test_the_same_by_calls_and_with_the_words_of_the_page(store_options):
    engine = store_options.pop("engine")
    configure_store("db", strategy=engine, **store_options)
    configure_limiter("api", store_id="db", rate_per_second=100.0)
    async with acquire("api"):
        pass
    assert isinstance(ratesync.get_limiter("api"), limiter_class(engine, "token_bucket"))


async def test_a_rate_of_a_hundred_is_limited_in_spite_of_the_margin(store_options):
    """A margin as long as the interval would let everything pass."""
    configure_store("db", **{**store_options, "strategy": store_options.pop("engine")})
    configure_limiter("api", store_id="db", rate_per_second=100.0)
    loop = asyncio.get_running_loop()
    await ratesync.get_store("db").initialize()
    begun = loop.time()
    for _ in range(51):
        async with acquire("api"):
            pass
    assert loop.time() - begun >= 0.49 - 0.011  # one margin of 10 ms, once


async def test_production_limits_hold_together(store_options):
    configure_store("db", **{**store_options, "strategy": store_options.pop("engine")})
    configure_limiter("api", store_id="db", rate_per_second=1000.0, max_concurrent=3, timeout=30.0)
    inside = most = 0

    async def request() -> None:
        nonlocal inside, most
        async with acquire("api"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(request() for _ in range(60)))
    assert most <= 3
    assert (await ratesync.get_limiter("api").get_state()).in_use == 0


def test_a_program_of_the_page_runs_unchanged_in_a_process_of_its_own(ratesync_registry, store_options):
    (ratesync_registry / "rate-sync.toml").write_text(QUICK_START.format(store=as_toml(store_options)))
    program = """
import asyncio
from ratesync import acquire

async def main():
    async with acquire("api"):
        print("response")

asyncio.run(main())
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ratesync_registry,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # A machine that stood still during the first connect is no fault of the program's.
    said = [line for line in done.stderr.splitlines() if "does not answer; calls pass unlimited" not in line]
    assert (done.returncode, done.stdout, said) == (0, "response\nresponse\n", [])


# The table of options -------------------------------------------------------------------------------

DEFAULTS = {
    "table_name": "rate_limiter_state",
    "schema_name": "public",
    "auto_create": False,
    "pool_min_size": 2,
    "pool_max_size": 10,
    "timing_margin_ms": 10.0,
}


def test_the_defaults_are_those_of_the_page():
    configure_store("db", strategy="postgres", url="postgresql://user:pass@localhost:5432/mydb")
    listed = ratesync.list_stores()["db"]
    assert {name: listed[name] for name in DEFAULTS} == DEFAULTS
    assert {name: type(listed[name]) for name in DEFAULTS} == {k: type(v) for k, v in DEFAULTS.items()}
    assert "pass" not in listed["url"]
    constructor = inspect.signature(ratesync.PostgresRateLimiter).parameters
    assert {name: constructor[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("missing", ["engine", "url"])
def test_what_is_required_is_named_when_it_is_missing(load, missing):
    fields = {"engine": "postgres", "url": "postgresql://user:pass@localhost:5432/mydb"}
    del fields[missing]
    load(QUICK_START.format(store=as_toml(fields)))
    with pytest.raises(ratesync.ConfigValidationError, match=rf"stores\.db.*{missing} is required"):
        ratesync.get_limiter("api")


async def test_the_pool_opens_its_minimum_and_never_more_than_its_maximum(
    load, monkeypatch, ratesync_postgres_url, ratesync_asyncpg
):
    """Production configuration: the url from the environment, both sizes set, 50 at the same time."""
    await ratesync_asyncpg.execute(TABLE)
    monkeypatch.setenv("DATABASE_URL", ratesync_postgres_url)
    load(
        '[stores.prod_db]\nengine = "postgres"\nurl = "${DATABASE_URL}"\nauto_create = false\n'
        "pool_min_size = 5\npool_max_size = 6\n\n"
        '[limiters.api]\nstore = "prod_db"\nrate_per_second = 100.0\nmax_concurrent = 50\ntimeout = 30.0\n'
    )
    limiter = ratesync.get_limiter("api")
    assert (limiter.rate_per_second, limiter.max_concurrent, limiter.default_timeout) == (100.0, 50, 30.0)

    async def request() -> None:
        async with acquire("api"):
            pass

    await asyncio.gather(*(request() for _ in range(80)))
    connections = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'ratesync%'"
    )
    async with asyncio.timeout(20):
        while await ratesync_asyncpg.fetchval(connections) < 5:
            await asyncio.sleep(0.02)
    assert await ratesync_asyncpg.fetchval(connections) <= 6


# The table by hand, its grants, another schema ------------------------------------------------------


async def test_table_and_grants_of_the_page_suffice_for_every_operation(app_url, ratesync_asyncpg):
    await ratesync_asyncpg.execute(TABLE + GRANT)
    configure_store("db", strategy="postgres", url=app_url, auto_create=False)
    configure_limiter("api", "db", rate_per_second=0.001, burst=10, max_concurrent=2, timeout=0)
    limiter = ratesync.get_limiter("api")
    async with acquire("api") as permit, acquire("api", key="tenant"):
        await permit.settle(3)
        assert (await limiter.peek()).remaining == 1  # seven units, but one slot
    assert await limiter.try_acquire()
    assert await limiter.release()
    assert (await limiter.get_state()).current_usage == 4
    await limiter.reset()
    assert (await limiter.get_state()).current_usage == 0
    assert {row["group"] for row in (await ratesync.get_store("db").list())["groups"]} == {
        "api",
        "api:tenant",
    }


async def test_a_table_in_another_schema_is_used_there_and_only_there(app_url, ratesync_asyncpg):
    await ratesync_asyncpg.execute(
        "CREATE SCHEMA rate_limiting; GRANT USAGE ON SCHEMA rate_limiting TO myapp_user"
    )
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL search_path TO rate_limiting;" + TABLE + GRANT)
    await ratesync_asyncpg.execute(TABLE + GRANT)  # a decoy
    configure_store("db", strategy="postgres", url=app_url, schema_name="rate_limiting", auto_create=False)
    configure_limiter("api", "db", rate_per_second=100.0)
    async with acquire("api"):
        pass
    assert await ratesync_asyncpg.fetchval("SELECT group_id FROM rate_limiting.rate_limiter_state") == "api"
    assert await ratesync_asyncpg.fetchval("SELECT count(*) FROM public.rate_limiter_state") == 0


async def test_a_schema_without_usage_says_which_grant_is_missing(app_url, ratesync_asyncpg):
    await ratesync_asyncpg.execute("CREATE SCHEMA rate_limiting")
    async with ratesync_asyncpg.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL search_path TO rate_limiting;" + TABLE + GRANT)
    configure_store("db", strategy="postgres", url=app_url, schema_name="rate_limiting")
    configure_limiter("api", "db", rate_per_second=100.0)
    with pytest.raises(
        ratesync.RateLimiterError, match='GRANT USAGE ON SCHEMA "rate_limiting" TO "myapp_user"'
    ):
        async with acquire("api"):
            pass


@pytest.mark.parametrize("by_hand", [False, True], ids=["empty", "table by hand"])
async def test_the_development_grants_suffice_for_auto_create(app_url, ratesync_asyncpg, by_hand):
    await ratesync_asyncpg.execute("GRANT CREATE ON SCHEMA public TO myapp_user;" + (TABLE + GRANT) * by_hand)
    configure_store("db", strategy="postgres", url=app_url, auto_create=True)
    configure_limiter("api", "db", rate_per_second=100.0, max_concurrent=2)
    async with acquire("api"):
        assert (await ratesync.get_limiter("api").get_state()).in_use == 1
    findings = await ratesync.get_store("db").doctor()
    assert [finding for finding in findings if finding["level"] != "ok"] == []


async def test_auto_create_without_the_right_to_create_uses_the_table_that_is_there(
    app_url, ratesync_asyncpg
):
    await ratesync_asyncpg.execute(TABLE + GRANT)
    configure_store("db", strategy="postgres", url=app_url, auto_create=True)
    configure_limiter("api", "db", rate_per_second=100.0, max_concurrent=2)
    async with acquire("api"):
        pass


# Cleaning up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_create", [False, True])
async def test_the_cleanup_takes_old_rows_and_nothing_that_counts(app_url, ratesync_asyncpg, auto_create):
    await ratesync_asyncpg.execute("GRANT CREATE ON SCHEMA public TO myapp_user;" + TABLE + GRANT)
    configure_store("db", strategy="postgres", url=app_url, auto_create=auto_create)
    configure_limiter("old", "db", rate_per_second=100.0)
    configure_limiter("pace", "db", rate_per_second=0.001)
    configure_limiter("slots", "db", max_concurrent=2)
    assert await ratesync.try_acquire("old")
    assert await ratesync.try_acquire("pace")
    async with acquire("slots"):
        await ratesync_asyncpg.execute(
            "UPDATE rate_limiter_state SET last_acquisition_at = NOW() - INTERVAL '8 days' "
            "WHERE group_id IN ('old', 'slots')"
        )
        async with acquire("slots"):  # a limiter without a rate shows that it is in use, too
            await ratesync_asyncpg.execute(CLEANUP)
            left = await ratesync_asyncpg.fetch("SELECT group_id FROM rate_limiter_state ORDER BY 1")
            assert [row["group_id"] for row in left] == ["pace", "slots"]
            assert not await ratesync.try_acquire("slots")
    assert not await ratesync.try_acquire("pace")
    assert await ratesync.try_acquire("old")


# Troubleshooting: each row is an error, or a count, that says what the page says ---------------------


async def test_table_does_not_exist(app_url):
    configure_store("db", strategy="postgres", url=app_url, auto_create=False)
    configure_limiter("api", "db", rate_per_second=100.0)
    with pytest.raises(
        ratesync.RateLimiterError, match=r"rate_limiter_state.*does not exist.*auto_create = true"
    ):
        async with acquire("api"):
            pass


@pytest.mark.parametrize("missing", ["SELECT", "INSERT", "UPDATE"])
async def test_permission_denied_and_what_cures_it(app_url, ratesync_asyncpg, missing):
    await ratesync_asyncpg.execute(TABLE + GRANT + f"REVOKE {missing} ON rate_limiter_state FROM myapp_user")
    configure_store("db", strategy="postgres", url=app_url)
    configure_limiter("api", "db", rate_per_second=100.0)

    async def use() -> None:
        for _ in range(2):  # the first writes a row, the second changes it
            async with acquire("api"):
                pass

    with pytest.raises(
        ratesync.RateLimiterError, match=r'GRANT SELECT, INSERT, UPDATE ON .* TO "myapp_user"'
    ):
        await use()
    await ratesync_asyncpg.execute(GRANT)
    async with acquire("api"):  # and it recovers, without a restart
        pass


async def test_more_operations_than_connections_wait_and_do_not_fail(ratesync_postgres_url):
    configure_store(
        "db",
        strategy="postgres",
        url=ratesync_postgres_url,
        auto_create=True,
        pool_min_size=1,
        pool_max_size=1,
    )
    for number in range(30):
        configure_limiter(f"l{number}", "db", rate_per_second=1000.0, max_concurrent=1, fail_closed=True)

    async def use(name: str) -> None:
        async with acquire(name):
            pass

    await asyncio.gather(*(use(f"l{number % 30}") for number in range(300)))


async def test_a_role_with_fewer_connections_than_the_pool_wants_is_served_by_those(
    app_url, ratesync_asyncpg
):
    await ratesync_asyncpg.execute("ALTER ROLE myapp_user CONNECTION LIMIT 1")
    # Sessions of tests before this one may still be on their way out, and would be the one that is allowed.
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'myapp_user'"
    async with asyncio.timeout(30):
        while await ratesync_asyncpg.fetchval(sessions):
            await asyncio.sleep(0.02)
    try:
        await ratesync_asyncpg.execute(TABLE + GRANT)
        configure_store("db", strategy="postgres", url=app_url, pool_min_size=1, pool_max_size=10)
        # Of two sessions that begin in the same instant PostgreSQL may refuse both: each counts.
        await ratesync.get_store("db").initialize()
        configure_limiter("api", "db", rate_per_second=1e6, burst=1000, fail_closed=True, outage_budget=30)
        configure_limiter("slots", "db", max_concurrent=5, fail_closed=True, outage_budget=30)

        async def use(name: str) -> None:
            async with acquire(name):
                pass

        await asyncio.gather(*(use(name) for name in ["api", "slots"] * 50))
        assert ratesync.get_limiter("slots").get_metrics().failed == 0
    finally:
        ratesync.shutdown()
        await ratesync_asyncpg.execute("ALTER ROLE myapp_user CONNECTION LIMIT -1")


async def test_a_missing_index_is_found_with_the_statement_that_makes_it(app_url, ratesync_asyncpg):
    await ratesync_asyncpg.execute(TABLE + GRANT + "DROP INDEX idx_rate_limiter_state_updated")
    configure_store("db", strategy="postgres", url=app_url)
    (index,) = [f for f in await ratesync.get_store("db").doctor() if f["subject"] == "index"]
    assert index["level"] == "warning"
    await ratesync_asyncpg.execute(
        index["message"].partition("CREATE")[1] + index["message"].partition("CREATE")[2]
    )
    assert not [
        f for f in await ratesync.get_store("db").doctor() if f["subject"] == "index" and f["level"] != "ok"
    ]


@pytest.mark.parametrize("first", [True, False], ids=["first insert", "later write"])
async def test_a_race_with_another_writer_is_lost_unnoticed(ratesync_postgres_url, ratesync_asyncpg, first):
    """A later write waits for the other and goes on from there; a first insert is repeated and counted."""
    # A statement given up because it waited for the other, and repeated, would be another race.
    patient = {"auto_create": True, "command_timeout": 60.0}
    configure_store("db", strategy="postgres", url=ratesync_postgres_url, **patient)
    configure_limiter("api", "db", rate_per_second=0.001, burst=10, fail_closed=True, outage_budget=60)
    await ratesync.get_store("db").initialize()
    if not first:
        assert await ratesync.try_acquire("api")
    async with ratesync_asyncpg.acquire() as other:
        async with other.transaction():
            await other.execute(
                "INSERT INTO rate_limiter_state (group_id, last_acquisition_at) VALUES ('api', NOW()) "
                "ON CONFLICT (group_id) DO UPDATE SET version = rate_limiter_state.version + 1"
            )
            ours = asyncio.ensure_future(ratesync.try_acquire("api"))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            async with asyncio.timeout(20):
                while not await ratesync_asyncpg.fetchval(waiting):
                    await asyncio.sleep(0.01)
        assert await ours
    assert ratesync.get_limiter("api").get_metrics().cas_failures == (1 if first else 0)
    assert await ratesync_asyncpg.fetchval("SELECT version FROM rate_limiter_state") == (2 if first else 3)


# Commands -------------------------------------------------------------------------------------------


def test_the_commands_agree_with_the_page(ratesync_registry, ratesync_postgres_url):
    """check, migrate (what `auto_create` would do) and doctor, on the file of the quick start."""
    (ratesync_registry / "rate-sync.toml").write_text(
        QUICK_START.format(store=as_toml({"engine": "postgres", "url": ratesync_postgres_url}))
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ratesync", *arguments],
            cwd=ratesync_registry,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert run("check").returncode == 0
    missing = run("doctor")
    assert missing.returncode != 0
    assert "auto_create = true" in missing.stdout + missing.stderr
    assert run("migrate").returncode == 0
    assert run("doctor").returncode == 0
    assert run("status").returncode == 0
