"""`[state]` and `configure_state`: the table as the seeds print it, and what is refused with its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ratesync
from ratesync import ConfigValidationError, StoreNotFoundError
from ratesync._registry import _registry
from ratesync.config import Config, read_config

pytestmark = pytest.mark.usefixtures("ratesync_registry")

SEED = """
[server]
host = "127.0.0.1"
port = 8080

[state]
backend = "postgres"
url = "postgres://acteon:acteon@localhost:5432/acteon"

[audit]
enabled = true
backend = "postgres"
url = "postgres://acteon:acteon@localhost:5432/acteon"

[rules]
directory = "./rules"
"""
MIXED = """
# Redis for state (fast distributed locking)
[state]
backend = "redis"
url = "redis://localhost:6379"

# PostgreSQL for audit (reliable, queryable)
[audit]
enabled = true
backend = "postgres"
url = "postgres://acteon:acteon@localhost:5432/acteon"
"""


@pytest.fixture
def write(ratesync_registry: Path) -> Any:
    def write(text: str) -> Path:
        path = ratesync_registry / "acteon.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def read(write: Any, text: str) -> Config:
    return read_config(write(text))


def test_the_file_of_the_seed_is_read_and_what_is_not_ours_is_named(write: Any) -> None:
    config = read(write, SEED)
    assert config.state is not None
    assert (config.state.engine, config.state.options.prefix) == ("postgres", "acteon_")
    assert config.ignored == ("server", "audit", "rules")
    assert (config.stores, config.limiters) == ({}, {})


def test_backends_of_state_and_audit_can_be_mixed(write: Any) -> None:
    config = read(write, MIXED)
    assert config.state is not None
    assert config.state.engine == "redis"


def test_variables_are_expanded(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_BACKEND", "postgres")
    monkeypatch.setenv("STATE_URL", "postgresql://app@db/app")
    text = (
        '[state]\nbackend = "${STATE_BACKEND}"\nurl = "${STATE_URL}"\nprefix = "${PREFIX:-x_}"\n'
        'timeout = "${T:-2.5}"\npool_max_size = "${POOL:-3}"\n'
    )
    state = read(write, text).state
    assert state is not None
    assert (state.options.prefix, state.options.timeout) == ("x_", 2.5)
    assert state.store_options is not None
    assert state.store_options.pool_max_size == 3  # type: ignore[attr-defined]
    assert state.store_options.url == "postgresql://app@db/app"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("table", "field", "text"),
    [
        ("", "backend", "give backend = 'postgres', 'redis' or 'memory'"),
        ('backend = "postgres"', "url", "url is required"),
        ('backend = "postgress"\nurl = "x=1"', "backend", "did you mean 'postgres'"),
        ('backend = "dynamodb"', "backend", "for strict exclusion take 'postgres'"),
        ("backend = 5", "backend", "one of 'memory', 'postgres', 'redis'"),
        ('backend = ["redis"]', "backend", "one of 'memory', 'postgres', 'redis'"),
        ('engine = "redis"\nurl = "redis://h"', "engine", "is called backend here: backend = 'redis'"),
        ('backend = "memory"\nurl = "redis://h"', "url", "unknown key 'url'"),
        ('backend = "redis"\nurl = "redis://h"\nprefx = "a"', "prefx", "did you mean 'prefix'"),
        ('backend = "memory"\nstore = "db"', "backend", "exclude each other"),
        ('store = "nowhere"', "store", "'nowhere' is not configured"),
        ('store = "memory"\nurl = "redis://h"', "url", r"belong to \[stores\.<id>\]"),
        ('backend = "postgres"\nurl = "mysql://h/d"', "url", "another scheme"),
        (f'backend = "memory"\nprefix = "{"ä" * 21}"', "prefix", "0 to 40 bytes.*42 bytes"),
        ('backend = "memory"\nprefix = "a\\u0000"', "prefix", "NUL"),
        ('backend = "redis"\nurl = "redis://h"\nprefix = "{a}_"', "prefix", "hash_tag"),
        ('backend = "memory"\nnamespace = ""', "namespace", "1 to 255 bytes"),
        (f'backend = "memory"\ntenant = "{"ä" * 200}"', "tenant", "400 bytes"),
        ('backend = "memory"\ntimeout = 0', "timeout", "must be > 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_cure(write: Any, table: str, field: str, text: str) -> None:
    with pytest.raises(ConfigValidationError, match=text) as caught:
        read(write, f"[state]\n{table}\n")
    assert caught.value.field == f"state.{field}"
    assert "acteon.toml: [state]" in str(caught.value)


def test_state_has_to_be_a_table(write: Any) -> None:
    with pytest.raises(ConfigValidationError, match="state has to be a table"):
        read(write, 'state = "postgres"')


def test_a_misspelled_table_is_an_error_and_tables_of_others_are_not(write: Any) -> None:
    with pytest.raises(ConfigValidationError, match="did you mean 'state'"):
        read(write, '[sate]\nbackend = "memory"\n')
    assert read(write, "[status]\nport = 1\n[stats]\nport = 2\n").ignored == ("status", "stats")


def test_a_password_is_in_no_message(write: Any) -> None:
    with pytest.raises(ConfigValidationError) as caught:
        read(write, '[state]\nbackend = "redis"\nurl = "redis://:geheim@h"\nsocket_timeout = -1\n')
    assert "geheim" not in str(caught.value)


def test_without_configuration_state_is_in_the_embedded_store() -> None:
    store, options = _registry.state()
    assert (store.engine, store.store_id, options.prefix) == ("memory", "memory", "acteon_")


def test_beside_a_shared_store_state_is_never_private_by_accident(write: Any) -> None:
    ratesync.load_config(write('[stores.db]\nengine = "postgres"\nurl = "postgresql://localhost/app"\n'))
    with pytest.raises(ConfigValidationError, match=r"add \[state\] with store = 'db'"):
        _registry.state()
    ratesync.configure_state("memory")
    assert _registry.state()[0].engine == "memory"


def test_a_discovered_file_configures_state(ratesync_registry: Path) -> None:
    text = '[state]\nbackend = "redis"\nurl = "redis://localhost:1"\nprefix = "p_"\n'
    (ratesync_registry / "rate-sync.toml").write_text(text, encoding="utf-8")
    store, options = _registry.state()
    assert (store.engine, options.prefix) == ("redis", "p_")


def test_what_was_configured_by_a_call_wins_over_a_discovered_file(ratesync_registry: Path) -> None:
    (ratesync_registry / "rate-sync.toml").write_text(
        '[state]\nbackend = "memory"\nprefix = "file_"\n', encoding="utf-8"
    )
    ratesync.configure_state("memory", prefix="call_")
    assert ratesync.list_stores() == {}  # discovers
    assert _registry.state()[1].prefix == "call_"


def test_equal_options_share_the_connections_of_a_configured_store() -> None:
    url = "postgresql://localhost/app"
    ratesync.configure_store("db", "postgres", url=url)
    ratesync.configure_state("postgres", url=url)
    assert _registry.state()[0] is ratesync.get_store("db")
    ratesync.configure_state("postgres", url=url, pool_max_size=3)
    own = _registry.state()[0]
    assert own is not ratesync.get_store("db")
    assert _registry.state()[0] is own
    ratesync.configure_state(store="db", tenant="t")
    assert _registry.state()[0] is ratesync.get_store("db")


def test_a_store_that_is_not_configured_cannot_keep_state() -> None:
    ratesync.configure_store("db", "memory")
    with pytest.raises(StoreNotFoundError, match="did you mean 'db'"):
        ratesync.configure_state(store="dbb")
    with pytest.raises(ConfigValidationError, match="exclude each other"):
        ratesync.configure_state("memory", store="db")


def test_state_survives_a_shutdown_as_configuration() -> None:
    ratesync.configure_state("redis", url="redis://localhost:1")
    first = _registry.state()[0]
    ratesync.shutdown()
    second = _registry.state()[0]
    assert second is not first
    assert first._closed
