"""The TCP proxy of ratesync.testing, against an echo server; every command, and back to normal."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from ratesync.testing import TcpProxy


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    listener = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with TcpProxy("127.0.0.1", listener.getsockname()[1]) as proxy:
        yield proxy
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def works(sock: socket.socket, text: bytes = b"hello") -> bool:
    sock.sendall(text)
    got = b""
    while len(got) < len(text):
        got += sock.recv(65536)
    return got == text


def nothing_comes(sock: socket.socket) -> bool:
    sock.settimeout(0.05)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(10)
    return False


def test_bytes_pass_unchanged(proxy: TcpProxy) -> None:
    with connect(proxy) as sock:
        assert works(sock, bytes(range(256)) * 4000)
        assert (proxy.connections, proxy.accepted) == (1, 1)


def test_cut_resets_what_is_open_and_new_connections_work(proxy: TcpProxy) -> None:
    with connect(proxy) as old:
        assert works(old)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            old.recv(1)
    with connect(proxy) as new:
        assert works(new)


@pytest.mark.parametrize("direction", [None, "requests", "replies"])
def test_stall_holds_bytes_back_and_resume_delivers_them(proxy: TcpProxy, direction: str | None) -> None:
    with connect(proxy) as sock:
        assert works(sock)
        proxy.stall(direction)  # type: ignore[arg-type]
        sock.sendall(b"later")
        assert nothing_comes(sock)
        proxy.resume()
        assert sock.recv(5, socket.MSG_WAITALL) == b"later"


def test_a_stall_concerns_new_connections_too(proxy: TcpProxy) -> None:
    proxy.stall()
    with connect(proxy) as sock:
        sock.sendall(b"later")
        assert nothing_comes(sock)
        proxy.resume()
        assert sock.recv(5, socket.MSG_WAITALL) == b"later"


def test_a_delay_is_latency_in_each_chosen_direction(proxy: TcpProxy) -> None:
    loop = asyncio.new_event_loop()
    with connect(proxy) as sock:
        proxy.delay(0.05, "replies")
        begin = loop.time()
        assert works(sock)
        assert loop.time() - begin >= 0.045
        proxy.delay(0.0)
        assert works(sock)
    loop.close()


def test_dropped_connections_end_at_once_and_old_ones_go_on(proxy: TcpProxy) -> None:
    with connect(proxy) as old:
        assert works(old)
        proxy.drop_new()
        with connect(proxy) as new, contextlib.suppress(ConnectionResetError):
            assert new.recv(1) == b""
        assert works(old)
        proxy.resume()
        with connect(proxy) as new:
            assert works(new)


def test_refused_connections_are_refused_until_resumed_on_the_same_port(proxy: TcpProxy) -> None:
    proxy.refuse_new()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.resume()
    with connect(proxy) as sock:
        assert works(sock)


def test_a_server_that_is_away_ends_the_clients_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with TcpProxy("127.0.0.1", port) as proxy, connect(proxy) as sock:
        assert sock.recv(1) == b""


def test_through_keeps_everything_of_a_url_but_host_and_port(proxy: TcpProxy) -> None:
    url = proxy.through("postgresql://u:p%40@db.example:5433/app?sslmode=disable")
    assert url == f"postgresql://u:p%40@127.0.0.1:{proxy.port}/app?sslmode=disable"


def test_closing_ends_connections_and_the_thread(proxy: TcpProxy) -> None:
    with connect(proxy) as sock:
        assert works(sock)
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert "ratesync-proxy" not in [thread.name for thread in threading.enumerate()]
