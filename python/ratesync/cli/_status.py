"""`ratesync status`: how full each configured limiter is, and who holds slots."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from ratesync import errors
from ratesync.cli._common import config_option, make_console, open_stores


@click.command()
@config_option
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
    stores = dict(open_stores(config_file, None))
    configured = ratesync.list_limiters()
    for store_id, store in stores.items():
        try:
            listing = store.list(limit).wait()
            holders += [{"store": store_id, **row} for row in listing["holders"]]
            mine = [name for name, fields in configured.items() if fields["store"] == store_id][:limit]
            limiters += [limiter_row(name) for name in mine]
        except errors.StoreError as error:
            problems[store_id] = str(error)
    return {"limiters": limiters, "holders": holders, "errors": problems}


def limiter_row(name: str) -> dict[str, Any]:
    """How full a limiter is now."""
    import ratesync

    limiter = ratesync.get_limiter(name)
    state = limiter.peek().wait()
    bounds = (limiter.burst if limiter.rate_per_second else None, limiter.limit, limiter.max_concurrent)
    capacity = min(bound for bound in bounds if bound is not None)
    return {
        "limiter": name,
        "store": limiter.store_id,
        "rate_per_second": limiter.rate_per_second,
        "burst": limiter.burst,
        "max_concurrent": limiter.max_concurrent,
        "allowed": state.allowed,
        "remaining": state.remaining,
        "in_use": state.in_use,
        "retry_after": state.retry_after,
        "used": max(0.0, min(1.0, 1 - state.remaining / capacity)),
    }


def used_bar(share: float) -> str:
    """`share` of ten blocks, and in per cent."""
    filled = round(share * 10)
    return f"{'█' * filled}{'░' * (10 - filled)} {share:4.0%}"


def slots_text(row: dict[str, Any]) -> str:
    """Slots in use of how many."""
    return f"{row['in_use']}/{row['max_concurrent']}" if row["max_concurrent"] is not None else "-"


def next_text(row: dict[str, Any]) -> str:
    """When the limiter grants next."""
    return "now" if row["allowed"] else f"{row['retry_after']:.3g} s"


def holders_table(rows: list[dict[str, Any]]) -> Table:
    """Who holds slots."""
    table = Table("group", "holder", "slots", "held for", "expires in", box=None, pad_edge=False)
    for row in rows:
        expires = f"{row['expires_in']:.1f} s" if row["expires_in"] >= 0 else "expired"
        slots, held = str(row["slots"]), f"{row['held_for']:.1f} s"
        table.add_row(escape(row["group"]), escape(row["holder"]), slots, held, expires)
    return table


def _print_status(report: dict[str, Any]) -> None:
    console = make_console()
    table = Table(
        "limiter", "store", "rate/s", "used", "remaining", "in use", "next in", box=None, pad_edge=False
    )
    for row in report["limiters"]:
        table.add_row(
            escape(row["limiter"]),
            escape(row["store"]),
            "-" if row["rate_per_second"] is None else f"{row['rate_per_second']:g}",
            used_bar(row["used"]),
            str(row["remaining"]),
            slots_text(row),
            next_text(row),
        )
    if report["limiters"]:
        console.print(table)
    elif not report["errors"]:
        console.print("no limiters are configured")
    if report["holders"]:
        console.print()
        console.print(holders_table(report["holders"]))
    for store_id, problem in report["errors"].items():
        click.echo(f"ratesync: store {store_id}: {problem}", err=True)
