"""What the servers of the test kit share: a free port, and the log that a server writes."""

from __future__ import annotations

import socket
from pathlib import Path


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
