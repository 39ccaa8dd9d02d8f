"""`ratesync migrate` and `ratesync doctor`: the tables and servers behind the stores."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

import ratesync
from ratesync import errors
from ratesync.cli._common import (
    config_option,
    find,
    make_console,
    open_state,
    open_stores,
    say_ignored,
    store_option,
)
from ratesync.config import read_config

if TYPE_CHECKING:
    from ratesync.stores import MigrationStep


@click.command()
@config_option
@store_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--sql", is_flag=True, help="Print the SQL of the outstanding steps; change nothing.")
def migrate(config_file: str | None, store_id: str | None, dry_run: bool, sql: bool) -> None:
    """Create or update the tables of [stores] and of [state], where their backends have tables.

    \b
    Examples:
      ratesync migrate -c acteon.toml --dry-run
      ratesync migrate --sql --store db | psql "$ADMIN_URL"
    """
    stores = open_stores(config_file, store_id)
    say_ignored(read_config(find(config_file)))
    look = dry_run or sql
    for name, store in stores:
        _report(name, store.migrate(dry_run=look).wait(), dry_run, sql)
    state = open_state(store_id)
    if state is not None:
        store, options = state
        name = f"[state] {options.prefix!r} in {options.store or store.engine}"
        _report(name, store.migrate_state(options.prefix, dry_run=look).wait(), dry_run, sql)
    elif not stores:
        click.echo("nothing to migrate: neither [stores] nor [state] are configured")


def _report(name: str, steps: list[MigrationStep], dry_run: bool, sql: bool) -> None:
    outstanding = [step for step in steps if not step["applied"]]
    if sql:
        what = name if name.startswith("[state]") else f"store {name}"
        comment = " ".join(what.splitlines())  # a name cannot end the comment
        click.echo(f"-- {comment}: {len(outstanding)} outstanding steps")
        for step in outstanding:
            text = step["sql"].rstrip()
            click.echo(f"-- {step['number']} {step['name']}\n{text}{'' if text.endswith(';') else ';'}")
        return
    verb = "would apply" if dry_run else "applied"
    for step in outstanding:
        click.echo(f"{name}: {verb} {step['number']} {step['name']}")
    if not outstanding:
        click.echo(f"{name}: {'up to date' if steps else 'nothing to migrate'}")


@click.command()
@config_option
@store_option
def doctor(config_file: str | None, store_id: str | None) -> None:
    """Check the stores, that of [state] included: connection, version, schema, grants; and say the cure.

    \b
    Examples:
      ratesync doctor
      ratesync doctor -c config/rate-sync.toml --store db

    Exit status: 1 when there is a finding of level error.
    """
    table = Table("store", "level", "subject", "finding", box=None, pad_edge=False)
    failed = False
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    stores = open_stores(config_file, store_id)
    state = open_state(store_id)
    if state is not None:
        ratesync.state()  # its tables are looked at, too
        if all(store is not state[0] for _, store in stores):
            stores.append(("[state]", state[0]))
    for name, store in stores:
        try:
            findings = store.doctor().wait()
        except errors.StoreError as error:
            findings = [{"level": "error", "subject": "connection", "message": str(error)}]
        for finding in findings:
            failed = failed or finding["level"] == "error"
            level = f"[{styles.get(finding['level'], 'none')}]{escape(finding['level'])}[/]"
            table.add_row(escape(name), level, escape(finding["subject"]), escape(finding["message"]))
    make_console().print(table)
    if failed:
        sys.exit(1)
