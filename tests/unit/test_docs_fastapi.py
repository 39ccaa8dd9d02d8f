"""The application of the FastAPI guide runs as printed, and does what the guide says around it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from ratesync.cli import cli
from ratesync.contrib.counters import _SUMMED
from ratesync.contrib.fastapi import DEFAULT_TRUSTED_PROXY_NETWORKS
from ratesync.testing import ManualClock

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "guides" / "fastapi.md"


def first_block(page: Path, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found
    return found[1]


async def test_the_application_of_the_guide(ratesync_registry: Path) -> None:
    with ManualClock():  # nothing refills between the first request and the last
        module: dict[str, Any] = {"__name__": "guide"}
        exec(compile(first_block(GUIDE, "python"), str(GUIDE), "exec"), module)
        transport = httpx.ASGITransport(module["app"], client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = [await client.get("/items") for _ in range(21)]
            assert [answer.status_code for answer in answers] == [200] * 20 + [429]
            assert answers[0].headers["ratelimit-policy"] == '"per-address";q=20;w=4'
            assert answers[0].headers["x-ratelimit-limit"] == "20"
            printed = first_block(GUIDE, "json")
            assert answers[-1].json() == __import__("json").loads(printed)
            # /login shares the address's limit, which is used up; another address has its own.
            assert (await client.post("/login", headers={"x-api-key": "k"})).status_code == 429
            assert (await client.get("/report")).status_code == 200
        transport = httpx.ASGITransport(module["app"], client=("192.0.2.2", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            codes = [
                (await client.post("/login", headers={"x-api-key": "other"})).status_code for _ in range(11)
            ]
            assert codes == [200] * 10 + [429]


def test_the_default_networks_are_those_of_the_reference() -> None:
    text = (DOCS / "reference" / "fastapi.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("`DEFAULT_TRUSTED"))
    assert re.findall(r"`([^`]+/\d+)`", line) == list(DEFAULT_TRUSTED_PROXY_NETWORKS)


async def test_every_metric_is_in_the_reference(ratesync_registry: Path) -> None:
    pytest.importorskip("prometheus_client")
    from ratesync.contrib.prometheus.metrics import Collector

    text = (DOCS / "reference" / "prometheus.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(ratesync_\w+?)(?:_total)?`", text))
    assert {family.name for family in Collector().collect()} == documented


def test_every_counter_of_a_limiter_is_exported() -> None:
    from ratesync.contrib.otel import _COUNTERS as OTEL
    from ratesync.contrib.prometheus.metrics import _COUNTERS as PROMETHEUS

    apart = {"refused_rate", "refused_concurrency", "current_concurrent"}  # by reason, and a gauge
    assert {row[3] for row in OTEL} | apart == set(_SUMMED)
    assert {row[1] for row in PROMETHEUS} | apart | {"passed_open"} == set(_SUMMED)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_and_option_is_in_the_reference(command: str) -> None:
    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    usage = re.search(rf"^ratesync {command}\b.*$", text, re.M)
    assert usage
    for parameter in cli.commands[command].params:
        if parameter.param_type_name == "option":
            assert any(name in usage[0] for name in parameter.opts), parameter.opts
