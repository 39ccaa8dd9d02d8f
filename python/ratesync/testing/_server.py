"""What the servers of the test kit share: a port that stays theirs, and the log that a server writes."""

from __future__ import annotations

import contextlib
import functools
import socket
from pathlib import Path

_HOST = "127.0.0.1"


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_HOST, port))
    except BaseException:
        sock.close()
        raise
    return sock


@functools.cache
def _can_be_held() -> bool:
    """Whether a server can listen on a port that another socket is bound to (Linux: yes)."""
    try:
        with _bound(0) as held, _bound(held.getsockname()[1]) as server:
            server.listen()
            return True
    except OSError:
        return False


class HeldPort:
    """A free port of 127.0.0.1 that nobody else gets until `close()`, also while its server is down.

    A socket is bound to it that never listens. The system gives such a port to nobody who asks for a free
    one and to no outgoing connection; a server that sets SO_REUSEADDR, as all do, may listen on it all the
    same. Where the system does not allow that, the port was free at the moment of choice, and no more.

    Args:
        bus: the port 10,000 higher is held too: a Redis Cluster's node listens there for the others.
    """

    def __init__(self, *, bus: bool = False) -> None:
        self._sockets: list[socket.socket] = []
        for _ in range(1000):
            held = _bound(0)
            self.number = int(held.getsockname()[1])
            self._sockets = [held]
            if not bus:
                break
            with contextlib.suppress(OSError, OverflowError):
                self._sockets.append(_bound(self.number + 10_000))
                break
            self.close()
        else:
            raise RuntimeError("no free pair of ports for a Redis Cluster node")
        if not _can_be_held():
            self.close()

    def close(self) -> None:
        """Anybody may have it."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class OwnsPort:
    """A server with a port that stays its own until `_let_go()`."""

    port: int
    _held: HeldPort | None = None

    def _hold_port(self, *, bus: bool = False) -> None:
        self._let_go()
        self._held = HeldPort(bus=bus)
        self.port = self._held.number

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()


class ServerLog:
    """Reads the file `log` in the server's directory."""

    def _where(self) -> Path:
        raise NotImplementedError

    def log(self, lines: int = 40, since: int = 0) -> str:
        """The end of the server's log, of what came after it had `since` bytes."""
        path = self._where() / "log"
        text = path.read_bytes()[since:].decode(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def log_size(self) -> int:
        """Bytes in the server's log, for `log(since=...)`."""
        path = self._where() / "log"
        return path.stat().st_size if path.exists() else 0
