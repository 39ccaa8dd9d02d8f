"""rate-sync.toml: finding, reading and checking it, all or nothing.

A file goes through five steps - bounded read, TOML, `${VAR}` expansion, structure, fields - and comes
out as a `Config`, or as one ConfigValidationError that names the file, the table and the key. Nothing
is configured until all of it is valid; the registry then takes the whole in one step. Discovery is
lazy: a bad file never breaks `import ratesync`, it raises at the first use that needs it, until fixed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratesync._schemas import (
    Expanded,
    LimiterOptions,
    StoreOptions,
    build_limiter,
    build_store,
    check_id,
)
from ratesync._state_schema import StateConfig, build_state
from ratesync.errors import (
    ConfigFileNotFoundError,
    ConfigValidationError,
    StoreNotFoundError,
    nearest,
    toml_key,
)

__all__ = ["MAX_FILE_BYTES", "Config", "FastAPIConfig", "StoreConfig", "find_config", "read_config"]

MAX_FILE_BYTES = 1 << 20
DISCOVERY = ("rate-sync.toml", os.path.join("config", "rate-sync.toml"))
ENVIRONMENT = "RATE_SYNC_CONFIG"
OUR_TABLES = ("stores", "limiters", "fastapi", "state")
# Tables of the services that share the file; they are left alone, and named where a person looks.
OTHER_TABLES = frozenset(
    {"audit", "server", "rules", "events", "actors", "locks", "metrics", "logging"}
    | {"stats", "statsd", "static", "status"}  # near to [state], and meant
)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """A configured store: the name of its engine and the checked options."""

    engine: str
    options: StoreOptions


@dataclass(slots=True)
class FastAPIConfig:
    """The `[fastapi]` table, or what `configure_fastapi` set.

    Attributes:
        trusted_proxy_networks: networks of proxies whose X-Forwarded-For is believed. None: the
            integration's own default, the private networks.
    """

    trusted_proxy_networks: list[str] | None = None

    def configure(self, trusted_proxy_networks: list[str] | None = None) -> None:
        """Sets what is given and leaves unchanged what is None. Raises ConfigValidationError."""
        if trusted_proxy_networks is not None:
            given = {"trusted_proxy_networks": trusted_proxy_networks}
            self.trusted_proxy_networks = _check_fastapi(given, "configure_fastapi")


@dataclass(slots=True)
class Config:
    """The checked content of one file."""

    path: str
    stores: dict[str, StoreConfig] = field(default_factory=dict)
    limiters: dict[str, LimiterOptions] = field(default_factory=dict)
    fastapi: FastAPIConfig = field(default_factory=FastAPIConfig)
    state: StateConfig | None = None
    #: Tables of the file that belong to others.
    ignored: tuple[str, ...] = ()


def read_config(path: str | os.PathLike[str], *, known_stores: frozenset[str] = frozenset()) -> Config:
    """Reads and checks a file without configuring anything.

    Args:
        path: the file.
        known_stores: ids of stores that the limiters of the file may use besides the file's own.
    """
    name = os.fspath(path)
    data = _parse_toml(_read_bounded(name), name)
    return _check(data, name, known_stores)


def find_config() -> tuple[Path | None, str]:
    """The file that discovery loads, and a note for messages on where it was looked for."""
    note = ""
    named = os.environ.get(ENVIRONMENT)
    if named:
        if os.path.lexists(named):
            return Path(named), note
        note = f" ({ENVIRONMENT} names {named!r}, which does not exist)"
    for candidate in DISCOVERY:
        if os.path.lexists(candidate):
            return Path(candidate), note
    return None, note or " (no rate-sync.toml was found here or in ./config; `ratesync init` writes one)"


def _read_bounded(name: str) -> bytes:
    try:
        if "\0" in name:
            raise ConfigValidationError(f"configuration file {name!r}: the name contains a NUL character")
        with open(name, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > MAX_FILE_BYTES:
                raise _too_large(name, f"{status.st_size} bytes")
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        link = " (it is a dangling symbolic link)" if os.path.islink(name) else ""
        raise ConfigFileNotFoundError(f"configuration file {name!r} does not exist{link}") from None
    except IsADirectoryError:
        raise ConfigValidationError(
            f"configuration file {name!r} is a directory; name the file in it"
        ) from None
    except OSError as error:
        raise ConfigValidationError(
            f"configuration file {name!r} cannot be read: {error.strerror or error}"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise _too_large(name, f"more than {MAX_FILE_BYTES} bytes")
    return content


def _too_large(name: str, size: str) -> ConfigValidationError:
    return ConfigValidationError(
        f"configuration file {name!r} has {size}; the bound is {MAX_FILE_BYTES} (1 MiB)"
    )


def _parse_toml(content: bytes, name: str) -> dict[str, Any]:
    import tomllib

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigValidationError(
            f"{name}: line {line} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigValidationError(f"{name}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigValidationError(f"{name}: not valid TOML: nested too deeply") from None


# ${...} -------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$?\$\{(?P<body>[^}]*)(?P<end>\}?)")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{).)*))?\Z", re.DOTALL)


def expand(text: str, where: str) -> str:
    """`text` with `${VAR}` and `${VAR:-default}` replaced; an `Expanded` string when there were any.

    A variable that is defined but empty counts as defined. `$${` stands for a literal `${`; any other
    `$` stands for itself. Values are not expanded again.
    """
    if "${" not in text:
        return text
    replaced = False

    def replace(match: re.Match[str]) -> str:
        nonlocal replaced
        if match[0].startswith("$$"):
            return match[0][1:]
        body = _BODY.match(match["body"]) if match["end"] else None
        if body is None:
            raise ConfigValidationError(
                f"{where}: what follows at character {match.start() + 1} is neither ${{NAME}} nor "
                "${NAME:-default}; a literal '${' is written '$${'"  # not shown: it may be part of a password
            )
        replaced = True
        value = os.environ.get(body["name"], body["default"])
        if value is None:
            raise ConfigValidationError(
                f"{where}: the environment variable {body['name']} is not defined; define it, or give a "
                f"default: ${{{body['name']}:-default}}"
            )
        return value

    result = _REFERENCE.sub(replace, text)
    return Expanded(result) if replaced else result


def _expand_env_vars(value: Any, where: str = "configuration") -> Any:
    """Expands every string in `value`: keys, values and list items."""
    if isinstance(value, str):
        return expand(value, where)
    if isinstance(value, list):
        return [_expand_env_vars(item, where) for item in value]
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        for raw, item in value.items():
            key = str(expand(raw, f"{where}, key {raw!r}"))
            if key in result:
                raise ConfigValidationError(f"{where}: the key {key!r} appears twice after ${{}} expansion")
            result[key] = _expand_env_vars(item, f"{where} {key}")
        return result
    return value


# Structure and fields -----------------------------------------------------------------------------


def _validate_config_structure(
    data: Mapping[str, Any], name: str = "configuration"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The `stores`, `limiters` and `fastapi` tables; others pass unless they look like a misspelling."""
    for key in data:
        if key not in OUR_TABLES and key not in OTHER_TABLES:
            hint = nearest(key, OUR_TABLES, cutoff=0.7)
            if hint:
                raise ConfigValidationError(f"{name}: unknown table [{toml_key(key)}]{hint}", field=key)
    tables = []
    for key in OUR_TABLES[:3]:
        table = data.get(key, {})
        if not isinstance(table, dict):
            raise ConfigValidationError(
                f"{name}: {key} has to be a table", key, "a table", type(table).__name__
            )
        tables.append(table)
    stores, limiters, fastapi = tables
    if not isinstance(data.get("state", {}), dict):
        raise ConfigValidationError(
            f"{name}: state has to be a table", "state", "a table", type(data["state"]).__name__
        )
    for kind, table in (("stores", stores), ("limiters", limiters)):
        for key, entry in table.items():
            if not isinstance(entry, dict):
                raise ConfigValidationError(
                    f"{name}: [{kind}] {key} has to be a table [{kind}.{toml_key(key)}]",
                    f"{kind}.{key}",
                    "a table",
                    type(entry).__name__,
                )
    return stores, limiters, fastapi


def _check(data: Mapping[str, Any], name: str, known_stores: frozenset[str]) -> Config:
    raw_stores, raw_limiters, raw_fastapi = _validate_config_structure(data, name)
    config = Config(name)
    for key, table in _entries(name, "stores", raw_stores):
        where = f"{name}: [stores.{toml_key(key)}]"
        with _Located(f"stores.{key}"):
            check_id("store", key, where)
            options = {option: value for option, value in table.items() if option != "engine"}
            if "engine" not in table:
                raise ConfigValidationError(f"{where}: engine is required and missing", "engine")
            engine = str(table["engine"]) if isinstance(table["engine"], Expanded) else table["engine"]
            config.stores[key] = StoreConfig(engine, build_store(engine, options, where))
    for key, table in _entries(name, "limiters", raw_limiters):
        where = f"{name}: [limiters.{toml_key(key)}]"
        with _Located(f"limiters.{key}"):
            check_id("limiter", key, where)
            limiter = build_limiter(table, where)
            known = {*config.stores, *known_stores, "memory"}
            if limiter.store not in known:
                missing = StoreNotFoundError(limiter.store, known)
                raise ConfigValidationError(f"{where}: {missing}", "store") from missing
            config.limiters[key] = limiter
    where = f"{name}: [fastapi]"
    with _Located("fastapi"):
        config.fastapi.trusted_proxy_networks = _check_fastapi(_expand_env_vars(raw_fastapi, where), where)
    if "state" in data:
        config.state = _check_state(data["state"], name, {*config.stores, *known_stores, "memory"})
    config.ignored = tuple(str(key) for key in data if key not in OUR_TABLES)
    return config


def _check_state(raw: dict[str, Any], name: str, known: set[str]) -> StateConfig:
    where = f"{name}: [state]"
    with _Located("state"):
        state = build_state(_expand_env_vars(raw, where), where)
        if state.options.store is not None and state.options.store not in known:
            missing = StoreNotFoundError(state.options.store, known)
            raise ConfigValidationError(f"{where}: {missing}", "store") from missing
        return state


def _entries(name: str, kind: str, raw: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The sub-tables of `[kind]`, names and contents expanded."""
    entries: dict[str, dict[str, Any]] = {}
    for raw_key, table in raw.items():
        where = f"{name}: [{kind}.{toml_key(raw_key)}]"
        key = str(expand(raw_key, where))
        if key in entries:
            raise ConfigValidationError(
                f"{where}: {key!r} appears twice after ${{}} expansion", f"{kind}.{key}"
            )
        entries[key] = _expand_env_vars(table, where)
    return list(entries.items())


def _check_fastapi(raw: Mapping[str, Any], where: str) -> list[str] | None:
    for key in raw:
        if key != "trusted_proxy_networks":
            hint = nearest(key, ("trusted_proxy_networks",))
            raise ConfigValidationError(
                f"{where}: unknown key {key!r}{hint}; valid: trusted_proxy_networks", key
            )
    networks = raw.get("trusted_proxy_networks")
    if networks is None:
        return None
    field_name, expected = "trusted_proxy_networks", 'a list of networks such as "10.0.0.0/8"'
    if not isinstance(networks, list):
        raise ConfigValidationError(
            f"{where}: {field_name} is not valid", field_name, expected, repr(networks)
        )
    for network in networks:
        try:
            if not isinstance(network, str):  # ip_network(5) would be 0.0.0.5/32
                raise ValueError
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise ConfigValidationError(
                f"{where}: {field_name} is not valid", field_name, expected, repr(network)
            ) from None
    return [str(network) for network in networks]


class _Located:
    """Gives errors raised inside the dotted path of the table they are about."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ConfigValidationError):
            error.field = f"{self._path}.{error.field}" if error.field else self._path


def __getattr__(name: str) -> Any:
    if name in ("configure_fastapi", "get_fastapi_config", "load_config"):  # their home imports this module
        from ratesync import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
