"""`ratesync top`: limiters, holders and stores, live. It looks and charges nothing."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ratesync import errors
from ratesync.cli._common import config_option, make_console, open_stores
from ratesync.cli._status import holders_table, limiter_row, next_text, slots_text, used_bar

if TYPE_CHECKING:
    from ratesync.stores import GroupRow

__all__ = ["top"]


@click.command()
@config_option
@click.option(
    "--interval",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    help="Seconds between two looks.",
)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Rows per list.")
@click.option("--once", is_flag=True, help="Look once and end; there are no rates then.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line and look.")
def top(config_file: str | None, interval: float, limit: int, once: bool, as_json: bool) -> None:
    """Show the limiters, who holds slots, and the stores, again and again. Ctrl-C ends it.

    `writes/s` is how often the row of a group changed: one write may carry the grants of many. A limiter's
    keys are groups of their own, shown with the busiest first. The memory store belongs to one process, so
    its limiters are always idle here.

    \b
    Examples:
      ratesync top
      ratesync top --once --json | jq '.groups[:3]'
      ratesync top --interval 10 --json >> limits.jsonl
    """
    look = _Look(config_file, limit)
    if once:
        report = look.take()
        if as_json:
            click.echo(json.dumps(report))
        else:
            make_console().print(_screen(report))
        if report["errors"]:
            raise SystemExit(1)
        return
    try:
        if as_json:
            while True:
                click.echo(json.dumps(look.take()))
                time.sleep(interval)
        _live(look, interval)
    except KeyboardInterrupt:
        return  # the way to end it


def _live(look: _Look, interval: float) -> None:
    console = make_console()
    with Live(_screen(look.take()), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_screen(look.take()), refresh=True)


class _Look:
    """Looks at all stores, and remembers the last look for the rates."""

    def __init__(self, config_file: str | None, limit: int) -> None:
        self._stores = list(open_stores(config_file, None))
        self._limit = limit
        self._versions: dict[tuple[str, str], int] = {}
        self._at: float | None = None

    def take(self) -> dict[str, Any]:
        """The state now."""
        import ratesync

        now = time.monotonic()
        elapsed = now - self._at if self._at is not None else None
        report: dict[str, Any] = {
            "time": time.time(),
            "limiters": [],
            "groups": [],
            "holders": [],
            "stores": [],
            "errors": {},
        }
        configured = ratesync.list_limiters()
        for store_id, store in self._stores:
            try:
                asked = time.perf_counter()
                listing = store.list(self._limit).wait()
                answered = time.perf_counter() - asked
                report["holders"] += [{"store": store_id, **row} for row in listing["holders"]]
                if store.capabilities["shared"]:  # else they are this command's own
                    report["groups"] += [self._group(store_id, row, elapsed) for row in listing["groups"]]
                mine = [name for name, fields in configured.items() if fields["store"] == store_id]
                report["limiters"] += [limiter_row(name) for name in mine[: self._limit]]
                report["stores"].append(
                    {
                        "store": store_id,
                        "engine": store.engine,
                        "answered_in": answered,
                        "truncated": listing["truncated"],
                        **store.stats().wait(),
                    }
                )
            except errors.StoreError as error:
                report["errors"][store_id] = str(error)
        report["groups"].sort(
            key=lambda row: (-(row["writes_per_second"] or 0), -row["in_use"], row["group"])
        )
        self._at = now
        return report

    def _group(self, store_id: str, row: GroupRow, elapsed: float | None) -> dict[str, Any]:
        before = self._versions.get((store_id, row["group"]))
        self._versions[store_id, row["group"]] = row["version"]
        rate = None
        # A version that went down: the group was reset, or its number began anew.
        if elapsed and before is not None and row["version"] >= before:
            rate = (row["version"] - before) / elapsed
        return {"store": store_id, **row, "writes_per_second": rate}


def _screen(report: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [
        Text(f"ratesync top  {time.strftime('%H:%M:%S', time.localtime(report['time']))}", style="bold")
    ]
    limiters = Table("limiter", "store", "used", "remaining", "in use", "next in", box=None, pad_edge=False)
    for row in report["limiters"]:
        limiters.add_row(
            escape(row["limiter"]),
            escape(row["store"]),
            used_bar(row["used"]),
            str(row["remaining"]),
            slots_text(row),
            next_text(row),
        )
    parts.append(limiters if report["limiters"] else Text("no limiters are configured"))
    if report["groups"]:
        groups = Table("group", "store", "writes/s", "in use", "dealt ahead", box=None, pad_edge=False)
        for row in report["groups"]:
            rate = row["writes_per_second"]
            groups.add_row(
                escape(row["group"]),
                escape(row["store"]),
                "-" if rate is None else f"{rate:.4g}",
                str(row["in_use"]),
                f"{row['last_ahead']:.3g} s" if row["last_ahead"] > 0 else "-",
            )
        parts += [Text(), groups]
    if report["holders"]:
        parts += [Text(), holders_table(report["holders"])]
    stores = Table("store", "engine", "answered in", "groups", box=None, pad_edge=False)
    for row in report["stores"]:
        if row["engine"] != "memory":
            stores.add_row(
                escape(row["store"]),
                row["engine"],
                f"{row['answered_in'] * 1000:.3g} ms",
                "more than shown" if row["truncated"] else "all",
            )
    if stores.row_count:
        parts += [Text(), stores]
    for store_id, problem in report["errors"].items():
        parts += [Text(), Text(f"store {store_id}: {problem}", style="red")]
    return Group(*parts)
