"""`MemoryRateLimiter`: limits of this process."""

from __future__ import annotations

import weakref
from typing import ClassVar, Unpack

from ratesync import _engine
from ratesync.engines._engine_limiter import EngineLimiter, LimiterExtras, new_store
from ratesync.stores import Store

__all__ = ["MemoryRateLimiter"]

# The engine keeps every store as long as it runs; those whose limiter is gone serve the next one.
_free: list[Store] = []
_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _forget_engine() -> None:
    for store in list(_stores):
        store._retire()
    _free.clear()


_engine.on_drop(_forget_engine)


class MemoryRateLimiter(EngineLimiter):
    """A limit that lives in this process, made without configuration.

    Every object has a state of its own, also when another one has the same `group_id`. For a limit that
    several places share by name, use `configure_limiter` and `get_limiter`.

    Args:
        group_id: the name in messages and metrics, 1 to 255 characters.
        rate_per_second: grants per second; excludes limit and window_seconds.
        limit: grants per window.
        window_seconds: length of the window in seconds.
        max_concurrent: slots held at the same time.
        default_timeout: seconds that `acquire` waits at most; None: as long as it takes.
        fail_closed: without effect; this store has no outages.
        **options: `algorithm` (default: `sliding_window` with a limit, else `token_bucket`), `burst`,
            `lease_seconds`, `max_hold_seconds`, `outage_budget`, as in `configure_limiter`.

    Raises:
        ConfigValidationError: names the field and what was expected (also a ValueError).

    Example:
        >>> limiter = MemoryRateLimiter("example", rate_per_second=1.0, burst=2)
        >>> [limiter.try_acquire().wait() for _ in range(3)]
        [True, True, False]
    """

    engine: ClassVar[str] = "memory"

    def __init__(
        self,
        group_id: str,
        rate_per_second: float | None = None,
        limit: int | None = None,
        window_seconds: float | None = None,
        max_concurrent: int | None = None,
        default_timeout: float | None = None,
        fail_closed: bool = False,
        **options: Unpack[LimiterExtras],
    ) -> None:
        self._construct(
            group_id,
            {
                "rate_per_second": rate_per_second,
                "limit": limit,
                "window_seconds": window_seconds,
                "max_concurrent": max_concurrent,
                "default_timeout": default_timeout,
                "fail_closed": fail_closed,
                **options,
            },
        )

    def _open(self, group_id: str) -> Store:
        assert self._config is not None
        with _engine.lock:
            store = None
            while _free and (store is None or store._closed):
                store = _free.pop()
            if store is None or store._closed:
                store = new_store(self.engine, self._config.options)
                _stores.add(store)
        # What an earlier limiter of that name left in it is forgotten.
        _engine.Limiter(store._core, group_id, max_concurrent=1)._forget()
        weakref.finalize(self, _free.append, store).atexit = False
        return store
