"""`ratesync simulate`: what a configuration would have done with a recorded trace.

The engine itself decides, on its memory store, with a clock that is moved by hand from event to event: the
next request, the end of a request that holds a slot, or a timer of the engine (a slot's time, a
deadline). So every wait is exact to the nanosecond, and a day of traffic takes seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ratesync import Permit, _engine
from ratesync.cli._common import Failure, make_console
from ratesync.cli._trace import Request, read_trace
from ratesync.config import Config, read_config
from ratesync.engines.memory import MemoryRateLimiter
from ratesync.errors import (
    AcquireTimeoutError,
    ConfigValidationError,
    LimiterNotFoundError,
    RateLimiterError,
)
from ratesync.limits import StoreLimiter
from ratesync.stores import Store

__all__ = ["simulate"]

# Turns of the event loop in which tasks that were woken run: one reads the completions, one resumes.
_TURNS = 3


@click.command()
@click.argument("file")
@click.option(
    "--trace", "trace_file", required=True, metavar="CSV", help="Requests: timestamp, limiter[, key, ...]."
)
@click.option("--limiter", metavar="ID", help="The limiter of rows that name none.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def simulate(file: str, trace_file: str, limiter: str | None, as_json: bool) -> None:
    """Say what the configuration FILE would have done with recorded requests.

    The trace is CSV (comma, semicolon or tab) with the columns timestamp, limiter, key, cost, duration and
    timeout; with a header in any order, or without one in this order. Only timestamp and limiter are
    required. Timestamps are ISO 8601 or numbers since the epoch; duration is how long a slot is held and
    timeout how long the caller waits, both in seconds. No store is asked: all limits start unused and are
    kept in memory, as one process would see them.

    \b
    Examples:
      ratesync simulate rate-sync.toml --trace requests.csv
      ratesync simulate new.toml --trace requests.csv --json | jq '.limiters[].refused'
      cut -d' ' -f1 access.log | ratesync simulate new.toml --trace - --limiter api

    Exit status: 1 when the file or a row is not valid (the line names it).
    """
    config = read_config(file)
    requests = _read(trace_file, limiter)
    simulation = _Simulation(config, trace_file)
    asyncio.run(simulation.run(requests))
    report = {
        "trace": {
            "requests": len(requests),
            "from": requests[0].at / 1e9 if requests else None,
            "to": requests[-1].at / 1e9 if requests else None,
        },
        "limiters": {name: tally.report() for name, tally in simulation.tallies.items()},
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _read(name: str, limiter: str | None) -> list[Request]:
    if name == "-":
        import io
        import sys

        return read_trace(io.StringIO(sys.stdin.read(), newline=""), "standard input", limiter)
    try:
        with Path(name).open(encoding="utf-8-sig", newline="") as file:
            return read_trace(file, name, limiter)
    except OSError as error:
        raise Failure(f"{name} cannot be read: {error.strerror or error}") from None


class _Tally:
    """What one limiter did."""

    def __init__(self) -> None:
        self.requests = self.at_once = self.held = self.peak = 0
        self.refused: dict[str, int] = {}
        self.waits: list[float] = []

    def began(self) -> None:
        self.held += 1
        self.peak = max(self.peak, self.held)

    def report(self) -> dict[str, Any]:
        waits = sorted(self.waits)
        return {
            "requests": self.requests,
            "granted_at_once": self.at_once,
            "delayed": len(waits),
            "wait_p50": _percentile(waits, 0.5),
            "wait_p99": _percentile(waits, 0.99),
            "wait_max": waits[-1] if waits else None,
            "refused": dict(sorted(self.refused.items())),
            "peak_concurrency": self.peak,
        }


def _percentile(ordered: list[float], share: float) -> float | None:
    """The nearest-rank percentile."""
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)] if ordered else None


class _Simulation:
    """The limiters of a configuration on an engine of their own, and the events of the trace."""

    def __init__(self, config: Config, trace: str) -> None:
        import msgspec

        self._engine = _engine.Engine(manual_clock=True)
        self._config = config
        self._trace = trace
        self._limiters: dict[str, StoreLimiter] = {}
        self.tallies: dict[str, _Tally] = {}
        stores: dict[str, Store] = {}
        for limiter_id, options in config.limiters.items():
            if options.store not in stores:
                configured = config.stores.get(options.store)
                margin = configured.options.timing_margin if configured is not None else 0.0
                core = self._engine.add_store(options.store, "memory", {})
                stores[options.store] = Store(core, self._engine.now, margin)
            simulated = msgspec.structs.replace(options, max_hold_seconds=None)
            store = stores[options.store]
            self._limiters[limiter_id] = MemoryRateLimiter.on_store(store, limiter_id, simulated)
            self.tallies[limiter_id] = _Tally()
        self._ends: list[tuple[int, int, Permit, _Tally, bool]] = []  # a heap of held slots
        self._ended = 0
        self._order = 0
        self._waiting: set[asyncio.Task[None]] = set()
        self._timer: int | None = None  # the engine's next one, unless `_stale`
        self._stale = False  # the engine's thread has something to do, or it has something to tell
        self._failure: Failure | None = None
        self._now = self._engine.now_ns()

    async def run(self, requests: list[Request]) -> None:
        """Plays the whole trace, and on until nobody waits or holds."""
        try:
            # Calendar windows begin at multiples of their length since the epoch, so the clock is theirs;
            # a trace with small numbers is moved by whole days (its clock cannot go back).
            day = 86_400 * 10**9
            start = requests[0].at if requests else 0
            shift = 0 if start >= self._now else -(-(self._now - start) // day) * day
            for request in requests:
                await self._until(request.at + shift)
                self._start(request)
            while self._waiting or self._ends:
                await self._until(None)
        finally:
            for task in self._waiting:
                task.cancel()
            await asyncio.gather(*self._waiting, return_exceptions=True)
            for _, _, permit, _, _ in self._ends:
                permit.release()
            self._engine.shutdown()

    async def _until(self, target: int | None) -> None:
        """Lets everything happen that happens before `target`, or the next thing when it is None."""
        while True:
            if self._stale:
                await self._settle()
            end = self._ends[0][0] if self._ends else None
            moment = min((at for at in (self._timer, end) if at is not None), default=None)
            if moment is None or (target is not None and moment > target):
                break
            self._move(moment)
            if self._timer is not None and self._timer <= self._now:
                await self._settle()
            while self._ends and self._ends[0][0] <= self._now:
                _, _, permit, tally, waited = heapq.heappop(self._ends)
                self._release(permit, tally, waited)
            if target is None:
                return
        if target is not None:
            self._move(target)

    def _move(self, to: int) -> None:
        """Moves the clock only; what is due by then is fired by `_settle`."""
        self._now = max(self._now, to)
        self._engine.step(self._now, True)

    async def _settle(self) -> None:
        """Lets what was started reach the engine, what is due be fired, and what it answered arrive."""
        while True:
            self._timer = self._engine.step(self._now, False)
            ended = await self._turn()
            if self._failure is not None:
                raise self._failure
            if not ended:
                self._stale = False
                return

    async def _turn(self) -> bool:
        """Runs the tasks that were woken; whether any ended."""
        if not self._waiting:
            return False
        before = self._ended
        while True:
            seen = self._ended
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            if self._ended == seen:
                return seen != before

    def _start(self, request: Request) -> None:
        limiter = self._limiters.get(request.limiter)
        if limiter is None:
            missing = LimiterNotFoundError(request.limiter, self._limiters)
            raise Failure(f"{self._trace}:{request.line}: {missing}") from None
        tally = self.tallies[request.limiter]
        tally.requests += 1
        try:
            permit = limiter.acquire_context(request.timeout, cost=request.cost, key=request.key)
            entering: Any = permit.__aenter__()
        except AcquireTimeoutError as refusal:
            self._refused(tally, refusal)
            return
        except ConfigValidationError as error:
            raise Failure(f"{self._trace}:{request.line}: {error}") from None
        if entering is permit:
            tally.at_once += 1
            self._granted(permit, request, tally, False)
            return
        self._stale = True
        task = asyncio.get_running_loop().create_task(self._wait(entering, permit, request, tally))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _wait(
        self, entering: Coroutine[Any, Any, Permit], permit: Permit, request: Request, tally: _Tally
    ) -> None:
        try:
            await entering
        except AcquireTimeoutError as refusal:
            self._refused(tally, refusal)
        except RateLimiterError as error:
            self._failure = Failure(f"{self._trace}:{request.line}: {error}")
        else:
            if permit.waited > 0:
                tally.waits.append(permit.waited)
            else:
                tally.at_once += 1
            self._granted(permit, request, tally, True)
        finally:
            self._ended += 1

    def _granted(self, permit: Permit, request: Request, tally: _Tally, waited: bool) -> None:
        tally.began()
        if request.duration == 0:
            self._release(permit, tally, waited)
            return
        self._order += 1
        end = self._now + request.duration
        heapq.heappush(self._ends, (end, self._order, permit, tally, waited))

    def _release(self, permit: Permit, tally: _Tally, waited: bool) -> None:
        tally.held -= 1
        permit.release()
        # The slot of one that waited is given back by the engine's thread, which also wakes the next.
        self._stale = self._stale or waited or bool(self._waiting)

    def _refused(self, tally: _Tally, refusal: AcquireTimeoutError) -> None:
        reason = refusal.reason or "timeout"
        tally.refused[reason] = tally.refused.get(reason, 0) + 1


def _print(report: dict[str, Any]) -> None:
    console = make_console()
    trace = report["trace"]
    span = f" over {trace['to'] - trace['from']:.6g} s" if trace["requests"] else ""
    console.print(f"{trace['requests']} requests{span}")
    table = Table(
        "limiter",
        "requests",
        "at once",
        "delayed",
        "wait p50",
        "p99",
        "max",
        "refused: rate",
        "slots",
        "peak",
        box=None,
        pad_edge=False,
    )
    for name, row in report["limiters"].items():
        waits = [row[column] for column in ("wait_p50", "wait_p99", "wait_max")]
        table.add_row(
            escape(name),
            str(row["requests"]),
            str(row["granted_at_once"]),
            str(row["delayed"]),
            *("-" if wait is None else f"{wait:.4g} s" for wait in waits),
            str(row["refused"].get("rate_limited", 0)),
            str(row["refused"].get("concurrency_full", 0)),
            str(row["peak_concurrency"]),
        )
    console.print(table)
