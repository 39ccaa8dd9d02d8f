"""What holds for the whole suite: its event loop, no configuration from outside, patience with servers.

`pytest --loop=uvloop` runs everything on uvloop, `--asyncio-debug` in asyncio's debug mode, `--only=postgres`
what has to do with that server.
The fixtures come from `ratesync.testing.plugin`, which pytest finds because ratesync is installed.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from ratesync import Store
from ratesync._schemas import LimiterOptions
from ratesync.limits import core_parameters
from ratesync.testing import RedisCluster, RedisSentinel
from ratesync.testing.contract import patient_state

PATIENCE = 20.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop", choices=("asyncio", "uvloop"), default="asyncio", help="event loop of the suite"
    )
    parser.addoption(
        "--only", choices=("postgres", "redis"), help="what has to do with this server, to try versions of it"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the suite in the background lets it ignore Ctrl-C, and its children too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--loop") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_report_header(config: pytest.Config) -> str:
    return f"event loop: {config.getoption('--loop')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--only`: a test has to do with a server when it says so in its name, its parameters or a fixture."""
    only = config.getoption("--only")
    if only is None:
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        concerned = only in item.nodeid.lower() or any(only in fixture for fixture in fixtures)
        (kept if concerned else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def patient_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits and state wait for their server's answer, unless the test says how long they do.

    By default a call on a limit that lost 0.25 s is let pass, and one on state has 5 s for everything, the
    first connection and the schema included. A machine that runs tests may stand still for longer.
    """

    def patient(store: Store, options: LimiterOptions) -> dict[str, Any]:
        parameters = core_parameters(store, options)
        if parameters["outage_budget"] == LimiterOptions().outage_budget:
            parameters["outage_budget"] = PATIENCE
        return parameters

    monkeypatch.setattr("ratesync.limits.core_parameters", patient)
    monkeypatch.setattr("ratesync.engines._engine_limiter.core_parameters", patient)
    patient_state(monkeypatch, PATIENCE)


@pytest.fixture
def ratesync_postgres_url(ratesync_postgres_url: str, patient_limits: None) -> str:
    return ratesync_postgres_url


@pytest.fixture
def ratesync_redis_url(ratesync_redis_url: str, patient_limits: None) -> str:
    return ratesync_redis_url


@pytest.fixture
def ratesync_redis_cluster(ratesync_redis_cluster: RedisCluster, patient_limits: None) -> RedisCluster:
    return ratesync_redis_cluster


@pytest.fixture
def ratesync_redis_sentinel(ratesync_redis_sentinel: RedisSentinel, patient_limits: None) -> RedisSentinel:
    return ratesync_redis_sentinel
