"""`ratesync simulate`: exact waits, refusals and slots of hand-computed traces; and every bad row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ratesync.cli import cli

pytestmark = pytest.mark.usefixtures("clean")


def run(toml: str, trace: str, *arguments: str) -> Result:
    Path("rs.toml").write_text(toml)
    Path("t.csv").write_text(trace)
    return CliRunner().invoke(cli, ["simulate", "rs.toml", "--trace", "t.csv", *arguments])


def report(toml: str, trace: str, *arguments: str) -> dict[str, Any]:
    result = run(toml, trace, "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def api(toml: str, trace: str, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = report(f"[limiters.api]\n{toml}", trace, *arguments)["limiters"]["api"]
    return found


def test_a_rate_delays_by_exactly_one_interval_each() -> None:
    seen = api("rate_per_second = 10", "timestamp,limiter\n" + "100,api\n" * 5)
    assert seen == {
        "requests": 5,
        "granted_at_once": 1,
        "delayed": 4,
        "wait_p50": pytest.approx(0.2, abs=1e-8),
        "wait_p99": pytest.approx(0.4, abs=1e-8),
        "wait_max": pytest.approx(0.4, abs=1e-8),
        "refused": {},
        "peak_concurrency": 1,
    }


def test_what_would_come_too_late_is_refused_and_charges_nothing() -> None:
    seen = api(
        "rate_per_second = 1\ntimeout = 1.5",
        "timestamp,limiter,timeout\n0,api,\n0,api,\n0,api,\n0,api,0\n2.0,api,0\n",
    )
    assert seen["granted_at_once"] == 2  # the first, and the one at 2 s
    assert seen["delayed"] == 1
    assert seen["wait_max"] == pytest.approx(1.0, abs=1e-8)
    assert seen["refused"] == {"rate_limited": 2}


def test_slots_are_held_for_the_duration_and_waited_for_in_order() -> None:
    trace = "timestamp,limiter,duration\n0,api,3\n1,api,3\n2,api,3\n3,api,1\n"
    seen = api("max_concurrent = 2", trace)
    # The third waits from 2 to 3, where the first ends; the fourth from 3 to 4.
    assert seen["delayed"] == 2
    assert seen["wait_p50"] == pytest.approx(1.0, abs=1e-8)
    assert seen["wait_max"] == pytest.approx(1.0, abs=1e-8)
    assert seen["peak_concurrency"] == 2
    refused = api("max_concurrent = 2\ntimeout = 0.5", trace)
    assert refused["refused"] == {"concurrency_full": 1}


def test_the_postgres_margin_and_keys_count() -> None:
    toml = (
        '[stores.db]\nengine = "postgres"\nurl = "postgresql://x/y"\n'
        '[limiters.api]\nstore = "db"\nrate_per_second = 10\ntimeout = 0\n'
    )
    trace = "timestamp,limiter,key\n0,api,a\n0,api,b\n0.095,api,a\n0.1,api,b\n0.102,api,b\n"
    seen = report(toml, trace)["limiters"]["api"]
    assert (seen["granted_at_once"], seen["refused"]) == (4, {"rate_limited": 1})


def test_costs_and_bursts() -> None:
    trace = "timestamp,limiter,cost\n0,api,6\n0,api,5\n0,api,4\n1,api,1\n"
    seen = api("rate_per_second = 1\nburst = 10\ntimeout = 0", trace)
    assert (seen["granted_at_once"], seen["refused"]) == (3, {"rate_limited": 1})


@pytest.mark.parametrize(
    "trace",
    [
        "timestamp,limiter\n1700000000,api\n1700000000.5,api\n",
        "limiter;time\napi;2023-11-14T22:13:20Z\napi;2023-11-14T22:13:20.5+00:00\n",
        "ts\tlimiter_id\n1700000000000\tapi\n1700000000500\tapi\n",
        "1700000000000000,api\n1700000000500000,api\n",
        "\n2023-11-14T22:13:20,api\n\n2023-11-14T23:13:20.5+01:00,api\n",
        '"timestamp","limiter","user agent"\n"1700000000","api","a, b\nc"\n1700000000.5,api,\n',
        "timestamp,limiter\n1700000000.5,api\n1700000000,api\n",
    ],
)
def test_headers_delimiters_and_kinds_of_time(trace: str) -> None:
    found = report("[limiters.api]\nrate_per_second = 1\n", trace)
    Path("t.csv").write_bytes(b"\xef\xbb\xbf" + trace.replace("\n", "\r\n").encode())  # as Excel writes it
    again = CliRunner().invoke(cli, ["simulate", "rs.toml", "--trace", "t.csv", "--json"])
    assert json.loads(again.output) == found
    assert found["trace"] == {"requests": 2, "from": 1700000000.0, "to": 1700000000.5}
    assert found["limiters"]["api"]["wait_max"] == pytest.approx(0.5, abs=1e-6)


def test_a_log_of_times_only_from_standard_input() -> None:
    Path("rs.toml").write_text("[limiters.api]\nrate_per_second = 1\n")
    arguments = ["simulate", "rs.toml", "--trace", "-", "--limiter", "api", "--json"]
    result = CliRunner().invoke(cli, arguments, input="10\n10\n12\n")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["limiters"]["api"]["delayed"] == 1


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ("timestamp,limiter\n1,api\nyesterday,api\n", "t.csv:3: timestamp 'yesterday' is neither"),
        ("timestamp,limiter\n-1,api\n", "t.csv:2: timestamp '-1' is out of range"),
        ("timestamp,limiter\nnan,api\n", "t.csv:2: timestamp"),
        ("timestamp,limiter\n9" + "9" * 30 + ",api\n", "t.csv:2: timestamp"),
        ("timestamp,limiter\n1,apu\n", "t.csv:2: limiter 'apu' is not configured (did you mean 'api'?)"),
        ("timestamp,limiter\n1,\n", "t.csv:2: no limiter is named"),
        ("timestamp,limiter\n1\n", "t.csv:2: no limiter is named"),
        ("timestamp,limiter,cost\n1,api,0\n", "t.csv:2: cost '0'"),
        ("timestamp,limiter,cost\n1,api,1e3\n", "t.csv:2: cost '1e3'"),
        ("timestamp,limiter,duration\n1,api,-1\n", "t.csv:2: duration '-1'"),
        ("timestamp,limiter,timeout\n1,api,inf\n", "t.csv:2: timeout 'inf'"),
        ("timestamp,limiter,key\n1,api," + "k" * 300 + "\n", "t.csv:2: limiter name and key are too long"),
        ("timestamp,limiter,cost,timeout\n1,api,5,0\n", "t.csv:2: this cost can never be had at once"),
        ("timestamp,limiter\n1,api\n2," + "x" * 200_000 + "\n", "t.csv:3: not valid CSV: field larger"),
        ("timestamp,key\n1,a\n", "t.csv:1: no column 'limiter'"),
        ("timestamp,time,limiter\n1,1,api\n", "t.csv:1: a column appears twice"),
    ],
)
def test_a_bad_row_is_named(trace: str, message: str) -> None:
    result = run("[limiters.api]\nrate_per_second = 1\n", trace)
    assert result.exit_code == 1
    assert result.stderr.startswith("ratesync: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_files_that_are_not_there_or_not_text() -> None:
    run("[limiters.api]\nrate_per_second = 1\n", "")
    Path("t.csv").write_bytes(b"timestamp,limiter\n1,\xff\n")
    result = CliRunner().invoke(cli, ["simulate", "rs.toml", "--trace", "t.csv"])
    assert (result.exit_code, "not UTF-8" in result.stderr) == (1, True)
    result = CliRunner().invoke(cli, ["simulate", "rs.toml", "--trace", "missing.csv"])
    assert (result.exit_code, "cannot be read" in result.stderr) == (1, True)
    result = CliRunner().invoke(cli, ["simulate", "missing.toml", "--trace", "t.csv"])
    assert result.exit_code == 2


def test_an_empty_trace_is_fine_and_the_table_names_the_limiters() -> None:
    result = run("[limiters.api]\nrate_per_second = 1\n", "timestamp,limiter\n")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("0 requests\n")
    assert "api" in result.output


def reference(rate: float, slots: int, rows: list[tuple[float, float]]) -> tuple[list[float], int]:
    """Waits of a queue that serves in order: each starts when its turn has come and a slot is free."""
    ends: list[float] = []
    waits = []
    turn = 0.0
    for at, duration in rows:
        free = 0.0 if len(ends) < slots else sorted(ends)[-slots]
        start = max(at, free, turn)
        turn = start + 1 / rate
        ends.append(start + duration)
        waits.append(start - at)
    return waits, len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_slots_alone_agree_with_a_queue_computed_by_hand(seed: int) -> None:
    dice = random.Random(seed)
    rows, at = [], 0.0
    for _ in range(300):
        at = round(at + dice.expovariate(5), 3)
        rows.append((at, round(dice.uniform(0.1, 1.0), 3)))
    waits, _ = reference(1e9, 3, rows)
    trace = "timestamp,limiter,duration\n" + "".join(f"{at},api,{duration}\n" for at, duration in rows)
    seen = api("max_concurrent = 3", trace)
    assert seen["delayed"] == sum(wait > 1e-6 for wait in waits)
    assert seen["wait_max"] == pytest.approx(max(waits), abs=1e-5)
    assert seen["peak_concurrency"] == 3


@pytest.mark.parametrize("seed", range(3))
def test_rates_alone_agree_with_a_queue_computed_by_hand(seed: int) -> None:
    dice = random.Random(seed)
    rows, at = [], 0.0
    for _ in range(500):
        at = round(at + dice.expovariate(9), 3)
        rows.append((at, 0.0))
    waits, _ = reference(10, 10**6, rows)
    trace = "timestamp,limiter\n" + "".join(f"{at},api\n" for at, _ in rows)
    seen = api("rate_per_second = 10", trace)
    assert seen["delayed"] == sum(wait > 1e-6 for wait in waits)
    assert seen["wait_max"] == pytest.approx(max(waits), abs=1e-5)
