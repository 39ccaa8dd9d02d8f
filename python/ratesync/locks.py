"""Locks that one holder has at a time, over tasks, threads, processes and machines.

`Lock` is compiled, as `State` is. Only `cancel_on_loss` is added here, since it needs asyncio: a lock
that has it is a `CancellingLock`.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from ratesync._engine import CoreLock, Lease, compiled
from ratesync._engine import CorePending as Pending
from ratesync.errors import ConfigValidationError, LockLostError

if TYPE_CHECKING:
    from ratesync.stores import Store

__all__ = ["CancellingLock", "Lease", "Lock"]


@compiled
class Lock(CoreLock):
    """A lock by name. Obtain it with `ratesync.lock()` or `Store.lock()`, and enter it.

        async with ratesync.lock("invoice-42", ttl=30, timeout=10) as lease:     # asyncio
            ...
        with ratesync.lock("invoice-42") as lease:                               # a plain thread
            ...

    Entering waits until the lock is free, first come, first served as far as processes can agree on it, and
    gives the `Lease`. Leaving gives the lock back; where the store does not answer within a second, that goes
    on in the background, with a warning, and the lock is free at the end of its ttl at the latest. One Lock
    object may be entered by many tasks and threads; it is not re-entrant: who has it and asks again waits for
    himself.

    Raised on entering: LockTimeoutError, when somebody else held it for longer than `timeout`; StoreError.
    On leaving: LockLostError, when the lock was lost while the body ran (unless the body raised something).

    Example:
        >>> import ratesync
        >>> with ratesync.lock("invoice-42", ttl=30) as lease:
        ...     print(lease.lost, 0 < lease.remaining <= 30)
        False True
    """

    __slots__ = ("_arguments", "_store")
    _store: Store
    _arguments: dict[str, Any]

    @classmethod
    def _on(cls, store: Store, **arguments: Any) -> Self:
        """The keywords are those of `Store.lock`."""
        lock = cls(
            store._core,
            arguments["prefix"],
            arguments["namespace"],
            arguments["tenant"],
            arguments["name"],
            ttl=arguments["ttl"],
            timeout=arguments["timeout"],
            auto_renew=arguments["auto_renew"],
        )
        lock._store = store  # keeps it open
        lock._arguments = arguments
        return lock

    def _renew(self) -> Lock:
        """The same on this process's store. The core calls it in a forked child, at the first use there."""
        fresh = type(self)._on(self._store._current(), **self._arguments)
        self._store = fresh._store
        return fresh

    def acquire(
        self,
        ttl: float | timedelta = ...,
        timeout: float | None = ...,
        auto_renew: bool = ...,
    ) -> Pending[Lease | None]:
        """Asks for the lock without entering it; whoever gets the lease has to release it.

        Args:
            ttl: seconds (or a timedelta) after which others may take it, when its holder is gone.
            timeout: seconds to wait; 0 asks once, None waits as long as it takes.
            auto_renew: keep the lease alive until it is released.

        What is not given is as the lock was made.

        Returns:
            A lease, or None: somebody else held it until the timeout.

        Example:
            >>> import ratesync
            >>> lock = ratesync.lock("invoice-7")
            >>> lease = lock.acquire(timeout=0).wait()
            >>> lock.acquire(timeout=0).wait() is None, lease.release().wait()
            (True, True)
        """
        raise NotImplementedError


class CancellingLock(Lock):
    """A lock that cancels the body of its `async with` when it is lost (`cancel_on_loss=True`).

    The cancelled body ends with LockLostError instead of CancelledError; a cancellation that comes from
    elsewhere stays one.
    """

    __slots__ = ("_bodies",)
    _bodies: dict[asyncio.Task[Any] | None, _Body]

    async def __aenter__(self) -> Lease:
        lease = await super().__aenter__()
        task = asyncio.current_task()
        if task is None:  # not asyncio's: nothing could be cancelled
            await super().__aexit__(None, None, None)
            raise RuntimeError("cancel_on_loss=True needs an asyncio task to cancel")
        try:
            bodies = self._bodies
        except AttributeError:
            bodies = self._bodies = {}
        bodies[task] = _Body(task, lease)
        return lease

    async def __aexit__(self, *exc: Any) -> None:
        task = asyncio.current_task()
        # Fixtures and exit stacks may leave in another task than they entered in.
        body = self._bodies.pop(task) if task in self._bodies else self._bodies.popitem()[1]
        ours = body.leave(exc[0])
        await super().__aexit__(*exc)
        if ours:
            raise LockLostError(body.lease.name, body.lease.token) from exc[1]

    def __enter__(self) -> Lease:
        raise ConfigValidationError(
            f"cancel_on_loss cannot interrupt a thread (lock {self.name!r}): use `async with`, or leave it "
            "out and look at lease.lost between the steps of the body",
            "cancel_on_loss",
        )


class _Body:
    """The body of one `async with`, and the task that waits for the loss of its lease."""

    def __init__(self, task: asyncio.Task[Any], lease: Lease) -> None:
        self.lease = lease
        self._task = task
        self._cancelling = task.cancelling()  # what was asked of the task before is not ours to take back
        self._cancelled = False
        self._left = False
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="ratesync-lock-watcher")

    async def _watch(self) -> None:
        # As asyncio.timeout() does: this is another task, so the body is suspended, and sees it before us.
        if await self.lease.lost_signal() and not self._left:
            self._cancelled = True
            self._task.cancel(f"lock {self.lease.name!r} was lost")

    def leave(self, kind: type[BaseException] | None) -> bool:
        """Ends the watch. Whether the body was ended by our cancellation and nothing else."""
        self._left = True
        self._watcher.cancel()
        if not self._cancelled:
            return False
        others = self._task.uncancel() > self._cancelling
        return not others and kind is not None and issubclass(kind, asyncio.CancelledError)
