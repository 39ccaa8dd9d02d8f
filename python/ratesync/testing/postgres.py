"""A real PostgreSQL server for tests and demos, started in a temporary directory and gone afterwards.

    with PostgresServer() as server:
        url = server.create_database()

Finds the server programs by itself, runs them as another user when we are root (PostgreSQL refuses
root), and listens on a Unix socket and on a free port of 127.0.0.1. A guard process stops the server
and removes its files even when this process dies without a word. With RATESYNC_TEST_POSTGRES_URL set,
`PostgresServer.find()` gives that server instead, which cannot be stopped or killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from ratesync.testing._server import OwnsPort, ServerLog
from ratesync.testing._sql import execute

__all__ = ["ExternalPostgres", "PostgresNotFoundError", "PostgresServer"]

Mode = Literal["smart", "fast", "immediate"]
_SIGNALS: dict[str, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_SUPERUSER = "ratesync"

# Ends with its standard input, that is when the process that started it is gone; $1 is the server's home.
_GUARD = """
cat >/dev/null
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null) && kill -QUIT "$pid" 2>/dev/null
sleep 1
rm -rf "$1"
"""


class PostgresNotFoundError(RuntimeError):
    """No PostgreSQL server programs on this machine."""


def find_bin_dir() -> Path:
    """The directory of `initdb` and `postgres`: RATESYNC_PG_BIN, Debian's place (newest), PATH."""
    given = os.environ.get("RATESYNC_PG_BIN")
    if given:
        candidates = [Path(given)]
    else:
        debian = [path / "bin" for path in Path("/usr/lib/postgresql").glob("[0-9]*")]
        candidates = sorted(debian, key=lambda path: int(path.parent.name.split(".")[0]), reverse=True)
        on_path = shutil.which("initdb")
        if on_path:
            candidates.append(Path(on_path).resolve().parent)
        candidates += Path("/opt/homebrew/opt").glob("postgresql*/bin")
    for candidate in candidates:
        if (candidate / "initdb").exists() and (candidate / "postgres").exists():
            return candidate
    raise PostgresNotFoundError(
        "no PostgreSQL server found: install one (Debian: apt-get install postgresql), set RATESYNC_PG_BIN "
        "to the directory of initdb, or set RATESYNC_TEST_POSTGRES_URL to a server that may be used for tests"
    )


class _Databases:
    """What a server that we own and one that we were given have in common: fresh databases."""

    def url(self, database: str | None = None) -> str:
        """A connection URL; without a database one that administrative statements can use."""
        raise NotImplementedError

    def create_database(self) -> str:
        """Makes an empty database of its own for the caller and returns its URL."""
        name = f"rs_{uuid.uuid4().hex[:12]}"
        execute(self.url(), f'CREATE DATABASE "{name}" TEMPLATE template0')
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Removes a database made by `create_database`, ending the connections to it."""
        name = urlsplit(url).path.lstrip("/")
        deadline = time.monotonic() + 60
        while True:
            try:
                execute(
                    self.url(),
                    f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
                    f'DROP DATABASE IF EXISTS "{name}"',
                )
                return
            except Exception as error:
                # Sessions live on for a moment after they were ended; the server waits 5 s for them.
                if getattr(error, "sqlstate", None) != "55006" or time.monotonic() > deadline:
                    raise

    def execute(self, *statements: str, database: str | None = None) -> list[Any]:
        """Runs statements as the superuser, each by itself; returns the rows of the last one."""
        return execute(self.url(database), *statements)


class ExternalPostgres(_Databases):
    """The server of RATESYNC_TEST_POSTGRES_URL. Its user must be allowed to create databases."""

    owned = False

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: str | None = None, *, user: str | None = None) -> str:
        """The given URL, with another database or user when asked for."""
        parts = urlsplit(self._url)
        netloc = parts.netloc
        if user is not None:
            netloc = f"{quote(user, safe='')}@{netloc.rpartition('@')[2]}"
        path = parts.path if database is None else f"/{database}"
        return urlunsplit((parts.scheme, netloc, path, parts.query, parts.fragment))

    def log(self, lines: int = 40, since: int = 0) -> str:
        """Nothing: the log is elsewhere."""
        return ""

    def log_size(self) -> int:
        """Nothing: the log is elsewhere."""
        return 0

    def close(self) -> None:
        """Nothing: the server is not ours."""


class PostgresServer(OwnsPort, ServerLog, _Databases):
    """One PostgreSQL server of our own.

    Args:
        durable: False turns fsync and its relatives off, for tests that do not pull the plug.
        settings: further server settings, as in postgresql.conf.
        bin_dir: where `initdb` and `postgres` are; found by itself when left out.

    Example:
        >>> server = PostgresServer(durable=False)  # doctest: +SKIP
        >>> with server:                            # doctest: +SKIP
        ...     url = server.create_database()
    """

    owned = True

    def __init__(
        self,
        *,
        durable: bool = True,
        settings: Mapping[str, str | int] | None = None,
        bin_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.bin_dir = Path(bin_dir) if bin_dir is not None else find_bin_dir()
        self.host = "127.0.0.1"
        self.port = 0
        self._settings: dict[str, str | int] = {
            "max_connections": 200,
            "shared_buffers": "64MB",
            "log_line_prefix": "%m [%p] ",
            "log_checkpoints": "off",
            "timezone": "UTC",
        }
        if not durable:
            self._settings |= {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
        self._settings |= settings or {}
        self._identity = _server_identity()
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @staticmethod
    def find(*, durable: bool = True) -> PostgresServer | ExternalPostgres:
        """The server of RATESYNC_TEST_POSTGRES_URL when that is set, else one of our own, started."""
        given = os.environ.get("RATESYNC_TEST_POSTGRES_URL")
        if given:
            return ExternalPostgres(given)
        server = PostgresServer(durable=durable)
        server.start()
        return server

    # Life cycle -----------------------------------------------------------------------------------

    def start(self) -> PostgresServer:
        """Starts the server, after `initdb` the first time, and returns when it accepts connections."""
        if self._process is not None and self._process.poll() is None:
            return self
        if self._home is None:
            self._initialize()
        deadline, ports = time.monotonic() + 60, 0
        while True:
            try:
                self._launch()
                return self
            except _StartFailure as failure:
                # After kill(), the old shared memory goes away with the last orphaned process.
                if "shared memory" in str(failure) and time.monotonic() < deadline:
                    time.sleep(0.1)
                elif "Address already in use" in str(failure) and ports < 5:
                    ports += 1
                    self._hold_port()
                else:
                    raise RuntimeError(f"PostgreSQL did not start; its log:\n{failure}") from None

    def stop(self, mode: Mode = "fast") -> None:
        """Stops the server: `smart` waits for the clients, `fast` disconnects them, `immediate` crashes."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(_SIGNALS[mode])
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(
                f"PostgreSQL did not stop ({mode}) within 60 s; its log:\n{self.log()}"
            ) from None

    def restart(self, mode: Mode = "fast") -> None:
        """Stops and starts; the port stays."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL to the server and all its backends: what a power failure does to clients."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGSTOP)  # no new backends while they are counted
        children = list(_children(process.pid))
        # All stand still before the first dies: a backend that outlives the others shows what was committed
        # here and waits for a standby, because that wait ends with the server.
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (*children, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
        process.wait()

    def freeze(self) -> None:
        """Stops all server processes without closing anything (SIGSTOP): a host that hangs."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Ends `freeze`."""
        self._signal_all(signal.SIGCONT)

    def standby(self) -> PostgresServer:
        """A hot standby of this server, started; `promote()` makes it the primary.

        Without `pg_basebackup` among the programs the files are copied while this server is stopped.
        """
        # A promotion that comes while the standby looks for its primary may wait for the next look.
        settings = {"wal_retrieve_retry_interval": "200ms", **self._settings}
        standby = PostgresServer(settings=settings, bin_dir=self.bin_dir)
        data = standby._make_home() / "data"
        if (self.bin_dir / "pg_basebackup").exists():
            backup = ["-R", "-X", "stream", "-c", "fast", "-d", self.url()]
            standby._run(["pg_basebackup", "-D", str(data), *backup])
        else:
            copy = 'cp -Rp "$0" "$1" && touch "$1/standby.signal"'
            self.stop()
            standby._run(["/bin/sh", "-c", copy, str(self._where() / "data"), str(data)])
            self.start()
            standby._settings |= {"primary_conninfo": self.url()}
        standby._configure()
        standby.start()
        return standby

    def promote(self) -> None:
        """Makes a standby the primary and returns when it accepts writes."""
        [(done,)] = self.execute("SELECT pg_promote(true, 60)")
        if not done:
            raise RuntimeError(f"the standby was not promoted within 60 s; its log:\n{self.log()}")

    def close(self) -> None:
        """Stops the server and removes its files."""
        atexit.unregister(self.close)
        self.stop("immediate")
        self._let_go()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None
        guard, self._guard = self._guard, None
        if guard is not None and guard.stdin is not None:
            guard.terminate()
            guard.stdin.close()
            guard.wait()

    def __enter__(self) -> PostgresServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Looking --------------------------------------------------------------------------------------

    def url(
        self,
        database: str | None = None,
        *,
        user: str | None = None,
        socket: bool = False,
        **parameters: str,
    ) -> str:
        """A connection URL for libpq and asyncpg, by TCP or by the Unix socket."""
        database = database or "postgres"
        user = quote(user if user is not None else _SUPERUSER, safe="")
        if socket:
            parameters |= {"host": str(self._where()), "port": str(self.port)}
            return f"postgresql://{user}@/{database}?{urlencode(parameters)}"
        query = f"?{urlencode(parameters)}" if parameters else ""
        return f"postgresql://{user}@{self.host}:{self.port}/{database}{query}"

    @property
    def version(self) -> int:
        """The major version of the server programs."""
        out = subprocess.run([self.bin_dir / "postgres", "-V"], capture_output=True, text=True, check=True)
        return int(out.stdout.split()[2].partition(".")[0].partition("beta")[0])

    @property
    def running(self) -> bool:
        """Whether the server process lives."""
        return self._process is not None and self._process.poll() is None

    # Inside ---------------------------------------------------------------------------------------

    def _where(self) -> Path:
        if self._home is None:
            raise RuntimeError("the PostgreSQL server was not started, or is closed")
        return self._home

    def _make_home(self) -> Path:
        # Not below pytest's tmp_path: that is closed to the user the server runs as. Short, because a
        # socket's path may have 107 bytes.
        self._home = home = Path(tempfile.mkdtemp(prefix="ratesync-pg-"))
        if self._identity:
            os.chown(home, self._identity["user"], self._identity["group"])
        atexit.register(self.close)
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(home)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._hold_port()
        return home

    def _initialize(self) -> None:
        home = self._make_home()
        initdb = ["initdb", "-D", str(home / "data"), "-U", _SUPERUSER, "-A", "trust", "-E", "UTF8"]
        self._run([*initdb, "--locale=C", "-N"])
        self._configure()

    def _configure(self) -> None:
        home = self._where()
        lines = [f"{name} = '{value}'" for name, value in self._settings.items()]
        with (home / "data" / "postgresql.conf").open("a") as conf:
            conf.write("\n" + "\n".join(lines) + "\n")

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            [self.bin_dir / command[0], *command[1:]],
            cwd=self._where(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **self._identity,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed ({done.returncode}):\n{done.stdout}{done.stderr}")

    def _launch(self) -> None:
        home = self._where()
        options = {
            "port": self.port,
            "listen_addresses": self.host,
            "unix_socket_directories": home,
        }
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (home / "log").open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(
                [self.bin_dir / "postgres", "-D", home / "data", *arguments],
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us
                **self._identity,
            )
        deadline = time.monotonic() + 60
        while not _is_ready(home / "data" / "postmaster.pid", self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                self._process = None
                raise _StartFailure((home / "log").read_bytes()[begin:].decode(errors="replace"))
            time.sleep(0.01)

    def _signal_all(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)  # first, so that no backend is added while they are counted
        for pid in _children(self._process.pid):
            with contextlib.suppress(ProcessLookupError):  # a backend that has just ended
                os.kill(pid, number)


class _StartFailure(Exception):
    """The server ended before it was ready; the message is its log."""


def _server_identity() -> dict[str, Any]:
    """Arguments for subprocess that drop root's identity, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise PostgresNotFoundError(
        "running as root, and there is no user postgres or nobody to run the server as"
    )


def _is_ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text().splitlines()
    except OSError:
        return False
    # Line 8 is the state; a file left by a killed server names another process.
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() in ("ready", "standby")


def _children(parent: int) -> Iterator[int]:
    """Direct children of a process; the server's backends are no session of its own."""
    tasks = Path(f"/proc/{parent}/task/{parent}/children")
    if tasks.exists():
        return iter([int(pid) for pid in tasks.read_text().split()])
    out = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = (line.split() for line in out.splitlines())
    return iter([int(pid) for pid, ppid in pairs if ppid == str(parent)])
