"""`rate_limited`: a limit around every call of a function.

    @rate_limited("api")
    async def fetch(url: str) -> bytes: ...

    @rate_limited(lambda tenant: f"tenant:{tenant}", timeout=2.0)
    def export(tenant: str) -> None: ...

The wrapper is of the kind of what it wraps: coroutine function, plain function, generator or asynchronous
generator, also as method. Only entering the limit may raise its errors or, with mode "try", be answered by
None; what the body raises always passes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from ratesync import _engine, registry
from ratesync.core import RateLimiter
from ratesync.errors import ConfigValidationError, RateLimiterAcquisitionError

__all__ = ["get_limiter", "rate_limited"]

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Limited = str | RateLimiter
Factory = Callable[..., Limited | Awaitable[Limited]]

# Looked up here at each call, so that tests can put another in its place.
get_limiter: Callable[[str], RateLimiter] = registry.get_limiter


class _Wait(Protocol):
    def __call__(self, function: F, /) -> F: ...


class _Try(Protocol):
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R | None]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R | None]: ...


@overload
def rate_limited(
    limiter_or_factory: Limited | Factory, *, timeout: float | None = None, mode: Literal["wait"] = "wait"
) -> _Wait: ...
@overload
def rate_limited(
    limiter_or_factory: Limited | Factory, *, timeout: float | None = None, mode: Literal["try"]
) -> _Try: ...
def rate_limited(
    limiter_or_factory: Limited | Factory,
    *,
    timeout: float | None = None,
    mode: Literal["wait", "try"] = "wait",
) -> Any:
    """Decorates a function so that every call acquires first, and gives a slot back at its end.

    Coroutine functions wait in asyncio. Plain functions block their thread; inside a running event loop a
    call that would have to wait is a RuntimeError. A generator is limited as one call: it acquires when its
    iteration starts, and gives the slot back when it ends or is closed.

    Args:
        limiter_or_factory: the limiter's id, a limiter, or a function that returns one of them. Such a
            factory is called at each call, with those arguments of the call that it names, by name, defaults
            applied; with `**kwargs` it gets all. It may be a coroutine function when the decorated function
            is one.
        timeout: seconds to wait at most, 0 tries once. None: the limiter's default.
        mode: `wait` raises when the limit refuses. `try`, which needs a timeout, returns None instead; it is
            not for generators, where nothing would tell a refusal from an empty iteration.

    Raises:
        ConfigValidationError: at decoration; another mode, `try` without a timeout or on a generator, or a
            bad timeout (also a ValueError).
        TypeError: at decoration; what is decorated or the first argument is of the wrong kind, or the factory
            needs an argument that the function does not have.
        LimiterNotFoundError: at the call; no such limiter.
        AcquireTimeoutError: at the call; the slot would come too late.
        TypeError: at the call; a plain function returned a coroutine, which would run unlimited.
        RuntimeError: at the call; a plain function would have to block a running event loop.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("mail", rate_per_second=0.1)
        >>> @rate_limited("mail", timeout=0, mode="try")
        ... def send(text: str) -> str:
        ...     return f"sent {text}"
        >>> send("one"), send("two")
        ('sent one', None)
    """
    _check(limiter_or_factory, timeout, mode)

    def decorate(function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(decorate(function.__func__))
        if not callable(function) or inspect.isclass(function):
            raise TypeError(
                f"rate_limited() decorates a function, an async function or a generator, not {function!r}"
            )
        return _wrap(function, _Source(limiter_or_factory, function), timeout, mode == "try")

    return decorate


def _check(limiter_or_factory: object, timeout: object, mode: object) -> None:
    where = "rate_limited()"
    if mode not in ("wait", "try"):
        raise ConfigValidationError(f"{where}: mode is not valid", "mode", "'wait' or 'try'", repr(mode)[:80])
    if mode == "try" and timeout is None:
        raise ConfigValidationError(
            f"{where}: mode='try' needs a timeout: seconds to wait before it returns None, 0 for none",
            "timeout",
        )
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0
    ):
        raise ConfigValidationError(
            f"{where}: timeout is not valid",
            "timeout",
            "a number of seconds >= 0, or None",
            repr(timeout)[:80],
        )
    if not isinstance(limiter_or_factory, (str, RateLimiter)) and not callable(limiter_or_factory):
        raise TypeError(
            f"{where} takes the id of a limiter, a limiter, or a function that returns one, "
            f"not {type(limiter_or_factory).__name__}"
        )


_MIXED = "the limiter factory of {0}() is asynchronous and {0}() is not: make both of one kind"

# Which limiter ------------------------------------------------------------------------------------


class _Source:
    """Finds the limiter of one call: a fixed one, or what the factory says about the arguments."""

    def __init__(self, source: Any, function: Callable[..., Any]) -> None:
        self.fixed: Any = None
        self.is_async = False
        if isinstance(source, (str, RateLimiter)):
            self.fixed = source
            return
        self._factory = source
        self.is_async = _is(inspect.iscoroutinefunction, source)
        self._signature = _signature(function)
        self._positional: list[str] = []
        self._named: set[str] = set()
        self._takes_all = False
        self._read(inspect.signature(source).parameters, _name(function))

    def _read(self, parameters: Any, name: str) -> None:
        """Which arguments the factory wants, and whether the function has them."""
        ours = self._signature.parameters
        open_ended = any(own.kind is own.VAR_KEYWORD for own in ours.values())
        for wanted in parameters.values():
            if wanted.kind is wanted.VAR_KEYWORD:
                self._takes_all = True
            elif wanted.kind is not wanted.VAR_POSITIONAL:
                if wanted.name not in ours and wanted.default is wanted.empty and not open_ended:
                    raise TypeError(
                        f"the limiter factory of {name}() needs the argument {wanted.name!r}, which {name}() "
                        "does not have: give it a default, or name an argument of the function"
                    )
                if wanted.kind is wanted.POSITIONAL_ONLY:
                    self._positional.append(wanted.name)
                else:
                    self._named.add(wanted.name)

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """The limiter or its id; of an asynchronous factory, an awaitable of it."""
        if self.fixed is not None:
            return self.fixed
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values: dict[str, Any] = {}
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update(bound.arguments[name])
            else:
                values[name] = bound.arguments[name]
        positional = [values.pop(name) for name in self._positional if name in values]
        if not self._takes_all:
            values = {name: value for name, value in values.items() if name in self._named}
        return self._factory(*positional, **values)


def _context(found: object, timeout: float | None, name: str) -> Any:
    """What is entered around the call, when it can be had without asking; None when it has to be prepared."""
    if isinstance(found, str):
        if get_limiter is registry.get_limiter:
            return _engine.acquire(found, timeout=timeout)
    elif isinstance(found, _engine.Limiter):
        return found.acquire_context(timeout)
    elif not hasattr(found, "acquire_context"):
        raise TypeError(
            f"the limiter factory of {name}() returned {type(found).__name__}: it has to return the id of a "
            "limiter, or a limiter"
        )
    return None


def _context_of_another(found: Any, timeout: float | None) -> tuple[Any, Any]:
    """A limiter that is not ours, or not looked up by us, and its context."""
    limiter = get_limiter(found) if isinstance(found, str) else found
    ours = isinstance(limiter, _engine.Limiter)
    return limiter, limiter.acquire_context(
        timeout=limiter.default_timeout if timeout is None and not ours else timeout
    )


async def _prepare(found: Any, timeout: float | None, name: str) -> Any:
    if inspect.isawaitable(found) and not hasattr(found, "acquire_context"):
        found = await found
    context = _context(found, timeout, name)
    if context is None:
        limiter, context = _context_of_another(found, timeout)
        # Ours connect by themselves, and within the policy for outages.
        if not isinstance(limiter, _engine.Limiter) and not limiter.is_initialized:
            await limiter.initialize()
    return context


def _enter(found: Any, timeout: float | None, name: str) -> Any:
    if not isinstance(found, str) and inspect.isawaitable(found) and not hasattr(found, "acquire_context"):
        if inspect.iscoroutine(found):
            found.close()
        raise TypeError(_MIXED.format(name))
    context = _context(found, timeout, name)
    return context if context is not None else _context_of_another(found, timeout)[1]


class _Blocked:
    """Around a plain function: its limit as a context manager that says what to do inside an event loop."""

    __slots__ = ("_context", "_name")

    def __init__(self, context: Any, name: str) -> None:
        self._context = context
        self._name = name

    def __enter__(self) -> None:
        try:
            self._context.__enter__()
        except RuntimeError as error:
            if type(error) is not RuntimeError or "event loop" not in str(error):
                raise
            raise RuntimeError(
                f"{self._name}() would have to wait for its limit, which would block the running event loop: "
                f"make it a coroutine function (async def), or call it with asyncio.to_thread()"
            ) from error

    def __exit__(self, *exc: object) -> Any:
        return self._context.__exit__(*exc)


# Wrapping -----------------------------------------------------------------------------------------


def _is(kind: Callable[[object], bool], function: Any) -> bool:
    """Whether the function, or the `__call__` of a callable object, is of that kind."""
    return kind(function) or (
        not inspect.isroutine(function)
        and not isinstance(function, functools.partial)
        and kind(getattr(function, "__call__", None))  # noqa: B004 - its kind, not whether there is one
    )


def _signature(function: Any) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError:  # functions written in C may have none: any arguments, and none has a name
        return inspect.signature(lambda *args, **kwargs: None)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


def _wrap(function: Any, source: _Source, timeout: float | None, gives_none: bool) -> Any:
    is_async_generator = _is(inspect.isasyncgenfunction, function)
    if gives_none and (is_async_generator or _is(inspect.isgeneratorfunction, function)):
        raise ConfigValidationError(
            f"rate_limited(): mode='try' is not for generators such as {_name(function)}(): nothing would "
            "tell a refusal from an empty iteration; use mode='wait' and catch AcquireTimeoutError",
            "mode",
        )
    wrapper: Any
    if _is(inspect.iscoroutinefunction, function):
        wrapper = _coroutine_function(function, source, timeout, gives_none)
    elif is_async_generator:
        wrapper = _async_generator(function, source, timeout)
    elif source.is_async:
        raise TypeError(_MIXED.format(_name(function)))
    elif _is(inspect.isgeneratorfunction, function):
        wrapper = _generator(function, source, timeout)
    else:
        wrapper = _plain_function(function, source, timeout, gives_none)
    functools.update_wrapper(wrapper, function)
    try:  # frameworks read the annotations, whose names this module does not know
        wrapper.__signature__ = inspect.signature(function, eval_str=True)
    except Exception:  # a name that is only known to type checkers, or no signature at all
        wrapper.__signature__ = _signature(function)
    return wrapper


def _coroutine_function(function: Any, source: _Source, timeout: float | None, gives_none: bool) -> Any:
    name = _name(function)

    async def call(*args: Any, **kwargs: Any) -> Any:
        found = source.fixed
        context = None if found is None else _context(found, timeout, name)
        if context is None:
            context = await _prepare(source(args, kwargs), timeout, name)
        entered = False
        try:
            async with context:
                entered = True
                return await function(*args, **kwargs)
        except RateLimiterAcquisitionError:
            if entered or not gives_none:
                raise
            return None

    return call


def _plain_function(function: Any, source: _Source, timeout: float | None, gives_none: bool) -> Any:
    name = _name(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        context = _Blocked(_enter(source(args, kwargs), timeout, name), name)
        entered = False
        try:
            with context:
                entered = True
                result = function(*args, **kwargs)
        except RateLimiterAcquisitionError:
            if entered or not gives_none:
                raise
            return None
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError(
                f"{name}() returned a coroutine that would run after its limit has ended: make {name}() a "
                "coroutine function (async def)"
            )
        return result

    return call


def _generator(function: Any, source: _Source, timeout: float | None) -> Any:
    name = _name(function)

    def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with _Blocked(_enter(source(args, kwargs), timeout, name), name):
            return (yield from function(*args, **kwargs))

    return call


def _async_generator(function: Any, source: _Source, timeout: float | None) -> Any:
    name = _name(function)

    async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        async with await _prepare(source(args, kwargs), timeout, name):
            items = cast("AsyncGenerator[Any, Any]", function(*args, **kwargs))
            try:
                item = await anext(items)
                while True:
                    try:
                        sent = yield item
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        item = await items.athrow(error)
                    else:
                        item = await items.asend(sent)
            except StopAsyncIteration:
                return
            finally:
                await items.aclose()

    return call
