"""The other process of a probe: takes units when it is asked to, or holds a slot and computes."""

from __future__ import annotations

import asyncio
import sys
import time

from benchmarks.lawful.contenders import everybody


async def main(action: str, contender_name: str, url: str, name: str, *numbers: str) -> None:
    contender = next(found for found in everybody() if found.name == contender_name)
    if action == "take":
        assert contender.take
        take = await contender.take(url, name, int(numbers[0]), float(numbers[1]), int(numbers[2]))
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            passed = 0
            for _ in range(int(line)):
                passed += await take()
            print(passed, flush=True)
    else:
        assert contender.slot
        slot = await contender.slot(url, name, int(numbers[0]), float(numbers[1]), 1.0)
        async with slot():
            print("held", flush=True)
            end = time.monotonic() + 30
            while time.monotonic() < end:  # busy: no event loop turns while it computes
                pass


asyncio.run(main(*sys.argv[1:]))
