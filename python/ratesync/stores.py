"""`Store`: one configured backend, for set-up, inspection and shutdown.

Limits are used by name; a Store is for what concerns all limiters on it: connecting ahead of time,
migrations, diagnosis, and listing who holds what. Every method that talks to the backend returns a
`Pending`: await it, or `.wait()` for it in a plain thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from ratesync._engine import CoreStore
from ratesync._pending import Pending, script
from ratesync.errors import StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from datetime import timedelta

    from ratesync._engine import Lease
    from ratesync._schemas import StoreOptions
    from ratesync.idempotency import Idempotent
    from ratesync.locks import Lock
    from ratesync.states import State

__all__ = ["Finding", "GroupRow", "HolderRow", "LockRow", "MigrationStep", "Store", "StoreListing"]


class MigrationStep(TypedDict):
    """One step of the schema: its number and name, the SQL, and whether it was applied before this run."""

    number: int
    name: str
    sql: str
    applied: bool


class Finding(TypedDict):
    """One finding of `doctor`: level `ok`, `warning` or `error`, what it is about, and the cure."""

    level: str
    subject: str
    message: str


class GroupRow(TypedDict):
    """One group of a store; `last_ahead` is how far the latest slot dealt lies ahead of now, in seconds."""

    group: str
    last_ahead: float
    version: int
    in_use: int


class HolderRow(TypedDict):
    """Who holds slots of a group; `held_for` and `expires_in` in seconds, negative when expired."""

    group: str
    holder: str
    slots: int
    held_for: float
    expires_in: float


class StoreListing(TypedDict):
    """What `Store.list` found; `truncated` when there was more than the limit."""

    groups: list[GroupRow]
    holders: list[HolderRow]
    truncated: bool


class LockRow(TypedDict):
    """One lock; `held_for` and `expires_in` in seconds, negative when expired; `waiters` are processes."""

    namespace: str
    tenant: str
    name: str
    token: int
    holder: str
    held_for: float
    expires_in: float
    waiters: int


Steps = list[MigrationStep]  # aliases: inside Store, `list` is the method
Findings = list[Finding]
Locks = list[LockRow]


class Store:
    """One configured backend of this process. Obtain it with `get_store(store_id)`.

    Example:
        >>> import ratesync
        >>> ratesync.configure_store("store-doc", "memory")
        >>> store = ratesync.get_store("store-doc")
        >>> store.engine
        'memory'
        >>> store.initialize().wait()
    """

    def __init__(
        self,
        core: CoreStore,
        now: Callable[[], float],
        timing_margin_ms: float,
        options: StoreOptions | None = None,
    ) -> None:
        self._core = core
        self._options = options
        self._now = now  # the engine's clock, in seconds
        self._timing_margin_ms = timing_margin_ms  # for the limiters on it
        self._pid = os.getpid()
        self._closed = False
        self._initialized = False
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()  # limiters on it; they keep the store alive
        # A store that was configured anew lives on until its last limiter and permit are gone.
        self._finalizer = weakref.finalize(self, _close_quietly, core, os.getpid())
        self._finalizer.atexit = False

    @property
    def store_id(self) -> str:
        """The configured id."""
        return self._core.store_id

    @property
    def engine(self) -> str:
        """`memory`, `postgres` or `redis`."""
        return self._core.engine

    @property
    def capabilities(self) -> dict[str, Any]:
        """What the backend can do: `limits`, `shared`, `durable`, `consistency` and further flags."""
        return self._core.capabilities

    @property
    def is_initialized(self) -> bool:
        """Whether `initialize()` succeeded (here or through a limiter) and the store is still open."""
        return self._initialized and not self._closed

    @script
    def initialize(self) -> Generator[Pending[Any], Any, None]:
        """Connects and checks the schema (creates it with `auto_create`), which the first use does otherwise.

        Raises:
            StoreUnavailableError: no connection; the message names host, port and the time it took.
            StoreServerError: refused, for example missing table or grant; the message says the cure.
        """
        yield self._core.initialize()
        self._initialized = True

    def migrate(self, *, dry_run: bool = False) -> Pending[Steps]:
        """Applies outstanding migrations and returns all steps. `dry_run` only lists them."""
        return cast("Pending[Steps]", self._core.migrate(dry_run))

    def doctor(self) -> Pending[Findings]:
        """Checks version, schema, grants, clock and settings, and says what to do about each finding."""
        return cast("Pending[Findings]", self._core.doctor())

    def list(self, limit: int = 100) -> Pending[StoreListing]:
        """Groups and holders in the store, at most `limit` of each."""
        return cast("Pending[StoreListing]", self._core.list(limit))

    def stats(self) -> Pending[dict[str, int]]:
        """Counters of this process: round trips, statements, batched operations, conflicts, connections."""
        return self._core.stats()

    # State ----------------------------------------------------------------------------------------

    def state(
        self,
        prefix: str = "acteon_",
        namespace: str = "default",
        tenant: str = "default",
        *,
        kind: str = "state",
        codec: Literal["json"] | None = None,
        timeout: float | None = 5.0,
    ) -> State:
        """Keys of one namespace and tenant in this store: dedup keys, counters, versioned values, timeouts.

        Args:
            prefix: what the names of tables or keys start with, 0 to 40 bytes. Different ones never meet.
            namespace: part of every key, 1 to 255 bytes.
            tenant: part of every key, 1 to 255 bytes.
            kind: part of every key, unless an operation names another one.
            codec: None for str, bytes and int; `json` for what JSON can say.
            timeout: seconds that one operation may take, queueing and reconnecting included; None: no bound.

        Raises:
            ConfigValidationError: names the argument and what was expected.

        Example:
            >>> import ratesync
            >>> carts = ratesync.get_store("memory").state("shop_", tenant="acme", codec="json")
            >>> carts.set("cart-7", {"items": [1, 2]}, ttl=3600).wait()
            1
            >>> carts.get("cart-7").wait()
            {'items': [1, 2]}
        """
        from ratesync.states import State

        return State._on(
            self._here(),
            prefix=prefix,
            namespace=namespace,
            tenant=tenant,
            kind=kind,
            codec=codec,
            timeout=timeout,
        )

    def lock(
        self,
        name: str,
        ttl: float | timedelta = 30,
        timeout: float | None = None,
        *,
        auto_renew: bool = True,
        cancel_on_loss: bool = False,
        prefix: str = "acteon_",
        namespace: str = "default",
        tenant: str = "default",
    ) -> Lock:
        """A lock: `async with store.lock("invoice-42") as lease:`, or `with` in a plain thread.

        Args:
            name: of the lock, 1 to 255 bytes of UTF-8; no character has a special meaning.
            ttl: seconds after which others may take it when its holder is gone, killed or cut off.
            timeout: seconds to wait for it; 0 asks once, None waits as long as it takes.
            auto_renew: the lease is renewed until the body ends, by a thread that Python cannot hold up.
                False: the body has `ttl` seconds, unless it calls `lease.extend()`.
            cancel_on_loss: `async with` only: cancel the body when the lock is lost, and raise LockLostError
                instead. Otherwise `lease.lost` says it, and leaving the body raises.
            prefix: what the names of tables or keys start with, 0 to 40 bytes.
            namespace: part of the name, 1 to 255 bytes.
            tenant: part of the name, 1 to 255 bytes.

        Raises:
            ConfigValidationError: names the argument and what was expected.

        Example:
            >>> import ratesync
            >>> store = ratesync.get_store("memory")
            >>> with store.lock("invoice-42", ttl=30, timeout=10) as lease:
            ...     print(lease.name, lease.token > 0)
            invoice-42 True
        """
        from ratesync.locks import CancellingLock, Lock

        return (CancellingLock if cancel_on_loss else Lock)._on(
            self._here(),
            name=name,
            ttl=ttl,
            timeout=timeout,
            auto_renew=auto_renew,
            prefix=prefix,
            namespace=namespace,
            tenant=tenant,
        )

    def try_lock(
        self,
        name: str,
        ttl: float | timedelta = 30,
        *,
        auto_renew: bool = True,
        prefix: str = "acteon_",
        namespace: str = "default",
        tenant: str = "default",
    ) -> Pending[Lease | None]:
        """Takes the lock when it is free at this moment. Whoever gets the lease has to `release()` it.

        The arguments are those of `lock`.

        Returns:
            The lease, or None: somebody else has it.

        Example:
            >>> import ratesync
            >>> store = ratesync.get_store("memory")
            >>> lease = store.try_lock("nightly-report").wait()
            >>> store.try_lock("nightly-report").wait() is None
            True
            >>> lease.release().wait()
            True
        """
        lock = self.lock(
            name, ttl, 0, auto_renew=auto_renew, prefix=prefix, namespace=namespace, tenant=tenant
        )
        return lock.acquire()

    def idempotent(
        self,
        key: str,
        fingerprint: str | bytes | None = None,
        ttl: float | timedelta | None = 86400,
        lease: float | timedelta = 30,
        wait: float | timedelta | None = None,
        *,
        on_error: Literal["free", "keep"] = "free",
        prefix: str = "acteon_",
        namespace: str = "default",
        tenant: str = "default",
        timeout: float | None = 5.0,
    ) -> Idempotent:
        """An operation that is done once per key; later calls get the first one's result.

            async with store.idempotent("charge-42", fingerprint=body_hash) as op:
                if not op.done:
                    op.result = await charge()
            return op.result

        Args:
            key: names the operation, for example an Idempotency-Key header; 1 to 1024 bytes.
            fingerprint: of the request, for example a digest of its body. Another one under the same key is
                an error; None is not compared.
            ttl: seconds for which the result is kept; None: for ever.
            lease: seconds after which others may run the operation when its runner is gone. Renewed while the
                body runs.
            wait: when it is running elsewhere: seconds to wait for its result; None: do not.
            on_error: of a body that raises: `free` the key, so that the next call runs, or `keep` the
                failure, for what must not be tried again.
            prefix: what the names of tables or keys start with, 0 to 40 bytes.
            namespace: part of the key, 1 to 255 bytes.
            tenant: part of the key, 1 to 255 bytes.
            timeout: seconds that one trip to the store may take, queueing and reconnecting included.

        Raises, on entering:
            IdempotencyMismatchError: the key was used with another fingerprint.
            OperationInProgressError: it is running elsewhere (still, after `wait`); `retry_after`.
            OperationFailedError: it failed before, and that was kept.

        Raises, on leaving:
            LeaseLostError: the result was not stored, since somebody else had taken over.

        Example:
            >>> import ratesync
            >>> store = ratesync.get_store("memory")
            >>> def pay():
            ...     with store.idempotent("charge-42", fingerprint="5 EUR") as op:
            ...         if not op.done:
            ...             op.result = {"receipt": 17}
            ...     return op.done, op.result
            >>> pay(), pay()
            ((False, {'receipt': 17}), (True, {'receipt': 17}))
        """
        from ratesync.idempotency import Idempotent

        return Idempotent(
            self._here(),
            key,
            fingerprint,
            ttl=ttl,
            lease=lease,
            wait=wait,
            on_error=on_error,
            prefix=prefix,
            namespace=namespace,
            tenant=tenant,
            timeout=timeout,
        )

    def locks(self, prefix: str = "acteon_", limit: int = 1000) -> Pending[Locks]:
        """Locks that are held, or expired and not yet purged, in all namespaces, by name; at most `limit`."""
        return cast("Pending[Locks]", self._here()._core.locks(prefix, limit))

    def break_lock(
        self,
        name: str,
        token: int = 0,
        *,
        prefix: str = "acteon_",
        namespace: str = "default",
        tenant: str = "default",
    ) -> Pending[bool]:
        """Takes a lock from its holder, who is told by `lease.lost`, at its next renewal.

        Args:
            name: of the lock.
            token: only while it is held under this token; 0: whoever holds it.
            prefix: as in `lock`.
            namespace: as in `lock`.
            tenant: as in `lock`.

        Returns:
            Whether it was held (under that token).
        """
        return self._here()._core.break_lock(prefix, namespace, tenant, name, token)

    def migrate_state(self, prefix: str = "acteon_", *, dry_run: bool = False) -> Pending[Steps]:
        """Creates the tables of state and locks of a prefix; returns all steps. `dry_run` only lists them."""
        return cast("Pending[Steps]", self._here()._core.migrate_state(prefix, dry_run))

    def _here(self) -> Store:
        """This store; in a forked child the one that takes its place there."""
        return self if self._pid == os.getpid() else self._current()

    def _current(self) -> Store:
        """The store of the same name in this process; itself, unless it is another process's."""
        if not self._closed:
            return self
        from ratesync._registry import _registry

        return _registry.renewed(self.store_id)

    @script
    def close(self) -> Generator[Pending[Any], Any, None]:
        """Ends all work on the store and closes its connections. The next use by name opens it anew."""
        if not self._closed:
            self._retire()
            yield self._core.close()

    def _retire(self) -> None:
        """Marks the store as gone without talking to it (its engine was stopped, or is another process's)."""
        self._closed = True
        self._finalizer.detach()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "initialized" if self._initialized else "not initialized"
        return f"<ratesync.Store {self.store_id!r} ({self.engine}, {state})>"


def _close_quietly(core: CoreStore, pid: int) -> None:
    # Called by the garbage collector, which must not block; the thread ends with the last socket.
    def close() -> None:
        with contextlib.suppress(StoreClosedError):  # the whole engine was stopped meanwhile
            core.close().wait()

    if pid == os.getpid():
        threading.Thread(target=close, name="ratesync-close", daemon=True).start()
