"""The pytest plugin: fixtures for suites of users, and the strictness that ratesync's own suite has.

Fixtures import what they need when they are used; a suite that uses none pays nothing. Two ini options,
off by default: `ratesync_strict_loop` fails a test that leaves errors in an event loop's log, and
`ratesync_crash_sentinel` reports at the start that the previous run died, and in which test.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ratesync.testing.clock import ManualClock
    from ratesync.testing.postgres import ExternalPostgres, PostgresServer
    from ratesync.testing.postgres_pair import PostgresPair
    from ratesync.testing.proxy import TcpProxy
    from ratesync.testing.redis import ExternalRedis, RedisServer
    from ratesync.testing.redis_topology import RedisCluster, RedisSentinel

_SENTINEL = "running-test"
# No test is to see a failover that it did not ask for, because a node had no turn on a busy machine.
_PATIENCE_MS = 30_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("ratesync_strict_loop", "errors logged by event loops fail the test", "bool", False)
    parser.addini("ratesync_crash_sentinel", "report that the previous run crashed", "bool", False)


# Configuration and clock --------------------------------------------------------------------------


@pytest.fixture
def ratesync_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No store or limiter configured and none to discover; afterwards the engine is stopped.

    The working directory is an empty one, which is the fixture's value.
    """
    import ratesync
    from ratesync._registry import _registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RATE_SYNC_CONFIG", raising=False)
    _registry.clear()
    yield tmp_path
    ratesync.shutdown()
    _registry.clear()


@pytest.fixture
def ratesync_clock(ratesync_registry: Path) -> Iterator[ManualClock]:
    """Time stands still for the memory store until `clock.advance(s)` or `await clock.run(s)`."""
    from ratesync.testing.clock import ManualClock

    with ManualClock() as clock:
        yield clock


# PostgreSQL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ratesync_postgres_server() -> Iterator[PostgresServer | ExternalPostgres]:
    """One server for the session: our own (not durable), or that of RATESYNC_TEST_POSTGRES_URL."""
    from ratesync.testing.postgres import PostgresServer

    server = PostgresServer.find(durable=False)
    yield server
    server.close()


@pytest.fixture
def ratesync_postgres_url(
    ratesync_postgres_server: PostgresServer | ExternalPostgres, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The URL of an empty database, made for this test. The server's log is shown when the test fails.

    The engine is stopped before the database goes, whatever the order of the fixtures.
    """
    import ratesync

    mark = ratesync_postgres_server.log_size()
    url = ratesync_postgres_server.create_database()
    yield url
    log = ratesync_postgres_server.log(since=mark)
    ratesync.shutdown()
    ratesync_postgres_server.drop_database(url)
    if request.node.stash.get(_FAILED, False) and log:
        print(f"--- log of the PostgreSQL server\n{log}")


@pytest.fixture
def ratesync_postgres_pair(request: pytest.FixtureRequest) -> Iterator[PostgresPair]:
    """A primary with a synchronous standby of this test's own; the logs are shown when the test fails."""
    import ratesync
    from ratesync.testing.postgres_pair import PostgresPair

    with PostgresPair() as pair:
        yield pair
        ratesync.shutdown()
        if request.node.stash.get(_FAILED, False):
            print(pair.log())


@pytest.fixture
def ratesync_proxy(ratesync_postgres_url: str) -> Iterator[TcpProxy]:
    """A proxy before the test's database: connect to `proxy.through(ratesync_postgres_url)`."""
    from urllib.parse import urlsplit

    from ratesync.testing.proxy import TcpProxy

    parts = urlsplit(ratesync_postgres_url)
    with TcpProxy(parts.hostname or "127.0.0.1", parts.port or 5432) as proxy:
        yield proxy


def _asyncpg_fixture() -> Any:
    async def ratesync_asyncpg(ratesync_postgres_url: str) -> AsyncIterator[Any]:
        """An asyncpg pool on the test's database (fetchval, execute, ...): a witness of what is stored."""
        import asyncpg

        async with asyncpg.create_pool(ratesync_postgres_url, min_size=1, max_size=4) as pool:
            yield pool

    try:
        import pytest_asyncio
    except ImportError:
        return None  # without pytest-asyncio the fixture does not exist
    return pytest_asyncio.fixture(ratesync_asyncpg)


_fixture = _asyncpg_fixture()
if _fixture is not None:
    ratesync_asyncpg = _fixture

# Redis --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ratesync_redis_server() -> Iterator[RedisServer | ExternalRedis]:
    """One server for the session: our own (nothing on disk), or that of RATESYNC_TEST_REDIS_URL."""
    from ratesync.testing.redis import RedisServer

    server = RedisServer.find()
    yield server
    server.close()


@pytest.fixture
def ratesync_redis_url(
    ratesync_redis_server: RedisServer | ExternalRedis, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The URL of an empty database. The server's log is shown when the test fails.

    The engine is stopped before the next test, whatever the order of the fixtures.
    """
    import ratesync

    ratesync_redis_server.clean()
    mark = ratesync_redis_server.log_size()
    yield ratesync_redis_server.url
    ratesync.shutdown()
    log = ratesync_redis_server.log(since=mark)
    if request.node.stash.get(_FAILED, False) and log:
        print(f"--- log of the Redis server\n{log}")


@pytest.fixture(scope="session")
def _ratesync_redis_cluster() -> Iterator[RedisCluster]:
    from ratesync.testing.redis_topology import RedisCluster

    with RedisCluster(replicas=1, node_timeout_ms=_PATIENCE_MS) as cluster:
        yield cluster


@pytest.fixture
def ratesync_redis_cluster(_ratesync_redis_cluster: RedisCluster) -> Iterator[RedisCluster]:
    """A Cluster of three primaries with a replica each, healthy and empty, made once for the session."""
    import ratesync

    _ratesync_redis_cluster.heal()
    _ratesync_redis_cluster.clean()
    yield _ratesync_redis_cluster
    ratesync.shutdown()


@pytest.fixture(scope="session")
def _ratesync_redis_sentinel() -> Iterator[RedisSentinel]:
    from ratesync.testing.redis_topology import RedisSentinel

    with RedisSentinel(down_after_ms=_PATIENCE_MS) as group:
        yield group


@pytest.fixture
def ratesync_redis_sentinel(_ratesync_redis_sentinel: RedisSentinel) -> Iterator[RedisSentinel]:
    """A primary, a replica and three Sentinels, healthy and empty, made once for the session."""
    import ratesync

    _ratesync_redis_sentinel.heal()
    _ratesync_redis_sentinel.clean()
    yield _ratesync_redis_sentinel
    ratesync.shutdown()


def _redis_py_fixture() -> Any:
    async def ratesync_redis_py(ratesync_redis_url: str) -> AsyncIterator[Any]:
        """A redis-py asyncio client on the test's database: a witness of what is stored."""
        import redis.asyncio

        async with redis.asyncio.from_url(ratesync_redis_url, decode_responses=True) as client:
            yield client

    try:
        import pytest_asyncio
    except ImportError:
        return None
    return pytest_asyncio.fixture(ratesync_redis_py)


_fixture = _redis_py_fixture()
if _fixture is not None:
    ratesync_redis_py = _fixture

# Strictness ---------------------------------------------------------------------------------------

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


class _Errors(logging.Handler):
    """Collects what event loops report: exceptions nobody awaited, failing callbacks, lost tasks."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({record.exc_info[1]!r})"
        self.messages.append(text)


@pytest.fixture(autouse=True)
def _ratesync_strict_loop(pytestconfig: pytest.Config) -> Iterator[None]:
    if not pytestconfig.getini("ratesync_strict_loop"):
        yield
        return
    handler = _Errors()
    logger = logging.getLogger("asyncio")  # also where uvloop's default handler writes
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    if handler.messages:
        pytest.fail("left in the event loop:\n" + "\n".join(handler.messages), pytrace=False)


class _CrashSentinel:
    """Keeps the name of the running test in a file that only a finished session removes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.crashed = path.read_text() if path.exists() else None

    def pytest_report_header(self) -> str | None:
        if self.crashed is None:
            return None
        return f"ratesync: THE PREVIOUS RUN CRASHED (no end of session), last test: {self.crashed or 'none'}"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.path.write_text(nodeid)

    def pytest_sessionfinish(self) -> None:
        self.path.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    cache = getattr(config, "cache", None)
    if config.getini("ratesync_crash_sentinel") and cache is not None and not hasattr(config, "workerinput"):
        path = cache.mkdir("ratesync") / _SENTINEL
        config.pluginmanager.register(_CrashSentinel(path), "ratesync-crash-sentinel")
