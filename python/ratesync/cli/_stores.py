"""`ratesync migrate` and `ratesync doctor`: the tables and servers behind the stores."""

from __future__ import annotations

import sys

import click
from rich.markup import escape
from rich.table import Table

from ratesync import errors
from ratesync.cli._common import config_option, make_console, open_stores, store_option


@click.command()
@config_option
@store_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--sql", is_flag=True, help="Print the SQL of the outstanding steps; change nothing.")
def migrate(config_file: str | None, store_id: str | None, dry_run: bool, sql: bool) -> None:
    """Create or update the tables of the PostgreSQL stores.

    \b
    Examples:
      ratesync migrate --dry-run
      ratesync migrate --sql --store db | psql "$ADMIN_URL"
    """
    for name, store in open_stores(config_file, store_id):
        steps = store.migrate(dry_run=dry_run or sql).wait()
        outstanding = [step for step in steps if not step["applied"]]
        if sql:
            click.echo(f"-- store {name}: {len(outstanding)} outstanding steps")
            for step in outstanding:
                text = step["sql"].rstrip()
                click.echo(f"-- {step['number']} {step['name']}\n{text}{'' if text.endswith(';') else ';'}")
            continue
        verb = "would apply" if dry_run else "applied"
        for step in outstanding:
            click.echo(f"{name}: {verb} {step['number']} {step['name']}")
        if not outstanding:
            click.echo(f"{name}: {'up to date' if steps else 'nothing to migrate'}")


@click.command()
@config_option
@store_option
def doctor(config_file: str | None, store_id: str | None) -> None:
    """Check the stores: connection, version, schema, grants; and say the cure.

    \b
    Examples:
      ratesync doctor
      ratesync doctor -c config/rate-sync.toml --store db

    Exit status: 1 when there is a finding of level error.
    """
    table = Table("store", "level", "subject", "finding", box=None, pad_edge=False)
    failed = False
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for name, store in open_stores(config_file, store_id):
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
