"""PostgreSQL itself refuses what a holder writes that lost its lock.

A lock cannot stop a process that was suspended while it held it: the process wakes up, and writes. Its
fencing token can, where the table that it writes to knows the newest token. `guard_sql` gives the SQL of
triggers that keep a column with the token of the last writer and refuse any write that comes with an older
one; `guard` installs them.

    async with store.lock("invoice-42", ttl=30) as lease:
        await connection.execute(
            "UPDATE invoices SET state = 'sent', fence = $1 WHERE id = 42", lease.token
        )

The refusal is decided under the row's lock, so it does not matter who is faster. It arrives as an error of
the driver with SQLSTATE `RSF01`; `is_stale` recognizes it.

What the guard does not see: docs/reference/fencing.md.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

from ratesync.errors import ConfigValidationError

__all__ = ["STALE_TOKEN", "TOKEN_MISSING", "guard", "guard_sql", "is_stale", "unguard", "unguard_sql"]

#: SQLSTATE of a write with an older fencing token than the row, or its scope, was written with.
STALE_TOKEN = "RSF01"
#: SQLSTATE of a write without any fencing token.
TOKEN_MISSING = "RSF02"

_MAX_IDENTIFIER = 63
# PostgreSQL fires triggers in the order of their names: what others make of the row is seen.
_TRIGGER = "zzz_ratesync_fence"


def guard_sql(
    table: str,
    *,
    schema: str = "public",
    column: str = "fence",
    scope: Sequence[str] = (),
    strict: bool = False,
    add_column: bool = False,
) -> str:
    """The SQL that guards a table: to be run by its owner, as often as wanted, as one script.

    Args:
        table: the table to be guarded.
        schema: where it is.
        column: BIGINT column for the fencing token of the last write.
        scope: columns that name the lock which guards a row. Without them each row remembers its own newest
            token, which is all that updates of one row need. With them the newest token of each scope is kept
            in a table `<table>_fences`, and an INSERT of a further row with an older token is refused, too.
        strict: also refuse an UPDATE that does not set the column.
        add_column: add the column where it is missing.

    Raises:
        ConfigValidationError: a name that PostgreSQL cannot have.

    Example:
        >>> STALE_TOKEN in guard_sql("invoices", column="fence")
        True
    """
    names = _Names(table, schema, column, scope)
    parts = []
    if add_column:
        parts.append(f"ALTER TABLE {names.table} ADD COLUMN IF NOT EXISTS {names.column} BIGINT;")
    if scope:
        parts.append(
            f"CREATE TABLE IF NOT EXISTS {names.marks} (\n"
            '    scope TEXT COLLATE "C" PRIMARY KEY,\n'
            "    fence BIGINT NOT NULL\n"
            ") WITH (fillfactor = 80);"
        )
    parts.append(_row_function(names))
    parts.append(_trigger(names, _TRIGGER, "BEFORE INSERT OR UPDATE", "ROW", names.function))
    if strict:
        parts.append(_note_function(names))
        # The first says that the column was not set, the second, which only fires when it was, that it was.
        parts.append(_trigger(names, f"{_TRIGGER}_1", "BEFORE UPDATE", "STATEMENT", f"{names.note} ('')"))
        parts.append(
            _trigger(
                names,
                f"{_TRIGGER}_2",
                f"BEFORE UPDATE OF {names.column}",
                "STATEMENT",
                f"{names.note} ('set')",
            )
        )
        parts.append(_strict_function(names))
        parts.append(_trigger(names, f"{_TRIGGER}_3", "BEFORE UPDATE", "ROW", names.strict))
    else:
        parts.append(_drop_strict(names))
    return "\n".join(parts) + "\n"


def unguard_sql(
    table: str,
    *,
    schema: str = "public",
    column: str = "fence",
    scope: Sequence[str] = (),
) -> str:
    """The SQL that removes what `guard_sql` made; column and `<table>_fences` stay, as they are data.

    Example:
        >>> "DROP TRIGGER" in unguard_sql("invoices")
        True
    """
    names = _Names(table, schema, column, scope)
    return "\n".join(
        (
            f"DROP TRIGGER IF EXISTS {_TRIGGER} ON {names.table};",
            _drop_strict(names),
            f"DROP FUNCTION IF EXISTS {names.function} ();\n",
        )
    )


async def guard(connection: Any, table: str, **options: Any) -> None:
    """Runs `guard_sql` over a connection of asyncpg or psycopg, in one transaction.

    Args:
        connection: what has `execute(sql)`: a connection or pool of asyncpg, a connection of psycopg. With
            psycopg the transaction is yours to commit, unless it is in autocommit.
        table: as in `guard_sql`, like the options.

    Example:
        >>> await guard(connection, "invoices", add_column=True)  # doctest: +SKIP
    """
    await _execute(connection, guard_sql(table, **options))


async def unguard(connection: Any, table: str, **options: Any) -> None:
    """Runs `unguard_sql`, as `guard` does.

    Example:
        >>> await unguard(connection, "invoices")  # doctest: +SKIP
    """
    await _execute(connection, unguard_sql(table, **options))


def is_stale(error: BaseException) -> bool:
    """Whether an error of asyncpg, psycopg or SQLAlchemy says that a fencing token is too old.

    Example:
        >>> is_stale(ValueError())
        False
    """
    for candidate in (error, getattr(error, "orig", None), error.__cause__):
        if getattr(candidate, "sqlstate", None) == STALE_TOKEN:
            return True
    return False


async def _execute(connection: Any, sql: str) -> None:
    outcome = connection.execute(sql)
    if inspect.isawaitable(outcome):
        await outcome


# Names --------------------------------------------------------------------------------------------


def _bad(option: str, expected: str, received: object) -> ConfigValidationError:
    message = f"{option}: expected {expected}, got {received!r}"
    error = ConfigValidationError(message, option, expected)
    error.received = received
    return error


def _identifier(option: str, name: object) -> str:
    """A quoted identifier."""
    if not isinstance(name, str):
        raise _bad(option, "a string", name)
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise _bad(option, "a name of valid Unicode", name) from None
    if not 1 <= size <= _MAX_IDENTIFIER or "\0" in name:
        raise _bad(option, f"1 to {_MAX_IDENTIFIER} bytes without NUL, as PostgreSQL's names have", name)
    quoted = name.replace('"', '""')
    return f'"{quoted}"'


def _literal(text: str) -> str:
    """A string constant that means the same whatever standard_conforming_strings says."""
    doubled = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{doubled}'"


class _Names:
    """The quoted names of everything that belongs to one guard."""

    def __init__(self, table: str, schema: str, column: str, scope: Sequence[str]) -> None:
        if isinstance(scope, str):
            raise _bad("scope", 'a list of column names, as ["id"]', scope)
        where = _identifier("schema", schema)
        self.table = f"{where}.{_identifier('table', table)}"
        self.column = _identifier("column", column)
        self.plain_column = column
        self.scope = [_identifier("scope", name) for name in scope]
        # Of any table name, however long; the same for each run.
        digest = hashlib.sha256(f"{schema}\0{table}\0{column}".encode()).hexdigest()[:8]
        self.function = f'{where}."ratesync_fence_{digest}"'
        self.note = f'{where}."ratesync_fence_{digest}_note"'
        self.strict = f'{where}."ratesync_fence_{digest}_strict"'
        self.setting = f"ratesync.fence_{digest}"
        self.marks = ""
        if scope:
            if len(table.encode()) > _MAX_IDENTIFIER - len("_fences"):
                raise _bad("table", "at most 56 bytes with scope, for the name of <table>_fences", table)
            self.marks = f"{where}.{_identifier('table', table + '_fences')}"

    def message(self, text: str, *values: str) -> str:
        """format(...) of a message about this table; $ stands for table and column."""
        return f"pg_catalog.format({', '.join([_literal(text), *values])})"


# Statements ---------------------------------------------------------------------------------------


def _function(name: str, body: str, more: str = "") -> str:
    # The body holds names that may hold anything, also dollar quotes.
    tag = "ratesync"
    while f"${tag}$" in body:
        tag += "_"
    return (
        f"CREATE OR REPLACE FUNCTION {name} () RETURNS trigger\n"
        f"LANGUAGE plpgsql{more} AS ${tag}$\n{body}${tag}$;"
    )


def _trigger(names: _Names, trigger: str, when: str, each: str, call: str) -> str:
    call = call if call.endswith(")") else f"{call} ()"
    return (
        f"DROP TRIGGER IF EXISTS {trigger} ON {names.table};\n"
        f"CREATE TRIGGER {trigger} {when} ON {names.table} FOR EACH {each} EXECUTE FUNCTION {call};"
    )


def _raise(state: str, message: str, hint: str, indent: str = "    ") -> str:
    return (
        f"{indent}RAISE EXCEPTION USING ERRCODE = '{state}', MESSAGE = {message},\n"
        f"{indent}    HINT = {_literal(hint)},\n"
        f"{indent}    SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;\n"
    )


_WHERE = "TG_TABLE_SCHEMA, TG_TABLE_NAME"
_STALE_HINT = "The lock was taken by somebody else meanwhile: stop this job, and acquire the lock anew."
_MISSING_HINT = "Write the fencing token of the lock (lease.token) with every INSERT and UPDATE."


def _row_function(names: _Names) -> str:
    missing = names.message(
        "no fencing token: %I.%I is guarded, and column %I was not set", _WHERE, _literal(names.plain_column)
    )
    body = (
        "BEGIN\n"
        f"  IF NEW.{names.column} IS NULL THEN\n"
        + _raise(TOKEN_MISSING, missing, _MISSING_HINT)
        + "  END IF;\n"
    )
    if names.scope:
        key = ", ".join(f"NEW.{column}" for column in names.scope)
        stale = names.message(
            "stale fencing token %s: a newer one has written to %I.%I in this scope already",
            f"NEW.{names.column}",
            _WHERE,
        )
        body += (
            # Decided under the lock on the scope's mark: whoever comes second sees the first.
            f"  INSERT INTO {names.marks} AS m (scope, fence)\n"
            f"  VALUES (pg_catalog.jsonb_build_array({key})::text, NEW.{names.column})\n"
            "  ON CONFLICT (scope) DO UPDATE SET fence = excluded.fence WHERE m.fence <= excluded.fence;\n"
            "  IF NOT FOUND THEN\n" + _raise(STALE_TOKEN, stale, _STALE_HINT) + "  END IF;\n"
        )
        # Those who write to the table need no rights on the marks.
        more = " SECURITY DEFINER SET search_path = pg_catalog, pg_temp"
    else:
        stale = names.message(
            "stale fencing token %s: the row of %I.%I was already written under token %s",
            f"NEW.{names.column}",
            _WHERE,
            f"OLD.{names.column}",
        )
        body += (
            f"  IF TG_OP = 'UPDATE' AND NEW.{names.column} < OLD.{names.column} THEN\n"
            + _raise(STALE_TOKEN, stale, _STALE_HINT)
            + "  END IF;\n"
        )
        more = ""
    return _function(names.function, body + "  RETURN NEW;\nEND\n", more)


def _note_function(names: _Names) -> str:
    body = (
        f"BEGIN\n  PERFORM pg_catalog.set_config('{names.setting}', TG_ARGV[0], true);\n  RETURN NULL;\nEND\n"
    )
    return _function(names.note, body)


def _strict_function(names: _Names) -> str:
    missing = names.message(
        "no fencing token: this UPDATE of %I.%I does not set column %I",
        _WHERE,
        _literal(names.plain_column),
    )
    body = (
        "BEGIN\n"
        f"  IF pg_catalog.current_setting('{names.setting}', true) IS DISTINCT FROM 'set' THEN\n"
        + _raise(TOKEN_MISSING, missing, _MISSING_HINT)
        + "  END IF;\n  RETURN NEW;\nEND\n"
    )
    return _function(names.strict, body)


def _drop_strict(names: _Names) -> str:
    drops = [f"DROP TRIGGER IF EXISTS {_TRIGGER}_{n} ON {names.table};" for n in (1, 2, 3)]
    drops += [f"DROP FUNCTION IF EXISTS {name} ();" for name in (names.note, names.strict)]
    return "\n".join(drops)
