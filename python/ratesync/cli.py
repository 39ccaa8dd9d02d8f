"""The `ratesync` command: check and write configuration, migrate, diagnose, and look at limits.

Every failure is one line on stderr, never a traceback (RATESYNC_DEBUG=1 shows it). Exit status: 0 all
is well, 1 something is wrong (invalid configuration, findings, store out), 2 wrong usage or no file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratesync import errors
from ratesync._version import __version__


class _Failure(click.ClickException):
    """One clear line and an exit status."""

    def show(self, file: Any = None) -> None:
        click.echo(f"ratesync: {self.format_message()}", file=file, err=file is None)


class _NoFile(_Failure):
    """There is nothing to work on."""

    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("RATESYNC_DEBUG"):
                raise
            if isinstance(error, errors.ConfigFileNotFoundError):
                raise _NoFile(str(error)) from None
            if isinstance(error, errors.RateLimiterError):
                raise _Failure(str(error)) from None
            raise _Failure(
                f"internal error: {type(error).__name__}: {error} (RATESYNC_DEBUG=1 shows where)"
            ) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ratesync")
def cli() -> None:
    """Rate and concurrency limits over memory and PostgreSQL.

    \b
    Examples:
      ratesync init                     write a commented rate-sync.toml
      ratesync check rate-sync.toml     is it valid, and what does it amount to?
      ratesync migrate --dry-run        what would be created?
      ratesync doctor                   is the database ready?
      ratesync status                   who holds what?

    Without -c the file is found as the library does: RATE_SYNC_CONFIG, ./rate-sync.toml,
    ./config/rate-sync.toml. Exit status: 0 fine, 1 something is wrong, 2 wrong usage or no file.
    """


_config_option = click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    help="Configuration; found as the library does when left out.",
)
_store_option = click.option("--store", "store_id", metavar="ID", help="Only this store.")


@cli.command()
@click.argument("file", required=False)
def check(file: str | None) -> None:
    """Validate FILE and print the effective configuration, passwords masked.

    \b
    Examples:
      ratesync check rate-sync.toml
      DATABASE_URL=postgresql://... ratesync check config/rate-sync.toml

    Exit status: 0 valid, 1 not valid (the line names file, table and key), 2 no such file.
    """
    import msgspec

    from ratesync._schemas import as_masked_dict
    from ratesync.config import read_config

    path = _find(file)
    config = read_config(path)
    out = [f"# {path}: valid; {len(config.stores)} stores, {len(config.limiters)} limiters"]
    for store_id, store in config.stores.items():
        out += ["", f"[stores.{errors.toml_key(store_id)}]", f"engine = {_toml(store.engine)}"]
        out += _assignments(as_masked_dict(store.options))
    for limiter_id, limiter in config.limiters.items():
        out += [
            "",
            f"[limiters.{errors.toml_key(limiter_id)}]",
            *_assignments(msgspec.structs.asdict(limiter)),
        ]
    if config.fastapi.trusted_proxy_networks is not None:
        networks = ", ".join(_toml(network) for network in config.fastapi.trusted_proxy_networks)
        out += ["", "[fastapi]", f"trusted_proxy_networks = [{networks}]"]
    click.echo("\n".join(out))


@cli.command()
@click.argument("path", default="rate-sync.toml")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(path: str, force: bool) -> None:
    """Write a commented configuration to PATH (default: rate-sync.toml).

    \b
    Examples:
      ratesync init
      ratesync init config/rate-sync.toml --force
    """
    target = Path(path)
    try:
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        with open(target, "w" if force else "x", encoding="utf-8") as file:
            file.write(_TEMPLATE)
    except OSError as error:
        if target.exists() and not force:
            raise _Failure(f"{path} exists already; --force replaces it") from None
        raise _Failure(f"{path} cannot be written: {error.strerror or error}") from None
    click.echo(f"wrote {path}; next: ratesync check {path}")


@cli.command()
@_config_option
@_store_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--sql", is_flag=True, help="Print the SQL of the outstanding steps; change nothing.")
def migrate(config_file: str | None, store_id: str | None, dry_run: bool, sql: bool) -> None:
    """Create or update the tables of the PostgreSQL stores.

    \b
    Examples:
      ratesync migrate --dry-run
      ratesync migrate --sql --store db | psql "$ADMIN_URL"
    """
    for name, store in _stores(config_file, store_id):
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


@cli.command()
@_config_option
@_store_option
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
    for name, store in _stores(config_file, store_id):
        try:
            findings = store.doctor().wait()
        except errors.StoreError as error:
            findings = [{"level": "error", "subject": "connection", "message": str(error)}]
        for finding in findings:
            failed = failed or finding["level"] == "error"
            level = f"[{styles.get(finding['level'], 'none')}]{escape(finding['level'])}[/]"
            table.add_row(escape(name), level, escape(finding["subject"]), escape(finding["message"]))
    _console().print(table)
    if failed:
        sys.exit(1)


@cli.command()
@_config_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Rows per list.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def status(config_file: str | None, limit: int, as_json: bool) -> None:
    """Show how full each configured limiter is, and who holds slots. Charges nothing.

    The memory store belongs to one process, so its limiters are always idle here.

    \b
    Examples:
      ratesync status
      ratesync status --json | jq '.holders[] | select(.held_for > 60)'
    """
    report = _collect_status(config_file, limit)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_status(report)
    if report["errors"]:
        sys.exit(1)


def _collect_status(config_file: str | None, limit: int) -> dict[str, Any]:
    import ratesync

    limiters: list[dict[str, Any]] = []
    holders: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    stores = dict(_stores(config_file, None))
    configured = ratesync.list_limiters()
    for store_id, store in stores.items():
        try:
            listing = store.list(limit).wait()
            holders += [{"store": store_id, **row} for row in listing["holders"]]
            mine = [name for name, fields in configured.items() if fields["store"] == store_id][:limit]
            for name in mine:
                limiter = ratesync.get_limiter(name)
                state = limiter.peek().wait()
                bounds = (limiter.burst if limiter.rate_per_second else None, limiter.max_concurrent)
                capacity = min(bound for bound in bounds if bound is not None)
                limiters.append(
                    {
                        "limiter": name,
                        "store": store_id,
                        "rate_per_second": limiter.rate_per_second,
                        "burst": limiter.burst,
                        "max_concurrent": limiter.max_concurrent,
                        "allowed": state.allowed,
                        "remaining": state.remaining,
                        "in_use": state.in_use,
                        "retry_after": state.retry_after,
                        "used": max(0.0, min(1.0, 1 - state.remaining / capacity)),
                    }
                )
        except errors.StoreError as error:
            problems[store_id] = str(error)
    return {"limiters": limiters, "holders": holders, "errors": problems}


def _print_status(report: dict[str, Any]) -> None:
    console = _console()
    table = Table(
        "limiter", "store", "rate/s", "used", "remaining", "in use", "next in", box=None, pad_edge=False
    )
    for row in report["limiters"]:
        filled = round(row["used"] * 10)
        in_use = f"{row['in_use']}/{row['max_concurrent']}" if row["max_concurrent"] is not None else "-"
        table.add_row(
            escape(row["limiter"]),
            escape(row["store"]),
            "-" if row["rate_per_second"] is None else f"{row['rate_per_second']:g}",
            f"{'█' * filled}{'░' * (10 - filled)} {row['used']:4.0%}",
            str(row["remaining"]),
            in_use,
            "now" if row["allowed"] else f"{row['retry_after']:.3g} s",
        )
    if report["limiters"]:
        console.print(table)
    elif not report["errors"]:
        console.print("no limiters are configured")
    if report["holders"]:
        holders = Table("group", "holder", "slots", "held for", "expires in", box=None, pad_edge=False)
        for row in report["holders"]:
            expires = f"{row['expires_in']:.1f} s" if row["expires_in"] >= 0 else "expired"
            holders.add_row(
                escape(row["group"]),
                escape(row["holder"]),
                str(row["slots"]),
                f"{row['held_for']:.1f} s",
                expires,
            )
        console.print()
        console.print(holders)
    for store_id, problem in report["errors"].items():
        click.echo(f"ratesync: store {store_id}: {problem}", err=True)


def _find(file: str | None) -> str:
    from ratesync.config import find_config

    if file is not None:
        return file
    path, note = find_config()
    if path is None:
        raise _NoFile(f"no configuration file{note}")
    return str(path)


def _stores(config_file: str | None, store_id: str | None) -> Iterable[tuple[str, Any]]:
    """Loads the configuration and yields its stores, those that limiters use implicitly included."""
    import ratesync

    ratesync.load_config(_find(config_file))
    if store_id is not None:
        return [(store_id, ratesync.get_store(store_id))]
    used = [fields["store"] for fields in ratesync.list_limiters().values()]
    names = dict.fromkeys([*ratesync.list_stores(), *used])
    return [(name, ratesync.get_store(name)) for name in names]


def _console() -> Console:
    # Piped output is not wrapped: a finding stays on one line.
    return Console(width=None if sys.stdout.isatty() else 400, highlight=False)


def _assignments(values: dict[str, Any]) -> list[str]:
    return [
        f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"
        for name, value in values.items()
    ]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


_TEMPLATE = """\
# Configuration of ratesync. Found as RATE_SYNC_CONFIG, ./rate-sync.toml or ./config/rate-sync.toml.
# Check it with: ratesync check
# ${VAR} takes an environment variable, ${VAR:-default} one with a default; $${ is a literal ${.

# Stores keep the state of the limits. `memory` exists without being configured: one process, nothing
# to set up. For limits that hold over processes and machines:
#
# [stores.db]
# engine = "postgres"
# url = "${DATABASE_URL}"
# auto_create = true            # create the tables at first use; otherwise: ratesync migrate
# table_name = "rate_limiter_state"
# schema_name = "public"
# pool_min_size = 2
# pool_max_size = 10            # connections of one process, for all limiters together
# timing_margin_ms = 10.0       # forgiven earliness of an arrival; never raises the long-run rate
# command_timeout = 5.0         # seconds
# connect_timeout = 5.0         # seconds

[limiters.api]
# store = "db"                  # left out: memory
rate_per_second = 100.0         # grants per second, in the long run
burst = 1                       # grants that may come at once after idling; 1 spaces evenly
# max_concurrent = 50           # slots held at the same time
# timeout = 30.0                # seconds that acquire() waits at most; left out: as long as it takes
# fail_closed = false           # true: an outage of the store refuses calls; false: it lets them pass
# outage_budget = 0.25          # seconds that a call may lose to a store that does not answer
# lease_seconds = 30            # a killed holder's slot comes back after this
# max_hold_seconds = 600        # a hung holder's slot comes back after this
"""
