"""The functions by name: configure, look up, acquire and list what the registry holds."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ratesync import _engine
from ratesync._engine import Permit as AcquireContext
from ratesync._engine import acquire
from ratesync._pending import Pending, script
from ratesync._registry import DEFAULT_STORE, RateLimiterRegistry, _registry
from ratesync.errors import RateLimiterAlreadyConfiguredError
from ratesync.limits import RateLimiter
from ratesync.stores import Store

if TYPE_CHECKING:
    from ratesync.config import FastAPIConfig

__all__ = [
    "AcquireContext",
    "RateLimiterRegistry",
    "acquire",
    "clone_limiter",
    "configure_fastapi",
    "configure_limiter",
    "configure_store",
    "get_fastapi_config",
    "get_limiter",
    "get_or_clone_limiter",
    "get_store",
    "initialize_all_limiters",
    "initialize_limiter",
    "list_limiters",
    "list_stores",
    "load_config",
    "try_acquire",
]


def configure_store(
    store_id: str, strategy: str | None = None, *, engine: str | None = None, **options: Any
) -> None:
    """Configures a store; nothing is opened before its first use.

    Args:
        store_id: name of the store, 1 to 255 characters. An existing one is replaced; limiters move to the
            new one at their next use.
        strategy: the engine: `memory`, `postgres` or `redis`.
        engine: the same under the name that TOML uses; give one of the two.
        **options: of the engine. memory: none. postgres: `url` (required), `table_name`, `schema_name`,
            `auto_create`, `pool_min_size`, `pool_max_size`, `timing_margin_ms` (milliseconds),
            `command_timeout`, `connect_timeout` (seconds), `synchronous_commit`, `unlogged`,
            `statement_cache`, `listen_url`. redis: `url` (required), `db`, `password`, `key_prefix`,
            `hash_tag` (one hash slot of a Cluster for all limits), `pool_max_size`, `timing_margin_ms`,
            `socket_timeout`, `socket_connect_timeout` (seconds).

    Raises:
        ConfigValidationError: names the option, what was expected, and the nearest valid name.

    Example:
        >>> configure_store("registry-doc", "memory")
    """
    from ratesync._schemas import build_store, check_id, fail
    from ratesync.config import StoreConfig

    store_id = check_id("store", store_id)
    where = f"store {store_id!r}"
    if strategy is not None and engine is not None and strategy != engine:
        fail(where, "strategy", "and engine differ; give one of them", repr(engine), repr(strategy))
    name = strategy if strategy is not None else engine
    _registry.set_store(store_id, StoreConfig(str(name), build_store(name, options, where)))


def configure_limiter(
    limiter_id: str,
    store_id: str = DEFAULT_STORE,
    rate_per_second: float | None = None,
    max_concurrent: int | None = None,
    timeout: float | None = None,
    algorithm: str = "token_bucket",
    limit: int | None = None,
    window_seconds: float | None = None,
    fail_closed: bool = False,
    *,
    burst: int = 1,
    outage_budget: float = 0.25,
    lease_seconds: float = 30.0,
    max_hold_seconds: float | None = None,
) -> None:
    """Configures a limiter; nothing is opened before its first use.

    Configured again under the same id it takes the new parameters at once, and what was consumed stays
    consumed: the state in the store belongs to the id.

    Args:
        limiter_id: name of the limiter and of its state in the store, 1 to 255 characters.
        store_id: where the state lives. The default, `memory`, exists without being configured.
        rate_per_second: grants per second over all processes, 0 < rate <= 1e9. None: no rate limit.
        max_concurrent: slots held at the same time over all processes. None: no concurrency limit.
        timeout: default of `acquire`: seconds to wait at most, None waits as long as it takes.
        algorithm: `token_bucket` (GCRA, ITU-T I.371) spaces grants by rate_per_second and burst. The others
            count grants per window, and ignore those two: `sliding_window` exactly, by a log of the
            grants; `sliding_counter` by an estimate from two counters; `fixed_window` per calendar window.
        limit: windows: grants per window over all processes; without effect on token_bucket.
        window_seconds: windows: their length, 0.001 to 31622400 (366 days); without effect on token_bucket.
        fail_closed: an outage of the store refuses calls (True) or lets them pass (False).
        burst: grants that may come at once after idling; 1 spaces evenly.
        outage_budget: seconds that a call may lose to a store that does not answer.
        lease_seconds: a holder not heard of for this long loses its slots.
        max_hold_seconds: ends the renewal of slots held longer than this.

    Raises:
        StoreNotFoundError: `store_id` is not configured.
        ConfigValidationError: names the field and what was expected.

    Example:
        >>> configure_limiter("registry-doc", rate_per_second=100.0, max_concurrent=50, timeout=30.0)
        >>> configure_limiter("quota-doc", algorithm="sliding_window", limit=1000, window_seconds=3600)
    """
    from ratesync._schemas import build_limiter, check_id

    limiter_id = check_id("limiter", limiter_id)
    check_id("store", store_id, f"limiter {limiter_id!r}")
    fields = {
        "store": store_id,
        "algorithm": algorithm,
        "rate_per_second": rate_per_second,
        "max_concurrent": max_concurrent,
        "limit": limit,
        "window_seconds": window_seconds,
        "timeout": timeout,
        "fail_closed": fail_closed,
        "burst": burst,
        "outage_budget": outage_budget,
        "lease_seconds": lease_seconds,
        "max_hold_seconds": max_hold_seconds,
    }
    _registry.set_limiter(limiter_id, build_limiter(fields, f"limiter {limiter_id!r}"))


def clone_limiter(
    source_id: str,
    new_id: str,
    *,
    rate_per_second: float | None = None,
    max_concurrent: int | None = None,
    timeout: float | None = None,
    limit: int | None = None,
    window_seconds: float | None = None,
) -> None:
    """Configures `new_id` with the parameters of `source_id` and a state of its own.

    Arguments that are given replace the copied parameter. For one limit per tenant `acquire(id, key=...)`
    needs no clone.

    Raises:
        LimiterNotFoundError: no limiter `source_id`.
        RateLimiterAlreadyConfiguredError: `new_id` exists (also a ValueError).
        ConfigValidationError: an override is not valid.

    Example:
        >>> configure_limiter("clone-doc", rate_per_second=10.0)
        >>> clone_limiter("clone-doc", "clone-doc-fast", rate_per_second=20.0)
        >>> get_limiter("clone-doc-fast").rate_per_second
        20.0
    """
    import msgspec

    from ratesync._schemas import build_limiter, check_id

    new_id = check_id("limiter", new_id)
    overrides = {
        "rate_per_second": rate_per_second,
        "max_concurrent": max_concurrent,
        "timeout": timeout,
        "limit": limit,
        "window_seconds": window_seconds,
    }
    with _engine.lock:
        fields = msgspec.structs.asdict(_registry.options(source_id))
        if new_id in _registry._limiters:
            raise RateLimiterAlreadyConfiguredError(new_id)
        fields.update({name: value for name, value in overrides.items() if value is not None})
        _registry.set_limiter(new_id, build_limiter(fields, f"limiter {new_id!r}"))


def get_limiter(limiter_id: str) -> RateLimiter:
    """The limiter of that name, built when needed; the same object until it is configured again.

    Connects nothing: the first acquisition does, or `initialize()`.

    Raises:
        LimiterNotFoundError: not configured; the message names the nearest ids.
        StoreNotFoundError: its store is not configured.
        ConfigValidationError: the discovered rate-sync.toml is not valid.
    """
    return _registry.limiter(limiter_id)


@script
def get_or_clone_limiter(base_limiter_id: str, unique_id: str) -> Generator[Pending[Any], Any, RateLimiter]:
    r"""The limiter `base:unique`, cloned from `base` when it does not exist, and initialized.

    The state is that of `acquire(base, key=unique)`: `:` and `\` in `unique_id` are escaped with a
    backslash, so that no two pairs meet in one name. Every clone is a registered limiter; for very many
    ids use `key=`, which registers nothing.

    Raises:
        LimiterNotFoundError: no limiter `base_limiter_id`.
        ConfigValidationError: the id is empty or the whole is longer than 255 characters.

    Example:
        >>> configure_limiter("tenants-doc", rate_per_second=10.0)
        >>> get_or_clone_limiter("tenants-doc", "a:b").wait().group_id
        'tenants-doc:a\\:b'
    """
    from ratesync._schemas import check_id

    limiter_id = group_id_for(base_limiter_id, check_id("key", unique_id))
    with _engine.lock:
        if limiter_id not in _registry._limiters:
            clone_limiter(base_limiter_id, limiter_id)
            _registry._bases[limiter_id] = base_limiter_id
        limiter = _registry.limiter(limiter_id)
    yield limiter.initialize()
    return limiter


def group_id_for(base: str, key: str) -> str:
    """The group of `acquire(base, key=key)`; the core applies the same rule."""
    escaped = key.replace("\\", "\\\\").replace(":", "\\:")
    return f"{base}:{escaped}"


def get_store(store_id: str) -> Store:
    """The store of that name, built when needed. Connects nothing.

    Raises:
        StoreNotFoundError: not configured; the message names the nearest ids.
        ConfigValidationError: the discovered rate-sync.toml is not valid, or the url is not.
    """
    return _registry.store(store_id)


def try_acquire(
    limiter_id: str,
    *more: str | float | None,
    timeout: float | None = 0,
    cost: int = 1,
    key: str | None = None,
) -> Pending[bool]:
    """Whether an acquisition of one limit, or of several at once, was granted; await it, or `.wait()` for it.

    Args:
        limiter_id: name of the limiter, or `name:key`.
        *more: further names, all or nothing with the first; a number or None at the end is the timeout.
        timeout: seconds to wait at most; the default 0 tries once, None takes the limiter's default.
        cost: units to take, at least 1.
        key: acquire from this key's own limit, same parameters. For one limiter only.

    With `max_concurrent` a granted slot is held until `get_limiter(limiter_id).release()`.

    Raises:
        LimiterNotFoundError: no such limiter.
        ConfigValidationError: a bad argument, or a limit named twice.
        StoreError: the store failed and `fail_closed` is on.

    Example:
        >>> configure_limiter("try-doc", rate_per_second=1.0)
        >>> configure_limiter("try-doc-all", rate_per_second=1.0, burst=5)
        >>> try_acquire("try-doc", "try-doc-all").wait(), try_acquire("try-doc", "try-doc-all").wait()
        (True, False)
        >>> [try_acquire("try-doc-all").wait() for _ in range(5)]  # the refusal took nothing
        [True, True, True, True, False]
    """
    if more and not isinstance(more[-1], str):
        *more, timeout = more  # type: ignore[assignment]
    return _engine.attempt(
        _engine.acquire(limiter_id, *more, timeout=timeout, cost=cost, key=key)  # type: ignore[call-overload]
    )


@script
def initialize_limiter(limiter_id: str) -> Generator[Pending[Any], Any, None]:
    """Connects the limiter's store ahead of the first use. Raises what `Store.initialize` raises."""
    yield _registry.limiter(limiter_id).initialize()


@script
def initialize_all_limiters() -> Generator[Pending[Any], Any, None]:
    """Initializes every configured limiter in order, and stops at the first failure."""
    _registry.discover()
    for limiter_id in list(_registry._limiters):
        yield _registry.limiter(limiter_id).initialize()


def load_config(config_path: str | os.PathLike[str]) -> None:
    """Reads a TOML file and configures the stores and limiters in it, all or nothing.

    Args:
        config_path: the file; UTF-8, at most 1 MiB. `[stores.<id>]` holds `engine` and its options,
            `[limiters.<id>]` the fields of `configure_limiter` (`store` defaults to `memory`). A
            string may contain `${VAR}` and `${VAR:-default}`; `$${` writes a literal `${`.

    Raises:
        ConfigFileNotFoundError: there is no such file (also a FileNotFoundError).
        ConfigValidationError: unreadable, not TOML, or not valid; names file, table and key.

    Names that were configured before are replaced.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rate-sync.toml"
        >>> _ = path.write_text('[limiters."load doc"]\\nrate_per_second = 100.0\\n')
        >>> load_config(path)
    """
    from ratesync.config import read_config

    _registry.apply(read_config(config_path, known_stores=_registry.store_ids()))


def configure_fastapi(trusted_proxy_networks: list[str] | None = None) -> None:
    """Sets the options of `ratesync.contrib.fastapi` in this process.

    Args:
        trusted_proxy_networks: networks of proxies whose X-Forwarded-For is believed, such as
            `["10.0.0.0/8"]`; an empty list believes nobody. None leaves the setting unchanged.

    Raises:
        ConfigValidationError: an entry is not a network.

    Example:
        >>> configure_fastapi(trusted_proxy_networks=["10.0.0.0/8", "2001:db8::/32"])
        >>> get_fastapi_config().trusted_proxy_networks
        ['10.0.0.0/8', '2001:db8::/32']
    """
    get_fastapi_config().configure(trusted_proxy_networks)


def get_fastapi_config() -> FastAPIConfig:
    """The options of `ratesync.contrib.fastapi`: those of `configure_fastapi`, else of `[fastapi]`."""
    _registry.discover()
    return _registry.fastapi()


def list_stores() -> dict[str, dict[str, Any]]:
    """The configured stores: `engine`, the options with passwords masked, and `initialized`."""
    from ratesync._schemas import as_masked_dict

    with _engine.lock:
        _registry.discover()
        return {
            store_id: {
                "engine": config.engine,
                **as_masked_dict(config.options),
                "initialized": store_id in _registry._stores
                and (
                    _registry._stores[store_id].is_initialized
                    or any(limiter.is_initialized for limiter in _registry._stores[store_id]._users)
                ),
                "runtime_kwargs": [],
            }
            for store_id, config in _registry._backends.items()
        }


def list_limiters() -> dict[str, dict[str, Any]]:
    """The configured limiters: `store` (also as `backend`), the fields, `initialized` and live `metrics`.

    `base` is the limiter that `get_or_clone_limiter` cloned this one from, else None.
    """
    import msgspec

    with _engine.lock:
        _registry.discover()
        result: dict[str, dict[str, Any]] = {}
        for limiter_id, options in _registry._limiters.items():
            built = _registry._built.get(limiter_id)
            result[limiter_id] = {
                "backend": options.store,
                **msgspec.structs.asdict(options),
                "initialized": built is not None and built.is_initialized,
                "metrics": built.get_metrics() if built is not None else None,
                "base": _registry._bases.get(limiter_id),
            }
        return result
