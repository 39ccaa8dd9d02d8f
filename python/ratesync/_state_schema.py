"""What `[state]` and `configure_state` may say, and the check of arguments of state, locks and idempotency.

As in `_schemas`, the struct is the only description of the options. The table also takes the options
of its backend's store, checked where those of `[stores.<id>]` are.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from ratesync._schemas import (
    ENGINES,
    Expanded,
    StoreOptions,
    TimeoutSeconds,
    build,
    build_store,
    check_id,
    describe,
    fail,
)
from ratesync.errors import ConfigValidationError, nearest

__all__ = ["DEFAULT_PREFIX", "StateConfig", "StateOptions", "build_state", "check_seconds", "check_text"]

DEFAULT_PREFIX = "acteon_"
MAX_PREFIX_BYTES = 40  # a table's name has at most 63 bytes
MAX_NAME_BYTES = 255  # namespace, tenant, kind
MAX_KEY_BYTES = 1024
MAX_SECONDS = 32_000_000_000.0  # 1000 years, as in the core

# Kept by the services whose files say so; not by this version.
FUTURE_BACKENDS = ("dynamodb", "clickhouse")

Prefix = Annotated[str, Meta(max_length=40, extra={"expected": "0 to 40 bytes"})]
SpaceName = Annotated[str, Meta(min_length=1, max_length=255, extra={"expected": "1 to 255 bytes"})]
Backend = Literal["memory", "postgres", "redis"]


class StateOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of `[state]` and of `configure_state`, besides the options of the backend's store."""

    #: The kind of store: embedded, PostgreSQL, Redis. Its own options stand in the same table.
    backend: Backend | None = None
    #: Id of a configured store that keeps the state, instead of `backend`: they share its connections.
    store: str | None = None
    #: What the names of tables, or keys, start with. State of different prefixes never meets.
    prefix: Prefix = DEFAULT_PREFIX
    #: Part of every key, for one application or environment.
    namespace: SpaceName = "default"
    #: Part of every key, for one customer.
    tenant: SpaceName = "default"
    #: Seconds that one operation may take, queueing and reconnecting included.
    timeout: TimeoutSeconds = 5.0


@dataclass(frozen=True, slots=True)
class StateConfig:
    """Checked: the options, and the store's own where `backend` names one, else None."""

    options: StateOptions
    engine: str | None
    store_options: StoreOptions | None


def build_state(raw: Mapping[str, object], where: str) -> StateConfig:
    """Checks a `[state]` table: its own fields, and those of the backend's store."""
    names = [field.name for field in msgspec.structs.fields(StateOptions)]
    own = {key: value for key, value in raw.items() if key in names}
    rest = {key: value for key, value in raw.items() if key not in names}
    backend = own.get("backend")
    if isinstance(backend, Expanded):
        own["backend"] = backend = str(backend)
    if "engine" in rest and backend is None:
        fail(where, "engine", f"is called backend here: backend = {describe('engine', rest['engine'])}")
    if backend is not None and not (isinstance(backend, str) and backend in ENGINES):
        _refuse_backend(backend, where)
    options = build(StateOptions, own, where)
    check_text("prefix", options.prefix, where, most=MAX_PREFIX_BYTES, empty=True)
    for name in ("namespace", "tenant"):
        check_text(name, getattr(options, name), where)
    if (options.backend is None) == (options.store is None):
        problem = "is missing" if options.backend is None else "and store exclude each other"
        fail(
            where,
            "backend",
            f"{problem}: give backend = 'postgres', 'redis' or 'memory', or store = the id of one",
        )
    if options.store is not None:
        check_id("store", options.store, where)
        if rest:
            key = next(iter(rest))
            hint = nearest(key, names)
            fail(where, str(key), f"is unknown here{hint}: options of the store belong to [stores.<id>]")
        return StateConfig(options, None, None)
    engine = str(options.backend)
    if engine == "redis" and set(options.prefix) & set("{}"):
        fail(
            where, "prefix", "may not contain { or }, which name a slot of a Cluster: set the option hash_tag"
        )
    try:
        return StateConfig(options, engine, build_store(engine, rest, where))
    except ConfigValidationError as error:
        if error.field in rest and error.field not in _field_names(engine):
            known = [*names, *_field_names(engine)]
            message = f"{where}: unknown key {error.field!r}{nearest(error.field, known)}; valid: "
            raise ConfigValidationError(message + ", ".join(known), field=error.field) from None
        raise


def _field_names(engine: str) -> list[str]:
    return [field.name for field in msgspec.structs.fields(ENGINES[engine])]


def _refuse_backend(backend: object, where: str) -> typing.NoReturn:
    expected = "one of 'memory', 'postgres', 'redis'"
    if backend in FUTURE_BACKENDS:
        problem = "is no backend of this version; for strict exclusion take 'postgres'"
    else:
        hint = nearest(backend, ENGINES) if isinstance(backend, str) else ""
        problem = f"is not a backend of this version{hint}"
    fail(where, "backend", problem, expected, describe("backend", backend))


def check_text(
    field: str, value: object, where: str, *, most: int = MAX_NAME_BYTES, empty: bool = False
) -> str:
    """A part of a key: a string of 1 to `most` bytes in UTF-8, without NUL."""
    expected = f"{0 if empty else 1} to {most} bytes of UTF-8"
    if not isinstance(value, str):
        fail(where, field, "is not a string", expected, type(value).__name__)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        fail(where, field, "contains a surrogate, which is not valid Unicode text")
    if "\0" in value:
        fail(where, field, "contains a NUL character")
    if not empty and not value:
        fail(where, field, "is empty", expected, "''")
    if size > most:
        fail(where, field, "is too long", expected, f"{size} bytes")
    return value


def check_seconds(field: str, value: object, where: str, *, zero: bool = False) -> float:
    """A duration in seconds, or a timedelta: above 0, or from 0."""
    expected = f"seconds {'>= 0' if zero else '> 0'}, or a timedelta"
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(where, field, "is not a duration", expected, repr(value))
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if math.isnan(seconds) or seconds < 0 or (seconds == 0 and not zero):
        fail(where, field, "is not valid", expected, repr(value))
    if seconds > MAX_SECONDS:
        fail(where, field, "is longer than 1000 years", expected, repr(value))
    return seconds
