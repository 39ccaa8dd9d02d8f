"""What a store and a limiter may be given: fields, units, defaults and legal ranges, and their check.

The structs below are the only description of the options; `configure_*`, TOML files, `ratesync check`
and the reference documentation all read them. `build()` turns a table of raw values into a struct or
a ConfigValidationError that names the place, the field, what was expected and what came.
"""

from __future__ import annotations

import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ratesync.errors import ConfigValidationError, nearest

MAX_ID = 255  # characters; the width of group_id in the table of the PostgreSQL store


class Expanded(str):
    """A string in which `${VAR}` was replaced; only such strings are converted to numbers and flags."""

    __slots__ = ()


def _meta(expected: str, **bounds: Any) -> Meta:
    return Meta(extra={"expected": expected}, **bounds)


Rate = Annotated[float, _meta("a finite number, 0 < rate <= 1e9", gt=0, le=1e9)]
Count = Annotated[int, _meta("an integer from 1 to 1000000000", ge=1, le=1_000_000_000)]
Seconds = Annotated[float, _meta("a finite number of seconds >= 0", ge=0)]
WindowSeconds = Annotated[float, _meta("seconds from 0.001 to 31622400", ge=0.001, le=366 * 86400)]
LeaseSeconds = Annotated[float, _meta("seconds from 1 to 86400", ge=1, le=86400)]
BudgetSeconds = Annotated[float, _meta("seconds from 0 to 60", ge=0, le=60)]
TimeoutSeconds = Annotated[float, _meta("seconds, 0 < value <= 86400", gt=0, le=86400)]
Milliseconds = Annotated[float, _meta("milliseconds from 0 to 60000", ge=0, le=60000)]
PoolMin = Annotated[int, _meta("an integer from 0 to 1000", ge=0, le=1000)]
PoolMax = Annotated[int, _meta("an integer from 1 to 1000", ge=1, le=1000)]
DbNumber = Annotated[int, _meta("an integer from 0 to 1000000", ge=0, le=1_000_000)]
KeyPart = Annotated[
    str, _meta("1 to 255 characters without { and }", pattern=r"\A[^{}]+\Z", min_length=1, max_length=255)
]
SqlName = Annotated[str, _meta("a name of 1 to 63 bytes without NUL", min_length=1)]
Switch = Literal["auto", "on", "off"]
Algorithm = Literal["token_bucket", "sliding_window", "sliding_counter", "fixed_window"]


class StoreOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the options of one engine; `timing_margin` is what its limiters are given."""

    @property
    def timing_margin(self) -> float:
        return 0.0


class MemoryOptions(StoreOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The embedded store has no options. One clock, so no margin either."""


class PostgresOptions(StoreOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `engine = "postgres"`."""

    #: libpq URL or key=value string; several hosts and target_session_attrs are honoured. Required.
    url: str
    #: Table of the limiter states; quoted, so any case works.
    table_name: SqlName = "rate_limiter_state"
    #: Schema of that table.
    schema_name: SqlName = "public"
    #: Create what is missing at first use. Off: the table exists, or `ratesync migrate` makes it.
    auto_create: bool = False
    #: Connections kept open while idle.
    pool_min_size: PoolMin = 2
    #: Upper bound of connections of this process to this store, all limiters together.
    pool_max_size: PoolMax = 10
    #: An arrival this early (ms, at most one interval) is forgiven; never raises the long-run rate.
    timing_margin_ms: Milliseconds = 10.0
    #: Seconds until a statement without answer counts as lost and its connection is dropped.
    command_timeout: TimeoutSeconds = 5.0
    #: Seconds for one attempt to connect, name resolution and TLS included.
    connect_timeout: TimeoutSeconds = 5.0
    #: auto: off for pure rates, on where slots are held. A crash may repeat the last moments when off.
    synchronous_commit: Switch = "auto"
    #: Create the tables UNLOGGED: faster, emptied by a crash of the server.
    unlogged: bool = False
    #: Named prepared statements; auto finds out whether a transaction pooler is in between.
    statement_cache: Switch = "auto"
    #: Where LISTEN works, when `url` leads to a pooler that loses notifications. Empty: `url`.
    listen_url: str = ""

    @property
    def timing_margin(self) -> float:
        return self.timing_margin_ms


class RedisOptions(StoreOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `engine = "redis"`."""

    #: redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster:// address. Required.
    url: str
    #: Number of the database, where the url names none.
    db: DbNumber = 0
    #: Password, where the url has none.
    password: str | None = None
    #: What all keys start with; stores with the same server and prefix share their limits.
    key_prefix: KeyPart = "rate_limit"
    #: Keeps all limits of the store in one hash slot of a Cluster, so that several can be acquired at once.
    hash_tag: KeyPart | None = None
    #: Without effect: one connection carries all commands. Taken for configurations of rate-sync.
    pool_min_size: PoolMin = 2
    #: Upper bound of connections of this process to a server; two are used at most, 1 polls for slots.
    pool_max_size: PoolMax = 10
    #: An arrival this early (ms, at most one interval) is forgiven; never raises the long-run rate.
    timing_margin_ms: Milliseconds = 10.0
    #: Seconds until a command without answer counts as lost and its connection is dropped.
    socket_timeout: TimeoutSeconds = 5.0
    #: Seconds for one attempt to connect, name resolution and TLS included.
    socket_connect_timeout: TimeoutSeconds = 5.0

    @property
    def timing_margin(self) -> float:
        return self.timing_margin_ms


class LimiterOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of `[limiters.<id>]` and of `configure_limiter`."""

    #: Id of the store that keeps the state.
    store: str = "memory"
    #: How grants are counted: a bucket by rate_per_second, or a window by limit and window_seconds.
    algorithm: Algorithm = "token_bucket"
    #: token_bucket: grants per second over all processes, in the long run. None: no rate limit.
    rate_per_second: Rate | None = None
    #: Slots held at the same time over all processes. None: no concurrency limit.
    max_concurrent: Count | None = None
    #: Windows: grants per window over all processes. Without effect on token_bucket.
    limit: Count | None = None
    #: Windows: their length, to the microsecond. Without effect on token_bucket.
    window_seconds: WindowSeconds | None = None
    #: Default of acquire(): seconds to wait at most, 0 tries once, None waits as long as it takes.
    timeout: Seconds | None = None
    #: True: an outage of the store is a RateLimiterAcquisitionError. False: it lets the call pass.
    fail_closed: bool = False
    #: token_bucket: grants that may come at once after idling. 1: even spacing.
    burst: Count = 1
    #: Seconds that a call may lose to a store that does not answer, before fail_closed decides.
    outage_budget: BudgetSeconds = 0.25
    #: A holder that was not heard of for this long (killed, cut off) loses its slots.
    lease_seconds: LeaseSeconds = 30.0
    #: Ends the renewal of a slot held longer than this: seconds, None never.
    max_hold_seconds: TimeoutSeconds | None = None

    @property
    def is_window(self) -> bool:
        return self.algorithm != "token_bucket"


ENGINES: dict[str, type[StoreOptions]] = {
    "memory": MemoryOptions,
    "postgres": PostgresOptions,
    "redis": RedisOptions,
}
ALGORITHMS: tuple[str, ...] = typing.get_args(Algorithm)
SECRETS = frozenset({"url", "password", "listen_url"})

S = TypeVar("S", bound=Struct)


def fail(
    where: str, field: str, problem: str, expected: str = "", received: object = None
) -> typing.NoReturn:
    """Raises the ConfigValidationError for one field of the table `where`."""
    raise ConfigValidationError(f"{where}: {field} {problem}", field, expected, received)


def describe(field: str, value: object) -> str:
    """`value` for a message: short, and without what may be a secret."""
    if field in SECRETS:
        return f"a {type(value).__name__}" if not isinstance(value, str) else repr(mask_secrets(value))
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def build(cls: type[S], raw: Mapping[str, object], where: str) -> S:
    """Checks `raw` against the fields of `cls`, field by field, and returns the struct."""
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, object] = {}
    for key, value in raw.items():
        if key not in fields:
            raise ConfigValidationError(
                f"{where}: unknown key {key!r}{nearest(key, fields)}; valid: {', '.join(fields) or 'none'}",
                field=str(key),
            )
        if value == "" and isinstance(value, Expanded) and not _takes_text(hints[key]):
            continue  # ${VAR:-}: not given
        values[key] = _check(hints[key], value, where, key)
    for field in fields.values():
        if field.required and field.name not in values:
            fail(where, field.name, "is required and missing")
    return cls(**values)


def _check(hint: Any, value: object, where: str, key: str) -> object:
    base, optional, expected = _unfold(hint)
    if optional:
        if value is None:
            return None
        expected = f"{expected}, or none"
    converted = value
    if isinstance(value, Expanded) and base is not str:
        converted = _parse(base, value)
    if not isinstance(converted, bool):  # numpy, Decimal and Fraction are numbers as well
        if base is float and isinstance(converted, numbers.Real):
            try:
                converted = float(converted)
            except OverflowError:
                fail(where, key, "is too large", expected, describe(key, value))
        elif base is int and isinstance(converted, numbers.Integral):
            converted = int(converted)
    if isinstance(converted, float) and not math.isfinite(converted):
        fail(where, key, "is not finite", expected, describe(key, value))
    if isinstance(converted, Expanded):
        converted = str(converted)
    try:
        checked: object = msgspec.convert(converted, hint, strict=True)
    except msgspec.ValidationError:
        fail(where, key, _problem(hint, converted), expected, describe(key, value))
    if isinstance(checked, str):
        _check_text(checked, where, key)
        if hint is SqlName and len(checked.encode()) > 63:
            fail(where, key, "is too long", expected, f"{len(checked.encode())} bytes")
    return checked


def _problem(hint: Any, value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        bounds = [meta for meta in _metas(hint) if meta.gt == 0 or (meta.ge or 0) > 0]
        return "must be > 0" if bounds else "is not valid"
    choices = _choices(hint)
    return f"is not valid{nearest(value, choices)}" if choices and isinstance(value, str) else "is not valid"


def _inner(hint: Any) -> Any:
    """The hint without `| None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(member for member in typing.get_args(hint) if member is not type(None))
    return hint


def _metas(hint: Any) -> tuple[Meta, ...]:
    inner = _inner(hint)
    return typing.get_args(inner)[1:] if typing.get_origin(inner) is Annotated else ()


def _choices(hint: Any) -> tuple[Any, ...]:
    inner = _inner(hint)
    return typing.get_args(inner) if typing.get_origin(inner) is Literal else ()


def _takes_text(hint: Any) -> bool:
    return _unfold(hint)[0] is str


def _unfold(hint: Any) -> tuple[Any, bool, str]:
    """The plain type of a field, whether None is allowed, and the words for what is expected."""
    optional = _inner(hint) is not hint
    hint = _inner(hint)
    if typing.get_origin(hint) is Annotated:
        base, *metas = typing.get_args(hint)
        return base, optional, next(str(meta.extra["expected"]) for meta in metas if meta.extra)
    if typing.get_origin(hint) is Literal:
        return str, optional, "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    return (
        hint,
        optional,
        {str: "a string", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint))),
    )


_FLAGS = {
    "true": True,
    "false": False,
    "1": True,
    "0": False,
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}\Z")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\Z")


def _parse(base: Any, text: str) -> object:
    """An expanded string as the declared type; unchanged where it does not look like one."""
    stripped = text.strip()
    if base is bool:
        return _FLAGS.get(stripped.lower(), text)
    if base is int and _INTEGER.match(stripped):
        return int(stripped)
    if base is float and _NUMBER.match(stripped):
        return float(stripped)
    return text


def _check_text(text: str, where: str, key: str) -> None:
    if "\0" in text:
        fail(where, key, "contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        fail(where, key, "contains a surrogate, which is not valid Unicode text")


def check_id(kind: str, value: object, where: str | None = None) -> str:
    """Store and limiter ids: 1 to 255 characters, not blank, no NUL; quotes, dots and spaces are fine."""
    where = where or f"{kind} {describe('id', value)}"
    field = f"{kind}_id"
    if not isinstance(value, str):
        fail(where, field, "is not a string", "a string", type(value).__name__)
    if not value.strip():
        fail(where, field, "is empty", f"1 to {MAX_ID} characters", repr(value))
    if len(value) > MAX_ID:
        fail(where, field, "is too long", f"at most {MAX_ID} characters", f"{len(value)} characters")
    _check_text(value, where, field)
    return str(value)


def build_store(engine: object, raw: Mapping[str, object], where: str) -> StoreOptions:
    """The options of a store of that engine."""
    if not isinstance(engine, str) or engine not in ENGINES:
        names = ", ".join(repr(name) for name in ENGINES)
        hint = nearest(engine, ENGINES) if isinstance(engine, str) else ""
        fail(
            where,
            "engine",
            f"is not an engine of this version{hint}",
            f"one of {names}",
            describe("engine", engine),
        )
    options = build(ENGINES[engine], raw, where)
    if isinstance(options, PostgresOptions):
        _check_postgres_url(options.url, where)
        if options.listen_url:
            _check_postgres_url(options.listen_url, where, "listen_url")
        if options.pool_min_size > options.pool_max_size:
            if "pool_min_size" in raw:
                fail(
                    where,
                    "pool_min_size",
                    "is larger than pool_max_size",
                    f"at most {options.pool_max_size}",
                    options.pool_min_size,
                )
            options = msgspec.structs.replace(options, pool_min_size=options.pool_max_size)
    elif isinstance(options, RedisOptions):
        _check_redis_url(options.url, where)
    return options


def _check_redis_url(url: str, where: str) -> None:
    # Those of cpp/ratesync/redis/url.cc, which checks the rest at the first use.
    kinds = ("redis", "rediss")
    schemes = {
        *kinds,
        "unix",
        "redis+unix",
        *(f"{one}+{two}" for one in kinds for two in ("sentinel", "cluster")),
    }
    expected = "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
    if not url.strip():
        fail(where, "url", "is empty", expected, "''")
    scheme, separator, _ = url.partition("://")
    if not separator:  # not shown: it may hold a password
        fail(where, "url", f"is not an address; write {expected}")
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) and scheme.lower() not in schemes:
        fail(where, "url", "has another scheme", expected, repr(f"{scheme}://"))


def _check_postgres_url(url: str, where: str, field: str = "url") -> None:
    expected = "postgresql://user@host:5432/database or a key=value string of libpq"
    if not url.strip():
        fail(where, field, "is empty", expected, "''")
    scheme, separator, _ = url.partition("://")
    if (
        separator
        and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme)
        and scheme not in ("postgres", "postgresql")
    ):
        cure = " (leave out the driver's name)" if scheme.startswith("postgres") else ""
        fail(where, field, f"has another scheme{cure}", expected, repr(f"{scheme}://"))
    if not separator and "=" not in url:
        fail(
            where, field, f"is not a connection string; write {expected}"
        )  # it may hold a password: not shown


def build_limiter(raw: Mapping[str, object], where: str) -> LimiterOptions:
    """The options of a limiter; rules between fields included."""
    options = build(LimiterOptions, raw, where)
    windows = options.limit is not None, options.window_seconds is not None
    if options.is_window and not all(windows):
        fail(
            where,
            "window_seconds" if windows[0] else "limit",
            f"is missing: {options.algorithm} needs both limit and window_seconds",
        )
    if not options.is_window and options.rate_per_second is None and options.max_concurrent is None:
        cure = "; limit and window_seconds are for algorithm = 'sliding_window'" if any(windows) else ""
        fail(
            where,
            "rate_per_second",
            f"and max_concurrent are both missing: token_bucket needs one of them, or both{cure}",
        )
    check_id("store", options.store, where)
    return options


_USERINFO = re.compile(r"(:(?!//)).*@", re.DOTALL)
_KEYWORD = re.compile(
    r"(\w*(?:password|passwd|secret|token)\w*\s*=\s*)('(?:\\.|[^'\\])*'?|(?:\\.|[^\s\\])+)", re.I | re.S
)


def mask_secrets(text: str) -> str:
    """`text` with passwords of URLs and of key=value strings replaced by `***`.

    Errs on the side of hiding: everything between the first colon (that of `://` aside) and the last
    `@` goes, because passwords with unescaped `@`, `/` or `:` do occur, and malformed URLs too.
    """
    return _KEYWORD.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


def as_masked_dict(options: Struct) -> dict[str, Any]:
    """The fields of a store's options, with secrets masked."""
    values = msgspec.structs.asdict(options)
    for name in SECRETS & values.keys():
        value = values[name]
        values[name] = "***" if name == "password" and value else mask_secrets(value) if value else value
    return values
