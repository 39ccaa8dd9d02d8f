"""Reading a recorded trace of requests: CSV, with or without a header, every error with its line number."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from ratesync.cli._common import Failure

__all__ = ["Request", "read_trace"]

COLUMNS = ("timestamp", "limiter", "key", "cost", "duration", "timeout")
_ALIASES = {
    "timestamp": "timestamp",
    "time": "timestamp",
    "ts": "timestamp",
    "at": "timestamp",
    "limiter": "limiter",
    "limiter_id": "limiter",
    "group_id": "limiter",
    "key": "key",
    "cost": "cost",
    "duration": "duration",
    "duration_seconds": "duration",
    "timeout": "timeout",
}
_MAX_SECONDS = 9e9
# Numbers beyond these are milli-, micro- and nanoseconds: no log is from the year 5138.
_SCALES = ((1e11, 1), (1e14, 1_000), (1e17, 1_000_000), (math.inf, 1_000_000_000))


@dataclass(slots=True)
class Request:
    """One row. Times in nanoseconds; `timeout` in seconds, None for the limiter's default."""

    at: int
    limiter: str
    key: str | None
    cost: int
    duration: int
    timeout: float | None
    line: int


def read_trace(file: TextIO, name: str, limiter: str | None = None) -> list[Request]:
    """The requests in order of time; of the same moment, in order of the file.

    Args:
        file: opened with `newline=""`.
        name: for messages.
        limiter: the limiter of rows that name none.
    """
    requests: list[Request] = []
    try:
        in_order = True
        for request in _rows(file, name, limiter):
            in_order = in_order and (not requests or requests[-1].at <= request.at)
            requests.append(request)
    except UnicodeDecodeError as error:
        raise Failure(f"{name}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    if not in_order:
        requests.sort(key=lambda request: request.at)
    return requests


def _rows(file: TextIO, name: str, default_limiter: str | None) -> Iterator[Request]:
    first = file.readline()
    delimiter = max(",;\t", key=first.count)
    names = [
        _ALIASES.get(cell.strip().strip('"').lower().lstrip("\ufeff")) for cell in first.split(delimiter)
    ]
    reader = csv.reader(file, delimiter=delimiter)
    lines_before = 1
    if "timestamp" in names:
        if len(set(filter(None, names))) != len([found for found in names if found]):
            raise Failure(f"{name}:1: a column appears twice: {first.strip()}")
        columns = {column: place for place, column in enumerate(names) if column is not None}
    else:
        columns = {column: place for place, column in enumerate(COLUMNS)}
        if default_limiter is not None and len(names) == 1:
            del columns["limiter"]
        file.seek(0)
        lines_before = 0
    if "limiter" not in columns and default_limiter is None:
        raise Failure(f"{name}:1: no column 'limiter'; add one, or name the limiter with --limiter")
    row_of = _RowReader(name, columns, default_limiter)
    try:
        for cells in reader:
            if cells and any(cell.strip() for cell in cells):
                yield row_of(cells, reader.line_num + lines_before)
    except csv.Error as error:
        raise Failure(f"{name}:{reader.line_num + lines_before}: not valid CSV: {error}") from None


class _RowReader:
    """Turns the cells of a row into a Request."""

    def __init__(self, name: str, columns: dict[str, int], default_limiter: str | None) -> None:
        self._name = name
        self._places = [columns.get(column) for column in COLUMNS]
        self._default_limiter = default_limiter

    def __call__(self, cells: list[str], line: int) -> Request:
        at, limiter, key, cost, duration, timeout = [
            cells[place].strip() if place is not None and place < len(cells) else "" for place in self._places
        ]
        limiter_id = limiter or self._default_limiter
        if not limiter_id:
            raise Failure(f"{self._name}:{line}: no limiter is named")
        try:
            return Request(
                _moment(at),
                sys.intern(limiter_id),
                sys.intern(key) if key else None,
                _whole(cost) if cost else 1,
                round(_seconds(duration, "duration") * 1e9) if duration else 0,
                _seconds(timeout, "timeout") if timeout else None,
                line,
            )
        except ValueError as error:
            raise Failure(f"{self._name}:{line}: {error}") from None


def _moment(text: str) -> int:
    """ISO 8601 (UTC where no zone is named), or a number since the epoch in s, ms, us or ns."""
    if text.isascii() and text.isdigit():
        whole = int(text) if len(text) < 20 else 10**20
        for bound, divisor in _SCALES:
            if whole < bound:
                return _in_range(whole * (1_000_000_000 // divisor), text)
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        if math.isfinite(number) and number >= 0:
            for bound, divisor in _SCALES:
                if number < bound:
                    return _in_range(round(number * 1_000_000 / divisor) * 1000, text)
        raise ValueError(f"timestamp {text[:40]!r} is out of range")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"timestamp {text[:40]!r} is neither ISO 8601 nor a number of seconds") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return _in_range((since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000, text)


def _in_range(nanos: int, text: str) -> int:
    if not 0 <= nanos < 8 * 10**18:
        raise ValueError(f"timestamp {text[:40]!r} is out of range")
    return nanos


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 18 and int(text) > 0):
        raise ValueError(f"cost {text[:40]!r} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str, column: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _MAX_SECONDS:
        raise ValueError(f"{column} {text[:40]!r} is not a number of seconds")
    return number
