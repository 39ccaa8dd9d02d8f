# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""The command line on [state] against real servers: tables, findings, and locks of other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import ratesync

TABLES = ["floors", "lock_waiters", "locks", "migrations", "state", "timeouts"]


def ratesync_command(*arguments: str, answer: str = "") -> tuple[int, str, str]:
    """A process of its own, as on a shell."""
    done = subprocess.run(
        [sys.executable, "-m", "ratesync", *arguments],
        input=answer,
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def tables(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        )
        return [row["tablename"] for row in rows]
    finally:
        await connection.close()


def write(text: str) -> str:
    Path("acteon.toml").write_text(text, encoding="utf-8")
    return "acteon.toml"


@pytest.fixture
def file(ratesync_registry: Path, ratesync_postgres_url: str) -> str:
    return write(
        f'[server]\nport = 8080\n\n[state]\nbackend = "postgres"\nurl = "{ratesync_postgres_url}"\n'
        'timeout = 20\n\n[rules]\ndirectory = "./rules"\n'
    )


async def test_migrate_says_what_it_would_do_then_does_it_once(file: str, ratesync_postgres_url: str) -> None:
    code, out, err = ratesync_command("migrate", "-c", file, "--dry-run")
    assert (code, err) == (0, "ratesync: acteon.toml: ignored, not of ratesync: [server], [rules]\n")
    assert "[state] 'acteon_' in postgres: would apply 1 create_state_tables" in out
    assert await tables(ratesync_postgres_url) == []
    code, out, _ = ratesync_command("migrate", "-c", file)
    assert code == 0
    assert "applied 4 create_lock_tables" in out
    assert await tables(ratesync_postgres_url) == [f"acteon_{name}" for name in TABLES]
    assert ratesync_command("migrate", "-c", file)[1] == "[state] 'acteon_' in postgres: up to date\n"


async def test_the_sql_of_a_dry_run_makes_the_same_tables(file: str, ratesync_postgres_url: str) -> None:
    code, sql, _ = ratesync_command("migrate", "-c", file, "--sql")
    assert code == 0
    connection = await asyncpg.connect(ratesync_postgres_url)
    await connection.execute(sql)
    await connection.close()
    made = await tables(ratesync_postgres_url)
    assert {f"acteon_{name}" for name in ("state", "floors", "timeouts", "locks", "lock_waiters")} <= set(
        made
    )
    ratesync.load_config(file)
    assert await ratesync.state().check_and_set("k") is True
    async with ratesync.lock("l"):
        pass


async def test_a_mix_of_backends_is_migrated_in_one_go(
    ratesync_registry: Path, ratesync_postgres_url: str, ratesync_redis_url: str
) -> None:
    mixed = write(
        f'[state]\nbackend = "redis"\nurl = "{ratesync_redis_url}"\ntimeout = 20\n\n'
        f'[stores.db]\nengine = "postgres"\nurl = "{ratesync_postgres_url}"\n\n'
        f'[audit]\nenabled = true\nbackend = "postgres"\nurl = "{ratesync_postgres_url}"\n'
    )
    code, out, err = ratesync_command("migrate", "-c", mixed)
    assert code == 0, err
    assert "db: applied 1 " in out
    assert "[state] 'acteon_' in redis: nothing to migrate" in out
    assert "rate_limiter_state" in await tables(ratesync_postgres_url)
    ratesync.load_config(mixed)
    assert await ratesync.state().check_and_set("k") is True
    async with ratesync.idempotent("k") as op:
        op.result = 1


def test_doctor_says_what_is_missing_and_how_to_cure_it(file: str) -> None:
    code, out, _ = ratesync_command("doctor", "-c", file)
    assert code == 1
    assert "ratesync migrate" in out
    assert ratesync_command("migrate", "-c", file)[0] == 0
    code, out, _ = ratesync_command("doctor", "-c", file)
    assert code == 0, out
    assert "[state]" in out
    assert "acteon_locks" in out


def test_a_missing_table_is_an_error_with_the_cure(file: str) -> None:
    ratesync.load_config(file)
    with pytest.raises(ratesync.StoreServerError, match=r"ratesync migrate -c FILE"):
        ratesync.state().get("k").wait()
    with pytest.raises(ratesync.StoreServerError, match=r"ratesync migrate -c FILE"):
        ratesync.try_lock("l").wait()


@pytest.mark.parametrize("backend", ["postgres", "redis"])
def test_locks_of_another_process_are_seen_and_broken(
    backend: str, ratesync_registry: Path, request: pytest.FixtureRequest
) -> None:
    url: Any = request.getfixturevalue(f"ratesync_{backend}_url")
    create = "auto_create = true\n" if backend == "postgres" else ""
    file = write(f'[state]\nbackend = "{backend}"\nurl = "{url}"\n{create}')
    ratesync.load_config(file)
    # Renewed after a third of its time: so much for commands, and for a machine that stands still.
    with pytest.raises(ratesync.LockLostError), ratesync.lock("invoice-42", ttl=20) as lease:
        code, out, err = ratesync_command("locks", "list", "-c", file, "--json")
        assert code == 0, err
        (row,) = json.loads(out)
        assert (row["name"], row["token"]) == ("invoice-42", lease.token)
        assert f"{os.getpid()}" in row["holder"]
        assert 0 < row["expires_in"] <= 20
        assert "invoice-42" in ratesync_command("locks", "list", "-c", file)[1]
        code, out, err = ratesync_command("locks", "break", "invoice-42", "-c", file, answer="y\n")
        assert code == 0, err
        assert "Its holder may go on working" in out
        assert lease.lost_signal().wait() is True  # at the next renewal
    second = ratesync.try_lock("invoice-42").wait()
    assert second is not None
    assert second.token > lease.token
    assert second.release().wait() is True
