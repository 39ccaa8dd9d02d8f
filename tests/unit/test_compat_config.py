"""Section 4 of the compatibility contract: files and schemas. (More in test_config*.py.)"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ratesync
from ratesync import ConfigValidationError, _schemas
from ratesync.config import _expand_env_vars, _validate_config_structure
from ratesync.schemas import (
    ENGINE_SCHEMAS,
    LimiterConfig,
    MemoryEngineConfig,
    PostgresEngineConfig,
)
from ratesync.validation import validate_limiter_config, validate_store_config

pytestmark = pytest.mark.usefixtures("ratesync_registry")

URL = "postgresql://app:secret@localhost/app"


def test_a_file_of_the_seed_configures_everything(
    ratesync_registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", URL)
    path = ratesync_registry / "rate-sync.toml"
    path.write_text(
        """
        [stores.prod_db]
        engine = "postgres"
        url = "${DATABASE_URL}"
        auto_create = false
        pool_min_size = 5
        pool_max_size = "${POOL:-20}"

        [stores.local]
        engine = "memory"

        [limiters.api]
        store = "prod_db"
        rate_per_second = 100.0
        max_concurrent = 50
        timeout = 30.0

        [limiters.strict]
        store = "local"
        rate_per_second = 1.0
        fail_closed = true

        [fastapi]
        trusted_proxy_networks = ["10.0.0.0/8"]
        """
    )
    ratesync.load_config(str(path))
    assert ratesync.list_stores()["prod_db"]["pool_max_size"] == 20
    assert "secret" not in str(ratesync.list_stores())
    assert ratesync.get_limiter("strict").fail_closed is True
    assert ratesync.get_fastapi_config().trusted_proxy_networks == ["10.0.0.0/8"]


def test_the_private_helpers_that_suites_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "value")
    assert _expand_env_vars("${NAME}") == "value"
    assert _expand_env_vars("${MISSING:-default}") == "default"
    assert _expand_env_vars("${MISSING:-}") == ""
    assert _expand_env_vars({"a": ["${NAME}", 5], "b": {"${NAME}": True}}) == {
        "a": ["value", 5],
        "b": {"value": True},
    }
    stores, limiters, fastapi = _validate_config_structure(
        {"stores": {"a": {"engine": "memory"}}, "limiters": {"b": {}}, "fastapi": {}}
    )
    assert (stores, limiters, fastapi) == ({"a": {"engine": "memory"}}, {"b": {}}, {})
    assert _validate_config_structure({}) == ({}, {}, {})
    with pytest.raises(ConfigValidationError):
        _validate_config_structure({"stores": []})


@pytest.mark.parametrize("engine", sorted(_schemas.ENGINES))
def test_the_records_of_engines_have_every_option_with_its_default(engine: str) -> None:
    options = {
        field.name: dataclasses.MISSING if field.required else field.default
        for field in msgspec.structs.fields(_schemas.ENGINES[engine])
    }
    record: Any = ENGINE_SCHEMAS[engine]
    fields = {field.name: field.default for field in dataclasses.fields(record)}
    assert fields.pop("engine") == engine
    assert fields == options


def test_stores_are_validated() -> None:
    assert validate_store_config("memory", {}) == MemoryEngineConfig()
    config = validate_store_config("postgres", {"url": URL, "pool_max_size": 20})
    assert isinstance(config, PostgresEngineConfig)
    assert (config.engine, config.pool_max_size, config.table_name) == ("postgres", 20, "rate_limiter_state")
    assert "secret" not in repr(config)
    for engine, params in (
        ("postgres", {}),
        ("postgres", {"url": None}),
        ("postgres", {"url": URL, "pool_size": 5}),
        ("postgres", {"url": URL, "pool_max_size": 0}),
        ("mongo", {}),
        ("memory", {"url": URL}),
    ):
        with pytest.raises(ConfigValidationError):
            validate_store_config(engine, params)
    with pytest.raises(ValueError, match="pool_max_size"):
        PostgresEngineConfig(url=URL, pool_max_size=0)


def test_limiters_are_validated() -> None:
    config = validate_limiter_config({"store": "db", "rate_per_second": 10})
    assert config == LimiterConfig(store="db", rate_per_second=10.0)
    assert (config.algorithm, config.fail_closed, config.timeout) == ("token_bucket", False, None)
    for params, text in (
        ({"store": "db"}, "rate_per_second.*max_concurrent"),
        ({"store": "db", "rate_per_second": 0}, "rate_per_second"),
        ({"store": "db", "max_concurrent": -1}, "max_concurrent"),
        ({"store": "db", "rate_per_second": 1, "limit": 0}, "limit"),
        ({"store": "db", "rate_per_second": 1, "window_seconds": 0}, "window_seconds"),
        ({"store": "db", "rate_per_secnd": 1}, "did you mean 'rate_per_second'"),
    ):
        with pytest.raises(ValueError, match=text):
            validate_limiter_config(params)
    with pytest.raises(ValueError, match="rate_per_second"):
        LimiterConfig(store="db", rate_per_second=-1)
