"""`RateLimiter`: what every limiter offers, whatever keeps its state.

Limiters are made by `get_limiter`, or constructed directly from the classes in `ratesync.engines`. An
implementation of your own (a fake for tests, a limit kept elsewhere) derives from `RateLimiter` and has
the abstract members below; its methods may be coroutine functions, and then work in asyncio only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from ratesync.errors import AcquireTimeoutError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ratesync._engine import Permit
    from ratesync._pending import Pending
    from ratesync.limits import LimiterReadOnlyConfig, LimiterState, RateLimiterMetrics

__all__ = ["RateLimiter", "RateLimiterMetrics"]


class RateLimiter(ABC):
    """One limit on one store: rate, concurrency, or both. Obtain it with `get_limiter(limiter_id)`.

    `async with limiter:` and `with limiter:` acquire with the defaults. `acquire_context(timeout, cost=,
    key=)` does so with a timeout in seconds (None: the limiter's default), a cost in units, and a key that
    has a limit of its own with the same parameters.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("limiter-doc", rate_per_second=10.0, burst=2)
        >>> limiter = ratesync.get_limiter("limiter-doc")
        >>> [limiter.try_acquire().wait() for _ in range(3)]
        [True, True, False]
        >>> with limiter.acquire_context(timeout=1.0) as permit:
        ...     permit.limiter_id
        'limiter-doc'
    """

    __slots__ = ()

    # Acquiring ------------------------------------------------------------------------------------

    @abstractmethod
    def acquire(
        self, timeout: float | None = None, *, cost: int = 1, key: str | None = None
    ) -> Pending[None]:
        """Acquires without a body; with `max_concurrent` the slot is held until `release()`.

        Args:
            timeout: seconds to wait at most; None takes the limiter's default, and waits as long as it
                takes where that is None as well.
            cost: units to take, at least 1.
            key: acquire from this key's own limit, same parameters.

        Raises:
            AcquireTimeoutError: the slot would come too late; raised at once when that is known.
            StoreError: the store failed and `fail_closed` is on.
        """

    @abstractmethod
    def try_acquire(self, timeout: float = 0, *, cost: int = 1, key: str | None = None) -> Pending[bool]:
        """Like `acquire`, but answers False instead of raising when the slot would come too late.

        Args:
            timeout: seconds to wait at most. The default 0 tries once, whatever the limiter's is.
            cost: units to take, at least 1.
            key: acquire from this key's own limit, same parameters.
        """

    @abstractmethod
    def release(self) -> Pending[bool]:
        """Gives back the oldest slot that this object took with `acquire` or `try_acquire`.

        Takes effect at once; awaiting the result is optional. False: there was none - nothing is freed,
        and never a slot of a context manager or of somebody else - which is logged once.
        """

    def acquire_context(
        self, timeout: float | None = None, *, cost: int = 1, key: str | None = None
    ) -> Permit:
        """Like `ratesync.acquire`, for this limiter object: a `Permit`, to be used once.

        Args:
            timeout: seconds to wait at most; None takes the limiter's default.
            cost: units to take, at least 1.
            key: acquire from this key's own limit, same parameters.

        Raises:
            AcquireTimeoutError: on entering; the slot would come too late.
            StoreError: on entering; the store failed and `fail_closed` is on.
        """
        if cost != 1 or key is not None:
            raise TypeError(f"{type(self).__name__} has neither costs nor keys")
        return cast("Permit", _Context(self, timeout))

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *exc: object) -> None:
        await self.release()

    def __enter__(self) -> None:
        self.acquire().wait()

    def __exit__(self, *exc: object) -> None:
        self.release().wait()

    # State ----------------------------------------------------------------------------------------

    def peek(self, key: str | None = None) -> Pending[LimiterState]:
        """The state of the limit, or of a key's, as the store sees it. Charges nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not tell its state")

    def get_state(self, key: str | None = None) -> Pending[LimiterState]:
        """The same as `peek`."""
        return self.peek(key)

    @abstractmethod
    def get_metrics(self) -> RateLimiterMetrics:
        """Counters of this object; live, not a snapshot."""

    @abstractmethod
    def get_config(self) -> LimiterReadOnlyConfig:
        """The parameters, as configured."""

    def reset(self, key: str | None = None) -> Pending[None]:
        """Forgets what was consumed and who holds slots, of the limit itself or of one key."""
        raise NotImplementedError(f"{type(self).__name__} cannot be reset")

    def reset_all(self) -> Pending[None]:
        """Resets every group in this limiter's store, also those of other limiters and processes."""
        raise NotImplementedError(f"{type(self).__name__} cannot be reset")

    # Life cycle -----------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, **kwargs: Any) -> RateLimiter:
        """Makes a limiter from the options of a store (`ratesync.schemas`) and its own parameters."""

    @abstractmethod
    def initialize(self) -> Pending[None]:
        """Connects the store ahead of the first use. Raises what `Store.initialize` raises."""

    def disconnect(self) -> Pending[None]:
        """Takes the limiter out of use; closes its store's connections when no other limiter uses them.

        The next use by name builds it again.
        """
        raise NotImplementedError(f"{type(self).__name__} has no connections")

    # Parameters -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def group_id(self) -> str:
        """The id under which the store keeps the state; processes with the same id share the limit."""

    @property
    def store_id(self) -> str:
        """Id of the store; the name of its engine for a limiter that was constructed directly."""
        return self.get_config().store_id

    @property
    def algorithm(self) -> str:
        """How grants are spaced: the name that `configure_limiter` takes."""
        return "token_bucket"

    @property
    @abstractmethod
    def rate_per_second(self) -> float | None:
        """Grants per second in the long run; None: no such limit."""

    @property
    def burst(self) -> int:
        """Grants that may come at once after idling."""
        return 1

    @property
    @abstractmethod
    def max_concurrent(self) -> int | None:
        """Slots held at the same time, over all processes; None: no concurrency limit."""

    @property
    def limit(self) -> int | None:
        """Grants per window; None for token_bucket."""
        return None

    @property
    def window_seconds(self) -> float | None:
        """Length of the window in seconds; None for token_bucket."""
        return None

    @property
    @abstractmethod
    def default_timeout(self) -> float | None:
        """Seconds that `acquire` waits at most unless told otherwise; None: as long as it takes."""

    @property
    @abstractmethod
    def fail_closed(self) -> bool:
        """Whether an outage of the store refuses calls (True) or lets them pass (False)."""

    @property
    @abstractmethod
    def is_initialized(self) -> bool:
        """Whether `initialize()` or a first grant succeeded on this object, and the store is still open."""


class _Context:
    """`acquire_context()` of a limiter that only has the abstract methods."""

    def __init__(self, limiter: RateLimiter, timeout: float | None) -> None:
        self._limiter = limiter
        self._timeout = timeout

    async def __aenter__(self) -> None:
        limiter = self._limiter
        timeout = self._timeout if self._timeout is not None else limiter.default_timeout
        if timeout is None:
            await cast("Awaitable[None]", limiter.acquire())
        elif not await limiter.try_acquire(timeout):
            raise AcquireTimeoutError(
                f"could not acquire {limiter.group_id!r} within {timeout:g} s", limiter.group_id
            )

    async def __aexit__(self, *exc: object) -> None:
        await self._limiter.release()


def __getattr__(name: str) -> Any:
    if name == "RateLimiterMetrics":  # its home imports this module
        from ratesync.limits import RateLimiterMetrics

        return RateLimiterMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
