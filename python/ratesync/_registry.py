"""The registry: which stores and limiters are configured, and which of them are built.

One registry per process, guarded by the engine's lock. It keeps three promises: configuring is cheap
and opens nothing; a limiter is built at its first use, once; and the core's table of bound limiters,
which `acquire("name")` looks in first, holds exactly the limiters that are current. What belongs to a
stopped engine (shutdown, fork) is forgotten, what was configured stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ratesync import _engine
from ratesync.errors import ConfigValidationError, LimiterNotFoundError, StoreNotFoundError
from ratesync.limits import StoreLimiter
from ratesync.stores import Store

if TYPE_CHECKING:  # imported at first use: validation costs import time
    from ratesync._schemas import LimiterOptions
    from ratesync._state_schema import StateConfig, StateOptions
    from ratesync.config import Config, FastAPIConfig, StoreConfig

V = TypeVar("V")
DEFAULT_STORE = "memory"
STATE_STORE = (
    "[state]"  # how the store of [state] is called in messages; no file can name a store so by chance
)


class _Table(dict[str, V]):
    """A dict whose `clear()` also forgets what was built from its entries."""

    def __init__(self, forget: Callable[[], None]) -> None:
        super().__init__()
        self._forget = forget

    def clear(self) -> None:
        with _engine.lock:
            super().clear()
            self._forget()


class RateLimiterRegistry:
    """Configured and built stores and limiters. All methods are safe to call from any thread."""

    def __init__(self) -> None:
        self._backends: _Table[StoreConfig] = _Table(self._drop_built)
        self._limiters: _Table[LimiterOptions] = _Table(self._unbind_all)
        self._bases: dict[str, str] = {}  # clone for one identifier -> the limiter it was cloned from
        self._built: dict[str, StoreLimiter] = {}
        self._stores: dict[str, Store] = {}
        self._fastapi: FastAPIConfig | None = None
        self._state: StateConfig | None = None
        self._state_store: Store | None = None  # where [state] names a backend of its own
        self._discovered = False

    # Configuring ----------------------------------------------------------------------------------

    def set_store(self, store_id: str, config: StoreConfig) -> None:
        with _engine.lock:
            if self._backends.get(store_id) == config:
                return  # same options: the pool goes on
            self._backends[store_id] = config
            if store_id in self._stores:
                # Limiters on the old one are built anew at their next use. The old store closes when the
                # last limiter object and permit on it are gone.
                del self._stores[store_id]
                for limiter_id, limiter in list(self._built.items()):
                    if limiter.store_id == store_id:
                        self._unbind(limiter_id)

    def set_limiter(self, limiter_id: str, options: LimiterOptions) -> None:
        with _engine.lock:
            if options.store != DEFAULT_STORE and options.store not in self._backends:
                self.discover()
                if options.store not in self._backends:
                    raise StoreNotFoundError(options.store, self.store_ids() | {DEFAULT_STORE})
            self._bases.pop(limiter_id, None)
            if self._limiters.get(limiter_id) != options:
                self._limiters[limiter_id] = options
                self._unbind(limiter_id)

    def set_state(self, config: StateConfig) -> None:
        with _engine.lock:
            if config.options.store not in (None, DEFAULT_STORE, *self._backends):
                self.discover()
                if config.options.store not in self._backends:
                    raise StoreNotFoundError(str(config.options.store), self.store_ids() | {DEFAULT_STORE})
            if self._state != config:
                self._state, self._state_store = config, None

    def apply(self, config: Config, *, override: bool = True) -> None:
        """Takes over a checked file in one step. Without `override`, names that exist are kept."""
        with _engine.lock:
            for store_id, store in config.stores.items():
                if override or store_id not in self._backends:
                    self.set_store(store_id, store)
            for limiter_id, limiter in config.limiters.items():
                if override or limiter_id not in self._limiters:
                    self.set_limiter(limiter_id, limiter)
            if config.state is not None and (override or self._state is None):
                self.set_state(config.state)
            networks = config.fastapi.trusted_proxy_networks
            if networks is not None and (override or self.fastapi().trusted_proxy_networks is None):
                self.fastapi().trusted_proxy_networks = networks

    def discover(self) -> str:
        """Loads the file that discovery finds, once. Returns a note on the search, for messages.

        What was configured by calls wins over the file, as if the file had been loaded at import. A bad
        file raises every time until it is fixed.
        """
        from ratesync.config import find_config, read_config

        with _engine.lock:
            if self._discovered:
                return ""
            path, note = find_config()
            if path is None:
                return note
            config = read_config(path, known_stores=self.store_ids())
            self._discovered = True
            self.apply(config, override=False)
            return note

    def fastapi(self) -> FastAPIConfig:
        from ratesync.config import FastAPIConfig

        with _engine.lock:
            if self._fastapi is None:
                self._fastapi = FastAPIConfig()
            return self._fastapi

    # Looking up -----------------------------------------------------------------------------------

    def store_ids(self) -> frozenset[str]:
        return frozenset(self._backends)

    def options(self, limiter_id: str) -> LimiterOptions:
        with _engine.lock:
            found = self._limiters.get(limiter_id)
            if found is None:
                note = self.discover()
                found = self._limiters.get(limiter_id)
                if found is None:
                    raise LimiterNotFoundError(limiter_id, self._limiters, note)
            return found

    def limiter(self, limiter_id: str) -> StoreLimiter:
        with _engine.lock:
            built = self._built.get(limiter_id)
            if built is not None and not built._store._closed:
                _engine.bound_limiters()[limiter_id] = built
                return built
            from ratesync.engines import limiter_class

            options = self.options(limiter_id)
            store = self.store(options.store)
            limiter = limiter_class(store.engine, options.algorithm).on_store(store, limiter_id, options)
            self._built[limiter_id] = limiter
            _engine.bound_limiters()[limiter_id] = limiter
            return limiter

    def find(self, name: str) -> StoreLimiter | tuple[StoreLimiter, str]:
        """The limiter of that name, or, for `base:key` that is not configured itself, the base and the key.

        Nothing is registered per key: the key's state is that of `acquire(base, key=key)`.
        """
        base, _, key = name.partition(":")
        with _engine.lock:
            if not (base and key) or name in self._limiters:
                return self.limiter(name)
            if base not in self._limiters:
                self.discover()
            if name in self._limiters or base not in self._limiters:
                return self.limiter(name)
            return self.limiter(base), key

    def store(self, store_id: str) -> Store:
        import msgspec

        with _engine.lock:
            built = self._stores.get(store_id)
            if built is not None and not built._closed:
                return built
            config = self.store_config(store_id)
            engine = _engine.default_engine()
            core = engine.add_store(store_id, config.engine, msgspec.structs.asdict(config.options))
            store = Store(core, engine.now, config.options.timing_margin, config.options)
            self._stores[store_id] = store
            return store

    def store_config(self, store_id: str) -> StoreConfig:
        with _engine.lock:
            note = "" if store_id in self._backends else self.discover()
            if store_id not in self._backends:
                if store_id != DEFAULT_STORE:
                    raise StoreNotFoundError(store_id, self.store_ids() | {DEFAULT_STORE}, note)
                from ratesync._schemas import MemoryOptions
                from ratesync.config import StoreConfig

                self._backends[DEFAULT_STORE] = StoreConfig("memory", MemoryOptions())
            return self._backends[store_id]

    def state(self) -> tuple[Store, StateOptions]:
        """The store of `[state]` and its options; without configuration, the embedded store."""
        import msgspec

        from ratesync._state_schema import StateOptions
        from ratesync.config import StoreConfig

        with _engine.lock:
            note = "" if self._state is not None else self.discover()
            if self._state is None:
                self._refuse_private_state(note)
                return self.store(DEFAULT_STORE), StateOptions()
            options = self._state.options
            if options.store is not None:
                return self.store(options.store), options
            if self._state_store is not None and not self._state_store._closed:
                return self._state_store, options
            backend = str(self._state.engine)
            assert self._state.store_options is not None
            config = StoreConfig(backend, self._state.store_options)
            for store_id, other in self._backends.items():
                if other == config:
                    return self.store(store_id), options  # the same options: the same connections
            if backend == DEFAULT_STORE:
                return self.store(DEFAULT_STORE), options
            engine = _engine.default_engine()
            core = engine.add_store(STATE_STORE, backend, msgspec.structs.asdict(config.options))
            self._state_store = Store(core, engine.now, config.options.timing_margin, config.options)
            return self._state_store, options

    def renewed(self, store_id: str) -> Store:
        """The store that takes the place of one that was closed, or belongs to the parent of this process."""
        return self.state()[0] if store_id == STATE_STORE else self.store(store_id)

    def _refuse_private_state(self, note: str) -> None:
        # Locks of one process, where the limits are shared, would be found out too late.
        shared = next((name for name, one in self._backends.items() if one.engine != "memory"), None)
        if shared is not None:
            raise ConfigValidationError(
                f"no [state] is configured{note}: add [state] with store = {shared!r}, or with a backend and "
                'url, or call configure_state(); backend = "memory" keeps state in this process alone',
                "state",
            )

    # Forgetting -----------------------------------------------------------------------------------

    def _unbind(self, limiter_id: str) -> None:
        self._built.pop(limiter_id, None)
        _engine.bound_limiters().pop(limiter_id, None)

    def _unbind_all(self) -> None:
        self._built.clear()
        _engine.bound_limiters().clear()

    def _drop_built(self) -> None:
        self._unbind_all()
        self._stores.clear()
        self._state_store = None

    def forget_engine(self) -> None:
        """After shutdown and in a forked child: what was built belongs to an engine that is no more."""
        for store in self._stores.values():
            store._retire()
        if self._state_store is not None:
            self._state_store._retire()
        self._drop_built()

    def clear(self) -> None:
        """Forgets all configuration, so that the next use starts from discovery again. For tests."""
        with _engine.lock:
            self._backends.clear()
            self._limiters.clear()
            self._bases.clear()
            self._fastapi = None
            self._state = None
            self._discovered = False


_registry = RateLimiterRegistry()
_engine.on_drop(_registry.forget_engine)
_engine.install(_registry.find)
