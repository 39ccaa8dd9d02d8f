"""A PgBouncer in transaction mode before a test's PostgreSQL server.

Needs Debian's `pgbouncer` (BINARY is None where it is missing). The pooler has three server connections
for everybody, so that sessions are really shared.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ratesync.testing._server import HeldPort

__all__ = ["BINARY", "PgBouncer"]

BINARY = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class PgBouncer:
    """One pooler in front of the server of `url`, in a directory of its own."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._home = Path(tempfile.mkdtemp(prefix="ratesync-bouncer-"))
        self._held = HeldPort()
        self.port = self._held.number
        password = f" password={parts.password}" if parts.password else ""
        (self._home / "ini").write_text(
            f"[databases]\n* = host={parts.hostname} port={parts.port or 5432} user={parts.username}"
            f"{password}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 500\n"
        )
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PgBouncer refuses
            user = pwd.getpwnam("postgres")
            self._identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (self._home, self._home / "ini"):
                os.chown(path, user.pw_uid, user.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        assert BINARY is not None, "pgbouncer is not installed"
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, str(self._home / "ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._identity,
            )
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer did not start; its log:\n{(self._home / 'log').read_text()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Kills it; `start()` brings it back."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Kills it and removes its files."""
        self.stop()
        self._held.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def through(self, url: str) -> str:
        """The URL that goes through the pooler to the same database."""
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{self.port}"))
