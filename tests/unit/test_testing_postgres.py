"""The PostgreSQL server of ratesync.testing: start, stop, kill, standby, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratesync.testing.postgres import ExternalPostgres, PostgresNotFoundError, PostgresServer, find_bin_dir

try:
    find_bin_dir()
except PostgresNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(durable=False, settings={"work_mem": "5MB"}) as server:
        yield server


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


def test_settings_are_applied(server: PostgresServer) -> None:
    assert server.execute("SHOW fsync")[0][0] == "off"
    assert server.execute("SHOW work_mem")[0][0] == "5MB"
    assert server.execute("SHOW server_version_num")[0][0].startswith(str(server.version))


def test_databases_are_fresh_and_can_be_dropped_while_in_use(server: PostgresServer) -> None:
    first, second = server.create_database(), server.create_database()
    server.execute("CREATE TABLE t (n int)", database=name_of(first))
    assert server.execute("SELECT to_regclass('t')", database=name_of(second))[0][0] is None
    server.drop_database(first)
    known = {row[0] for row in server.execute("SELECT datname FROM pg_database")}
    assert name_of(first) not in known
    assert name_of(second) in known


def test_it_listens_on_tcp_and_on_a_socket(server: PostgresServer) -> None:
    external = ExternalPostgres(server.url(socket=True))
    assert external.execute("SELECT inet_server_addr() IS NULL")[0][0] is True
    assert server.execute("SELECT inet_server_port()")[0][0] == server.port


def test_it_comes_back_after_restart_and_after_kill_on_the_same_port(server: PostgresServer) -> None:
    url = server.create_database()
    server.execute("CREATE TABLE kept AS SELECT 1 AS n", database=name_of(url))
    port = server.port
    server.restart()
    server.kill()
    assert not server.running
    with pytest.raises(OSError, match=r"Connect call failed|refused|lost"):
        server.execute("SELECT 1")
    server.start()
    assert server.port == port
    assert server.execute("SELECT n FROM kept", database=name_of(url))[0][0] == 1


def test_a_frozen_server_goes_on_when_thawed(server: PostgresServer) -> None:
    server.freeze()
    server.thaw()
    assert server.execute("SELECT 1")[0][0] == 1


def test_a_standby_can_be_promoted(server: PostgresServer) -> None:
    if not (server.bin_dir / "pg_basebackup").exists():
        pytest.skip("no pg_basebackup beside this server")
    standby = server.standby()
    try:
        assert standby.execute("SELECT pg_is_in_recovery()")[0][0] is True
        standby.promote()
        standby.execute("CREATE TABLE written (n int)")
    finally:
        standby.close()


def test_a_server_that_cannot_start_shows_its_log() -> None:
    server = PostgresServer(settings={"shared_buffers": "nonsense"})
    try:
        with pytest.raises(RuntimeError, match="nonsense"):
            server.start()
    finally:
        server.close()


def test_nothing_stays_behind_when_the_process_is_killed() -> None:
    code = (
        "import sys, time\n"
        "from ratesync.testing import PostgresServer\n"
        "server = PostgresServer(durable=False).start()\n"
        "print(server._process.pid, server._home, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid, home = child.stdout.readline().split()
        assert Path(home).exists()
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (Path(home).exists() or is_alive(int(pid))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(home).exists()
    assert not is_alive(int(pid))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_given_server_is_used_as_it_is(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATESYNC_TEST_POSTGRES_URL", server.url())
    given = PostgresServer.find()
    assert not given.owned
    url = given.create_database()
    assert given.execute("SELECT current_database()", database=name_of(url))[0][0] == name_of(url)
    given.drop_database(url)
    given.close()
    assert server.running


def test_a_machine_without_postgresql_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RATESYNC_PG_BIN", str(tmp_path))
    with pytest.raises(PostgresNotFoundError, match="apt-get install postgresql"):
        find_bin_dir()
