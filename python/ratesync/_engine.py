"""The process's default engine, and the only module that imports the compiled core.

The engine is made at first use, made anew after `shutdown()` and in a forked child, and stopped at
exit. Whoever keeps objects of an engine registers with `on_drop`, to forget them when it goes. One
lock, `lock`, guards the engine and the registry; it is held across fork so that the child never
inherits it in the hands of a thread that does not exist there.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from ratesync import _core, errors
from ratesync._core import (
    HAS_POSTGRES,
    HAS_REDIS,
    KEEP,
    Engine,
    KeepType,
    Kept,
    Lease,
    Limiter,
    Permit,
    acquire,
    acquire_limits,
    attempt,
    bound_limiters,
    compiled,
)
from ratesync._core import Lock as CoreLock
from ratesync._core import Pending as CorePending
from ratesync._core import State as CoreState
from ratesync._core import Store as CoreStore

__all__ = [
    "HAS_POSTGRES",
    "HAS_REDIS",
    "KEEP",
    "CoreLock",
    "CorePending",
    "CoreState",
    "CoreStore",
    "Engine",
    "KeepType",
    "Kept",
    "Lease",
    "Limiter",
    "Permit",
    "acquire",
    "acquire_limits",
    "attempt",
    "bound_limiters",
    "compiled",
    "default_engine",
    "install",
    "lock",
    "on_drop",
    "shutdown",
    "use_engine",
]

log = logging.getLogger("ratesync")
lock = threading.RLock()

_engine: Engine | None = None
_exiting = False
_on_drop: list[Callable[[], None]] = []
_hooks: dict[str, Any] = {}


def default_engine() -> Engine:
    """The engine of this process, made when there is none. Raises StoreClosedError during exit."""
    global _engine
    with lock:
        if _exiting:
            raise errors.StoreClosedError(
                "the interpreter is exiting and ratesync was shut down: finish or join the work that uses "
                "limiters before the main thread ends"
            )
        if _engine is None:
            _engine = Engine()
        return _engine


def use_engine(engine: Engine) -> None:
    """Makes `engine` the default one, for tests with a manual clock. The present one is shut down."""
    global _engine
    shutdown()
    with lock:
        _engine = engine


def on_drop(forget: Callable[[], None]) -> None:
    """Registers what has to be forgotten when the engine goes (shutdown, fork). Called with `lock` held."""
    _on_drop.append(forget)


def shutdown() -> None:
    """Stops the default engine: waiting calls end with StoreClosedError, connections are closed.

    Configured stores and limiters stay configured: the next use by name starts a fresh engine. Limiter
    objects and permits obtained before belong to the stopped engine; get them again. Slots still held
    are given back by expiry. Blocks until the I/O thread has ended. Calling it twice is fine.

    Example:
        >>> import ratesync
        >>> ratesync.shutdown()
    """
    engine = _drop()
    if engine is not None:
        engine.shutdown()  # outside the lock: it waits for the I/O thread


def install(resolve: Callable[[str], Limiter | tuple[Limiter, str]]) -> None:
    """Connects the core with the registry (`resolve`) and with the exceptions."""
    _hooks.update(
        resolve=resolve,
        status_error=errors.from_status,
        denied_error=errors.from_denial,
        invalid_error=errors.from_invalid,
        log=_log,
        stale_error=errors.StaleVersionError,
        counter_error=errors.from_counter,
        rolled_back=errors.RolledBackError,
        lock_timeout=errors.LockTimeoutError,
        lock_lost=errors.LockLostError,
    )
    _core.set_hooks(**_hooks)


def install_records(
    versioned: Callable[[Any, int, int], Any], due: Callable[[str, str, int, int], Any]
) -> None:
    """Tells the core what to make of values with their versions, and of timeouts that are due."""
    _hooks.update(versioned=versioned, due=due)
    if "resolve" in _hooks:
        _core.set_hooks(**_hooks)


def _drop() -> Engine | None:
    global _engine
    with lock:
        engine, _engine = _engine, None
        bound_limiters().clear()
        for forget in _on_drop:
            forget()
        return engine


_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def _log(level: str, message: str) -> None:
    log.log(_LEVELS.get(level, logging.WARNING), "%s", message)


def _at_exit() -> None:
    global _exiting
    _exiting = True
    shutdown()


def _after_fork_in_child() -> None:
    # The inherited engine has no I/O thread here. The core leaks it on purpose; only forget it.
    try:
        _drop()
    finally:
        lock.release()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=_after_fork_in_child
    )
