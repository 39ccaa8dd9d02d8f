"""What the PostgreSQL benchmarks share: the server, the hand-written statement, the C program.

The server is started by ourselves with fsync on, and everybody reaches it over the same Unix socket. The
table is the one printed in the documentation, with its index on `updated_at`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Load
from ratesync.testing import PostgresServer

KEYS = 10_000
HOT = "hot"

TABLE = (
    """
CREATE TABLE rate_limiter_state (
    group_id VARCHAR(255) PRIMARY KEY,
    last_acquisition_at TIMESTAMPTZ NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    current_concurrent INTEGER NOT NULL DEFAULT 0,
    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
)""",
    "CREATE INDEX idx_rate_limiter_state_updated ON rate_limiter_state(updated_at)",
)

# A rate limit by hand, as good as it gets with one row and one statement: atomic, on the server's clock,
# a million per second with an hour of burst. `updated_at` is left alone, so that updates can be HOT.
BY_HAND = (
    "UPDATE rate_limiter_state "
    "SET last_acquisition_at = greatest(last_acquisition_at, clock_timestamp()) + interval '1 microsecond', "
    "version = version % 2147483647 + 1 "
    "WHERE group_id = $1 AND last_acquisition_at <= clock_timestamp() + interval '1 hour' "
    "RETURNING last_acquisition_at"
)


@contextlib.contextmanager
def server(**settings: str | int) -> Iterator[PostgresServer]:
    """A durable server of our own, gone afterwards."""
    with PostgresServer(durable=True, settings={"max_connections": 100, **settings}) as started:
        yield started


def database(started: PostgresServer) -> str:
    """The URL, over the Unix socket, of a fresh database."""
    return started.url(urlsplit(started.create_database()).path.lstrip("/"), socket=True)


def with_peers_rows(started: PostgresServer) -> str:
    """A fresh database with the table and the rows that hand-written code needs."""
    url = database(started)
    name = urlsplit(url).path.lstrip("/")
    rows = (
        f"INSERT INTO rate_limiter_state SELECT 'key-' || i, now() FROM generate_series(0, {KEYS - 1}) AS i"
    )
    hot = f"INSERT INTO rate_limiter_state VALUES ('{HOT}', now())"
    started.execute(*TABLE, rows, hot, "VACUUM ANALYZE rate_limiter_state", database=name)
    return url


def can_measure() -> str | None:
    """Why there is nothing to measure here, or None."""
    from ratesync._engine import HAS_POSTGRES

    return (
        None if HAS_POSTGRES else "this build has no PostgreSQL store (libpq was not found when it was built)"
    )


# Raw libpq and pgbench ------------------------------------------------------------------------------


class Floor:
    """`raw_libpq.c`, compiled with what pg_config says, and pgbench, on the statement by hand."""

    def __init__(self, started: PostgresServer, url: str) -> None:
        self._url = url
        self._bin = started.bin_dir
        self._directory = tempfile.TemporaryDirectory(prefix="ratesync-bench-")
        self.program = Path(self._directory.name) / "raw_libpq"
        source = Path(__file__).with_name("raw_libpq.c")
        config = shutil.which("pg_config") or str(self._bin / "pg_config")

        def asked(what: str) -> str:
            return subprocess.run([config, what], capture_output=True, text=True, check=True).stdout.strip()

        includes, libraries = asked("--includedir"), asked("--libdir")
        command = ["cc", "-O2", f"-I{includes}", str(source), "-o", str(self.program)]
        subprocess.run([*command, f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lpq"], check=True)
        self._script = Path(self._directory.name) / "by_hand.sql"
        self._script.write_text(BY_HAND.replace("$1", f"'{HOT}'") + ";\n", encoding="utf-8")

    def _options(self, durable: bool) -> str:
        return f"{self._url}&options=-csynchronous_commit%3D{'on' if durable else 'off'}"

    def raw(self, seconds: float, depth: int, *, durable: bool) -> Load:
        return self._raw(self._options(durable), BY_HAND, HOT, seconds, depth)

    def statement(self, sql: str, parameter: str, seconds: float, depth: int) -> Load:
        """Any statement with one parameter that returns one row, durable."""
        return self._raw(self._options(True), sql, parameter, seconds, depth)

    def _raw(self, url: str, sql: str, parameter: str, seconds: float, depth: int) -> Load:
        command = [str(self.program), url, sql, parameter, str(seconds), str(depth)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"raw_libpq: {done.stderr}")
        found = json.loads(done.stdout)
        return Load(found["operations"] / found["seconds"], found["p50"], found["p99"], found["operations"])

    def pgbench(self, seconds: float, clients: int, *, durable: bool) -> float:
        """Transactions per second."""
        command = [str(self._bin / "pgbench"), "-n", "-M", "prepared", "-f", str(self._script)]
        command += ["-c", str(clients), "-j", "1", "-T", str(max(1, round(seconds))), self._options(durable)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
        if done.returncode != 0 or not found:
            raise RuntimeError(f"pgbench: {done.stderr}")
        return float(found[1])

    def close(self) -> None:
        self._directory.cleanup()


def server_version(started: PostgresServer) -> str:
    return f"PostgreSQL {started.execute('SHOW server_version')[0][0].split()[0]} (fsync on, Unix socket)"


def need(reason: str | None) -> None:
    if reason:
        sys.exit(f"benchmarks: {reason}")
