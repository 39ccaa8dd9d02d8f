"""A TCP proxy that misbehaves on command, to put between a client and a server in fault tests.

    with TcpProxy("127.0.0.1", server.port) as proxy:
        ...                      # connect to proxy.port
        proxy.stall()            # a network that swallows everything
        proxy.resume()

It lives in a thread with an event loop of its own, so that a test may block or run any loop. All
commands may be called from any thread and have taken effect when they return.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from ratesync.testing._server import HeldPort

__all__ = ["TcpProxy"]

Direction = Literal["requests", "replies"]
_CHUNK = 64 * 1024


class _Gate:
    """How one direction of traffic is treated now."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.delay = 0.0


class _Link:
    """One client's connection, with the one to the server behind it."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.writers = [client]
        self.task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() != -1:
                # Linger 0: the peer gets a reset, as from a host that crashed and came back.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        if self.task is not None:
            self.task.cancel()


class TcpProxy:
    """Forwards a port of its own on 127.0.0.1 to `host:port`, until told otherwise.

    Attributes:
        port: where to connect; the same after `refuse_new()` and `resume()`.
        accepted: connections accepted so far.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.port = 0
        self._held: HeldPort | None = None
        self.accepted = 0
        self._links: set[_Link] = set()
        self._drop_new = False
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ratesync-proxy", daemon=True)

    # Life cycle -----------------------------------------------------------------------------------

    def start(self) -> TcpProxy:
        """Begins to listen."""
        self._held = HeldPort()
        self.port = self._held.number
        self._thread.start()
        self._call(self._open_gates)
        self._wait(self._listen())
        return self

    def close(self) -> None:
        """Ends all connections and the thread."""
        if self._loop.is_closed():
            return
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> TcpProxy:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Commands -------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Resets all connections of this moment; new ones are forwarded."""
        self._call(self._abort_all)

    def stall(self, direction: Direction | None = None) -> None:
        """Holds back all bytes (or only the requests, or only the replies) of old and new connections.

        `stall("replies")`, a request, `cut()`: the request was executed and its answer is lost.
        """

        def apply() -> None:
            for gate in self._chosen(direction):
                gate.open.clear()

        self._call(apply)

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """Lets every byte arrive that much later, in both directions or in one; 0 ends it."""

        def apply() -> None:
            for gate in self._chosen(direction):
                gate.delay = seconds

        self._call(apply)

    def drop_new(self) -> None:
        """Accepts new connections and closes them at once; old ones go on."""
        self._call(lambda: setattr(self, "_drop_new", True))

    def refuse_new(self) -> None:
        """Stops listening, so that new connections are refused; old ones go on."""
        self._wait(self._unlisten())

    def resume(self) -> None:
        """Ends stall, delay, drop_new and refuse_new. What was held back is delivered."""

        def apply() -> None:
            self._drop_new = False
            for gate in (self._requests, self._replies):
                gate.delay = 0.0
                gate.open.set()

        self._call(apply)
        self._wait(self._listen())

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return int(self._call(lambda: len(self._links)))

    def through(self, url: str) -> str:
        """The URL with host and port replaced by the proxy's."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    # Inside: everything below runs on the proxy's loop ----------------------------------------------

    def _call(self, function: Callable[[], Any]) -> Any:
        async def call() -> Any:
            return function()

        return self._wait(call())

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def _open_gates(self) -> None:
        self._requests, self._replies = _Gate(), _Gate()

    def _chosen(self, direction: Direction | None) -> list[_Gate]:
        gates = {"requests": self._requests, "replies": self._replies}
        return list(gates.values()) if direction is None else [gates[direction]]

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)

    async def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    async def _shut(self) -> None:
        await self._unlisten()
        tasks = [link.task for link in self._links if link.task is not None]
        self._abort_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # connection_lost of the aborted transports

    def _abort_all(self) -> None:
        for link in list(self._links):
            link.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._drop_new:
            writer.transport.abort()
            return
        link = _Link(writer)
        link.task = asyncio.current_task()
        self._links.add(link)
        try:
            back_reader, back_writer = await asyncio.open_connection(*self._target)
            link.writers.append(back_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, back_writer, self._requests)),
                asyncio.create_task(self._pump(back_reader, writer, self._replies)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server is away, or we were cut
        finally:
            self._links.discard(link)
            for each in link.writers:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: _Gate) -> None:
        """Reading does not wait for delivery, so that a delay is latency and does not cost throughput."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await gate.open.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        delivery = asyncio.create_task(deliver())
        try:
            data = b"-"
            while data:
                data = await reader.read(_CHUNK)
                await queue.put((loop.time() + gate.delay, data))
            await delivery
        except OSError:
            pass
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)
