"""Configuration files: every bad input is one error that names file, table and key; loading is atomic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ratesync
from ratesync import ConfigValidationError
from ratesync.config import MAX_FILE_BYTES, _expand_env_vars, _validate_config_structure, read_config

pytestmark = pytest.mark.usefixtures("clean")

GOOD = """
[stores.db]
engine = "postgres"
url = "postgresql://app:s3cret@localhost/mydb"
auto_create = true

[limiters.api]
store = "db"
rate_per_second = 100
max_concurrent = 50
timeout = 30.0
fail_closed = true

[limiters."names with 'quotes', dots. and \\"spaces\\""]
rate_per_second = 0.5

[fastapi]
trusted_proxy_networks = ["10.0.0.0/8", "::1"]

[audit]
backend = "redis"
"""


def write(text: str | bytes, name: str = "some.toml") -> str:
    path = Path(name)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(text: str | bytes) -> ConfigValidationError:
    with pytest.raises(ConfigValidationError) as caught:
        ratesync.load_config(write(text))
    assert "some.toml" in str(caught.value)
    assert ratesync.list_limiters() == {}
    assert ratesync.list_stores() == {}
    return caught.value


def test_a_good_file_configures_all_of_it() -> None:
    ratesync.load_config(write(GOOD))
    limiters = ratesync.list_limiters()
    assert set(limiters) == {"api", "names with 'quotes', dots. and \"spaces\""}
    assert limiters["api"]["store"] == limiters["api"]["backend"] == "db"
    assert limiters["api"]["rate_per_second"] == 100.0
    assert limiters["api"]["fail_closed"] is True
    store = ratesync.list_stores()["db"]
    assert store["engine"] == "postgres"
    assert store["url"] == "postgresql://app:***@localhost/mydb"
    assert (store["table_name"], store["pool_max_size"], store["auto_create"]) == (
        "rate_limiter_state",
        10,
        True,
    )


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_path_may_be_text_or_a_path(path_type: type[str] | type[Path]) -> None:
    ratesync.load_config(path_type(write("[limiters.a]\nrate_per_second = 1")))
    assert "a" in ratesync.list_limiters()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[limiters.api]\nrate_per_secnd = 1", ["[limiters.api]", "'rate_per_secnd'", "'rate_per_second'"]),
        ("[stores.m]\nengine = 'memory'\nurl = 'x'", ["[stores.m]", "unknown key 'url'"]),
        ("[stores.m]", ["[stores.m]", "engine is required"]),
        ("[stores.m]\nengine = 'memry'", ["'memry'", "did you mean 'memory'?", "'postgres'"]),
        ("[stores.m]\nengine = 5", ["engine", "5"]),
        ("[stores.r]\nengine = 'mysql'\nurl = 'mysql://h'", ["'mysql'", "'memory', 'postgres', 'redis'"]),
        ("[stores.p]\nengine = 'postgres'", ["[stores.p]", "url is required"]),
        ("[stores.p]\nengine = 'postgres'\nurl = 5", ["url", "a string", "int"]),
        ("[stores.p]\nengine = 'postgres'\nurl = ''", ["url is empty"]),
        ("[stores.p]\nengine = 'postgres'\nurl = 'mysql://h/d'", ["url", "'mysql://'", "postgresql://"]),
        (
            "[stores.p]\nengine = 'postgres'\nurl = 'postgresql+asyncpg://h/d'",
            ["leave out the driver's name"],
        ),
        (
            "[stores.p]\nengine = 'postgres'\nurl = 'postgres://h'\npool_max_size = 0",
            ["pool_max_size", "from 1"],
        ),
        (
            "[stores.p]\nengine = 'postgres'\nurl = 'postgres://h'\npool_min_size = 9\npool_max_size = 3",
            ["pool_min_size is larger than pool_max_size", "at most 3"],
        ),
        (
            "[stores.p]\nengine = 'postgres'\nurl = 'postgres://h'\nauto_create = 'true'",
            ["auto_create", "true or f"],
        ),
        (
            "[stores.p]\nengine = 'postgres'\nurl = 'postgres://h'\nsynchronous_commit = 'no'",
            ["'auto', 'on', 'off'"],
        ),
        ("[stores.p]\nengine = 'postgres'\nurl = 'postgres://h'\ntable_name = ''", ["table_name"]),
        (f"[stores.p]\nengine = 'postgres'\nurl = 'postgres://h'\ntable_name = '{'ü' * 40}'", ["80 bytes"]),
        ("[limiters.api]\nrate_per_second = '100'", ["[limiters.api]", "rate_per_second", "number", "'100'"]),
        ("[limiters.api]\nrate_per_second = true", ["rate_per_second", "got True"]),
        ("[limiters.api]\nrate_per_second = nan", ["rate_per_second is not finite"]),
        ("[limiters.api]\nrate_per_second = 1\nburst = 1.5", ["burst", "an integer", "1.5"]),
        ("[limiters.api]", ["[limiters.api]", "rate_per_second and max_concurrent are both missing"]),
        ("[limiters.api]\nrate_per_second = 1\nstore = 'nope'", ["[limiters.api]", "'nope'"]),
        (
            "[limiters.api]\nrate_per_second = 1\nalgorithm = 'sliding_window'",
            ["[limiters.api]", "limit is missing: sliding_window needs both limit and window_seconds"],
        ),
        (
            "[limiters.api]\nlimit = 5\nwindow_seconds = 1\nalgorithm = 'slidingwindow'",
            ["algorithm is not valid (did you mean 'sliding_window'", "'token_bucket'", "'fixed_window'"],
        ),
        (
            "[limiters.api]\nlimit = 5\nwindow_seconds = 1",
            ["are both missing", "algorithm = 'sliding_window'"],
        ),
        (
            "[limiters.api]\nlimit = 0\nwindow_seconds = 1\nalgorithm = 'fixed_window'",
            ["limit must be > 0", "got 0"],
        ),
        ("[limiters.api]\nlimit = 5\nwindow_seconds = 0", ["window_seconds must be > 0"]),
        ("[limiters.api]\nrate_per_second = -1", ["rate_per_second must be > 0"]),
        ("[limiters.api]\nmax_concurrent = 0", ["max_concurrent must be > 0"]),
        ("[limiter.api]\nrate_per_second = 1", ["[limiter]", "did you mean 'limiters'?"]),
        ("[store.api]\nengine = 'memory'", ["[store]", "did you mean 'stores'?"]),
        ("[limiters]\napi = 5", ["[limiters] api has to be a table [limiters.api]", "int"]),
        ("limiters = 5", ["limiters has to be a table"]),
        ("[limiters.'']\nrate_per_second = 1", ["limiter_id is empty"]),
        ('[limiters."a\\u0000b"]\nrate_per_second = 1', ["NUL"]),
        (f"[limiters.{'a' * 256}]\nrate_per_second = 1", ["at most 255 characters", "256"]),
        ("[fastapi]\ntrusted_proxy_network = []", ["[fastapi]", "'trusted_proxy_networks'"]),
        (
            "[fastapi]\ntrusted_proxy_networks = '10.0.0.0/8'",
            ["trusted_proxy_networks", "a list of networks"],
        ),
        ("[fastapi]\ntrusted_proxy_networks = ['10.0.0.0/99']", ["trusted_proxy_networks", "'10.0.0.0/99'"]),
        ("[fastapi]\ntrusted_proxy_networks = [5]", ["trusted_proxy_networks", "got 5"]),
        ("[limiters.api]\nrate_per_second = \n", ["not valid TOML", "line 2"]),
        ("[limiters.api]\nx = 1\nx = 2\n", ["not valid TOML", "line 3"]),
        (b"# fine\n# \xff\n", ["line 2 is not UTF-8"]),
        (
            "[limiters.api]\nrate_per_second = '${RS_UNDEFINED}'",
            ["[limiters.api]", "RS_UNDEFINED is not defined"],
        ),
        ("[limiters.'${RS_UNDEFINED}']\nrate_per_second = 1", ["RS_UNDEFINED is not defined"]),
        ("[stores.p]\nengine = 'postgres'\nurl = '${not a name}'", ["url", "at character 1 ", "$${"]),
        ("[stores.p]\nengine = 'postgres'\nurl = 'postgres://u:pw${OPEN'", ["at character 16 "]),
        ("[stores.p]\nengine = 'postgres'\nurl = '${A:-${B}}'", ["neither ${NAME} nor"]),
    ],
)
def test_a_bad_file_is_one_error_with_the_place(text: str | bytes, parts: list[str]) -> None:
    message = str(refused(text))
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert "pw" not in message


def test_the_error_carries_the_dotted_path() -> None:
    assert refused("[limiters.api]\nrate_per_second = 0").field == "limiters.api.rate_per_second"
    assert refused("[stores.m]\nengine = 'x'").field == "stores.m.engine"


def test_a_bad_entry_leaves_nothing_of_the_file_behind() -> None:
    ratesync.configure_limiter("old", rate_per_second=1)
    with pytest.raises(ConfigValidationError):
        ratesync.load_config(write(GOOD + "[limiters.zz]\nburst = 1\n"))
    assert set(ratesync.list_limiters()) == {"old"}
    assert ratesync.list_limiters()["old"]["rate_per_second"] == 1.0


def test_a_missing_file_is_also_a_file_not_found_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"'absent\.toml' does not exist") as caught:
        ratesync.load_config("absent.toml")
    assert isinstance(caught.value, ConfigValidationError)


def test_a_dangling_link_is_named_as_such() -> None:
    os.symlink("nowhere", "link.toml")
    with pytest.raises(ConfigValidationError, match=r"'link\.toml'.*dangling"):
        ratesync.load_config("link.toml")


def test_a_link_to_itself_cannot_be_read() -> None:
    os.symlink("loop.toml", "loop.toml")
    with pytest.raises(ConfigValidationError, match=r"'loop\.toml' cannot be read"):
        ratesync.load_config("loop.toml")


def test_a_directory_is_refused() -> None:
    os.mkdir("dir.toml")
    with pytest.raises(ConfigValidationError, match=r"'dir\.toml' is a directory"):
        ratesync.load_config("dir.toml")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused() -> None:
    os.chmod(write(GOOD), 0)
    with pytest.raises(ConfigValidationError, match="cannot be read"):
        ratesync.load_config("some.toml")


def test_a_name_with_nul_is_refused() -> None:
    with pytest.raises(ConfigValidationError, match="NUL"):
        ratesync.load_config("a\0b")


def test_a_file_of_10_mb_is_refused_by_its_size_before_it_is_read() -> None:
    with open("big.toml", "wb") as file:
        file.truncate(10_000_000)
    with pytest.raises(ConfigValidationError, match=r"10000000 bytes; the bound is 1048576"):
        ratesync.load_config("big.toml")


def test_a_device_without_end_is_refused_as_well() -> None:
    with pytest.raises(ConfigValidationError, match="the bound is"):
        ratesync.load_config("/dev/zero")


def test_a_file_of_exactly_the_bound_is_read() -> None:
    text = b"[limiters.a]\nrate_per_second = 1\n#"
    ratesync.load_config(write(text + b"x" * (MAX_FILE_BYTES - len(text))))


def test_a_byte_order_mark_is_accepted() -> None:
    ratesync.load_config(write("\ufeff[limiters.a]\nrate_per_second = 1"))


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    refused("a = " + "[" * 100_000)


# ${VAR} -------------------------------------------------------------------------------------------


def test_only_fields_declared_numeric_or_boolean_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RS_RATE": "2.5",
        "RS_MAX": "7",
        "RS_CLOSED": "true",
        "RS_TABLE": "12345",
        "RS_NAME": "42",
        "RS_PASSWORD": "1e5",
    }.items():
        monkeypatch.setenv(name, value)
    config = read_config(
        write(
            """
            [stores.db]
            engine = "postgres"
            url = "postgresql://u:${RS_PASSWORD}@h/db"
            table_name = "${RS_TABLE}"
            auto_create = "${RS_CREATE:-false}"
            [limiters."${RS_NAME}"]
            store = "db"
            rate_per_second = "${RS_RATE}"
            max_concurrent = "${RS_MAX}"
            fail_closed = "${RS_CLOSED}"
            timeout = "${RS_TIMEOUT:-}"
            """
        )
    )
    options = config.stores["db"].options
    assert options.url == "postgresql://u:1e5@h/db"  # type: ignore[attr-defined]
    assert options.table_name == "12345"  # type: ignore[attr-defined]
    limiter = config.limiters["42"]
    assert (limiter.rate_per_second, limiter.max_concurrent, limiter.fail_closed) == (2.5, 7, True)
    assert limiter.timeout is None


@pytest.mark.parametrize("value", ["ten", "1_0", "0x10", "1.5", "", " "])
def test_an_expanded_value_of_the_wrong_form_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_BURST", f"{value}!" if not value.strip() else value)
    assert "burst" in str(refused('[limiters.a]\nrate_per_second = 1\nburst = "${RS_BURST}"'))


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e10"])
def test_an_expanded_rate_obeys_the_same_bounds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_RATE", value)
    assert "rate_per_second" in str(refused('[limiters.a]\nrate_per_second = "${RS_RATE}"'))


def test_keys_expand_and_may_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_NAME", "api")
    assert "twice" in str(
        refused('[limiters.api]\nrate_per_second = 1\n[limiters."${RS_NAME}"]\nrate_per_second = 2')
    )


def test_tables_of_others_are_not_expanded() -> None:
    ratesync.load_config(
        write('[server]\nsecret = "${RS_UNDEFINED}"\n[x]\ny = 1\n[limiters.a]\nrate_per_second = 1')
    )


def test_the_names_that_well_known_suites_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_A", "x")
    assert _expand_env_vars({"${RS_A}": ["$HOME", "${RS_A}y", 5]}) == {"x": ["$HOME", "xy", 5]}
    data = {"stores": {"m": {"engine": "memory"}}, "limiters": {}, "other": {}}
    assert _validate_config_structure(data) == ({"m": {"engine": "memory"}}, {}, {})


# Discovery ----------------------------------------------------------------------------------------


def test_discovery_happens_at_first_use_and_not_before() -> None:
    write("[limiters.found]\nrate_per_second = 1", "rate-sync.toml")
    assert ratesync.get_limiter("found").rate_per_second == 1.0


def test_discovery_prefers_the_environment_then_here_then_config(
    clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir("config")
    write("[limiters.a]\nrate_per_second = 3", "config/rate-sync.toml")
    from ratesync.config import find_config

    assert find_config()[0] == Path("config/rate-sync.toml")
    write("[limiters.a]\nrate_per_second = 2", "rate-sync.toml")
    assert find_config()[0] == Path("rate-sync.toml")
    monkeypatch.setenv("RATE_SYNC_CONFIG", write("[limiters.a]\nrate_per_second = 1", "env.toml"))
    assert ratesync.get_limiter("a").rate_per_second == 1.0


def test_a_named_file_that_is_missing_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_SYNC_CONFIG", "missing.toml")
    with pytest.raises(ratesync.LimiterNotFoundError, match=r"RATE_SYNC_CONFIG names 'missing\.toml'"):
        ratesync.get_limiter("api")


def test_a_bad_discovered_file_raises_each_time_until_fixed() -> None:
    write("[limiters.api]\nrate_per_second = 0", "rate-sync.toml")
    for _ in range(2):
        with pytest.raises(
            ConfigValidationError, match=r"rate-sync\.toml: \[limiters\.api\]: rate_per_second"
        ):
            ratesync.acquire("api")
    with pytest.raises(ConfigValidationError):
        ratesync.list_limiters()
    write("[limiters.api]\nrate_per_second = 5", "rate-sync.toml")
    assert ratesync.get_limiter("api").rate_per_second == 5.0


def test_what_code_configured_wins_over_the_discovered_file() -> None:
    write("[limiters.api]\nrate_per_second = 1\n[limiters.other]\nrate_per_second = 1", "rate-sync.toml")
    ratesync.configure_limiter("api", rate_per_second=7)
    assert ratesync.get_limiter("other").rate_per_second == 1.0
    assert ratesync.get_limiter("api").rate_per_second == 7.0


def test_a_store_of_the_discovered_file_serves_limiters_of_the_code() -> None:
    write("[stores.mine]\nengine = 'memory'", "rate-sync.toml")
    ratesync.configure_limiter("api", "mine", 5.0)
    assert ratesync.get_limiter("api").store_id == "mine"
