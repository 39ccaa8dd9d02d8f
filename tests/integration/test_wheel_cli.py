"""The installed `ratesync` script on PostgreSQL, in a directory with nothing but a configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

SCRIPT = Path(sysconfig.get_path("scripts")) / "ratesync"

FILE = """
[stores.db]
engine = "postgres"
url = "${DATABASE_URL}"

[limiters.api]
store = "db"
rate_per_second = 100.0
max_concurrent = 50
fail_closed = true
outage_budget = 30.0
"""
HOLD = """
import sys
from ratesync import acquire
with acquire("api"), acquire("api"), acquire("api", key="tenant-7"):
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(ratesync_postgres_url, tmp_path):
    """Runs the command where rate-sync.toml is found by itself; returns exit status, stdout and stderr."""
    (tmp_path / "rate-sync.toml").write_text(FILE)

    def command(*arguments: str, url: str = ratesync_postgres_url) -> tuple[int, str, str]:
        done = subprocess.run(
            [SCRIPT, *arguments],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": url},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return command


def test_from_an_empty_database_to_a_healthy_one(run):
    assert run("check")[0] == 0
    status, out, _ = run("doctor")
    assert status == 1
    assert "ratesync migrate" in out
    status, out, _ = run("status")
    assert status == 1
    assert "no limiters" not in out

    steps = (
        "1 create_state_table",
        "2 create_leases_table",
        "4 create_window_tables",
        "5 create_waiters_table",
    )
    assert run("migrate", "--dry-run")[:2] == (0, "".join(f"db: would apply {step}\n" for step in steps))
    assert run("migrate") == (0, "".join(f"db: applied {step}\n" for step in steps), "")
    assert run("migrate") == (0, "db: up to date\n", "")
    assert run("migrate", "--sql")[1] == "-- store db: 0 outstanding steps\n"
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    assert "error" not in out


async def test_the_printed_sql_makes_what_migrate_makes(run, ratesync_asyncpg):
    status, sql, _ = run("migrate", "--sql")
    assert status == 0
    await ratesync_asyncpg.execute(sql)
    assert run("migrate") == (0, "db: up to date\n", "")
    assert run("doctor")[0] == 0


def test_status_shows_what_another_process_holds(run, ratesync_postgres_url, tmp_path):
    assert run("migrate")[0] == 0
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": ratesync_postgres_url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        status, out, _ = run("status")
        assert status == 0
        assert "2/50" in out
        status, out, _ = run("status", "--json")
        assert status == 0
        report = json.loads(out)
        assert {row["group"]: row["slots"] for row in report["holders"]} == {"api": 2, "api:tenant-7": 1}
        assert all(f":{holder.pid} " in row["holder"] for row in report["holders"])
        assert report["limiters"][0]["in_use"] == 2
    finally:
        holder.communicate()
    assert json.loads(run("status", "--json")[1])["holders"] == []


@pytest.mark.parametrize(
    ("command", "fault"), [("doctor", "refused"), ("status", "no such database"), ("migrate", "not a url")]
)
def test_a_wrong_url_is_said_in_one_line_without_the_password(run, ratesync_postgres_url, command, fault):
    parts = urlsplit(ratesync_postgres_url)
    url = {
        "refused": "postgresql://app:topsecret@127.0.0.1:1/app",
        "no such database": urlunsplit(parts._replace(path=f"{parts.path}_not")),
        "not a url": "http://app:topsecret@localhost/app",
    }[fault]
    status, out, err = run(command, url=url)
    assert status == 1
    assert "topsecret" not in out + err
    assert "Traceback" not in err
    said = (out + err).splitlines()
    assert len(said) == 1 or command == "doctor"
