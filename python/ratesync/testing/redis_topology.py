"""Real Redis Clusters and Sentinel groups on loopback, for tests that fail over and reshard.

    with RedisCluster(replicas=1) as cluster:
        cluster.move_slots(100, cluster.primaries[0], cluster.primaries[1])
        cluster.fail_over(cluster.primaries[0])

    with RedisSentinel() as group:
        group.kill_primary()
        group.wait_for_failover()

Made of `RedisServer`s, with their guard: nothing stays behind when this process dies.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

from ratesync.testing._resp import RespError
from ratesync.testing.redis import RedisServer, _Home, make_certificates, quoted

__all__ = ["RedisCluster", "RedisSentinel"]

SLOTS = 16384
_AWAY = (OSError, RespError)
_QUICK_MS = 3000


class _Group:
    """Several servers in one temporary directory."""

    def __init__(self, tls: bool) -> None:
        self._tls = tls
        self._home: _Home | None = None
        self.servers: list[RedisServer] = []

    def _open(self) -> Path:
        self._home = _Home()
        atexit.register(self.close)
        if self._tls:
            make_certificates(self._home.path)
        return self._home.path

    def _scheme(self, kind: str) -> str:
        return f"redis{'s' if self._tls else ''}+{kind}"

    def _query(self, parameters: dict[str, str]) -> str:
        if self._tls:
            parameters = {"ssl_ca_certs": str(self.servers[0].ca_file)} | parameters
        return "?" + urlencode(parameters, quote_via=quote, safe="") if parameters else ""

    def close(self) -> None:
        """Kills all servers and removes their files."""
        atexit.unregister(self.close)
        for server in self.servers:
            server.kill()
            server._let_go()
        home, self._home = self._home, None
        if home is not None:
            home.close()

    def log(self, lines: int = 40) -> str:
        """The end of each server's log."""
        return "\n".join(f"--- {server.port}\n{server.log(lines)}" for server in self.servers)

    def _wait(self, what: str, condition: Callable[[], bool], within: float = 60.0) -> None:
        deadline = time.monotonic() + within
        while True:
            with contextlib.suppress(*_AWAY):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {within:g} s; the servers' logs:\n{self.log(15)}")
            time.sleep(0.02)


class RedisCluster(_Group):
    """A Redis Cluster of our own with three primaries, and as many replicas of each as wanted.

    Args:
        replicas: of each primary.
        password: of all nodes.
        tls: speak TLS only, also among the nodes; see `RedisServer.ca_file`.
        node_timeout_ms: a node that is silent for so long is taken for dead, on a busy machine also one that
            lives: its replica takes over, and what was written last may be lost. While the cluster starts,
            fails over (`fail_over`) or heals it is 3 seconds at most.
        settings: further settings of each node.

    Attributes:
        servers: all nodes; the first three began as primaries.

    Example:
        >>> with RedisCluster() as cluster:                  # doctest: +SKIP
        ...     cluster.primaries[0].call("CLUSTER", "INFO")
    """

    def __init__(
        self,
        *,
        replicas: int = 0,
        password: str | None = None,
        tls: bool = False,
        node_timeout_ms: int = 3000,
        settings: Mapping[str, str | int] | None = None,
    ) -> None:
        super().__init__(tls)
        self._replicas, self._password = replicas, password
        self._node_timeout_ms = node_timeout_ms
        self._settings: dict[str, str | int] = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": min(node_timeout_ms, _QUICK_MS),
            "cluster-replica-validity-factor": 0,  # a replica may always take over
            "repl-diskless-sync-delay": 0,
        }
        self._settings |= settings or {}

    def start(self) -> RedisCluster:
        """Starts the nodes, joins them and returns when all of them serve all slots."""
        home = self._open()
        for number in range(3 * (1 + self._replicas)):
            server = RedisServer(
                password=self._password,
                settings=self._settings,
                tls=self._tls,
                _home=home / f"node{number}",
                _certificates=home if self._tls else None,
            )
            self.servers.append(server.start())
        first = self.servers[0]
        for number, server in enumerate(self.servers, 1):
            server.call("CLUSTER", "SET-CONFIG-EPOCH", number)
            first.call("CLUSTER", "MEET", server.host, server.port)
        share = [range(SLOTS * n // 3, SLOTS * (n + 1) // 3) for n in range(3)]
        for server, slots in zip(self.servers, share, strict=False):
            server.call("CLUSTER", "ADDSLOTS", *slots)
        for number, server in enumerate(self.servers[3:]):
            primary = self.node_id(self.servers[number % 3])
            self._wait("a replica learns of its primary", lambda: primary in self._nodes(server))  # noqa: B023
            server.call("CLUSTER", "REPLICATE", primary)
        self.wait_until_healthy()
        self._take_for_dead_after(self._node_timeout_ms)
        return self

    def __enter__(self) -> RedisCluster:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """`redis+cluster://` with all nodes as seeds."""
        login = f":{quote(self._password, safe='')}@" if self._password is not None else ""
        hosts = ",".join(f"{server.host}:{server.port}" for server in self.servers)
        return f"{self._scheme('cluster')}://{login}{hosts}{self._query({})}"

    @property
    def primaries(self) -> list[RedisServer]:
        """The nodes that own slots, as a node that lives sees it, by their first slot."""
        owners = sorted(self._slots().items(), key=lambda item: min(item[1], default=0))
        return [self._by_port(port) for port, slots in owners if slots]

    def node_id(self, server: RedisServer) -> str:
        """The node's name in the cluster."""
        return str(server.call("CLUSTER", "MYID"))

    def slot_of(self, key: str) -> int:
        """The hash slot of a key, as the servers see it."""
        return int(self._alive().call("CLUSTER", "KEYSLOT", key))

    def owner_of(self, slot: int) -> RedisServer:
        """The primary that has the slot."""
        return self._by_port(next(port for port, slots in self._slots().items() if slot in slots))

    def replicas_of(self, primary: RedisServer) -> list[RedisServer]:
        """The nodes that would take over."""
        nodes = [line.split() for line in self._nodes(self._alive()).splitlines()]
        ports = {fields[0]: int(fields[1].partition("@")[0].rpartition(":")[2]) for fields in nodes}
        chosen = next(name for name, port in ports.items() if port == primary.port)
        return [self._by_port(ports[fields[0]]) for fields in nodes if fields[3] == chosen]

    # Changes --------------------------------------------------------------------------------------

    def move_slots(self, slots: int | Iterable[int], source: RedisServer, target: RedisServer) -> list[int]:
        """Moves slots with their keys, slot by slot, while clients go on: ASK, TRYAGAIN and MOVED happen.

        Takes the slots, or how many. Returns those that were moved.
        """
        if isinstance(slots, int):
            slots = sorted(self._slots()[source.port])[:slots]
        moved = list(slots)
        source_id, target_id = self.node_id(source), self.node_id(target)
        others = [server for server in self.primaries if server not in (source, target)]
        auth = ["AUTH", self._password] if self._password is not None else []
        with source.connect() as old, target.connect() as new:
            for slot in moved:
                new.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
                old.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
                while keys := old.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
                    old.call("MIGRATE", target.host, target.port, "", 0, 10_000, *auth, "KEYS", *keys)
                # The new owner first: otherwise a moment exists in which nobody owns the slot.
                new.call("CLUSTER", "SETSLOT", slot, "NODE", target_id)
                old.call("CLUSTER", "SETSLOT", slot, "NODE", target_id)
                for server in others:
                    server.call("CLUSTER", "SETSLOT", slot, "NODE", target_id)
        return moved

    def fail_over(self, primary: RedisServer) -> RedisServer:
        """Kills a primary, waits until a replica serves its slots, and returns that replica."""
        replicas = self.replicas_of(primary)
        if not replicas:
            raise RuntimeError(f"node {primary.port} has no replica")
        slots = self._slots()[primary.port]
        primary.kill()

        def taken_over() -> bool:
            owners = {
                port for server in self._living() for port, own in self._slots(server).items() if own & slots
            }
            if len(owners) != 1 or primary.port in owners:
                return False
            # Who knows the new owner may call the cluster down for a moment yet.
            return all(self._facts(server)["cluster_state"] == "ok" for server in self._living())

        self._take_for_dead_after(min(self._node_timeout_ms, _QUICK_MS))
        try:
            self._wait("a replica takes over", taken_over)
        finally:
            self._take_for_dead_after(self._node_timeout_ms)
        return self.owner_of(min(slots))

    def heal(self) -> None:
        """Starts what is dead or paused and waits until all is well. Who is primary may have changed."""
        for server in self.servers:
            server.resume()
            server.start()
        with contextlib.suppress(*_AWAY):
            if self._healthy():
                return
        self._take_for_dead_after(min(self._node_timeout_ms, _QUICK_MS))
        self.wait_until_healthy()
        self._take_for_dead_after(self._node_timeout_ms)

    def clean(self) -> None:
        """Empties all primaries and forgets the scripts."""
        for server in self.primaries:
            server.clean()

    def wait_until_healthy(self) -> None:
        """Returns when every node serves all slots, knows every other, and replicas are in step."""
        self._wait("the cluster is healthy", self._healthy)

    # Inside ---------------------------------------------------------------------------------------

    def _healthy(self) -> bool:
        def healthy(server: RedisServer) -> bool:
            facts = self._facts(server)
            nodes = self._nodes(server)
            return (
                facts["cluster_state"] == "ok"
                and facts["cluster_slots_ok"] == str(SLOTS)
                and facts["cluster_known_nodes"] == str(len(self.servers))
                and not any(bad in nodes for bad in ("fail", "handshake", "noaddr", "disconnected"))
                and nodes.count("slave") == 3 * self._replicas
                and server.info("replication").get("master_link_status", "up") == "up"
            )

        return all(map(healthy, self.servers))

    def _take_for_dead_after(self, ms: int) -> None:
        for server in self._living():
            with contextlib.suppress(*_AWAY):
                server.call("CONFIG", "SET", "cluster-node-timeout", ms)

    def _facts(self, server: RedisServer) -> dict[str, str]:
        lines = server.call("CLUSTER", "INFO").splitlines()
        return dict(line.split(":", 1) for line in lines if line)

    def _nodes(self, server: RedisServer) -> str:
        return str(server.call("CLUSTER", "NODES"))

    def _living(self) -> list[RedisServer]:
        return [server for server in self.servers if server.running]

    def _alive(self) -> RedisServer:
        living = self._living()
        if not living:
            raise RuntimeError("no node of the Redis Cluster runs")
        return living[0]

    def _by_port(self, port: int) -> RedisServer:
        return next(server for server in self.servers if server.port == port)

    def _slots(self, server: RedisServer | None = None) -> dict[int, set[int]]:
        """Which slots the primary on a port has, as one node sees it."""
        owned: dict[int, set[int]] = {}
        for first, last, primary, *_ in (server or self._alive()).call("CLUSTER", "SLOTS"):
            owned.setdefault(primary[1], set()).update(range(first, last + 1))
        return owned


class _SentinelServer(RedisServer):
    """A Sentinel: it keeps what it learned in its configuration file, also over a restart."""

    def __init__(
        self,
        *,
        name: str,
        group_password: str | None,
        password: str | None,
        down_after_ms: int,
        tls: bool,
        _home: Path,
        _certificates: Path | None,
    ) -> None:
        super().__init__(password=password, tls=tls, _home=_home, _certificates=_certificates)
        self._name = name
        self._options = [
            f"sentinel down-after-milliseconds {name} {down_after_ms}",
            f"sentinel failover-timeout {name} 3000",
            f"sentinel parallel-syncs {name} 1",
        ]
        if group_password is not None:
            self._options.append(f"sentinel auth-pass {name} {quoted(group_password)}")
        self._monitor = ""

    def watch(self, primary: RedisServer) -> None:
        """What to watch, for a Sentinel that remembers nothing."""
        self._monitor = f"sentinel monitor {self._name} {primary.host} {primary.port} 2"

    def forget(self) -> None:
        """Removes what it learned."""
        (self._where() / "conf").unlink(missing_ok=True)

    def _take_port(self) -> None:
        super()._take_port()
        self.forget()  # which has the port

    def _config(self) -> str:
        home = self._where()
        lines = [f"bind {self.host}", f"dir {home}", f"pidfile {home / 'pid'}"]
        if self._tls:
            lines += ["port 0", f"tls-port {self.port}"]
            lines += [
                f"{name} {value}" for name, value in self._tls_settings().items() if name != "tls-cluster"
            ]
        else:
            lines.append(f"port {self.port}")
        if self.password is not None:
            lines.append(f"requirepass {quoted(self.password)}")
        return "\n".join([*lines, self._monitor, *self._options]) + "\n"

    def _command(self) -> list[str]:
        if not (self._where() / "conf").exists():
            super()._command()
        return [str(self.program), str(self._where() / "conf"), "--sentinel"]


class RedisSentinel(_Group):
    """A primary, a replica and three Sentinels that watch them.

    Args:
        name: of the group, for the Sentinels.
        password: of the two servers.
        sentinel_password: of the Sentinels themselves.
        tls: speak TLS only, all of them; see `RedisServer.ca_file`.
        down_after_ms: a server that is silent for so long is taken for dead, see `RedisCluster`. From
            `kill_primary`, or the beginning of `wait_for_failover`, to its end it is 3 seconds at most.

    Attributes:
        servers: the two servers, then the Sentinels; `nodes` and `sentinels` are its two parts.

    Example:
        >>> with RedisSentinel() as group:                   # doctest: +SKIP
        ...     group.kill_primary()
        ...     group.wait_for_failover()
    """

    def __init__(
        self,
        *,
        name: str = "ratesync",
        password: str | None = None,
        sentinel_password: str | None = None,
        tls: bool = False,
        down_after_ms: int = 2000,
    ) -> None:
        super().__init__(tls)
        self.name = name
        self.nodes: list[RedisServer] = []
        self.sentinels: list[_SentinelServer] = []
        self._password, self._sentinel_password = password, sentinel_password
        self._down_after_ms = down_after_ms
        self._killed: RedisServer | None = None

    def start(self) -> RedisSentinel:
        """Starts all five and returns when a failover would succeed."""
        home = self._open()
        for number in range(2):
            settings: dict[str, str | int] = {"repl-diskless-sync-delay": 0, "replica-priority": 100}
            if number:
                settings["replicaof"] = f"{self.nodes[0].host} {self.nodes[0].port}"
            server = RedisServer(
                password=self._password,
                settings=settings,
                tls=self._tls,
                _home=home / f"node{number}",
                _certificates=home if self._tls else None,
            )
            self.nodes.append(server.start())
            self.servers.append(server)
        self._wait_in_step()
        for number in range(3):
            sentinel = _SentinelServer(
                name=self.name,
                group_password=self._password,
                password=self._sentinel_password,
                down_after_ms=self._down_after_ms,
                tls=self._tls,
                _certificates=home if self._tls else None,
                _home=home / f"sentinel{number}",
            )
            sentinel.watch(self.nodes[0])
            sentinel.start()
            self.sentinels.append(sentinel)
            self.servers.append(sentinel)
        self._wait_until_watched()
        return self

    def __enter__(self) -> RedisSentinel:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """`redis+sentinel://` with all Sentinels."""
        login = f":{quote(self._password, safe='')}@" if self._password is not None else ""
        hosts = ",".join(f"{sentinel.host}:{sentinel.port}" for sentinel in self.sentinels)
        query = {} if self._sentinel_password is None else {"sentinel_password": self._sentinel_password}
        return f"{self._scheme('sentinel')}://{login}{hosts}/{quote(self.name, safe='')}{self._query(query)}"

    @property
    def primary(self) -> RedisServer:
        """The server that the Sentinels name; it may be dead."""
        for sentinel in self.sentinels:
            with contextlib.suppress(*_AWAY):
                port = int(sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)[1])
                return next(server for server in self.nodes if server.port == port)
        raise RuntimeError("no Sentinel answers")

    @property
    def replica(self) -> RedisServer:
        """The other one."""
        return next(server for server in self.nodes if server is not self.primary)

    def kill_primary(self) -> RedisServer:
        """SIGKILL to the primary; returns it."""
        self._killed = self.primary
        self._killed.kill()
        self._take_for_dead_after(min(self._down_after_ms, _QUICK_MS))
        return self._killed

    def wait_for_failover(self, since: RedisServer | None = None) -> RedisServer:
        """Returns the new primary when a Sentinel names it and it takes writes.

        Args:
            since: the old primary; the one that `kill_primary` killed when left out.
        """
        old = since or self._killed
        if old is None:
            raise RuntimeError("which primary is to be replaced? kill_primary() was not called")

        def done() -> bool:
            primary = self.primary
            return primary is not old and primary.call("ROLE")[0] == "master"

        self._take_for_dead_after(min(self._down_after_ms, _QUICK_MS))
        try:
            self._wait("the Sentinels fail over", done)
        finally:
            self._take_for_dead_after(self._down_after_ms)
        return self.primary

    def heal(self) -> None:
        """Starts what is dead or paused and waits until all is well. Who is primary may have changed.

        Unless all was well, the Sentinels begin anew and remember nothing: left alone, they look at a
        replica that came back only every 10 s.
        """
        for server in self.servers:
            server.resume()
        self._killed = None
        with contextlib.suppress(*_AWAY):
            if all(map(self._watched, self.sentinels)) and self._in_step():
                return
        named = self.primary if any(sentinel.running for sentinel in self.sentinels) else self.nodes[0]
        for sentinel in self.sentinels:
            sentinel.kill()
            sentinel.forget()
        # A primary that was killed comes back as a primary, with nothing in it.
        primary = next(
            (s for s in (named, *self.nodes) if s.running and s.call("ROLE")[0] == "master"), named
        )
        for server in self.nodes:
            server.start()
        primary.call("REPLICAOF", "NO", "ONE")
        for server in self.nodes:
            if server is not primary:
                server.call("REPLICAOF", primary.host, primary.port)
        self._wait_in_step()
        for sentinel in self.sentinels:
            sentinel.watch(primary)
            sentinel.start()
        self._wait_until_watched()

    def clean(self) -> None:
        """Empties the primary and forgets the scripts of both servers."""
        self.primary.clean()
        self.replica.call("SCRIPT", "FLUSH")

    # Inside ---------------------------------------------------------------------------------------

    def _take_for_dead_after(self, ms: int) -> None:
        for sentinel in self.sentinels:
            with contextlib.suppress(*_AWAY):
                sentinel.call("SENTINEL", "SET", self.name, "down-after-milliseconds", ms)

    def _wait_in_step(self) -> None:
        self._wait("the replica is in step", self._in_step)

    def _in_step(self) -> bool:
        links = [server.info("replication").get("master_link_status", "-") for server in self.nodes]
        return sorted(links) == ["-", "up"]

    def _wait_until_watched(self) -> None:
        self._wait("the Sentinels watch", lambda: all(map(self._watched, self.sentinels)))

    def _watched(self, sentinel: RedisServer) -> bool:
        def facts_of(fields: list[str]) -> dict[str, str]:
            return dict(zip(fields[::2], fields[1::2], strict=True))

        sentinel.call("SENTINEL", "CKQUORUM", self.name)
        facts = facts_of(sentinel.call("SENTINEL", "MASTER", self.name))
        replicas = [facts_of(fields) for fields in sentinel.call("SENTINEL", "REPLICAS", self.name)]
        return (
            facts["flags"] == "master"
            and facts["num-other-sentinels"] == "2"
            and [replica["flags"] for replica in replicas] == ["slave"]
            and replicas[0]["master-link-status"] == "ok"
            and replicas[0]["master-port"] == facts["port"]
        )
