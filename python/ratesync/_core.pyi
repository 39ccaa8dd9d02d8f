"""The compiled engine. Only `ratesync._engine` imports this module."""

from collections.abc import Callable, Generator, Iterable
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar, final, overload

T = TypeVar("T")
Ttl = float | timedelta | None  # seconds

HAS_POSTGRES: bool
HAS_REDIS: bool

class Pending(Generic[T]):
    """One call: `await` it in asyncio, or `wait()` in a plain thread; either starts it."""

    def __await__(self) -> Generator[Any, Any, T]: ...
    def wait(self) -> T: ...
    # The coroutine protocol: with it asyncio.create_task() and asyncio.run() take a Pending.
    def send(self, value: Any, /) -> Any: ...
    def throw(self, *exc: Any) -> Any: ...
    def close(self) -> None: ...

@final
class Engine:
    """One I/O thread with its stores."""

    def __init__(self, *, manual_clock: bool = False) -> None: ...
    def add_store(self, store_id: str, engine: str, options: dict[str, Any]) -> Store: ...
    def advance(self, seconds: float) -> None: ...
    def step(self, to_ns: int, idle: bool) -> int | None: ...  # the next timer's moment
    def now_ns(self) -> int: ...
    def now(self) -> float: ...
    def shutdown(self) -> None: ...

@final
class Store:
    """One configured backend of an engine."""

    @property
    def store_id(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def capabilities(self) -> dict[str, Any]: ...
    def initialize(self) -> Pending[None]: ...
    def migrate(self, dry_run: bool) -> Pending[list[dict[str, Any]]]: ...  # number, name, sql, applied
    def migrate_state(self, prefix: str, dry_run: bool) -> Pending[list[dict[str, Any]]]: ...
    def doctor(self) -> Pending[list[dict[str, str]]]: ...  # level ("ok"|"warning"|"error"), subject, message
    # namespace, tenant, name, token, holder, held_for, expires_in (seconds), waiters (processes)
    def locks(self, prefix: str, limit: int) -> Pending[list[dict[str, Any]]]: ...
    # token 0: whoever holds it; True: it was held until now
    def break_lock(
        self, prefix: str, namespace: str, tenant: str, name: str, token: int
    ) -> Pending[bool]: ...
    def stats(self) -> Pending[dict[str, int]]: ...
    def close(self) -> Pending[None]: ...
    # Last: behind it, `list` is no type any more.
    def list(self, limit: int) -> Pending[dict[str, Any]]: ...  # groups, holders, truncated

class Limiter:
    """Base of `ratesync.RateLimiter`: the hot path."""

    def __init__(
        self,
        store: Store,
        group_id: str,
        *,
        algorithm: str = "token_bucket",
        rate_per_second: float | None = None,
        burst: int = 1,
        limit: int | None = None,
        window_seconds: float | None = None,
        max_concurrent: int | None = None,
        timeout: float | None = None,
        fail_closed: bool = False,
        outage_budget: float = 0.25,
        lease_seconds: float = 30.0,
        max_hold_seconds: float | None = None,
        timing_margin_ms: float = 10.0,
    ) -> None: ...
    def acquire_context(
        self, timeout: float | None = ..., *, cost: int = 1, key: str | None = None
    ) -> Permit: ...
    def _try(self, timeout: float, cost: int, key: str | None) -> Pending[bool]: ...
    def _acquire_bare(self, timeout: float | None, cost: int, key: str | None) -> Pending[None]: ...
    def _release_bare(self) -> bool: ...
    def _peek(
        self, key: str | None
    ) -> Pending[dict[str, Any]]: ...  # available, in_use, retry_after, full_after, used
    def _reset(self, key: str | None) -> Pending[None]: ...
    def _adopt(self, fresh: Limiter, /) -> None: ...  # stand on its store from now on
    def _forget(self) -> None: ...  # reset at once, on the memory store, while nobody uses the group
    def _counters(self) -> dict[str, Any]: ...  # as counters_dict() in module.cc names them
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...

@final
class Permit:
    """One acquisition: context manager, awaitable, and the permit that it yields."""

    @property
    def waited(self) -> float: ...
    @property
    def remaining(self) -> int: ...
    @property
    def reset_after(self) -> float | None: ...
    @property
    def passed_open(self) -> bool: ...
    @property
    def lost(self) -> bool: ...
    @property
    def limiter_id(self) -> str: ...
    def settle(self, actual_cost: int) -> Pending[None]: ...
    def _parts(self) -> list[tuple[bool, int, float | None]] | None: ...  # granted, remaining, reset_after
    def release(self) -> None: ...
    def __await__(self) -> Generator[Any, None, Permit]: ...
    async def __aenter__(self) -> Permit: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def __enter__(self) -> Permit: ...
    def __exit__(self, *exc: object) -> None: ...

@overload
def acquire(
    limiter_id: str, timeout: float | None = None, *, cost: int = 1, key: str | None = None
) -> Permit: ...
@overload
def acquire(limiter_id: str, /, *more: str, timeout: float | None = None, cost: int = 1) -> Permit: ...
@overload
def acquire(first: str, second: str, timeout: float | None, /, *, cost: int = 1) -> Permit: ...
@overload
def acquire(first: str, second: str, third: str, timeout: float | None, /, *, cost: int = 1) -> Permit: ...
@overload
def acquire(
    first: str, second: str, third: str, fourth: str, timeout: float | None, /, *, cost: int = 1
) -> Permit: ...
def acquire_limits(limits: list[tuple[Limiter, str | None]], timeout: float | None, /) -> Permit: ...
def attempt(permit: Permit, /) -> Pending[bool]: ...  # starts the permit's acquisition; slots stay bare

@final
class KeepType: ...

KEEP: KeepType

C = TypeVar("C", bound=type)

def compiled(cls: C) -> C: ...  # the base's compiled methods, with the documentation in the class

class State:
    """Base of `ratesync.State`: the hot path. Each method checks what it is given and makes a Pending."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        *,
        namespace: str,
        tenant: str,
        kind: str,
        timeout: float | None,
        encode: Callable[[Any], str | bytes] | None = None,  # value -> JSON text; absent: str, bytes, int
        decode: Callable[[str], Any] | None = None,
    ) -> None: ...
    def check_and_set(
        self, key: str, value: Any = "1", ttl: Ttl = None, *, kind: str | None = None
    ) -> Pending[bool]: ...
    def get(self, key: str, *, kind: str | None = None) -> Pending[Any]: ...
    def get_versioned(self, key: str, *, kind: str | None = None) -> Pending[Any]: ...
    def set(self, key: str, value: Any, ttl: Ttl = None, *, kind: str | None = None) -> Pending[int]: ...
    def delete(self, key: str, expected: int | None = None, *, kind: str | None = None) -> Pending[bool]: ...
    def increment(
        self, key: str, delta: int = 1, ttl: Ttl = None, renew: bool = False, *, kind: str | None = None
    ) -> Pending[int]: ...
    def compare_and_swap(
        self,
        key: str,
        *,
        expected: int,
        value: Any,
        ttl: Ttl | KeepType = KEEP,
        kind: str | None = None,
    ) -> Pending[int]: ...
    def touch(
        self, key: str, ttl: Ttl, *, expected: int | None = None, kind: str | None = None
    ) -> Pending[bool]: ...
    def schedule(
        self, key: str, at: datetime | timedelta | float, *, kind: str | None = None
    ) -> Pending[None]: ...
    def unschedule(self, key: str, *, claim: int | None = None, kind: str | None = None) -> Pending[bool]: ...
    def many(self, ops: Iterable[Any], *, atomic: bool = False) -> Pending[list[Any]]: ...  # ratesync.ops.Op
    def claim_due(
        self, limit: int = 100, lease: float | timedelta = 60, *, kind: str | None = None
    ) -> Pending[list[Any]]: ...
    def initialize(self) -> Pending[None]: ...
    def purge(self, limit: int = 10_000) -> Pending[int]: ...
    def _scan(
        self, kind: str | None, prefix: str, cursor: str, page_size: int
    ) -> Pending[tuple[list[tuple[str, Any, int, int]], str]]: ...  # key, value, version, expires ms or 0
    def _begin(
        self, key: str, value: Any, ttl: Ttl, kind: str | None
    ) -> Pending[tuple[bool, int, Any]]: ...  # created, version, value of the row found
    def _finish(
        self, key: str, value: Any, version: int, ttl: Ttl | KeepType, kind: str | None
    ) -> Pending[tuple[bool, int]]: ...  # done, version found
    def _keep(
        self, key: str, version: int, ttl: Ttl, kind: str | None, age: float = 0.0, /
    ) -> Kept: ...  # touched at a third of the ttl; age: seconds since the row was asked for
    def _bell(
        self, key: str, kind: str, seen: int, timeout: float, /
    ) -> Pending[int]: ...  # of when to look again; the result is the next `seen`, 0 is the first
    def _ring(self, key: str, kind: str, /) -> None: ...  # whoever waits for the key looks now
    # A subclass may have `_renew(self) -> State`: in a forked child, what to stand on from now on.

@final
class Kept:
    """A row of the state that is kept alive for its writer, until stop() or until it is collected."""

    @property
    def lost(self) -> bool: ...
    def stop(self) -> None: ...
    def lost_signal(self) -> Pending[bool]: ...  # True: lost, False: stopped

class Lock:
    """Base of `ratesync.Lock`: the hot path."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        namespace: str,
        tenant: str,
        name: str,
        *,
        ttl: float | timedelta = 30.0,
        timeout: float | None = None,
        auto_renew: bool = True,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    # What is not given is as the lock was made; None: somebody else held it until the timeout.
    def acquire(
        self, ttl: float | timedelta = ..., timeout: float | None = ..., auto_renew: bool = ...
    ) -> Pending[Lease | None]: ...
    # Not in time: LockTimeoutError. Left without an exception, but lost meanwhile: LockLostError.
    async def __aenter__(self) -> Lease: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def __enter__(self) -> Lease: ...
    def __exit__(self, *exc: object) -> None: ...
    # A subclass may have `_renew(self) -> Lock`: in a forked child, what to stand on from now on.

@final
class Lease:
    """A lock that is held, until it is released or lost."""

    @property
    def name(self) -> str: ...
    @property
    def token(self) -> int: ...
    @property
    def lost(self) -> bool: ...
    @property
    def held(self) -> bool: ...
    @property
    def remaining(self) -> float: ...  # seconds, by this machine's clock
    @property
    def ttl(self) -> float: ...
    # Given back at the end of the body, as a lock is. Lost: LockLostError; released: RuntimeError.
    async def __aenter__(self) -> Lease: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def __enter__(self) -> Lease: ...
    def __exit__(self, *exc: object) -> None: ...
    def extend(self, ttl: float | timedelta, /) -> Pending[None]: ...  # LockLostError
    def release(self) -> Pending[bool]: ...  # whether it was held until now
    def lost_signal(self) -> Pending[bool]: ...  # True: lost, False: released

def set_hooks(
    *,
    # name -> limiter, or (limiter, key) for `name:key`; raises LimiterNotFoundError
    resolve: Callable[[str], Limiter | tuple[Limiter, str]],
    status_error: Callable[[str, str, str, str], BaseException],  # code, message, sqlstate, store id
    denied_error: Callable[[str, str, float], BaseException],  # group, rate|concurrency|outage: text, seconds
    invalid_error: Callable[[str, str, str, str], BaseException],  # message, field, expected, received
    log: Callable[[str, str], None],  # level, message
    stale_error: Callable[[int, int], BaseException] | None = None,  # expected, actual
    counter_error: Callable[[str, str], BaseException] | None = None,  # not_integer|overflow, key
    rolled_back: Callable[[list[Any]], BaseException] | None = None,  # outcomes of many(atomic=True)
    versioned: Callable[[Any, int, int], Any] | None = None,  # value, version, ms since 1970 or 0: never
    due: Callable[[str, str, int, int], Any] | None = None,  # key, kind, ms since 1970, claim
    lock_timeout: Callable[[str, float, str | None, float | None], BaseException]
    | None = None,  # name, timeout, holder, its remaining seconds
    lock_lost: Callable[[str, int], BaseException] | None = None,  # name, token
) -> None: ...
def bound_limiters() -> dict[str, Limiter]: ...  # the live name table that acquire() looks in first
def forked() -> bool: ...  # whether this process was forked since the module was loaded
