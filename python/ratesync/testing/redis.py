"""A real Redis server for tests and demos, started in a temporary directory and gone afterwards.

    with RedisServer() as server:
        url = server.url

Finds `redis-server` (or `valkey-server`) by itself and listens on a free port of 127.0.0.1 or on a Unix
socket. A guard process stops the server and removes its files even when this process dies without a
word. With RATESYNC_TEST_REDIS_URL set, `RedisServer.find()` gives that server instead, which cannot be
stopped or killed. A Cluster and a Sentinel group are in `ratesync.testing.redis_topology`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from ratesync.testing._resp import Argument, RespConnection, RespError
from ratesync.testing._server import OwnsPort, ServerLog

__all__ = ["ExternalRedis", "RedisNotFoundError", "RedisServer"]

# Ends with its standard input, that is when the process that started it is gone; $1 is the servers' home.
_GUARD = """
cat >/dev/null
for file in "$1"/pid "$1"/*/pid; do
  [ -f "$file" ] && kill -KILL "$(cat "$file")" 2>/dev/null
done
sleep 0.2
rm -rf "$1"
"""


class RedisNotFoundError(RuntimeError):
    """No Redis server program on this machine."""


def find_redis() -> Path:
    """The server program: in RATESYNC_REDIS_BIN (a directory), else on the PATH; redis before valkey."""
    given = os.environ.get("RATESYNC_REDIS_BIN")
    path = given or os.environ.get("PATH", "") + ":/usr/local/bin:/opt/homebrew/bin"
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=path)
        if found:
            return Path(found)
    raise RedisNotFoundError(
        "no Redis server found: install one (Debian: apt-get install redis-server), set RATESYNC_REDIS_BIN "
        "to the directory of redis-server, or set RATESYNC_TEST_REDIS_URL to a server that may be used for "
        "tests and whose database may be emptied"
    )


class _Home:
    """A temporary directory for one or more servers, and the guard that takes both down with us."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ratesync-redis-"))
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(self.path)], stdin=subprocess.PIPE, start_new_session=True
        )

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._guard.terminate()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._guard.wait()


class ExternalRedis:
    """The server of RATESYNC_TEST_REDIS_URL. The tests empty its database."""

    owned = False

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self, timeout: float = 10.0) -> RespConnection:
        """A connection of the harness's own, on the URL's database."""
        parts = urlsplit(self.url)
        tls = ssl.create_default_context() if parts.scheme == "rediss" else None
        if parts.scheme in ("unix", "redis+unix"):
            address: tuple[str, int] | str = unquote(parts.path)
        else:
            address = (parts.hostname or "127.0.0.1", parts.port or 6379)
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        connection = RespConnection(address, user=user, password=password, tls=tls, timeout=timeout)
        db = "" if isinstance(address, str) else parts.path.strip("/")
        try:
            if db not in ("", "0"):  # a user may be forbidden to SELECT
                connection.call("SELECT", db)
        except BaseException:
            connection.close()
            raise
        return connection

    def call(self, *arguments: Argument) -> Any:
        """One command on a connection of its own."""
        with self.connect() as connection:
            return connection.call(*arguments)

    def clean(self) -> None:
        """Empties the URL's database and forgets the scripts."""
        with self.connect() as connection:
            connection.call("FLUSHDB")
            connection.call("SCRIPT", "FLUSH")

    def log(self, lines: int = 40, since: int = 0) -> str:
        """Nothing: the log is elsewhere."""
        return ""

    def log_size(self) -> int:
        """Nothing: the log is elsewhere."""
        return 0

    def close(self) -> None:
        """Nothing: the server is not ours."""


class RedisServer(OwnsPort, ServerLog):
    """One Redis server of our own, which keeps nothing on disk unless asked to.

    Args:
        port: of 127.0.0.1; 0 takes a free one, which stays the same, and its own, over restarts.
        unix_socket: listen on a Unix socket only.
        tls: speak TLS only, with certificates made on the spot: see `ca_file`.
        password: of the default user; None: no password.
        users: further users by name, as ACL rules: `{"app": ">secret ~* +@all"}`.
        persist: append every write to a file, which is read at the next start; else a restarted server
            is an empty one.
        settings: further server settings, as in redis.conf (several words are several arguments).
        program: the server program; found by itself when left out.

    Attributes:
        port: 0 on a Unix socket.
        ca_file: PEM file of the authority that signed the TLS certificate, for `127.0.0.1` and `localhost`.
        cert_file: PEM file of a client certificate by the same authority, its key in `key_file`.

    Example:
        >>> with RedisServer() as server:           # doctest: +SKIP
        ...     server.call("PING")
        'PONG'
    """

    owned = True

    def __init__(
        self,
        *,
        port: int = 0,
        unix_socket: bool = False,
        tls: bool = False,
        password: str | None = None,
        users: Mapping[str, str] | None = None,
        persist: bool = False,
        settings: Mapping[str, str | int] | None = None,
        program: str | os.PathLike[str] | None = None,
        _home: Path | None = None,
        _certificates: Path | None = None,
    ) -> None:
        self.program = Path(program) if program is not None else find_redis()
        self.host = "127.0.0.1"
        self.port = port
        self.password = password
        self._unix, self._tls = unix_socket, tls
        self._certificates = _certificates  # where they are; made in our own directory when left out
        self._users = dict(users or {})
        self._settings: dict[str, str | int] = {"save": "", "appendonly": "yes" if persist else "no"}
        self._settings |= {"appendfsync": "always"} if persist else {}
        self._settings |= settings or {}
        self._directory = _home
        self._home: _Home | None = None
        self._chosen = port != 0 or unix_socket  # by the caller, who answers for it
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def find() -> RedisServer | ExternalRedis:
        """The server of RATESYNC_TEST_REDIS_URL when that is set, else one of our own, started."""
        given = os.environ.get("RATESYNC_TEST_REDIS_URL")
        return ExternalRedis(given) if given else RedisServer().start()

    # Life cycle -----------------------------------------------------------------------------------

    def start(self) -> RedisServer:
        """Starts the server and returns when it serves its data. Does nothing while it runs.

        Raises:
            RuntimeError: it ended, or did not serve within a minute; the message has its log.
        """
        if self.running:
            return self
        first = self._held is None and not self._chosen
        self._prepare()
        for attempt in range(20):
            try:
                self._launch()
                return self
            except _StartFailure as failure:
                if "Address already in use" not in str(failure) or attempt == 19:
                    raise RuntimeError(f"Redis did not start; its log:\n{failure}") from None
                if first:
                    self._take_port()
                time.sleep(0.1)  # one that was killed a moment ago
        raise AssertionError("not reached")

    def stop(self) -> None:
        """Stops the server as an administrator does; clients see an end of stream."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what a power failure does to clients."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kills and starts; the port stays, the memory is empty unless `persist`."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stops the process without closing anything (SIGSTOP): a host that hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends `pause`."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kills the server and removes its files."""
        atexit.unregister(self.close)
        self.kill()
        self._let_go()
        home, self._home = self._home, None
        if home is not None:
            self._directory = None
            home.close()

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Looking --------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """A connection URL: `redis://`, `rediss://` (it names `ca_file`) or `unix://`."""
        return self.url_for(password=self.password)

    def url_for(self, user: str = "", password: str | None = None, db: int = 0) -> str:
        """The URL with this user, password and database."""
        login = ""
        if password is not None:
            login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        if self._unix:
            return f"unix://{login}{quote(str(self.path))}?db={db}"
        query = "?" + urlencode({"ssl_ca_certs": str(self.ca_file)}) if self._tls else ""
        return f"redis{'s' if self._tls else ''}://{login}{self.host}:{self.port}/{db}{query}"

    @property
    def path(self) -> Path:
        """The Unix socket."""
        return self._where() / "socket"

    @property
    def ca_file(self) -> Path:
        """The authority's certificate."""
        return (self._certificates or self._where()) / "ca.pem"

    @property
    def cert_file(self) -> Path:
        """A client's certificate."""
        return (self._certificates or self._where()) / "client.pem"

    @property
    def key_file(self) -> Path:
        """The client certificate's key."""
        return (self._certificates or self._where()) / "client.key"

    @property
    def running(self) -> bool:
        """Whether the server process lives (also while paused)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the server process; 0 when there is none."""
        return self._process.pid if self._process is not None else 0

    def connect(self, timeout: float = 10.0) -> RespConnection:
        """A connection of the harness's own, as the default user."""
        address: tuple[str, int] | str = str(self.path) if self._unix else (self.host, self.port)
        tls = ssl.create_default_context(cafile=str(self.ca_file)) if self._tls else None
        return RespConnection(address, password=self.password, tls=tls, timeout=timeout)

    def call(self, *arguments: Argument) -> Any:
        """One command on a connection of its own."""
        with self.connect() as connection:
            return connection.call(*arguments)

    def info(self, section: str = "default") -> dict[str, str]:
        """The fields of INFO."""
        lines = self.call("INFO", section).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

    def clean(self) -> None:
        """Empties all databases and forgets the scripts."""
        with self.connect() as connection:
            connection.call("FLUSHALL")
            connection.call("SCRIPT", "FLUSH")

    # Inside ---------------------------------------------------------------------------------------

    def _where(self) -> Path:
        if self._directory is None:
            raise RuntimeError("the Redis server was not started, or is closed")
        return self._directory

    def _prepare(self) -> None:
        if self._directory is None:
            self._home = _Home()
            self._directory = self._home.path
            atexit.register(self.close)
        self._directory.mkdir(exist_ok=True)
        if self._held is None and not self._chosen:
            self._take_port()
        if self._tls and not self.ca_file.exists():
            make_certificates(self._directory)

    def _config(self) -> str:
        home = self._where()
        settings: dict[str, str | int] = {"port": 0, "dir": str(home), "pidfile": str(home / "pid")}
        if self._unix:
            settings["unixsocket"] = str(self.path)
        else:
            settings |= {"bind": self.host, "tls-port" if self._tls else "port": self.port}
        if self._tls:
            settings |= self._tls_settings()
        if self.password is not None:
            secret = quoted(self.password)
            settings |= {"requirepass": secret, "masterauth": secret}
        settings |= self._settings
        lines = [f"{name} {value}" if value != "" else f'{name} ""' for name, value in settings.items()]
        lines += [f"user {name} on {rules}" for name, rules in self._users.items()]
        return "\n".join(lines) + "\n"

    def _tls_settings(self) -> dict[str, str | int]:
        directory = self.ca_file.parent
        files = {"cert-file": "server.pem", "key-file": "server.key", "ca-cert-file": "ca.pem"}
        settings: dict[str, str | int] = {
            f"tls-{name}": str(directory / file) for name, file in files.items()
        }
        return settings | {"tls-auth-clients": "optional", "tls-replication": "yes", "tls-cluster": "yes"}

    def _command(self) -> list[str]:
        path = self._where() / "conf"
        path.write_text(self._config())
        path.chmod(0o600)
        return [str(self.program), str(path)]

    def _launch(self) -> None:
        home = self._where()
        command = self._command()
        with (home / "log").open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(
                command,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us
            )
        deadline = time.monotonic() + 60
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                raise _StartFailure((home / "log").read_bytes()[begin:].decode(errors="replace"))
            time.sleep(0.005)

    def _serves(self) -> bool:
        # Another server may have taken the port before ours: only our own pid counts. INFO is answered also
        # while the data is read from disk or from a primary; a Sentinel has none and says nothing of it.
        try:
            facts = self.info()
            return int(facts["process_id"]) == self.pid and facts.get("loading", "0") == "0"
        except (OSError, RespError, KeyError):
            return False

    def _take_port(self) -> None:
        self._hold_port(bus=self._settings.get("cluster-enabled") == "yes")

    def _signal(self, number: signal.Signals) -> None:
        if self.running and self._process is not None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)  # a paused one would not see SIGTERM
        process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"Redis did not stop within 30 s; its log:\n{self.log()}") from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                (self._where() / "pid").unlink()


class _StartFailure(Exception):
    """The server ended before it was ready; the message is its log."""


def quoted(text: str) -> str:
    """One argument of redis.conf, whatever characters it has."""
    return '"' + "".join(c if c.isalnum() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in text) + '"'


def make_certificates(directory: Path) -> None:
    """An authority (ca.pem), a server (server.pem, for 127.0.0.1 and localhost) and a client (client.pem)."""

    def openssl(*arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"openssl {arguments[0]} failed:\n{done.stderr}")

    if shutil.which("openssl") is None:
        raise RuntimeError("certificates are made by the openssl command: Debian: apt-get install openssl")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", "/CN=tests")
    names = directory / "names"
    names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for who in ("server", "client"):
        openssl("req", "-new", *key, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        authority = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30"]
        openssl("x509", "-req", "-in", f"{who}.csr", *authority, "-out", f"{who}.pem", "-extfile", "names")
