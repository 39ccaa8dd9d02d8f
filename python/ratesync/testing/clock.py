"""A clock that stands still until told, for tests of code that waits for a limit of the memory store.

    with ManualClock() as clock:
        task = asyncio.create_task(call_twice_per_minute())
        await clock.run(30)          # half a minute passes now

Inside the block the process's default engine is one with a manual clock; what was configured stays,
what was consumed starts from nothing. Stores on a server keep the server's time: for them only the
waiting in this process follows the manual clock.
"""

from __future__ import annotations

import asyncio

from ratesync import _engine

__all__ = ["ManualClock"]

# Turns of the event loop that run() gives the tasks it woke: one to read the completions, one to
# resume the tasks, the rest for what those tasks start in turn.
_TURNS = 10


class ManualClock:
    """Replaces the default engine by one whose time only `advance` moves."""

    def __init__(self) -> None:
        self._core: _engine.Engine | None = None

    def start(self) -> ManualClock:
        """Stops the default engine and takes its place. Limiter objects obtained before are void."""
        core = _engine.Engine(manual_clock=True)
        _engine.shutdown()
        with _engine.lock:
            _engine._engine = core
        self._core = core
        return self

    def stop(self) -> None:
        """Gives way to an ordinary engine, made at the next use. Ends all waiting calls."""
        if self._core is None:
            return
        self._core = None
        _engine.shutdown()

    @property
    def now(self) -> float:
        """Seconds on the engine's clock; the origin means nothing."""
        return self._running().now()

    def advance(self, seconds: float) -> None:
        """Moves time and fires what became due; tasks see it when their event loop runs next."""
        core = self._running()
        core.advance(0)  # calls made before this one begin to wait at the old time
        core.advance(seconds)

    async def run(self, seconds: float) -> None:
        """Lets tasks reach their waits, moves time, and lets the tasks that it woke run."""
        await self._turns()
        self.advance(seconds)
        await self._turns()

    async def _turns(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def _running(self) -> _engine.Engine:
        if self._core is None:
            raise RuntimeError("the manual clock is not started: use `with ManualClock() as clock:`")
        return self._core

    def __enter__(self) -> ManualClock:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
