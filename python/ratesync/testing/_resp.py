"""A few commands on a Redis server, for the harness itself: blocking, standard library only.

Independent of the product's own client, and of any other, so that starting servers needs no package.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any, BinaryIO

Argument = str | bytes | int | float


class RespError(RuntimeError):
    """The server's error reply."""


class RespConnection:
    """One connection. Statuses and bulk strings come as str, undecodable bytes escaped; nil is None."""

    def __init__(
        self,
        address: tuple[str, int] | str,
        *,
        user: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = 10.0,
    ) -> None:
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(timeout)
        else:
            self._socket = socket.create_connection(address, timeout)
        try:
            if isinstance(address, str):
                self._socket.connect(address)
            elif tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=address[0])
            self._reader: BinaryIO = self._socket.makefile("rb")
            if password is not None:
                self.call("AUTH", *([user] if user else []), password)
        except BaseException:
            self.close()
            raise

    def call(self, *arguments: Argument) -> Any:
        """Sends one command and returns its reply.

        Raises:
            RespError: the server refused it.
            OSError: the server is away.
        """
        parts = [part if isinstance(part, bytes) else str(part).encode() for part in arguments]
        head = b"*%d\r\n" % len(parts)
        self._socket.sendall(head + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        reply = self._read()
        if isinstance(reply, RespError):
            raise reply
        return reply

    def _line(self) -> bytes:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the Redis server closed the connection")
        return line[:-2]

    def _read(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            return RespError(rest.decode(errors="replace"))
        if kind == b":":
            return int(rest)
        size = int(rest)
        if size < 0:
            return None
        if kind == b"*":
            return [self._read() for _ in range(size)]
        data = self._reader.read(size + 2)
        if len(data) != size + 2:
            raise ConnectionError("the Redis server closed the connection")
        return data[:-2].decode(errors="surrogateescape")

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError, AttributeError):
            self._reader.close()
        self._socket.close()

    def __enter__(self) -> RespConnection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
