"""What the limiter classes of all engines have in common: construction without the registry.

A limiter that was constructed directly has no name to be looked up by. It keeps the options of its store,
opens that store itself, shared with every object of equal options, and opens it anew when the present one
belongs to a stopped engine or to the parent of a fork.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from ratesync import _engine
from ratesync._pending import Pending, script
from ratesync.errors import ConfigValidationError, nearest
from ratesync.limits import StoreLimiter, core_parameters
from ratesync.stores import Store

if TYPE_CHECKING:
    from typing import Self

    from ratesync._schemas import LimiterOptions, StoreOptions
    from ratesync.config import StoreConfig

__all__ = ["EngineLimiter", "LimiterExtras"]


class LimiterExtras(TypedDict, total=False):
    """Keywords of `configure_limiter` that the constructors take as well."""

    algorithm: str
    burst: int
    outage_budget: float
    lease_seconds: float
    max_hold_seconds: float | None


_KEYWORDS = {
    "rate_per_second",
    "limit",
    "window_seconds",
    "max_concurrent",
    "default_timeout",
    "fail_closed",
}

# Stores of limiters that were constructed directly. A store closes when the last of them is gone.
_shared: weakref.WeakValueDictionary[StoreConfig, Store] = weakref.WeakValueDictionary()


def _forget_engine() -> None:
    for store in list(_shared.values()):
        store._retire()
    _shared.clear()


_engine.on_drop(_forget_engine)


class EngineLimiter(StoreLimiter):
    """Base of the limiter classes of the engines."""

    engine: ClassVar[str]
    _config: StoreConfig | None = None  # of a limiter constructed directly

    @classmethod
    def on_store(cls, store: Store, group_id: str, options: LimiterOptions) -> Self:
        """The limiter of that name in the registry."""
        limiter = cls.__new__(cls)
        StoreLimiter.__init__(limiter, store, group_id, options)
        return limiter

    def _construct(self, group_id: object, given: Mapping[str, Any]) -> None:
        """Initializes a limiter from the keywords of a constructor."""
        import msgspec

        from ratesync._schemas import ENGINES, build_store, check_id, fail
        from ratesync.config import StoreConfig

        where = type(self).__name__
        name = check_id("group", group_id, where).strip()
        if self.engine not in ENGINES:
            build_store(self.engine, {}, where)  # says which engines there are
        of_store = {field.name for field in msgspec.structs.fields(ENGINES[self.engine])}
        known = of_store | _KEYWORDS | LimiterExtras.__annotations__.keys()
        for keyword in given.keys() - known:
            fail(where, keyword, f"is no option of it{nearest(keyword, known)}")
        options = build_store(self.engine, {k: v for k, v in given.items() if k in of_store}, where)
        limiter = _limiter_options({k: v for k, v in given.items() if k not in of_store}, where)
        self._config = StoreConfig(self.engine, options)
        StoreLimiter.__init__(self, self._open(name), name, limiter)

    def _open(self, group_id: str) -> Store:
        """The store of this limiter, which was constructed directly."""
        assert self._config is not None
        with _engine.lock:
            store = _shared.get(self._config)
            if store is None or store._closed:
                store = _shared[self._config] = new_store(self.engine, self._config.options)
            return store

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Self:
        """A limiter with the store options of `config` and the other keywords of the constructor.

        Args:
            config: an engine's config of `ratesync.schemas`, or a mapping of its fields.
            **kwargs: keywords of the constructor; they win over `config`.

        Raises:
            ConfigValidationError: a value is not valid, or `config` is of another engine.
        """
        from ratesync._schemas import fail

        fields = dict(asdict(config) if is_dataclass(config) else config)  # type: ignore[arg-type]
        engine = fields.pop("engine", cls.engine)
        if engine != cls.engine:
            fail(cls.__name__, "engine", "is another one", repr(cls.engine), repr(engine))
        return cls(**{**fields, **kwargs})

    @script
    def initialize(self) -> Generator[Pending[Any], Any, None]:
        if self._config is not None and self._store._closed:
            self._adopt(self._renew())
        yield self._store.initialize()
        self._initialized = True

    def _renew(self) -> _engine.Limiter:
        """A fresh compiled limiter. The core calls it in a forked child, at the first use there."""
        if self._config is None:
            from ratesync._registry import _registry

            return _registry.limiter(self._group_id)
        self._store = self._open(self._group_id)
        self._store._users.add(self)
        parameters = core_parameters(self._store, self._options)
        return _engine.Limiter(self._store._core, self._group_id, **parameters)


def new_store(engine: str, options: StoreOptions) -> Store:
    """A store of the default engine, named like its engine. Called with the lock held."""
    import msgspec

    running = _engine.default_engine()
    core = running.add_store(engine, engine, msgspec.structs.asdict(options))
    return Store(core, running.now, options.timing_margin, options)


def _limiter_options(given: Mapping[str, Any], where: str) -> LimiterOptions:
    from ratesync._schemas import build_limiter, fail

    fields = {**given, "store": "memory"}  # not looked at: the limiter has its store
    fields["timeout"] = fields.pop("default_timeout", None)
    windows = [name for name in ("limit", "window_seconds") if fields.get(name) is not None]
    if len(windows) == 1:
        missing = "window_seconds" if windows == ["limit"] else "limit"
        fail(where, missing, f"is missing: {windows[0]} needs it")
    if windows and fields.get("rate_per_second") is not None:
        fail(where, "rate_per_second", "and limit with window_seconds exclude each other; give one of them")
    if fields.get("algorithm") is None:
        fields["algorithm"] = "sliding_window" if windows else "token_bucket"
    try:
        return build_limiter(fields, where)
    except ConfigValidationError as error:
        if error.field == "timeout":  # the caller knows it by another name
            error.field = "default_timeout"
            error.args = (str(error).replace(" timeout ", " default_timeout ", 1),)
        raise
