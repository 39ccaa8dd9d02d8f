"""Operations that are done once per key, however often they are asked for: the first caller's result is kept.

A key's record is a row of state of the kind `idempotency`. The first caller creates it with a lease, which
the I/O thread renews while the body runs; its result replaces the record by a swap that names the
version of that creation, so whoever was taken over cannot commit. A record whose lease is over is
absent to the next caller, who runs the operation again. Who waits for a result stands at the key's
bell, which is rung when the record was replaced or removed; that it was rung says that looking is
worth it, no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ratesync._pending import Pending, script
from ratesync._schemas import describe
from ratesync._state_schema import MAX_KEY_BYTES, check_seconds, check_text
from ratesync.errors import (
    ConfigValidationError,
    IdempotencyMismatchError,
    InternalError,
    LeaseLostError,
    OperationFailedError,
    OperationInProgressError,
    StoreError,
)
from ratesync.states import State, to_json

if TYPE_CHECKING:
    from ratesync._engine import Kept
    from ratesync._in_transaction import CommitIn
    from ratesync.stores import Store

__all__ = ["KIND", "Idempotent", "Operation"]

KIND = "idempotency"
MAX_FINGERPRINT = 1024  # characters
MAX_REASON = 1000  # characters of a failure that is kept
MAX_RESULT_BYTES = 64 * 2**20 - 2**16  # a value has 64 MiB at most, and the record says more than the result
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5  # seconds between two tries to store a result
OUTAGE = 60.0  # seconds without any answer that who waits puts up with, as with a lock
RETRY_AFTER = 1.0  # seconds, for who does not wait

log = logging.getLogger("ratesync")
T = TypeVar("T")
_background: set[asyncio.Task[Any]] = set()  # asyncio keeps weak references only


class Operation:
    """One call of an idempotent operation, as the body sees it. Made by entering `idempotent()`.

    Attributes:
        key: the idempotency key.
        done: the operation was done before: `result` is the stored one, and the body has nothing to do.
    """

    def __init__(self, owner: Idempotent, version: int, record: dict[str, Any], *, done: bool) -> None:
        self.key = owner.key
        self.done = done
        self._owner = owner
        self._version = version
        self._record = record
        self._result: Any = record.get("result")
        self._kept: Kept | None = None
        self._in_transaction = False  # commit_in() was executed: whether it counts, the caller's COMMIT says

    @property
    def result(self) -> Any:
        """What the operation gave: str, numbers, bool, None, lists and dicts of these.

        Assign it in the body; it is stored when the body ends without an exception, as it was when it was
        assigned. A body that assigns nothing stores None.

        Raises:
            ConfigValidationError: on assignment: JSON cannot say it, or the operation is done already.
        """
        return self._result

    @result.setter
    def result(self, value: Any) -> None:
        if self.done:
            raise ConfigValidationError(
                f"the operation {self.key!r} is done and its result stored: look at op.done first, and leave "
                "the body when it is True",
                "result",
            )
        copy = json.loads(_storable(value))  # fails here, where the mistake is, and not when the body is over
        self._result = value
        self._record = {**self._record, "result": copy}

    @property
    def lost(self) -> bool:
        """The lease is over: somebody else may be running the operation, and the result will be refused."""
        return self._kept is not None and self._kept.lost

    def commit_in(self, connection: Any) -> CommitIn:
        """Stores the result in the caller's own PostgreSQL transaction, together with its effects.

        Effects and result are then committed together, or neither: exactly once, also when the process dies
        in between. Call it last in the transaction, and commit soon: until then the record is locked, and
        other callers of this key wait for it.

        Args:
            connection: of asyncpg or psycopg (sync or async), to the database of the store, in a
                transaction of READ COMMITTED.

        Returns:
            To be awaited; with a synchronous psycopg connection, call `.wait()` on it.

        Raises:
            LeaseLostError: somebody took over. It leaves the transaction's block, which rolls back.
            ConfigValidationError: the store is not PostgreSQL, or the connection is none of these or
                not in a transaction.
        """
        from ratesync._in_transaction import CommitIn

        return CommitIn(self, connection)

    def _done_record(self) -> dict[str, Any]:
        return {"result": None, **self._record, "state": "done"}


class Idempotent:
    """An idempotent operation, to be entered with `async with` or `with`. Made by `idempotent()`.

    Each object is for one call. `forget()` needs no entering.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        fingerprint: str | bytes | None,
        *,
        ttl: float | timedelta | None,
        lease: float | timedelta,
        wait: float | timedelta | None,
        on_error: Literal["free", "keep"],
        prefix: str,
        namespace: str,
        tenant: str,
        timeout: float | None,
    ) -> None:
        where = "idempotent()"
        self.key = check_text("key", key, where, most=MAX_KEY_BYTES)
        self._fingerprint = _fingerprint(fingerprint, where)
        self._ttl = None if ttl is None else check_seconds("ttl", ttl, where)
        self._lease = check_seconds("lease", lease, where)
        self._wait = None if wait is None else check_seconds("wait", wait, where, zero=True)
        if on_error not in ("free", "keep"):
            raise ConfigValidationError(
                f"{where}: on_error is not valid", "on_error", "'free' or 'keep'", repr(on_error)
            )
        self._keep_failures = on_error == "keep"
        self._state: State = store.state(prefix, namespace, tenant, kind=KIND, codec="json", timeout=timeout)
        self._operation: Operation | None = None
        self._entered = False

    async def __aenter__(self) -> Operation:
        return await self._enter()

    def __enter__(self) -> Operation:
        return self._enter().wait()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave(error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(error).wait()

    def forget(self) -> Pending[bool]:
        """Removes the record of the key, done, failed or running: the next call runs. Was there one?"""
        return self._then_ring(lambda: self._state.delete(self.key))

    @script
    def _then_ring(self, work: Callable[[], Pending[T]]) -> Generator[Pending[Any], Any, T]:
        result: T = yield work()
        self._ring()
        return result

    def _ring(self) -> None:
        """The record is another one now, or gone: whoever waits for it looks."""
        with contextlib.suppress(StoreError):  # shut down: who waits elsewhere looks now and then
            self._state._ring(self.key, KIND)

    # Entering -------------------------------------------------------------------------------------

    @script
    def _enter(self) -> Generator[Pending[Any], Any, Operation]:
        if self._entered:
            raise RuntimeError("this idempotent() was already entered: call idempotent() once for each call")
        self._entered = True
        # The owner's mark tells records apart that one key has one after the other.
        mine = {"state": "running", "owner": secrets.token_hex(8), "fingerprint": self._fingerprint}
        started = self._state.store._now()
        seen = 0
        waited = False
        asked = away_since = math.inf
        while True:
            asked = min(asked, self._state.store._now())
            try:
                created, version, found = yield from self._create(mine)
            except StoreError as problem:
                # Who waits keeps his place while the store is away; a first question is answered at once.
                now = self._state.store._now()
                away_since = min(away_since, now)
                hopeful = waited and (problem.retryable or problem.in_doubt)
                if not hopeful or now - started >= (self._wait or 0) or now - away_since >= OUTAGE:
                    raise
                yield _Sleep(LONGEST_PAUSE)
                continue
            record = mine if created else _record(found, self.key)
            # Ours as well: it was created, and the answer lost.
            if record.get("owner") == mine["owner"]:
                operation = Operation(self, version, mine, done=False)
                # The lease runs on the server since some moment after we asked.
                age = self._state.store._now() - asked
                operation._kept = self._state._keep(self.key, version, self._lease, KIND, age)
                self._operation = operation
                return operation
            asked = away_since = math.inf
            self._compare(record)
            if record["state"] == "done":
                return Operation(self, version, record, done=True)
            if record["state"] == "failed":
                raise OperationFailedError(self.key, str(record.get("error")))
            if self._wait is None:
                raise OperationInProgressError(self.key, min(self._lease, RETRY_AFTER))
            left = started + self._wait - self._state.store._now()
            if left <= 0:
                raise OperationInProgressError(self.key, min(self._lease, RETRY_AFTER), self._wait)
            waited = True
            seen = yield self._state._bell(self.key, KIND, seen, left)

    def _create(self, mine: dict[str, Any]) -> Generator[Pending[Any], Any, tuple[bool, int, Any]]:
        try:
            begun: tuple[bool, int, Any] = yield self._state._begin(self.key, mine, self._lease, KIND)
            return begun
        except (Exception, GeneratorExit):
            raise
        except BaseException:  # cancelled, or Ctrl-C: it may have been created, and nobody would run it
            _detach(self._abandon(mine["owner"]))
            raise

    @script
    def _abandon(self, owner: str) -> Generator[Pending[Any], Any, None]:
        # In order: operations on one key are executed as they were submitted.
        found = yield self._state.get_versioned(self.key, kind=KIND)
        if found is not None and isinstance(found.value, dict) and found.value.get("owner") == owner:
            yield self._then_ring(lambda: self._state.delete(self.key, found.version, kind=KIND))

    def _compare(self, record: dict[str, Any]) -> None:
        theirs = record.get("fingerprint")
        if self._fingerprint is not None and theirs is not None and theirs != self._fingerprint:
            raise IdempotencyMismatchError(self.key)

    # Leaving --------------------------------------------------------------------------------------

    @script
    def _leave(self, error: BaseException | None) -> Generator[Pending[Any], Any, None]:
        operation, self._operation = self._operation, None
        if operation is None:
            return  # it was done before
        kept = operation._kept
        assert kept is not None
        try:
            if error is not None:
                yield from self._failed(operation, error)
            elif not operation._in_transaction:
                yield from self._commit(operation, kept)
        finally:
            kept.stop()
            self._ring()

    def _commit(self, operation: Operation, kept: Kept) -> Generator[Pending[Any], Any, None]:
        pause = FIRST_PAUSE
        while True:
            try:
                stored, _ = yield self._finish(operation)
            except StoreError as problem:
                # What the body did is worth another try while the key is ours. Should the lost one have come
                # through, _refused() recognises the record.
                if kept.lost or not (problem.retryable or problem.in_doubt):
                    raise
                yield _Sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            except (Exception, GeneratorExit):
                raise
            except BaseException:  # cancelled: the body was through, so its result is stored all the same
                _detach(self._then_ring(lambda: self._finish(operation)))
                raise
            if not stored:
                yield from self._refused(operation)
            return

    def _finish(self, operation: Operation) -> Pending[tuple[bool, int]]:
        record = operation._done_record()
        return self._state._finish(self.key, record, operation._version, self._ttl, KIND)

    def _refused(self, operation: Operation) -> Generator[Pending[Any], Any, None]:
        found = yield self._state.get_versioned(self.key, kind=KIND)
        record = found.value if found is not None and isinstance(found.value, dict) else {}
        if record.get("owner") == operation._record["owner"] and record.get("state") == "done":
            return  # it is ours: an earlier try had come through
        raise LeaseLostError(self.key, what_happened(record, self._lease))

    def _failed(self, operation: Operation, error: BaseException) -> Generator[Pending[Any], Any, None]:
        """The body raised `error`, which goes on whatever happens here."""
        if operation._in_transaction:
            # Its transaction may be open around us, with the record locked: nobody can wait for it here.
            ended = self._then_ring(lambda: self._state.delete(self.key, operation._version, kind=KIND))
            _detach(ended, needs_loop=True)
            return
        try:
            if self._keep_failures:
                record = {**operation._record, "state": "failed", "error": _reason(error)}
                record.pop("result", None)
                yield self._state._finish(self.key, record, operation._version, self._ttl, KIND)
            else:
                yield self._state.delete(self.key, operation._version, kind=KIND)
        except StoreError as problem:
            log.warning(
                "the key %r of a failed operation could not be freed (%s): its lease of %g s does it",
                self.key,
                problem,
                self._lease,
            )


def what_happened(record: dict[str, Any], lease: float) -> str:
    """From what was found in place of a record that could not be replaced; empty: nothing."""
    lapsed = f"its lease of {lease:g} s had run out"
    if not record:
        return f"{lapsed} or was ended, and the key is free or used for something else"
    if record.get("state") == "done":
        return f"{lapsed}, and another caller did the operation and stored its result"
    if record.get("state") == "failed":
        return f"{lapsed}, and another caller tried the operation and failed"
    return f"{lapsed}, and another caller is running the operation"


def _record(found: object, key: str) -> dict[str, Any]:
    if isinstance(found, dict) and found.get("state") in ("running", "done", "failed"):
        return found
    raise InternalError(
        f"the value of {key!r} of kind {KIND!r} is no record of an operation: something else writes keys of "
        "this kind; give it another kind, namespace or prefix"
    )


def _storable(value: Any) -> str:
    text = to_json(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigValidationError(
            "the result has a lone surrogate, which cannot be stored: decode what it is made of with "
            "errors='replace'",
            "result",
        ) from None
    if size > MAX_RESULT_BYTES:
        raise ConfigValidationError(
            "the result is too large: store it elsewhere, and give its name as the result",
            "result",
            f"at most {MAX_RESULT_BYTES} bytes of JSON",
            f"{size} bytes",
        )
    return text


def _reason(error: BaseException) -> str:
    """What is kept of a failure; whatever its text is, it can be stored."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be had)"
    reason = f"{type(error).__name__}: {text}"[:MAX_REASON]
    return reason.encode(errors="backslashreplace").decode()


def _fingerprint(given: object, where: str) -> str | None:
    if given is None:
        return None
    if isinstance(given, bytes):
        given = given.hex()
    if not isinstance(given, str) or not 0 < len(given) <= MAX_FINGERPRINT:
        raise ConfigValidationError(
            f"{where}: fingerprint is not valid: pass a digest, such as hashlib.sha256(body).hexdigest()",
            "fingerprint",
            f"a str of 1 to {MAX_FINGERPRINT} characters, or bytes of half as many",
            describe("fingerprint", given),
        )
    return given


class _Sleep:
    """A Pending that lets time pass."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __await__(self) -> Generator[Any, Any, None]:
        return asyncio.sleep(self._seconds).__await__()

    def wait(self) -> None:
        time.sleep(self._seconds)

    def send(self, value: Any, /) -> Any:
        raise NotImplementedError("part of a Script only")

    throw = send

    def close(self) -> None:
        pass


def _detach(work: Pending[Any], *, needs_loop: bool = False) -> None:
    """Does `work` without anybody waiting for it or for its failure; the lease ends what it leaves undone."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        if needs_loop:
            work.close()
            return
        with contextlib.suppress(StoreError):
            work.wait()
        return

    async def run() -> None:
        with contextlib.suppress(StoreError):
            await work

    task = loop.create_task(run(), name="ratesync-idempotent")
    _background.add(task)
    task.add_done_callback(_background.discard)
