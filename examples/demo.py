"""200 tasks call an HTTP server at exactly the rate that it allows, and never get a 429.

    python examples/demo.py                    # one process, limits in memory
    python examples/demo.py --store postgres   # four processes share one limit through PostgreSQL
    python examples/demo.py --store redis      # the same through Redis

The server is a real one, on localhost, with a limit of its own: RATE requests per second, counted by a
token bucket that forgives JITTER seconds of network and scheduling delay and nothing else. Whatever
comes faster is answered with 429. The callers know one line: `async with acquire("api")`.

Exit status 0: no 429, and at least 90 % of the allowed rate was used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ratesync import acquire, configure_limiter, configure_store, get_store

RATE = 200.0  # requests per second: what the server allows and what the callers are limited to
JITTER = 0.05  # seconds by which a request may reach the server late and the next one in time
SECONDS = 8.0
TASKS = 200


# --- the callers --------------------------------------------------------------------------------------


async def call_for(seconds: float, tasks: int, server: str) -> list[float]:
    """`tasks` tasks that call as often as the limit lets them; returns each call's wait in seconds."""
    waits: list[float] = []
    end = time.monotonic() + seconds

    async def one_task(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            async with acquire("api") as permit:
                waits.append(permit.waited)
                async with session.get(server) as response:
                    await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one_task(session) for _ in range(tasks)))
    return waits


def run_worker(server: str, store_url: str, tasks: int, seconds: float) -> None:
    """One process of callers: configures the limit, waits for the start signal, prints its waits."""
    if store_url.startswith("redis"):
        configure_store("shared", engine="redis", url=store_url)
    elif store_url:
        configure_store("shared", engine="postgres", url=store_url, auto_create=True)
    else:
        configure_store("shared", engine="memory")
    configure_limiter("api", store_id="shared", rate_per_second=RATE, burst=1, fail_closed=True)
    get_store("shared").initialize().wait()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # the demo was ended
    print(json.dumps(asyncio.run(call_for(seconds, tasks, server))), flush=True)


# --- the server -----------------------------------------------------------------------------------------


@dataclass
class Server:
    """Counts, and answers 429 to what exceeds RATE by more than JITTER allows (GCRA, as in ATM's UPC)."""

    ok: int = 0
    refused: int = 0
    first: float = 0.0
    last: float = 0.0
    forgiven: float = 0.0  # the most by which a request came early and was let pass
    _theoretical: float = field(default=0.0, repr=False)

    async def handle(self, request: web.Request) -> web.Response:
        now = time.monotonic()
        self.first = self.first or now
        self._theoretical = self._theoretical or now
        if now < self._theoretical - JITTER:
            self.refused += 1
            return web.Response(status=429, text="slow down\n")
        self.forgiven = max(self.forgiven, self._theoretical - now)
        self._theoretical = max(now, self._theoretical) + 1 / RATE
        self.ok += 1
        self.last = now
        return web.Response(text="ok\n")

    @property
    def rate(self) -> float:
        """Requests per second from the first to the latest one."""
        return (self.ok - 1) / (self.last - self.first) if self.ok > 1 else 0.0

    @contextlib.asynccontextmanager
    async def listening(self):  # type: ignore[no-untyped-def]
        app = web.Application()
        app.router.add_get("/", self.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            yield f"http://{host}:{port}/"
        finally:
            await runner.cleanup()


# --- the show -------------------------------------------------------------------------------------------


async def show(server: Server, console: Console) -> None:
    """Progress until cancelled: live on a terminal, a line per second elsewhere."""
    begin = time.monotonic()

    def view() -> Group:
        passed = min(time.monotonic() - begin, SECONDS)
        status = Text.assemble(
            (f"{server.ok:5d} requests  ", "bold"),
            (f"{server.rate:6.1f}/s of {RATE:.0f}/s  ", "cyan"),
            (f"{server.refused} x 429", "bold red" if server.refused else "green"),
        )
        return Group(ProgressBar(SECONDS, passed, width=60), status)

    if console.is_terminal:
        with Live(view(), console=console, refresh_per_second=10, transient=True) as live:
            while True:
                await asyncio.sleep(0.1)
                live.update(view())
    while True:
        await asyncio.sleep(1)
        console.print(
            f"{time.monotonic() - begin:4.0f} s  {server.ok:5d} requests  {server.rate:6.1f}/s"
            f"  {server.refused} x 429"
        )


@contextlib.contextmanager
def store_for(kind: str, console: Console) -> Iterator[str]:
    """The URL of a server started for the demo, or nothing for the memory store."""
    if kind == "memory":
        yield ""
        return
    if kind == "redis":
        from ratesync.testing import RedisServer

        with RedisServer() as redis:
            console.print("a Redis server was started for the demo")
            yield redis.url
        return
    from ratesync.testing import PostgresServer

    with console.status("starting PostgreSQL"):
        server = PostgresServer().start()
    with server:
        console.print(f"PostgreSQL {server.version} runs on port {server.port}")
        yield server.url()


async def run(kind: str, console: Console) -> int:
    processes = 1 if kind == "memory" else 4
    server = Server()
    with store_for(kind, console) as store_url:
        async with server.listening() as address:
            console.print(
                f"{TASKS} tasks in {processes} process{'es' * (processes > 1)} call {address} "
                f"for {SECONDS:.0f} s\nthe server allows {RATE:.0f} requests/s and forgives "
                f"{JITTER * 1000:.0f} ms of delay on the way (at most {RATE * JITTER + 1:.0f} at once)"
            )
            workers = [
                await asyncio.create_subprocess_exec(
                    *(sys.executable, __file__, "--worker", address, store_url, str(TASKS // processes)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=16 * 1024 * 1024,
                )
                for _ in range(processes)
            ]
            pipes = [(worker.stdin, worker.stdout) for worker in workers if worker.stdin and worker.stdout]
            for _, out in pipes:
                if await out.readline() != b"ready\n":
                    console.print("[red]a worker did not start; see its message above")
                    return 1
            for start, _ in pipes:
                start.write(b"go\n")
            progress = asyncio.create_task(show(server, console))
            results = [await out.readline() for _, out in pipes]
            progress.cancel()
            for worker in workers:
                await worker.wait()
    if not all(results):
        console.print("[red]a worker failed; see its message above")
        return 1
    waits = sorted(wait for line in results for wait in json.loads(line))
    return report(kind, server, waits, console)


def report(kind: str, server: Server, waits: list[float], console: Console) -> int:
    def percentile(share: float) -> str:
        return f"{waits[min(len(waits) - 1, int(len(waits) * share))] * 1000:.0f} ms"

    table = Table(title=f"limit of {RATE:.0f}/s, store: {kind}")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("requests", str(server.ok + server.refused)),
        ("answered 429", str(server.refused)),
        ("configured rate", f"{RATE:.1f}/s"),
        ("achieved rate", f"{server.rate:.1f}/s ({server.rate / RATE:.1%})"),
        ("delay forgiven", f"{server.forgiven * 1000:.0f} ms of {JITTER * 1000:.0f} ms"),
        ("wait p50", percentile(0.5)),
        ("wait p99", percentile(0.99)),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(
        f"(with {TASKS} tasks for {RATE:.0f} calls/s, a call waits {TASKS / RATE:.1f} s for its turn)"
    )
    if server.refused:
        console.print(f"[red]FAILED: {server.refused} requests were answered 429")
    if server.rate < 0.9 * RATE:
        console.print(f"[red]FAILED: {server.rate:.1f}/s is less than 90 % of {RATE:.0f}/s")
    return 1 if server.refused or server.rate < 0.9 * RATE else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="call a rate limited server at its limit, without a 429")
    parser.add_argument("--store", choices=("memory", "postgres", "redis"), default="memory")
    parser.add_argument("--worker", nargs=3, metavar=("SERVER", "STORE_URL", "TASKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        server, store_url, tasks = arguments.worker
        run_worker(server, store_url, int(tasks), SECONDS)
        return 0
    return asyncio.run(run(arguments.store, Console(highlight=False)))


if __name__ == "__main__":
    sys.exit(main())
