"""`ratesync locks`: who has which lock, and breaking one by hand."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from ratesync.cli._common import Failure, config_option, load, make_console, open_state

if TYPE_CHECKING:
    from ratesync._state_schema import StateOptions
    from ratesync.stores import LockRow, Store

limit_option = click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="Rows."
)


@click.group(invoke_without_command=True)
@config_option
@click.pass_context
def locks(ctx: click.Context, config_file: str | None = None) -> None:
    """Show the locks of [state]: who has them, since when, until when, and how many wait.

    \b
    Examples:
      ratesync locks
      ratesync locks list -c acteon.toml --json | jq '.[] | select(.waiters > 0)'
      ratesync locks break invoice-42
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_locks, config_file=config_file)


@locks.command("list")
@config_option
@limit_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def list_locks(config_file: str | None = None, limit: int = 100, as_json: bool = False) -> None:
    """List the locks of [state], in all namespaces and tenants.

    The embedded store belongs to one process, so its locks are not seen from here.
    """
    store, options = _open(config_file)
    rows = store.locks(options.prefix, limit).wait()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        where = f"prefix {options.prefix!r} in {options.store or store.engine}"
        note = ", which is empty in every new process" if store.engine == "memory" else ""
        click.echo(f"no locks are held ({where}{note})")
        return
    make_console().print(_table(rows))


@locks.command("break")
@config_option
@click.argument("name")
@click.option("--namespace", help="Of the lock; left out: that of [state].")
@click.option("--tenant", help="Of the lock; left out: that of [state].")
@click.option("--token", type=click.IntRange(1), help="Only while it is held under this token.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def break_lock(
    config_file: str | None,
    name: str,
    namespace: str | None,
    tenant: str | None,
    token: int | None,
    yes: bool,
) -> None:
    """Take the lock NAME from its holder, and wake who waits for it.

    The holder learns of it at its next renewal; until then it may go on working, so only fencing keeps its
    writes out. Asks before, and breaks exactly the holding that it showed.

    Exit status: 1 when the lock is not held (any more).
    """
    store, options = _open(config_file)
    space = namespace or options.namespace, tenant or options.tenant
    held = [
        row
        for row in store.locks(options.prefix, 10_000).wait()
        if (row["namespace"], row["tenant"], row["name"]) == (*space, name)
        and token in (None, row["token"])
        and row["expires_in"] > 0
    ]
    if not held:
        under = "" if token is None else f" under token {token}"
        raise Failure(
            f"lock {name!r} of namespace {space[0]!r}, tenant {space[1]!r} is not held{under}; "
            "`ratesync locks` lists those that are"
        )
    (row,) = held
    if not yes:
        make_console().print(_table(held))
        click.confirm(f"Break lock {name!r}? Its holder may go on working", abort=True)
    broken = store.break_lock(
        name, row["token"], prefix=options.prefix, namespace=space[0], tenant=space[1]
    ).wait()
    if not broken:
        click.echo(f"ratesync: lock {name!r} was given back or taken by another holder meanwhile", err=True)
        sys.exit(1)
    click.echo(f"broke lock {name!r}, which {row['holder'] or 'somebody'} had under token {row['token']}")


def _open(config_file: str | None) -> tuple[Store, StateOptions]:
    parent = click.get_current_context().parent  # `ratesync locks -c FILE list` means the same
    if config_file is None and parent is not None:
        config_file = parent.params.get("config_file")
    load(config_file)
    state = open_state()
    if state is None:
        raise Failure("the configuration has no [state], so it names no store of locks: add one")
    return state


def _table(rows: list[LockRow]) -> Table:
    """Who has which lock. Names are shown as they are, quoted where they are not plain."""
    columns = ("lock", "namespace", "tenant", "holder", "since", "expires in", "waiting", "token")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        since = datetime.fromtimestamp(time.time() - row["held_for"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        expires = f"{row['expires_in']:.1f} s" if row["expires_in"] > 0 else "expired"
        table.add_row(
            *(escape(_plain(row[field])) for field in ("name", "namespace", "tenant", "holder")),
            f"{since}Z ({row['held_for']:.1f} s)",
            expires,
            str(row["waiters"]),
            str(row["token"]),
        )
    return table


def _plain(text: str) -> str:
    """A name that cannot play tricks with a terminal."""
    return text if text.isprintable() else repr(text)
