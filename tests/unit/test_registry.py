"""Names: configuring, looking up, cloning, listing; what shutdown and fork leave; who may be called how."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ratesync
from ratesync import ConfigValidationError, _engine
from ratesync._registry import _registry
from ratesync.registry import group_id_for

pytestmark = pytest.mark.usefixtures("clean")

URL = "postgresql://app:s3cret@localhost/mydb"


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rate_per_second": 0}, "rate_per_second"),
        ({"rate_per_second": -1}, "rate_per_second"),
        ({"rate_per_second": float("nan")}, "rate_per_second"),
        ({"rate_per_second": float("inf")}, "rate_per_second"),
        ({"rate_per_second": float("-inf")}, "rate_per_second"),
        ({"rate_per_second": 1e9 + 1}, "rate_per_second"),
        ({"rate_per_second": 10**400}, "rate_per_second"),
        ({"rate_per_second": "1"}, "rate_per_second"),
        ({"rate_per_second": True}, "rate_per_second"),
        ({"rate_per_second": 1, "burst": 0}, "burst"),
        ({"rate_per_second": 1, "burst": -1}, "burst"),
        ({"rate_per_second": 1, "burst": 1.0}, "burst"),
        ({"rate_per_second": 1, "burst": True}, "burst"),
        ({"rate_per_second": 1, "burst": 1_000_000_001}, "burst"),
        ({"rate_per_second": 1, "burst": None}, "burst"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"max_concurrent": -1}, "max_concurrent"),
        ({"max_concurrent": 1.5}, "max_concurrent"),
        ({"max_concurrent": True}, "max_concurrent"),
        ({"rate_per_second": 1, "timeout": -0.1}, "timeout"),
        ({"rate_per_second": 1, "timeout": float("nan")}, "timeout"),
        ({"rate_per_second": 1, "timeout": float("inf")}, "timeout"),
        ({"rate_per_second": 1, "timeout": False}, "timeout"),
        ({"rate_per_second": 1, "fail_closed": "yes"}, "fail_closed"),
        ({"rate_per_second": 1, "fail_closed": 1}, "fail_closed"),
        ({"rate_per_second": 1, "outage_budget": 61}, "outage_budget"),
        ({"rate_per_second": 1, "outage_budget": -1}, "outage_budget"),
        ({"rate_per_second": 1, "lease_seconds": 0.5}, "lease_seconds"),
        ({"rate_per_second": 1, "lease_seconds": 86401}, "lease_seconds"),
        ({"rate_per_second": 1, "max_hold_seconds": 0}, "max_hold_seconds"),
        ({"rate_per_second": 1, "limit": 0}, "limit"),
        ({"rate_per_second": 1, "window_seconds": 0}, "window_seconds"),
        ({"rate_per_second": 1, "algorithm": "sliding_window"}, "limit"),
        ({"algorithm": "sliding_window", "limit": 5}, "window_seconds"),
        ({"algorithm": "fixed_window", "window_seconds": 5}, "limit"),
        ({"algorithm": "sliding_counter", "limit": 0, "window_seconds": 5}, "limit"),
        ({"algorithm": "sliding_counter", "limit": 5, "window_seconds": 0.0005}, "window_seconds"),
        ({"algorithm": "sliding_counter", "limit": 5, "window_seconds": 367 * 86400}, "window_seconds"),
        ({"algorithm": "fixed_windows", "limit": 5, "window_seconds": 1}, "algorithm"),
        ({"rate_per_second": 1, "algorithm": "token-bucket"}, "algorithm"),
        ({"rate_per_second": 1, "algorithm": None}, "algorithm"),
        ({}, "rate_per_second"),
        ({"limit": 5, "window_seconds": 1}, "rate_per_second"),
    ],
    ids=str,
)
def test_a_bad_limiter_is_refused_by_field_and_nothing_changes(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigValidationError) as caught:
        ratesync.configure_limiter("api", **fields)
    assert caught.value.field == field
    assert "limiter 'api'" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert ratesync.list_limiters() == {}


@pytest.mark.parametrize("rate", [1e9, 1, 0.001, 1e-9])
def test_rates_up_to_the_bound_are_accepted(rate: float) -> None:
    ratesync.configure_limiter("api", rate_per_second=rate)
    assert ratesync.get_limiter("api").rate_per_second == rate


def test_numbers_of_other_libraries_are_numbers() -> None:
    from decimal import Decimal
    from fractions import Fraction

    ratesync.configure_limiter("a", rate_per_second=Fraction(1, 2))  # type: ignore[arg-type]
    ratesync.configure_limiter("b", rate_per_second=Decimal("0.5"))  # type: ignore[arg-type]
    assert ratesync.get_limiter("a").rate_per_second == ratesync.get_limiter("b").rate_per_second == 0.5


@pytest.mark.parametrize(
    "name",
    ["", " ", "\t\n", "a\0b", "\0", "x" * 256, "\ud800", 5, None, b"api"],
    ids=lambda name: repr(name)[:12],
)
@pytest.mark.parametrize("kind", ["limiter", "store", "clone", "limiter's store"])
def test_bad_names_are_refused(kind: str, name: Any) -> None:
    ratesync.configure_limiter("base", rate_per_second=1)
    configure: dict[str, Callable[[], None]] = {
        "limiter": lambda: ratesync.configure_limiter(name, rate_per_second=1),
        "store": lambda: ratesync.configure_store(name, "memory"),
        "clone": lambda: ratesync.clone_limiter("base", name),
        "limiter's store": lambda: ratesync.configure_limiter("api", name, 1.0),
    }
    with pytest.raises(ConfigValidationError) as caught:
        configure[kind]()
    str(caught.value).encode()  # printable, whatever the name was


@pytest.mark.parametrize(
    "name",
    ["a.b", "with 'single' and \"double\"", "a b", "ü" * 255, "x" * 255, "a:b", "a\\b", "%s{}$", "日本"],
)
def test_unusual_names_are_fine(name: str) -> None:
    ratesync.configure_store(name, "memory")
    ratesync.configure_limiter(name, name, 1.0)
    assert ratesync.get_limiter(name).group_id == name
    with ratesync.acquire(name):
        pass


@pytest.mark.parametrize("look_up", [ratesync.get_limiter, ratesync.acquire, ratesync.try_acquire])
def test_an_unknown_limiter_is_named_with_its_nearest(look_up: Any) -> None:
    ratesync.configure_limiter("payments", rate_per_second=1)
    with pytest.raises(
        ratesync.LimiterNotFoundError, match=r"'paymets'.*did you mean 'payments'\?"
    ) as caught:
        look_up("paymets")
    assert caught.value.limiter_id == "paymets"


def test_an_unknown_store_is_named_with_its_nearest() -> None:
    ratesync.configure_store("primary", "memory")
    with pytest.raises(ratesync.StoreNotFoundError, match=r"'primry'.*did you mean 'primary'\?"):
        ratesync.configure_limiter("api", "primry", 1.0)
    with pytest.raises(ratesync.StoreNotFoundError) as caught:
        ratesync.get_store("primry")
    assert caught.value.store_id == "primry"


@pytest.mark.parametrize(
    ("arguments", "options", "part"),
    [
        ((), {}, "one of 'memory', 'postgres'"),
        (("mysql",), {"url": "mysql://h"}, "one of 'memory', 'postgres', 'redis'"),
        (("postgress",), {"url": URL}, "did you mean 'postgres'?"),
        (("memory",), {"engine": "postgres"}, "give one of them"),
        (("memory",), {"size": 5}, "unknown key 'size'"),
        (("postgres",), {}, "url is required"),
        (("postgres",), {"url": None}, "url"),
        (("postgres",), {"url": URL, "pool_max": 5}, "did you mean 'pool_max_size'"),
        (("postgres",), {"url": URL, "command_timeout": 0}, "command_timeout"),
        (("postgres",), {"url": URL, "timing_margin_ms": -1}, "timing_margin_ms"),
        (("postgres",), {"url": "s3cret@host"}, "not a connection string"),
    ],
    ids=str,
)
def test_a_bad_store_is_refused(arguments: tuple[str, ...], options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigValidationError) as caught:
        ratesync.configure_store("db", *arguments, **options)
    assert part in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert ratesync.list_stores() == {}


# Looking up and configuring again -------------------------------------------------------------------


def test_a_limiter_is_built_once_until_it_is_configured_again() -> None:
    ratesync.configure_limiter("api", rate_per_second=1)
    first = ratesync.get_limiter("api")
    assert ratesync.get_limiter("api") is first
    ratesync.configure_limiter("api", rate_per_second=1)
    assert ratesync.get_limiter("api") is first, "the same parameters are no change"
    ratesync.configure_limiter("api", rate_per_second=2)
    assert ratesync.get_limiter("api") is not first
    assert ratesync.get_limiter("api").rate_per_second == 2.0


def test_a_live_change_takes_effect_and_keeps_what_was_consumed() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.001)
    assert ratesync.try_acquire("api").wait() is True
    ratesync.configure_limiter("api", rate_per_second=0.002)
    assert ratesync.try_acquire("api").wait() is False


def test_the_table_of_bound_limiters_stays_true() -> None:
    bound = _engine.bound_limiters()
    ratesync.configure_limiter("api", rate_per_second=1)
    assert "api" not in bound
    limiter = ratesync.get_limiter("api")
    assert bound["api"] is limiter
    ratesync.configure_limiter("api", rate_per_second=2)
    assert "api" not in bound
    ratesync.get_limiter("api")
    _registry._limiters.clear()
    assert bound == {}
    assert ratesync.list_limiters() == {}


@pytest.mark.skipif(not _engine.HAS_POSTGRES, reason="built without the PostgreSQL store")
def test_a_store_configured_anew_takes_its_limiters_along() -> None:
    ratesync.configure_store("s", "memory")
    ratesync.configure_limiter("api", "s", 0.001)
    assert ratesync.try_acquire("api").wait() is True
    ratesync.configure_store("s", "memory")
    assert ratesync.try_acquire("api").wait() is False, "the same options are no change"
    ratesync.configure_store("s", "postgres", url=URL)
    assert ratesync.get_store("s").engine == "postgres"
    assert ratesync.get_limiter("api").store_id == "s"


def test_the_memory_store_exists_without_being_configured() -> None:
    ratesync.configure_limiter("api", rate_per_second=1)
    assert ratesync.get_limiter("api").store_id == "memory"
    assert ratesync.get_store("memory").engine == "memory"
    assert set(ratesync.list_stores()) == {"memory"}


def test_positional_order_of_configure_limiter() -> None:
    ratesync.configure_store("s", "memory")
    ratesync.configure_limiter("api", "s", 5.0, 3, 2.0, "token_bucket", None, None, True)
    config = ratesync.get_limiter("api").get_config()
    assert config == ratesync.LimiterReadOnlyConfig("api", "token_bucket", "s", 5.0, 3, 2.0, None, None, True)


def test_parameters_are_readable_on_the_limiter() -> None:
    ratesync.configure_limiter(
        "api", rate_per_second=5, max_concurrent=2, timeout=1, burst=4, fail_closed=True
    )
    limiter = ratesync.get_limiter("api")
    assert (limiter.rate_per_second, limiter.burst, limiter.max_concurrent) == (5.0, 4, 2)
    assert (limiter.default_timeout, limiter.fail_closed, limiter.algorithm) == (1.0, True, "token_bucket")
    assert (limiter.limit, limiter.window_seconds) == (None, None)
    assert (limiter.group_id, limiter.store_id, limiter.is_initialized) == ("api", "memory", False)
    limiter.initialize().wait()
    assert limiter.is_initialized


def test_listings_mask_passwords_and_know_what_is_initialized() -> None:
    ratesync.configure_store("db", "postgres", url=URL)
    ratesync.configure_limiter("api", rate_per_second=1)
    assert "s3cret" not in repr(ratesync.list_stores())
    row = ratesync.list_limiters()["api"]
    assert (row["initialized"], row["metrics"]) == (False, None)
    ratesync.initialize_all_limiters().wait()
    row = ratesync.list_limiters()["api"]
    assert row["initialized"] is True
    assert row["metrics"].total_acquisitions == 0
    assert ratesync.list_stores()["memory"]["initialized"] is True
    assert ratesync.list_stores()["db"]["initialized"] is False


# Clones ---------------------------------------------------------------------------------------------


def test_a_clone_copies_and_overrides() -> None:
    ratesync.configure_limiter("base", rate_per_second=5, timeout=3, fail_closed=True)
    ratesync.clone_limiter("base", "copy", rate_per_second=7)
    copy = ratesync.get_limiter("copy")
    assert (copy.rate_per_second, copy.default_timeout, copy.fail_closed) == (7.0, 3.0, True)
    with pytest.raises(ValueError, match="already exists"):
        ratesync.clone_limiter("base", "copy")
    with pytest.raises(ratesync.LimiterNotFoundError):
        ratesync.clone_limiter("missing", "other")
    with pytest.raises(ConfigValidationError):
        ratesync.clone_limiter("base", "other", rate_per_second=-1)


def test_get_or_clone_gives_the_same_object_and_the_state_of_the_key() -> None:
    ratesync.configure_limiter("base", rate_per_second=0.001)
    tenant = ratesync.get_or_clone_limiter("base", "ten:ant\\7").wait()
    assert tenant.group_id == "base:ten\\:ant\\\\7"
    assert tenant.is_initialized
    assert ratesync.get_or_clone_limiter("base", "ten:ant\\7").wait() is tenant
    assert ratesync.try_acquire("base", key="ten:ant\\7").wait() is True
    assert tenant.try_acquire().wait() is False
    assert ratesync.try_acquire("base").wait() is True, "the base has a state of its own"


def test_a_key_that_makes_the_name_too_long_is_refused() -> None:
    ratesync.configure_limiter("base", rate_per_second=1)
    for key in ("x" * 251, ":" * 126, ""):
        with pytest.raises(ConfigValidationError):
            ratesync.get_or_clone_limiter("base", key).wait()
    assert set(ratesync.list_limiters()) == {"base"}


keys = st.text(st.sampled_from("ab:\\"), max_size=6)


@given(base=keys, one=keys, other=keys)
def test_no_two_keys_meet_in_one_group(base: str, one: str, other: str) -> None:
    assert (group_id_for(base, one) == group_id_for(base, other)) == (one == other)


@given(base=st.text(max_size=10), key=st.text(max_size=10))
def test_the_escaped_key_has_no_bare_colon_and_can_be_read_back(base: str, key: str) -> None:
    group = group_id_for(base, key)
    assert group.startswith(f"{base}:")
    plain, characters = "", iter(group[len(base) + 1 :])
    for character in characters:
        assert character != ":"
        plain += next(characters) if character == "\\" else character
    assert plain == key


# State, metrics, release ----------------------------------------------------------------------------


def test_the_state_is_read_without_charging() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01, burst=3)
    limiter = ratesync.get_limiter("api")
    for _ in range(3):
        state = limiter.get_state().wait()
        assert (state.allowed, state.remaining, state.current_usage) == (True, 3, 0)
    assert limiter.try_acquire().wait()
    assert limiter.get_state().wait().remaining == 2
    assert limiter.get_metrics().total_acquisitions == 1
    limiter.reset().wait()
    assert limiter.get_state().wait().remaining == 3


def test_release_frees_the_oldest_bare_acquire_and_a_stray_one_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ratesync.configure_limiter("api", max_concurrent=2)
    limiter = ratesync.get_limiter("api")
    limiter.acquire().wait()
    with limiter.acquire_context():
        assert limiter.try_acquire().wait() is False
        assert limiter.release().wait() is True
        for _ in range(3):
            assert limiter.release().wait() is False, "the slot of the context manager is not ours to free"
        assert limiter.get_state().wait().in_use == 1
    assert [record.message for record in caplog.records if "nothing was freed" in record.message] == [
        "release() of limiter 'api' without a matching acquire(): nothing was freed (said once)"
    ]


def test_metrics_are_live_and_read_only() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.01)
    metrics = ratesync.get_limiter("api").get_metrics()
    assert metrics.total_acquisitions == 0
    with ratesync.acquire("api"):
        assert metrics.total_acquisitions == 1
    with pytest.raises(AttributeError, match="counted by the engine"):
        metrics.total_acquisitions = 0


def test_a_metrics_record_of_ones_own_can_be_filled() -> None:
    metrics = ratesync.RateLimiterMetrics()
    metrics.record_acquisition(10.0)
    metrics.record_acquisition(30.0)
    metrics.record_timeout()
    metrics.record_concurrent_acquire()
    metrics.record_concurrent_release()
    metrics.record_concurrent_release()
    assert (metrics.total_acquisitions, metrics.avg_wait_time_ms, metrics.max_wait_time_ms) == (2, 20.0, 30.0)
    assert (metrics.timeouts, metrics.current_concurrent, metrics.total_releases) == (1, 0, 2)
    assert metrics.last_acquisition_at is not None


def test_reset_all_resets_the_whole_store() -> None:
    for name in ("a", "b"):
        ratesync.configure_limiter(name, rate_per_second=0.001)
        assert ratesync.try_acquire(name).wait()
    assert ratesync.try_acquire("a", key="k").wait()
    ratesync.get_limiter("a").reset_all().wait()
    assert [ratesync.try_acquire(name).wait() for name in ("a", "b")] == [True, True]
    assert ratesync.try_acquire("a", key="k").wait() is True


# Pendings -------------------------------------------------------------------------------------------


def test_pendings_work_with_await_gather_and_create_task() -> None:
    ratesync.configure_limiter("api", rate_per_second=1000.0, max_concurrent=10)
    limiter = ratesync.get_limiter("api")

    async def main() -> None:
        await limiter.initialize()
        await asyncio.create_task(limiter.acquire())
        await asyncio.create_task(limiter.reset())
        assert await asyncio.wait_for(limiter.try_acquire(1), 5)
        await asyncio.gather(limiter.acquire(), ratesync.initialize_limiter("api"), limiter.get_state())
        assert await limiter.release()
        assert (await ratesync.get_or_clone_limiter("api", "x")).group_id == "api:x"
        await limiter.disconnect()

    asyncio.run(main())


def test_a_pending_is_consumed_once() -> None:
    pending = ratesync.initialize_all_limiters()
    assert inspect.isawaitable(pending)
    pending.wait()
    with pytest.raises(RuntimeError, match="already consumed"):
        pending.wait()


def test_a_forgotten_pending_warns() -> None:
    with pytest.warns(RuntimeWarning, match=r"initialize_all_limiters\(\) was called but neither awaited"):
        ratesync.initialize_all_limiters()


def test_errors_of_a_pending_surface_when_it_is_consumed() -> None:
    pending = ratesync.initialize_limiter("missing")
    with pytest.raises(ratesync.LimiterNotFoundError):
        pending.wait()


# Life of the engine ---------------------------------------------------------------------------------


def test_after_shutdown_the_next_use_by_name_starts_afresh() -> None:
    ratesync.configure_limiter("api", rate_per_second=0.001)
    limiter = ratesync.get_limiter("api")
    assert limiter.try_acquire().wait()
    ratesync.shutdown()
    ratesync.shutdown()
    assert _engine.bound_limiters() == {}
    assert not limiter.is_initialized
    with pytest.raises(ratesync.StoreClosedError, match="get_limiter"):
        limiter.try_acquire(0.5).wait()
    assert ratesync.get_limiter("api") is not limiter
    assert ratesync.try_acquire("api").wait() is True


def test_disconnect_of_the_last_limiter_closes_the_store_and_use_by_name_reopens() -> None:
    ratesync.configure_limiter("a", rate_per_second=1)
    ratesync.configure_limiter("b", rate_per_second=1)
    a, b = ratesync.get_limiter("a"), ratesync.get_limiter("b")
    store = ratesync.get_store("memory")
    a.disconnect().wait()
    assert ratesync.get_store("memory") is store
    b.disconnect().wait()
    assert ratesync.get_store("memory") is not store
    assert ratesync.try_acquire("a").wait()


def test_threads_that_ask_at_once_get_the_same_limiter() -> None:
    ratesync.configure_limiter("api", rate_per_second=1)
    barrier = threading.Barrier(8)
    seen: list[ratesync.RateLimiter] = []

    def ask() -> None:
        barrier.wait()
        seen.append(ratesync.get_limiter("api"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len({id(limiter) for limiter in seen}) == 1


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_a_fresh_engine(clean: Path) -> None:
    done = run_python(
        """
import os, ratesync
ratesync.configure_limiter("api", rate_per_second=0.001)
held = ratesync.get_limiter("api")
assert held.try_acquire().wait()
pid = os.fork()
if pid == 0:
    assert ratesync.get_limiter("api") is not held
    assert ratesync.try_acquire("api").wait() is True
    ratesync.shutdown()
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert ratesync.get_limiter("api") is held
assert ratesync.try_acquire("api").wait() is False
""",
        clean,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_use_during_exit_is_a_clear_error(clean: Path) -> None:
    done = run_python(
        """
import atexit
@atexit.register
def late():
    try:
        ratesync.try_acquire("api")
    except ratesync.StoreClosedError as error:
        print(error)
import ratesync
ratesync.configure_limiter("api", rate_per_second=1)
ratesync.try_acquire("api").wait()
""",
        clean,
    )
    assert done.returncode == 0, done.stderr
    assert "interpreter is exiting" in done.stdout


@pytest.mark.parametrize("content", ["not toml", "[limiters.a]\nrate_per_second = 0", "\xff"])
def test_a_bad_file_never_breaks_import(clean: Path, content: str) -> None:
    (clean / "rate-sync.toml").write_bytes(content.encode("latin-1"))
    done = run_python(
        """
import ratesync
try:
    ratesync.acquire("a")
except ratesync.ConfigValidationError as error:
    print(error)
""",
        clean,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rate-sync.toml: ")


def test_import_leaves_the_heavy_libraries_alone(clean: Path) -> None:
    done = run_python(
        "import sys, ratesync; print({'rich', 'click', 'tomllib', 'msgspec', 'asyncio', 'ratesync.schemas', "
        "'ratesync.decorators', 'ratesync.testing', 'ratesync.config'} & set(sys.modules))",
        clean,
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_rate_sync_installed_beside_us_is_said_once(clean: Path) -> None:
    (clean / "lib-packages" / "rate_sync-0.2.0.dist-info").mkdir(parents=True)
    code = "import sys, warnings; sys.path.append('lib-packages'); warnings.resetwarnings(); import ratesync"
    done = run_python(code, clean)
    assert done.stderr.count("'rate-sync' is installed beside") == 1


# Identifiers ----------------------------------------------------------------------------------------


def test_hash_identifier_is_stable_across_spelling_and_salted() -> None:
    import hashlib

    assert ratesync.hash_identifier(" Ada ") == hashlib.sha256(b"ada").hexdigest()[:16]
    assert (
        ratesync.hash_identifier("ada", salt="s", length=8, algorithm="md5")
        == hashlib.md5(b"s:ada").hexdigest()[:8]
    )
    assert ratesync.hash_identifier("ada", algorithm="unheard-of") == ratesync.hash_identifier("ada")


def test_combine_identifiers_skips_what_is_empty() -> None:
    assert ratesync.combine_identifiers("a", None, "", 0, 7, separator="/") == "a/7"
    assert ratesync.combine_identifiers() == ""


def test_configure_fastapi_sets_checks_and_leaves_unchanged() -> None:
    assert ratesync.get_fastapi_config().trusted_proxy_networks is None
    ratesync.configure_fastapi(["10.0.0.0/8"])
    ratesync.configure_fastapi()
    assert ratesync.get_fastapi_config().trusted_proxy_networks == ["10.0.0.0/8"]
    with pytest.raises(ratesync.ConfigValidationError, match="trusted_proxy_networks"):
        ratesync.configure_fastapi(["not a network"])
    ratesync.get_fastapi_config().configure([])
    assert ratesync.get_fastapi_config().trusted_proxy_networks == []


def test_the_fastapi_table_of_a_discovered_file_is_found(clean: Path) -> None:
    (clean / "rate-sync.toml").write_text('[fastapi]\ntrusted_proxy_networks = ["192.0.2.0/24"]\n')
    assert ratesync.get_fastapi_config().trusted_proxy_networks == ["192.0.2.0/24"]
