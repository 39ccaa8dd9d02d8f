"""Samples, alternating rounds, tables and goals, shared by all benchmarks.

The trap this avoids: on a shared machine the clock frequency, the neighbours and the placement of threads
change from second to second, by more than what is measured. So contenders take turns within a round, a
ratio compares two contenders of the same round, and every figure comes with its minimum and maximum.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Spread:
    """Minimum, median and maximum of a few samples."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def text(self, form: Callable[[float], str]) -> str:
        if len(self.samples) == 1:
            return form(self.samples[0])
        return f"{form(self.median)} [{form(min(self.samples))} .. {form(max(self.samples))}]"

    def as_json(self) -> dict[str, float]:
        return {"min": min(self.samples), "median": self.median, "max": max(self.samples)}


@dataclass
class Goal:
    """A figure that was promised. `gated` ones fail the run, the others are only reported."""

    what: str
    value: float
    bound: float
    at_most: bool = True
    gated: bool = False
    form: Callable[[float], str] = lambda value: f"{value:.3g}"

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def row(self) -> list[str]:
        sign = "<=" if self.at_most else ">="
        return [
            self.what,
            self.form(self.value),
            f"{sign} {self.form(self.bound)}",
            "met" if self.met else "MISSED",
        ]


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def plain(self) -> str:
        grid = [list(self.columns), *[list(row) for row in self.rows]]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in grid
        ]
        return "\n".join([self.title, "-" * len(self.title), *lines])

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        rows = [self.columns, rule, *self.rows]
        return f"### {self.title}\n\n" + "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
        )


@dataclass
class Report:
    """What one benchmark found."""

    name: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(goal.gated and not goal.met for goal in self.goals)

    def render(self, markdown: bool) -> str:
        tables = list(self.tables)
        if self.goals:
            tables.append(
                Table(
                    f"{self.name}: goals",
                    ["goal", "measured", "bound", ""],
                    [goal.row() for goal in self.goals],
                )
            )
        parts = [table.markdown() if markdown else table.plain() for table in tables]
        parts += [f"* {note}" for note in self.notes]
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "data": self.data,
            "goals": [
                {"what": g.what, "value": g.value, "bound": g.bound, "at_most": g.at_most, "met": g.met}
                for g in self.goals
            ],
            "notes": self.notes,
        }


def ratios(of: Spread, to: Spread) -> Spread:
    """Ratio of two contenders, round by round."""
    return Spread([a / b for a, b in zip(of.samples, to.samples, strict=True)])


def progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def integer(value: float) -> str:
    return f"{value:,.0f}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def micros(value: float) -> str:
    return f"{value * 1e6:,.0f} us" if value < 0.01 else f"{value * 1e3:,.1f} ms"


def provenance(extra: Iterable[str] = ()) -> str:
    """One line on where the figures come from."""
    import os

    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    import ratesync

    parts = [
        time.strftime("%Y-%m-%d"),
        f"ratesync {ratesync.__version__}",
        f"{platform.python_implementation()} {platform.python_version()}",
        f"{os.cpu_count()} CPUs ({model})",
        f"{platform.system()} {platform.release().split('-')[0]}",
        *extra,
    ]
    return ", ".join(parts)


def save(path: str, reports: Sequence[Report], where: str) -> None:
    content = {"provenance": where, "benchmarks": [report.as_json() for report in reports]}
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
