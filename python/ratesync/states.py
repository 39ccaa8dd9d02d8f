"""State that is shared over tasks, threads, processes and machines: versioned values with a time to live.

`State` is compiled; its methods are written down here with their types and documentation only, and
`compiled` puts the compiled functions in their place, so that nothing lies between a caller and the core.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ratesync._engine import KEEP, CoreState, KeepType, compiled, install_records
from ratesync._engine import CorePending as Pending
from ratesync.errors import ConfigValidationError

if TYPE_CHECKING:
    from ratesync.ops import Op
    from ratesync.stores import Store

__all__ = ["KEEP", "Due", "Scan", "State", "Versioned"]

Ttl = int | float | timedelta | None


class Versioned(NamedTuple):
    """A value with what `compare_and_swap` needs.

    Attributes:
        value: as `get` returns it.
        version: grows by 1 with every write; never used twice for one key.
        expires_at: when it expires, on the store's clock, in UTC; None: never.

    Example:
        >>> Versioned("shipped", 3, None).version
        3
    """

    value: Any
    version: int
    expires_at: datetime | None


class Due(NamedTuple):
    """A timeout that fell due and was claimed by this caller.

    Attributes:
        key: the key it was set for.
        kind: the kind of that key.
        due_at: when it fell due, on the store's clock, in UTC.
        claim: pass it to `unschedule` when the work is done: it removes the timeout only while nobody
            else has claimed it meanwhile.
    """

    key: str
    kind: str
    due_at: datetime
    claim: int


@compiled
class State(CoreState):
    """Keys of one namespace and tenant in one store. Obtain it with `ratesync.state()` or `Store.state()`.

    A key has a value (str, bytes or int; anything JSON can say with `codec="json"`), a version that grows
    by 1 with every write and is never used twice for the key, and an expiry, on the store's clock. Expired
    is the same as absent. Every operation is one round trip; those that are under way at the same time
    share it. Operations of one caller on one key take effect in the order in which they were started.

    Common to all methods:
        key: 1 to 1024 bytes of UTF-8 without NUL; no character has a special meaning.
        kind: what the key is of, for example `dedup`, `group`, `chain` (1 to 255 bytes); keys of different
            kinds never meet. None: that of this object.
        ttl: seconds (int, float or timedelta) above 0, to the millisecond; less than one is one; up to
            1000 years. None: never expires.

    Every method returns a `Pending`: await it, or `.wait()` for it in a plain thread. All of them raise
    ConfigValidationError for an argument that is not acceptable, before anything is sent; and StoreError,
    where `InDoubtError` means that the answer was lost and could not be found out.

    Example:
        >>> import ratesync
        >>> state = ratesync.state()
        >>> state.check_and_set("order-42", ttl=300).wait(), state.check_and_set("order-42", ttl=300).wait()
        (True, False)
    """

    __slots__ = ("_options", "_store")
    _store: Store
    _options: dict[str, Any]

    @classmethod
    def _on(cls, store: Store, **options: Any) -> Self:
        """The keywords are those of `Store.state`."""
        codec = options["codec"]
        if codec not in (None, "json"):
            raise ConfigValidationError(
                f"codec {codec!r} is none: leave it out for str, bytes and int, or say 'json'",
                "codec",
                "None or 'json'",
                repr(codec),
            )
        state = cls(
            store._core,
            options["prefix"],
            namespace=options["namespace"],
            tenant=options["tenant"],
            kind=options["kind"],
            timeout=options["timeout"],
            encode=to_json if codec else None,
            decode=json.loads if codec else None,
        )
        state._store = store  # keeps it open
        state._options = options
        return state

    def _renew(self) -> State:
        """The same on this process's store. The core calls it in a forked child, at the first use there."""
        fresh = type(self)._on(self._store._current(), **self._options)
        self._store = fresh._store
        return fresh

    @property
    def store(self) -> Store:
        """The store it is kept in."""
        return self._store

    @property
    def prefix(self) -> str:
        """What the names of its tables, or keys, start with."""
        return str(self._options["prefix"])

    @property
    def namespace(self) -> str:
        """Part of every key."""
        return str(self._options["namespace"])

    @property
    def tenant(self) -> str:
        """Part of every key."""
        return str(self._options["tenant"])

    @property
    def kind(self) -> str:
        """The kind of keys whose operations name none."""
        return str(self._options["kind"])

    # Compiled from here on; what stands here are the signatures and the documentation. ------------

    def check_and_set(
        self, key: str, value: Any = "1", ttl: Ttl = None, *, kind: str | None = None
    ) -> Pending[bool]:
        """Creates the key when it is absent: deduplication.

        Returns:
            True: created now. False: it was there, and nothing changed. Of any number of callers, in
            any number of processes, exactly one gets True until the key expires or is deleted.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.check_and_set("webhook-1", ttl=86400).wait()
            True
            >>> state.check_and_set("webhook-1", ttl=86400).wait()
            False
        """
        raise NotImplementedError

    def get(self, key: str, *, kind: str | None = None) -> Pending[Any]:
        """The value of the key, or None.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.get("nobody").wait() is None
            True
        """
        raise NotImplementedError

    def get_versioned(self, key: str, *, kind: str | None = None) -> Pending[Versioned | None]:
        """The value of the key with its version and expiry, or None.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.set("order-7", "paid").wait()
            1
            >>> state.get_versioned("order-7").wait()
            Versioned(value='paid', version=1, expires_at=None)
        """
        raise NotImplementedError

    def set(self, key: str, value: Any, ttl: Ttl = None, *, kind: str | None = None) -> Pending[int]:
        """Writes the value whatever is there, with a new time to live.

        Args:
            key: of 1 to 1024 bytes.
            value: str, bytes or int (64 bits), at most 64 MiB. An int can be continued by `increment`; the
                text "5" is text. With `codec="json"`: what JSON can say.
            ttl: seconds from now; None: it never expires, also where it did so before.
            kind: of the key.

        Returns:
            The version after it: 1 for a key that never was.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.set("greeting", "hello").wait(), state.set("greeting", b"\\x00\\xff", ttl=60).wait()
            (1, 2)
            >>> state.get("greeting").wait()
            b'\\x00\\xff'
        """
        raise NotImplementedError

    def delete(self, key: str, expected: int | None = None, *, kind: str | None = None) -> Pending[bool]:
        """Removes the key; with `expected`, only where it has this version.

        Returns:
            Whether it was there (in that version) and is gone now. A key that is created again later goes
            on with higher versions.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.set("draft", "x").wait()
            1
            >>> state.delete("draft", expected=7).wait(), state.delete("draft").wait()
            (False, True)
            >>> state.set("draft", "y").wait()
            2
        """
        raise NotImplementedError

    def increment(
        self,
        key: str,
        delta: int = 1,
        ttl: Ttl = None,
        renew: bool = False,
        *,
        kind: str | None = None,
    ) -> Pending[int]:
        """Adds `delta` to a counter, which is created with `delta` when it is absent.

        Args:
            key: of 1 to 1024 bytes.
            delta: may be negative, or 0.
            ttl: seconds to live of a counter that is created; None: for ever.
            renew: whether `ttl` starts anew with every call; otherwise a living counter keeps its expiry.
            kind: of the key.

        Returns:
            The sum. Exact, however many processes count.

        Raises:
            NotAnIntegerError: the value is text, bytes or JSON; nothing changed.
            CounterOverflowError: the sum does not fit into 64 bits; nothing changed.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.increment("visits", ttl=60).wait(), state.increment("visits", 10).wait()
            (1, 11)
        """
        raise NotImplementedError

    def compare_and_swap(
        self, key: str, *, expected: int, value: Any, ttl: Ttl | KeepType = KEEP, kind: str | None = None
    ) -> Pending[int]:
        """Writes the value where the key has the version that the caller has seen.

        Args:
            key: of 1 to 1024 bytes.
            expected: the version; 0 creates the key, and fails where it is.
            value: as in `set`.
            ttl: seconds from now, None for ever; KEEP, the default, lets the running expiry go on.
            kind: of the key.

        Returns:
            The new version.

        Raises:
            StaleVersionError: another version, in `actual` (0: absent); nothing changed.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.compare_and_swap("balance", expected=0, value="100").wait()
            1
            >>> state.compare_and_swap("balance", expected=1, value="90").wait()
            2
            >>> try:
            ...     state.compare_and_swap("balance", expected=1, value="80").wait()
            ... except ratesync.StaleVersionError as error:
            ...     print(error.actual)
            2
        """
        raise NotImplementedError

    def touch(
        self, key: str, ttl: Ttl, *, expected: int | None = None, kind: str | None = None
    ) -> Pending[bool]:
        """Gives the key a new time to live, from now; its value and version stay.

        Returns:
            Whether it was there (in the version `expected`).

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.touch("session-1", 1800).wait(), state.set("session-1", "anna", ttl=60).wait()
            (False, 1)
            >>> state.touch("session-1", 1800).wait()
            True
        """
        raise NotImplementedError

    def schedule(
        self, key: str, at: datetime | timedelta | float, *, kind: str | None = None
    ) -> Pending[None]:
        """Sets a timeout, which `claim_due` hands out once it is due. One per key: a new one replaces it.

        The timeout belongs to the name, not to the value: it needs no value, and survives its end.

        Args:
            key: of 1 to 1024 bytes.
            at: when: an aware datetime, seconds since 1970, or a timedelta from the store's now.
            kind: of the key.

        Example:
            >>> from datetime import timedelta
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.schedule("order-42", timedelta(seconds=-1), kind="reminder").wait()
            >>> [due.key for due in state.claim_due(kind="reminder").wait()]
            ['order-42']
        """
        raise NotImplementedError

    def unschedule(self, key: str, *, claim: int | None = None, kind: str | None = None) -> Pending[bool]:
        """Removes the timeout of the key.

        Args:
            key: of 1 to 1024 bytes.
            claim: of `Due`: only while that claim is the newest, so that a slow worker does not remove
                what somebody else has claimed or scheduled meanwhile.
            kind: of the key.

        Returns:
            Whether there was one (with that claim).
        """
        raise NotImplementedError

    def claim_due(
        self, limit: int = 100, lease: int | float | timedelta = 60, *, kind: str | None = None
    ) -> Pending[list[Due]]:
        """Takes timeouts that are due, oldest first; each goes to exactly one caller.

        Whoever claims does the work, then calls `unschedule(due.key, claim=due.claim, kind=due.kind)`. A
        claim that is not ended falls due again after `lease` seconds.

        Args:
            limit: how many at most.
            lease: seconds for the work.
            kind: of these keys only; None: of every kind.

        Example:
            >>> import ratesync
            >>> state = ratesync.state()
            >>> state.schedule("job-1", 0).wait()
            >>> (due,) = state.claim_due(lease=30).wait()
            >>> state.claim_due().wait()
            []
            >>> state.unschedule(due.key, claim=due.claim).wait()
            True
        """
        raise NotImplementedError

    def many(self, ops: Iterable[Op], *, atomic: bool = False) -> Pending[list[Any]]:
        """Several operations, in one round trip.

        Args:
            ops: made by the functions of `ratesync.ops`; several on one key take effect in their order.
            atomic: all or nothing; then the keys have to be distinct (and, in a Redis Cluster, in one
                hash slot: see the reference). An operation fails the whole when it could not do what
                it was asked: `check_and_set` of a key that is there, a stale version, an absent key.

        Returns:
            One entry per operation, in order: what the method of that name returns, or the exception that
            it would have raised.

        Raises:
            RolledBackError: `atomic`, and nothing was done; `outcomes` says why.

        Example:
            >>> import ratesync
            >>> from ratesync import ops
            >>> state = ratesync.state()
            >>> state.many([ops.set("a", "1"), ops.increment("n", 5), ops.get("b")]).wait()
            [1, 5, None]
        """
        raise NotImplementedError

    def initialize(self) -> Pending[None]:
        """Connects and checks the tables (creates them with `auto_create`), as the first use does.

        Raises:
            StoreUnavailableError: no connection; the message names host, port and the time it took.
            StoreServerError: refused, for example missing table or grant; the message says the cure.
        """
        raise NotImplementedError

    def purge(self, limit: int = 10_000) -> Pending[int]:
        """Removes expired and deleted keys for good, at most `limit`; the store does so in the background.

        Returns:
            How many.
        """
        raise NotImplementedError

    # Up to here. ----------------------------------------------------------------------------------

    def scan(self, kind: str | None = None, prefix: str = "", page_size: int = 500) -> Scan:
        """The living keys of one kind with their values, a page at a time; for `async for` and `for`.

        Args:
            kind: of the keys; None: that of this object.
            prefix: what the keys start with; no character has a special meaning.
            page_size: how many keys one round trip carries, 1 to 10,000.

        Returns:
            An iterator of `(key, value)`. A key that is there all the time comes exactly once; one that
            comes or goes meanwhile may or may not. Ordered by the bytes of the key, except on Redis.

        Example:
            >>> import ratesync
            >>> from ratesync import ops
            >>> state = ratesync.state(tenant="acme")
            >>> _ = state.many([ops.set("a1", "x"), ops.set("b", "z")]).wait()
            >>> list(state.scan(prefix="a"))
            [('a1', 'x')]
        """
        return Scan(self, kind, prefix, page_size)

    def __repr__(self) -> str:
        options = self._options
        space = f"{options['namespace']!r}, {options['tenant']!r}"
        return f"<ratesync.State {options['prefix']!r} of {space} in {self._store!r}>"


class Scan:
    """What `State.scan` returns: iterate over it once, with `async for` or with `for`.

    Leaving the loop early is fine; nothing is held in the store.
    """

    def __init__(self, state: State, kind: str | None, prefix: str, page_size: int) -> None:
        self._state = state
        self._ask = (kind, prefix)
        self._page_size = _page_size(page_size)
        self._cursor: str | None = ""  # None: no page is left
        self._rows: list[tuple[str, Any, int, int]] = []
        self._next = 0
        self._fetching = False

    def __aiter__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        while self._next == len(self._rows):
            if self._cursor is None:
                raise StopAsyncIteration
            with self._alone():
                self._take(await self._page())
        return self._row()

    def __next__(self) -> tuple[str, Any]:
        while self._next == len(self._rows):
            if self._cursor is None:
                raise StopIteration
            with self._alone():
                self._take(self._page().wait())
        return self._row()

    def _page(self) -> Pending[tuple[list[tuple[str, Any, int, int]], str]]:
        assert self._cursor is not None
        kind, prefix = self._ask
        return self._state._scan(kind, prefix, self._cursor, self._page_size)

    def _take(self, page: tuple[list[tuple[str, Any, int, int]], str]) -> None:
        self._rows, cursor = page
        self._cursor, self._next = cursor or None, 0

    def _row(self) -> tuple[str, Any]:
        key, value, _version, _expires = self._rows[self._next]
        self._next += 1
        return key, value

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        if self._fetching:
            raise RuntimeError("this scan is already being iterated: call scan() once for each loop")
        self._fetching = True
        try:
            yield
        finally:
            self._fetching = False


def _page_size(given: object) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= 10_000:
        raise ConfigValidationError(
            "page_size is not valid", "page_size", "an integer from 1 to 10000", repr(given)
        )
    return given


def to_json(value: Any) -> str:
    """The JSON text of a value: refuses what would come back as something else."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigValidationError(
            f"the value cannot be written as JSON ({error}): use dict, list, str, int, float, bool and None",
            "value",
        ) from None


def make_versioned(value: Any, version: int, expires_at_ms: int) -> Versioned:
    """What the core has read; 0 ms: never expires."""
    return Versioned(value, version, from_ms(expires_at_ms) if expires_at_ms else None)


def make_due(key: str, kind: str, due_ms: int, claim: int) -> Due:
    """What the core has claimed."""
    return Due(key, kind, from_ms(due_ms), claim)


def from_ms(milliseconds: int) -> datetime:
    """Milliseconds since 1970 as a moment in UTC; beyond what datetime can say, its last moment."""
    try:
        seconds, rest = divmod(milliseconds, 1000)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)
    except (OverflowError, ValueError, OSError):
        return datetime.max.replace(tzinfo=UTC)


install_records(make_versioned, make_due)
