"""The Redis servers of ratesync.testing: start, kill, pause, TLS, Cluster, Sentinel; nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratesync.testing import RedisCluster, RedisSentinel, RedisServer
from ratesync.testing._resp import RespConnection, RespError
from ratesync.testing._server import HeldPort
from ratesync.testing.redis import ExternalRedis, RedisNotFoundError, find_redis

try:
    find_redis()
except RedisNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

HOSTILE = "a b\"'\\\n#ü%@/:?x"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(settings={"maxclients": 77}) as server:
        yield server


def test_settings_are_applied_and_nothing_is_written_to_disk(server: RedisServer) -> None:
    assert server.call("CONFIG", "GET", "maxclients") == ["maxclients", "77"]
    assert server.call("CONFIG", "GET", "save") == ["save", ""]
    assert server.call("CONFIG", "GET", "appendonly") == ["appendonly", "no"]


def test_every_kind_of_reply_is_understood(server: RedisServer) -> None:
    assert server.call("SET", "k", b"\xff\r\n") == "OK"
    assert server.call("GET", "k") == b"\xff\r\n".decode(errors="surrogateescape")
    assert server.call("GET", "absent") is None
    assert server.call("EVAL", "return {1, {'a'}, false}", 0) == [1, ["a"], None]
    with pytest.raises(RespError, match="unknown command"):
        server.call("NONSENSE")


def test_a_restarted_server_is_empty_and_has_the_same_port(server: RedisServer) -> None:
    server.call("SET", "kept", 1)
    port, pid = server.port, server.pid
    server.restart()
    assert (server.port, server.call("EXISTS", "kept")) == (port, 0)
    assert server.pid != pid
    server.kill()
    assert not server.running
    with pytest.raises(OSError, match="refused"):
        server.call("PING")
    server.start()
    assert server.call("PING") == "PONG"


def test_a_persistent_server_keeps_every_write_of_a_killed_one() -> None:
    with RedisServer(persist=True) as server:
        server.call("SET", "kept", 1)
        server.restart()
        assert server.call("GET", "kept") == "1"


def test_a_server_is_ready_only_when_it_has_read_its_data() -> None:
    # It answers INFO meanwhile, and refuses everything else.
    with RedisServer(persist=True, settings={"key-load-delay": 200, "appendfsync": "no"}) as server:
        server.call("EVAL", "for i = 1, 3000 do redis.call('SET', 'k' .. i, i) end", 0)
        server.call("SET", "last", 1)
        server.stop()
        server.start()
        assert server.call("GET", "last") == "1"
        assert "Loading" in server.log() or "DB loaded" in server.log()


def test_a_port_stays_with_its_server_while_that_is_down(server: RedisServer) -> None:
    port = server.port
    server.kill()
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", port))
    for _ in range(2000):
        with HeldPort() as other_port:
            assert other_port.number != port
    server.start()
    assert (server.port, server.call("PING")) == (port, "PONG")


def test_a_cluster_node_holds_the_port_of_its_bus_too() -> None:
    with HeldPort(bus=True) as held, pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", held.number + 10_000))


def test_a_paused_server_is_silent_and_goes_on_when_resumed(server: RedisServer) -> None:
    server.pause()
    with pytest.raises(TimeoutError), server.connect(timeout=0.2) as connection:
        connection.call("PING")
    server.resume()
    assert server.call("PING") == "PONG"


def test_a_paused_server_can_be_stopped() -> None:
    with RedisServer() as server:
        server.pause()
        server.stop()
        assert not server.running


def test_passwords_and_users_of_any_characters_work() -> None:
    with RedisServer(password=HOSTILE, users={"app": ">secret ~app:* +get +ping"}) as server:
        assert server.call("PING") == "PONG"
        assert ExternalRedis(server.url).call("PING") == "PONG"
        assert ExternalRedis(server.url_for("app", "secret")).call("PING") == "PONG"
        with pytest.raises(RespError, match="NOPERM"):
            ExternalRedis(server.url_for("app", "secret")).call("SET", "app:x", 1)
        with pytest.raises(RespError, match="WRONGPASS"):
            ExternalRedis(server.url_for(password="wrong")).call("PING")


def test_it_listens_on_a_unix_socket_only() -> None:
    with RedisServer(unix_socket=True) as server:
        assert server.port == 0
        assert server.url.startswith("unix:///")
        assert ExternalRedis(server.url).call("PING") == "PONG"


def test_tls_certificates_are_checked_by_clients() -> None:
    import ssl

    with RedisServer(tls=True) as server:
        assert server.url.startswith("rediss://")
        assert server.call("PING") == "PONG"
        context = ssl.create_default_context(cafile=str(server.ca_file))
        context.load_cert_chain(server.cert_file, server.key_file)
        with RespConnection(("127.0.0.1", server.port), tls=context) as connection:
            assert connection.call("PING") == "PONG"
        with pytest.raises(ssl.SSLCertVerificationError):
            RespConnection(("127.0.0.1", server.port), tls=ssl.create_default_context())


def test_a_server_that_cannot_start_shows_its_log() -> None:
    server = RedisServer(settings={"maxclients": "nonsense"})
    try:
        with pytest.raises(RuntimeError, match="nonsense"):
            server.start()
    finally:
        server.close()


def test_a_port_that_another_server_has_is_not_taken_for_our_own(server: RedisServer) -> None:
    other = RedisServer(port=server.port)
    try:
        with pytest.raises(RuntimeError, match="did not start"):
            other.start()
    finally:
        other.close()
    assert server.call("PING") == "PONG"


def test_files_and_processes_are_gone_after_close() -> None:
    server = RedisServer().start()
    home, pid = Path(str(server._directory)), server.pid
    server.close()
    assert not home.exists()
    with pytest.raises(ProcessLookupError):  # reaped, not a zombie
        os.kill(pid, 0)


@pytest.mark.parametrize("kind", ["RedisServer", "RedisCluster", "RedisSentinel"])
def test_nothing_stays_behind_when_the_process_is_killed(kind: str) -> None:
    code = (
        "import sys, time\n"
        f"from ratesync.testing import {kind}\n"
        f"group = {kind}().start()\n"
        "print(group._home.path, *(s.pid for s in getattr(group, 'servers', [group])), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        home, *pids = child.stdout.readline().split()
        assert Path(home).exists()
        assert pids
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (Path(home).exists() or any(map(is_alive, pids))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(home).exists()
    assert not any(map(is_alive, pids))


def is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_given_server_is_used_as_it_is(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATESYNC_TEST_REDIS_URL", server.url_for(db=3))
    given = RedisServer.find()
    assert not given.owned
    server.call("SET", "elsewhere", 1)
    given.call("SET", "here", 1)
    given.clean()
    assert given.call("DBSIZE") == 0
    assert server.call("GET", "elsewhere") == "1"
    given.close()
    assert server.running


def test_a_machine_without_redis_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RATESYNC_REDIS_BIN", str(tmp_path))
    with pytest.raises(RedisNotFoundError, match="apt-get install redis-server"):
        find_redis()


# Topologies ---------------------------------------------------------------------------------------


def fill(cluster: RedisCluster, count: int) -> dict[str, int]:
    keys = {f"key{number}": cluster.slot_of(f"key{number}") for number in range(count)}
    for key, slot in keys.items():
        cluster.owner_of(slot).call("SET", key, key)
    return keys


def test_moved_slots_take_their_keys_along(ratesync_redis_cluster: RedisCluster) -> None:
    cluster = ratesync_redis_cluster
    source, target, _ = cluster.primaries
    keys = fill(cluster, 40)
    mine = [slot for slot in keys.values() if cluster.owner_of(slot) is source]
    assert mine
    assert cluster.move_slots(mine, source, target) == mine
    for key, slot in keys.items():
        owner = cluster.owner_of(slot)
        assert owner is not source
        assert owner.call("GET", key) == key
    cluster.wait_until_healthy()
    cluster.move_slots(mine, target, source)


def test_a_replica_takes_over_from_a_killed_node_and_the_cluster_heals(
    ratesync_redis_cluster: RedisCluster,
) -> None:
    cluster = ratesync_redis_cluster
    keys = fill(cluster, 40)
    victim = cluster.primaries[1]
    for key, slot in keys.items():  # WAIT counts who has what was written by its own connection
        with cluster.owner_of(slot).connect(timeout=60) as connection:
            connection.call("SET", key, key)
            assert connection.call("WAIT", 1, 50_000) >= 1
    heir = cluster.fail_over(victim)
    assert heir is not victim
    assert not victim.running
    for key, slot in keys.items():
        assert cluster.owner_of(slot).call("GET", key) == key
    cluster.heal()
    assert victim in cluster.replicas_of(heir)


def test_the_sentinels_promote_the_replica_time_and_again(ratesync_redis_sentinel: RedisSentinel) -> None:
    group = ratesync_redis_sentinel
    for turn in range(2):
        old = group.kill_primary()
        new = group.wait_for_failover()
        assert new is not old
        new.call("SET", "turn", turn)
        group.heal()
        assert group.primary is new
        assert group.replica is old
        assert new.call("GET", "turn") == str(turn)


@pytest.mark.parametrize("tls", [False, True])
def test_topologies_with_passwords(tls: bool) -> None:
    with RedisCluster(password=HOSTILE, tls=tls) as cluster:
        keys = fill(cluster, 9)
        source, target, _ = cluster.primaries
        cluster.move_slots([s for s in keys.values() if cluster.owner_of(s) is source], source, target)
    with RedisSentinel(password=HOSTILE, sentinel_password="s t", tls=tls) as group:
        group.kill_primary()
        group.wait_for_failover()
