"""Every exception of ratesync, in one tree, and the one map from the engine's status codes to it.

Business outcomes (a refused `try_acquire`) are values; an exception is a wait that ran out, a store
that did not answer, or a mistake in the configuration. Messages say what to do next and never carry
a password. All exceptions survive pickling, so they cross process pools.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "AcquireTimeoutError",
    "ConfigFileNotFoundError",
    "ConfigValidationError",
    "CounterOverflowError",
    "IdempotencyError",
    "IdempotencyMismatchError",
    "InDoubtError",
    "InternalError",
    "LeaseLostError",
    "LimiterNotFoundError",
    "LockError",
    "LockLostError",
    "LockTimeoutError",
    "NotAnIntegerError",
    "OperationCancelledError",
    "OperationFailedError",
    "OperationInProgressError",
    "RateLimiterAcquisitionError",
    "RateLimiterAlreadyConfiguredError",
    "RateLimiterError",
    "RateLimiterNotConfiguredError",
    "RateLimiterNotInitializedError",
    "RolledBackError",
    "StaleVersionError",
    "StateError",
    "StoreClosedError",
    "StoreError",
    "StoreExhaustedError",
    "StoreNotFoundError",
    "StoreProtocolError",
    "StoreServerError",
    "StoreTimeoutError",
    "StoreUnavailableError",
]


class RateLimiterError(Exception):
    """Base of everything that ratesync raises on purpose.

    Attributes:
        retryable: the same call may succeed when repeated later, unchanged.
        in_doubt: the store may or may not have executed the call.
        sqlstate: five characters when a PostgreSQL server named one, else None.
        store: id of the store concerned, else None.
    """

    retryable: bool = False
    in_doubt: bool = False
    sqlstate: str | None = None
    store: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the subclass with the finished message as its only argument.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[RateLimiterError], args: tuple[Any, ...], state: dict[str, Any]) -> RateLimiterError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigValidationError(RateLimiterError, ValueError):
    """A configured value, name, file or call argument is not acceptable. Also a ValueError.

    Attributes:
        field: what was wrong, as a dotted path for files (`limiters.api.burst`), else None.
        expected: what would have been acceptable, else None.
        received: what came instead, with secrets masked, else None.
    """

    def __init__(
        self,
        message: str,
        field: str | None = None,
        expected: str | None = None,
        received: object = None,
    ) -> None:
        self.field = field or None
        self.expected = expected or None
        self.received = received
        if field and expected and received not in (None, ""):
            message = f"{message}: expected {expected}, got {received}"
        super().__init__(message)


class ConfigFileNotFoundError(ConfigValidationError, FileNotFoundError):
    """The configuration file that was named does not exist. Also a FileNotFoundError."""

    def __new__(cls, *args: object, **_kwargs: object) -> ConfigFileNotFoundError:
        # By attribute, ValueError's __new__ would come first and refuse an OSError's layout.
        return FileNotFoundError.__new__(cls, *args)


class RateLimiterNotConfiguredError(RateLimiterError):
    """A limiter was used that nothing configured."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"rate limiter {name!r} is not configured: call configure_limiter({name!r}, ...) "
            f"or add [limiters.{toml_key(name)}] to rate-sync.toml"
        )


class RateLimiterAlreadyConfiguredError(RateLimiterError, ValueError):
    """A name that has to be new is taken. Also a ValueError."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"rate limiter {name!r} already exists: choose another name, use get_or_clone_limiter() to reuse "
            "it, or configure_limiter() to replace it"
        )


class RateLimiterNotInitializedError(RateLimiterError, RuntimeError):
    """A limiter was used in a way that needs `initialize()` first. Also a RuntimeError."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        subject = f"rate limiter {name!r}" if name else "the rate limiter"
        super().__init__(f"{subject} is not initialized: await its initialize() first")


class RateLimiterAcquisitionError(RateLimiterError):
    """An acquisition was not granted.

    Attributes:
        group_id: the limiter's id (and key), else None.
        attempts: how often the store was asked, where that is known, else None.
        retry_after: seconds after which a new try makes sense, else None.
        reason: `rate_limited`, `concurrency_full`, `outage` (with `fail_closed`), or None.
    """

    retryable = True

    def __init__(
        self,
        message: str,
        group_id: str | None = None,
        attempts: int | None = None,
        *,
        retry_after: float | None = None,
        reason: str | None = None,
    ) -> None:
        self.group_id = group_id
        self.attempts = attempts
        self.retry_after = retry_after
        self.reason = reason
        super().__init__(message)


class AcquireTimeoutError(RateLimiterAcquisitionError, TimeoutError):
    """The slot would have come later than the caller was willing to wait. Also a TimeoutError.

    Raised at once when the answer is known in advance; nothing was consumed.
    """


class StoreError(RateLimiterAcquisitionError):
    """A store could not answer. As a RateLimiterAcquisitionError, so that one `except` covers outages too."""

    retryable = False


class StoreUnavailableError(StoreError):
    """The store cannot be reached; the call was certainly not executed."""

    retryable = True


class InDoubtError(StoreError):
    """The call was sent and its answer was lost: it may have been executed."""

    in_doubt = True


class StoreExhaustedError(StoreError):
    """A bound of this process is full: the connection pool's queue, or a queue of the engine."""

    retryable = True


class StoreTimeoutError(StoreError, TimeoutError):
    """The store did not answer within the time allowed. Also a TimeoutError."""

    retryable = True


class StoreServerError(StoreError):
    """The server refused the call; see `sqlstate`. `retryable` follows the class of that code."""


class StoreProtocolError(StoreError):
    """The store answered something that this version does not understand."""


class StoreClosedError(StoreError):
    """The store or the whole engine was shut down, so the call was not executed."""


class OperationCancelledError(StoreError):
    """The call was given up by its caller before it was executed."""


class StateError(RateLimiterError):
    """An operation on a key was executed and could not do what was asked; nothing changed."""


class StaleVersionError(StateError):
    """A write named a version that the key does not have. Read the key again, then decide anew.

    Attributes:
        expected: the version that the write named; 0: it was to create the key.
        actual: the version that the key has; 0: there is no such key (any more).
    """

    def __init__(self, expected: int, actual: int) -> None:
        self.expected = expected
        self.actual = actual
        if expected == 0:
            problem = f"the key exists already, with version {actual}"
        elif actual == 0:
            problem = f"version {expected} was expected and the key does not exist (any more)"
        else:
            problem = f"version {expected} was expected and the key has version {actual}"
        super().__init__(f"stale write: {problem}: read it with get_versioned() and decide anew")


class NotAnIntegerError(StateError, TypeError):
    """`increment` met a value that is no integer; text such as "5" is none. Also a TypeError.

    Attributes:
        key: the key concerned.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(
            f"the value of {key!r} is no integer, so increment() refused it: counters are made by it or "
            "by set() with an int; delete the key, or use another key or kind for the counter"
        )


class CounterOverflowError(StateError, OverflowError):
    """The sum of an `increment` does not fit into 64 bits. Also an OverflowError.

    Attributes:
        key: the key concerned.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(
            f"the counter {key!r} would leave the 64 bits from -2**63 to 2**63-1: set() a new start"
        )


class RolledBackError(StateError):
    """`many(atomic=True)` did nothing, because one of its operations could not be done.

    Attributes:
        outcomes: one entry for each operation, in order: what it would have answered, or the error that made
            the whole roll back.
    """

    def __init__(self, outcomes: list[Any]) -> None:
        self.outcomes = outcomes
        reasons = [f"operation {n}: {one}" for n, one in enumerate(outcomes) if isinstance(one, Exception)]
        super().__init__(
            f"nothing of the {len(outcomes)} operations was executed"
            + (f": {'; '.join(reasons)}" if reasons else "")
        )


class LockError(RateLimiterError):
    """Base of what concerns locks.

    Attributes:
        name: the lock.
    """

    name: str


class LockTimeoutError(LockError, TimeoutError):
    """Somebody else held the lock until the timeout. Also a TimeoutError.

    Attributes:
        name: the lock.
        holder: who holds it (host, process, application), None where unknown.
        remaining: seconds until the holder's lease is over unless it is renewed, None where unknown.
    """

    retryable = True

    def __init__(
        self, name: str, timeout: float = 0.0, holder: str | None = None, remaining: float | None = None
    ) -> None:
        self.name = name
        self.holder = holder
        self.remaining = remaining
        by = f" by {holder}" if holder else ""
        until = (
            "" if remaining is None else f", whose lease ends in {max(remaining, 0.0):.3g} s unless renewed"
        )
        super().__init__(
            f"lock {name!r} was not free within {timeout:g} s: it is held{by}{until}: wait longer "
            "(timeout=), or see `ratesync locks`"
        )


class LockLostError(LockError):
    """The lock was lost while its body ran: somebody else may have held it meanwhile.

    Attributes:
        name: the lock.
        token: the fencing token under which it was held.
    """

    def __init__(self, name: str, token: int) -> None:
        self.name = name
        self.token = token
        super().__init__(
            f"lock {name!r} (token {token}) was lost before its body ended: its lease was over, or it was "
            "broken, so another holder may have run at the same time; have writes refused by token (fencing)"
        )


class IdempotencyError(RateLimiterError):
    """Base of what concerns idempotent operations.

    Attributes:
        key: the idempotency key.
    """

    key: str


class IdempotencyMismatchError(IdempotencyError):
    """The key was used before with another fingerprint: this is another request under the same key.

    Attributes:
        key: the idempotency key.
        status_code: 422, which fits as an HTTP answer.
    """

    status_code = 422

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(
            f"idempotency key {key!r} was used with another fingerprint: use a new key for a new request, "
            "and derive the fingerprint from what makes two requests the same"
        )


class OperationInProgressError(IdempotencyError):
    """Another caller runs the operation right now.

    Attributes:
        key: the idempotency key.
        retry_after: seconds after which asking again makes sense.
        status_code: 409, which fits as an HTTP answer.
    """

    retryable = True
    status_code = 409

    def __init__(self, key: str, retry_after: float, waited: float | None = None) -> None:
        self.key = key
        self.retry_after = retry_after
        since = "" if waited is None else f" and did not end within {waited:g} s"
        super().__init__(
            f"the operation {key!r} is running elsewhere{since}: try again in {retry_after:.3g} s, or wait "
            "for its result with wait="
        )


class OperationFailedError(IdempotencyError):
    """An earlier call failed, and its failure was kept (`on_error="keep"`).

    Attributes:
        key: the idempotency key.
        reason: type and message of the exception that ended it.
    """

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(
            f"the operation {key!r} failed before and the failure is kept: {reason}: use a new key, or "
            "forget it: idempotent(key).forget()"
        )


class LeaseLostError(IdempotencyError):
    """The result could not be committed: the lease had been lost, and somebody else took over.

    Attributes:
        key: the idempotency key.
        happened: what was found in place of this caller's record.
    """

    def __init__(self, key: str, happened: str) -> None:
        self.key = key
        self.happened = happened
        super().__init__(
            f"the result of {key!r} was not stored: {happened}. What this caller did may be done twice: "
            "give it a longer lease=, or commit in the same transaction as its effects (commit_in)"
        )


class InternalError(RateLimiterError):
    """A bug of ratesync. Please report it with the message."""


class StoreNotFoundError(RateLimiterError):
    """A store id that nothing configured."""

    def __init__(self, store_id: str, known: Iterable[str] = (), note: str = "") -> None:
        self.store_id = store_id
        super().__init__(
            f"store {store_id!r} is not configured{nearest(store_id, known)}: call configure_store("
            f"{store_id!r}, ...) or add [stores.{toml_key(store_id)}] to rate-sync.toml{note}"
        )


class LimiterNotFoundError(RateLimiterError):
    """A limiter id that nothing configured. The message names the nearest ids that exist."""

    def __init__(self, limiter_id: str, known: Iterable[str] = (), note: str = "") -> None:
        self.limiter_id = limiter_id
        super().__init__(
            f"limiter {limiter_id!r} is not configured{nearest(limiter_id, known)}: call configure_limiter("
            f"{limiter_id!r}, ...) or add [limiters.{toml_key(limiter_id)}] to rate-sync.toml{note}"
        )


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """` (did you mean 'api'?)` for the known names closest to `name`, else the empty string."""
    import difflib  # only on the way to an error

    matches = difflib.get_close_matches(str(name), list(known), n=3, cutoff=cutoff)
    if not matches:
        return ""
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)"


def toml_key(name: object) -> str:
    """`name` as it has to be written in a TOML table header."""
    text = str(name)
    if text and all(char.isascii() and (char.isalnum() or char in "-_") for char in text):
        return text
    escaped = "".join(
        f"\\{char}" if char in '"\\' else char if char.isprintable() else _toml_escape(char) for char in text
    )
    return f'"{escaped}"'


def _toml_escape(char: str) -> str:
    return f"\\u{ord(char):04X}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08X}"


# Status codes of the engine (cpp/ratesync/base/status.h) to exception classes.
_BY_CODE: dict[str, type[StoreError]] = {
    "cancelled": OperationCancelledError,
    "timeout": StoreTimeoutError,
    "unavailable": StoreUnavailableError,
    "in_doubt": InDoubtError,
    "exhausted": StoreExhaustedError,
    "protocol": StoreProtocolError,
    "server": StoreServerError,
    "closed": StoreClosedError,
}

# SQLSTATE classes and codes after which the same call may succeed: serialization failure and deadlock,
# lock not available, insufficient resources, shutdown and start-up of the server.
_RETRYABLE_SQLSTATES = ("40001", "40P01", "55P03", "53", "57P01", "57P02", "57P03")


def from_status(code: str, message: str, sqlstate: str = "", store: str = "") -> RateLimiterError:
    """The exception for a status of the engine (a code of cpp/ratesync/base/status.h)."""
    error: RateLimiterError
    if code == "invalid":
        error = ConfigValidationError(message)
    elif code in _BY_CODE:
        error = _BY_CODE[code](message)
        if sqlstate.startswith(_RETRYABLE_SQLSTATES):
            error.retryable = True
    else:
        error = InternalError(f"{message} (status {code!r}); this is a bug of ratesync, please report it")
    error.sqlstate = sqlstate or None
    error.store = store or None
    return error


# As LimitService::is_outage() sees them: the server is not there, or did not decide in time.
_OUTAGE_SQLSTATES = ("08", "28", "53", "57", "58", "25006", "55P03")


def is_outage(error: StoreError) -> bool:
    """Whether the failure is one that a limiter's `fail_closed` answers, and not a mistake to be seen."""
    if isinstance(error, StoreServerError):
        return (error.sqlstate or "").startswith(_OUTAGE_SQLSTATES)
    return isinstance(error, (StoreUnavailableError, InDoubtError, StoreTimeoutError))


_REASONS = {
    "rate": ("rate_limited", "the next slot lies beyond the timeout"),
    "concurrency": ("concurrency_full", "all slots stayed in use until the timeout"),
}


def from_denial(limiter_id: str, reason: str, retry_after: float) -> RateLimiterAcquisitionError:
    """The exception for an acquisition that was not granted.

    Args:
        limiter_id: the group that was asked.
        reason: `rate`, `concurrency`, or `outage: <message of the store>`.
        retry_after: seconds, 0 where unknown.
    """
    kind, _, detail = reason.partition(": ")
    if kind in _REASONS:
        name, why = _REASONS[kind]
        after = f"; try again in {retry_after:.3g} s" if retry_after > 0 else ""
        return AcquireTimeoutError(
            f"could not acquire {limiter_id!r}: {why}{after}",
            limiter_id,
            retry_after=retry_after,
            reason=name,
        )
    return RateLimiterAcquisitionError(
        f"could not acquire {limiter_id!r}: the store failed and fail_closed is on: {detail or reason}",
        limiter_id,
        reason="outage",
    )


def from_invalid(
    message: str, field: str = "", expected: str = "", received: str = ""
) -> ConfigValidationError:
    """The exception for an argument that the engine refused."""
    return ConfigValidationError(message, field or None, expected or None, received or None)


def from_counter(reason: str, key: str) -> StateError:
    """The exception for an increment that was refused: reason `not_integer` or `overflow`."""
    return CounterOverflowError(key) if reason == "overflow" else NotAnIntegerError(key)
