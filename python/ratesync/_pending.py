"""Calls that work in asyncio and in plain threads: `await` them, or `.wait()` for them.

Every operation of ratesync that may have to wait is an ordinary function that returns a `Pending`.
The compiled engine has its own; this module has the type that describes both, and `Script`, which
chains several of them without writing the same code twice. Nothing happens before one is consumed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Generator
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")


class Pending(Protocol[T_co]):
    """One call, not started yet: consuming it starts it. Consume it once, in one of the two ways.

    `await pending` in asyncio (it is also accepted by `asyncio.create_task`, `gather` and
    `wait_for`), or `pending.wait()` in a plain thread, which blocks, lets other threads run, and can
    be interrupted with Ctrl-C.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("pending-doc", rate_per_second=5)
        >>> ratesync.try_acquire("pending-doc").wait()
        True
    """

    def __await__(self) -> Generator[Any, Any, T_co]:
        """Suspends the task until the result is there."""

    def wait(self) -> T_co:
        """Blocks the calling thread until the result is there."""

    def send(self, value: Any, /) -> Any:
        """Part of the coroutine protocol, for `asyncio.create_task`."""

    def throw(self, *exc: Any) -> Any:
        """Part of the coroutine protocol: how a task delivers its cancellation."""

    def close(self) -> None:
        """Part of the coroutine protocol: gives the call up."""


class Script(Generic[T]):
    """A generator of Pendings, run to its return value by `await` or by `wait()`. Starts when consumed."""

    def __init__(self, steps: Generator[Pending[Any], Any, T], name: str) -> None:
        self._steps = steps
        self._name = name
        self._started = False
        self._driver: Generator[Any, Any, T] | None = None

    def _start(self) -> None:
        if self._started:
            raise RuntimeError(f"the result of {self._name}() was already consumed; call it again")
        self._started = True

    def __await__(self) -> Generator[Any, Any, T]:
        self._start()
        return self._drive()

    def _drive(self) -> Generator[Any, Any, T]:
        try:
            pending = next(self._steps)
            while True:
                try:
                    value = yield from pending.__await__()
                except BaseException as error:
                    pending = self._steps.throw(error)
                else:
                    pending = self._steps.send(value)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def wait(self) -> T:
        self._start()
        try:
            pending = next(self._steps)
            while True:
                try:
                    value = pending.wait()
                except BaseException as error:
                    pending = self._steps.throw(error)
                else:
                    pending = self._steps.send(value)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    # The coroutine protocol, so that asyncio.create_task() takes a Script.
    def send(self, value: Any, /) -> Any:
        if self._driver is None:
            self._driver = self.__await__()
        return self._driver.send(value)

    def throw(self, *exc: Any) -> Any:
        if self._driver is None:
            self._driver = self.__await__()
        return self._driver.throw(*exc)

    def close(self) -> None:
        self._started = True
        if self._driver is not None:
            self._driver.close()
        self._steps.close()

    def __del__(self) -> None:
        if not self._started:
            self._started = True
            warnings.warn(
                f"{self._name}() was called but neither awaited nor waited for, so nothing happened",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )


class Done(Generic[T]):
    """A Pending whose result is already there: the call took effect when it was made."""

    def __init__(self, value: T) -> None:
        self._value = value

    def __await__(self) -> Generator[Any, Any, T]:
        return self._value
        yield

    def wait(self) -> T:
        return self._value

    def send(self, value: Any, /) -> Any:
        raise StopIteration(self._value)

    def throw(self, *exc: Any) -> Any:
        error = exc[1] if len(exc) > 1 and exc[1] is not None else exc[0]
        raise error

    def close(self) -> None:
        pass


def script(steps: Callable[P, Generator[Pending[Any], Any, T]]) -> Callable[P, Script[T]]:
    """Decorator: the generator function becomes a function that returns a Pending."""

    @functools.wraps(steps)
    def call(*args: P.args, **kwargs: P.kwargs) -> Script[T]:
        return Script(steps(*args, **kwargs), steps.__name__)

    return call
