"""Writes a record of state in a transaction of the caller's own, with the caller's own driver.

The statement is the one place outside the core that writes the table of state; it does what a swap there
does: the row's version decides, and grows by one.
"""

from __future__ import annotations

import inspect
import secrets
import typing
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ratesync.errors import ConfigValidationError, LeaseLostError
from ratesync.states import to_json

if TYPE_CHECKING:
    from ratesync.idempotency import Operation

JSON = 2  # store::Value::Type::json

_SQL = """
UPDATE {table} SET type = {json}, value = {value}, number = NULL, version = version + 1, op_id = {op},
 updated_at = clock_timestamp(), expires_at = clock_timestamp() + {ttl} * interval '1 millisecond'
 WHERE namespace = {namespace} AND tenant = {tenant} AND kind = {kind} AND key = {key}
 AND version = {version} AND NOT removed"""

_FIELDS = ("value", "op", "ttl", "namespace", "tenant", "kind", "key", "version")
_TYPES = ("bytea", "bigint", "float8", "text", "text", "text", "text", "bigint")


class CommitIn:
    """What `Operation.commit_in` returns: await it, or `.wait()` for it with a synchronous connection."""

    def __init__(self, operation: Operation, connection: Any) -> None:
        owner = operation._owner
        store = owner._state.store
        if store.engine != "postgres":
            raise ConfigValidationError(
                "commit_in() needs the records in PostgreSQL, in the connection's database, and they are "
                f"in {store.engine}: give [state] backend = 'postgres', or leave commit_in() out",
                "backend",
            )
        if operation.done:
            raise ConfigValidationError(
                f"the operation {operation.key!r} is done already: look at op.done first"
            )
        self._operation = operation
        self._connection = connection
        self._driver = _driver_of(connection)
        schema = str(getattr(store._options, "schema_name", "public"))
        table = f"{_quoted(schema)}.{_quoted(owner._state.prefix + 'state')}"
        marks = (
            [f"${n}::{kind}" for n, kind in enumerate(_TYPES, 1)]
            if self._driver == "asyncpg"
            else [f"%s::{kind}" for kind in _TYPES]
        )
        self._sql = _SQL.format(
            table=table if self._driver == "asyncpg" else table.replace("%", "%%"),
            json=JSON,
            **dict(zip(_FIELDS, marks, strict=True)),
        )
        self._values = (
            to_json(operation._done_record()).encode(),
            secrets.randbits(62) + 1,
            None if owner._ttl is None else float(max(1, round(owner._ttl * 1000))),
            owner._state.namespace,
            owner._state.tenant,
            owner._state.kind,
            operation.key,
            operation._version,
        )

    def __await__(self) -> Generator[Any, Any, None]:
        return self._run().__await__()

    async def _run(self) -> None:
        if self._driver == "psycopg":
            raise ConfigValidationError(
                "this connection is synchronous, and awaiting it would block the event loop: use "
                "op.commit_in(connection).wait() in a plain thread, or psycopg.AsyncConnection",
                "connection",
            )
        self._begin()
        if self._driver == "asyncpg":
            status = await self._connection.execute(self._sql, *self._values)
            self._end(int(status.split()[-1]))
        else:
            cursor = await self._connection.execute(self._sql, self._values)
            self._end(cursor.rowcount)

    def wait(self) -> None:
        """With a synchronous psycopg connection: blocks until the record is written."""
        if self._driver != "psycopg":
            raise ConfigValidationError(
                "this connection is asynchronous: await op.commit_in(connection)", "connection"
            )
        self._begin()
        self._end(self._connection.execute(self._sql, self._values).rowcount)

    def _begin(self) -> None:
        if not _in_transaction(self._connection, self._driver):
            raise ConfigValidationError(
                "commit_in() has to share a transaction with what it belongs to, and the connection is in "
                "none: `async with connection.transaction():` around both",
                "connection",
            )
        # A renewal would wait for our transaction, and all that travels with it.
        if self._operation._kept is not None:
            self._operation._kept.stop()

    def _end(self, rows: int) -> None:
        operation = self._operation
        if rows != 1:
            raise LeaseLostError(
                operation.key,
                "commit_in() was called before, in a transaction that is not rolled back: call it once, last"
                if operation._in_transaction
                else "its lease had run out and somebody took over, or the connection leads to another "
                "database than the store",
            )
        operation._in_transaction = True


def _driver_of(connection: object) -> str:
    if hasattr(connection, "fetchrow") and hasattr(connection, "is_in_transaction"):
        return "asyncpg"
    execute = getattr(connection, "execute", None)
    if execute is not None and hasattr(connection, "pgconn") and hasattr(connection, "info"):
        return "psycopg async" if inspect.iscoroutinefunction(execute) else "psycopg"
    _refuse(connection)


def _refuse(connection: object) -> typing.NoReturn:
    kind = type(connection)
    raise ConfigValidationError(
        f"commit_in() takes a connection of asyncpg or psycopg 3, not {kind.__module__}.{kind.__qualname__}: "
        "pass the driver's own (SQLAlchemy: (await connection.get_raw_connection()).driver_connection)",
        "connection",
    )


def _in_transaction(connection: Any, driver: str) -> bool:
    if driver == "asyncpg":
        return bool(connection.is_in_transaction())
    # psycopg begins a transaction by itself, unless it is in autocommit.
    return not connection.autocommit or int(connection.info.transaction_status) in (1, 2)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
