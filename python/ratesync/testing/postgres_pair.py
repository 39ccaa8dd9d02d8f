"""A primary with a synchronous standby, to see what a failover leaves of what was acknowledged.

    with PostgresPair() as pair:
        url = pair.create_database()       # names both hosts
        pair.kill_primary()
        pair.promote()

A commit is acknowledged once the standby has it on disk (`synchronous_commit = on`); with
`synchronous=False` the primary does not wait, and what it acknowledged last may be lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from ratesync.testing.postgres import PostgresServer, _Databases

__all__ = ["PostgresPair"]


class PostgresPair(_Databases):
    """A primary and its hot standby, both our own, with URLs that lead to whoever is the primary.

    Args:
        synchronous: the primary waits for the standby with every commit.
        durable: False turns fsync off on both, for tests that kill processes but do not pull the plug.
        settings: further server settings of both, as in postgresql.conf.

    Example:
        >>> with PostgresPair() as pair:              # doctest: +SKIP
        ...     url = pair.create_database()
        ...     pair.kill_primary()
        ...     pair.promote()
    """

    owned = True

    def __init__(
        self,
        *,
        synchronous: bool = True,
        durable: bool = False,
        settings: Mapping[str, str | int] | None = None,
    ) -> None:
        self.synchronous = synchronous
        # A server that is not durable would not wait for anything, the standby included.
        commit = {"synchronous_commit": "on"} if synchronous else {}
        self.primary = PostgresServer(durable=durable, settings={**commit, **(settings or {})})
        self.standby: PostgresServer | None = None
        self.promoted = False

    def start(self) -> PostgresPair:
        """Starts both, and returns when the standby follows (and is waited for)."""
        if self.standby is not None:
            return self
        self.primary.start()
        # Waiting for a standby that is not there yet would never end, so it is asked for afterwards.
        self.standby = self.primary.standby()
        if self.synchronous:
            self.primary.execute(
                "ALTER SYSTEM SET synchronous_standby_names = '*'",
                "SELECT pg_reload_conf()",
            )
        self._wait("the standby follows", self._follows)
        return self

    def url(self, database: str | None = None) -> str:
        """A URL of both hosts; only the one that accepts writes is used."""
        if self.standby is None:
            raise RuntimeError("the pair was not started, or is closed")
        one, other = urlsplit(self.primary.url(database)), urlsplit(self.standby.url(database))
        user, _, host = one.netloc.rpartition("@")
        hosts = f"{host},{other.netloc.rpartition('@')[2]}"
        return f"postgresql://{user}@{hosts}{one.path}?target_session_attrs=read-write"

    def kill_primary(self) -> None:
        """SIGKILL to the primary and all its processes; it stays away."""
        self.primary.kill()

    def promote(self) -> None:
        """Makes the standby the primary, with all that it received, and returns when it accepts writes."""
        if self.standby is None:
            raise RuntimeError("the pair was not started, or is closed")
        self.standby.promote()
        self.promoted = True

    def close(self) -> None:
        """Stops both and removes their files."""
        if self.standby is not None:
            self.standby.close()
            self.standby = None
        self.primary.close()

    def __enter__(self) -> PostgresPair:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self.close()

    def log(self, lines: int = 40) -> str:
        """The ends of both logs."""
        servers = {"primary": self.primary, "standby": self.standby}
        return "\n".join(f"--- {name}\n{server.log(lines)}" for name, server in servers.items() if server)

    def _follows(self) -> bool:
        wanted = "sync" if self.synchronous else "async"
        rows = self.primary.execute("SELECT state, sync_state FROM pg_stat_replication")
        return [tuple(row) for row in rows] == [("streaming", wanted)]

    def _wait(self, what: str, ready: object) -> None:
        assert callable(ready)
        end = time.monotonic() + 60
        while not ready():
            if time.monotonic() > end:
                raise RuntimeError(f"waited 60 s until {what}; the logs:\n{self.log()}")
            time.sleep(0.02)
