"""Load from asyncio: tasks that repeat an operation, and what they reached."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class Load:
    """What a load reached: operations per second, and the latency of those that were watched, in seconds."""

    def __init__(self, rate: float, p50: float, p99: float, operations: int) -> None:
        self.rate = rate
        self.p50 = p50
        self.p99 = p99
        self.operations = operations


async def drive(operation: Callable[[int], Awaitable[object]], tasks: int, seconds: float) -> Load:
    """`tasks` tasks repeat `operation(serial number)` for `seconds`. One task of ten watches the clock."""
    stop = False
    done = 0
    serial = 0
    latencies: list[int] = []
    clock = time.perf_counter_ns

    async def blind() -> None:
        nonlocal done, serial
        while not stop:
            serial += 1
            await operation(serial)
            done += 1

    async def watching() -> None:
        nonlocal done, serial
        while not stop:
            serial += 1
            begin = clock()
            await operation(serial)
            latencies.append(clock() - begin)
            done += 1

    def end() -> None:
        nonlocal stop
        stop = True

    asyncio.get_running_loop().call_later(seconds, end)
    begin = clock()
    await asyncio.gather(*((blind if number % 10 else watching)() for number in range(tasks)))
    elapsed = (clock() - begin) / 1e9
    latencies.sort()
    last = len(latencies) - 1
    return Load(
        done / elapsed, latencies[last // 2] / 1e9, latencies[last - len(latencies) // 100] / 1e9, done
    )
