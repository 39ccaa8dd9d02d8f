"""The functions that name no store: they use the one that `[state]` or `configure_state` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ratesync import _engine
from ratesync._registry import _registry

if TYPE_CHECKING:
    from ratesync.states import State

__all__ = ["configure_state", "state"]

# What state() has made, by its arguments; each belongs to the store that it was made on.
_states: dict[tuple[Any, ...], State] = {}
_engine.on_drop(_states.clear)
MAX_STATES = 1024  # beyond, they are made anew


def configure_state(
    backend: str | None = None,
    *,
    store: str | None = None,
    prefix: str = "acteon_",
    namespace: str = "default",
    tenant: str = "default",
    timeout: float = 5.0,
    **options: Any,
) -> None:
    """Says where `state()`, `lock()`, `try_lock()` and `idempotent()` keep what they keep.

    Nothing is opened before its first use. Without any configuration they use the embedded store, so
    what they keep is known to this process alone.

    Args:
        backend: `memory`, `postgres` or `redis`, with the options of such a store.
        store: instead of `backend`: id of a configured store, whose connections are shared.
        prefix: what names of tables or keys start with, 0 to 40 bytes. Different prefixes never meet.
        namespace: part of every key, 1 to 255 bytes.
        tenant: part of every key, 1 to 255 bytes.
        timeout: seconds that one operation may take, queueing and reconnecting included.
        **options: of the backend, as in `configure_store`: `url`, `auto_create`, `pool_max_size` ...

    Raises:
        ConfigValidationError: names the option, what was expected, and the nearest valid name.
        StoreNotFoundError: `store` is not configured.

    Example:
        >>> import ratesync
        >>> ratesync.configure_state("memory", prefix="orders_")
        >>> ratesync.configure_state("postgress", url="postgresql://localhost/app")
        Traceback (most recent call last):
            ...
        ratesync.errors.ConfigValidationError: configure_state: backend is not a backend of this version \
(did you mean 'postgres'?): expected one of 'memory', 'postgres', 'redis', got 'postgress'
    """
    from ratesync._state_schema import build_state

    given = {"prefix": prefix, "namespace": namespace, "tenant": tenant, "timeout": timeout, **options}
    chosen = {"backend": backend, "store": store}
    given |= {name: value for name, value in chosen.items() if value is not None}
    _registry.set_state(build_state(given, "configure_state"))


def state(
    namespace: str | None = None,
    tenant: str | None = None,
    *,
    kind: str = "state",
    codec: Literal["json"] | None = None,
) -> State:
    """The state that `[state]` or `configure_state` describes; the embedded store's where nothing does.

    The same object for the same arguments, so it can be called wherever it is needed.

    Args:
        namespace: part of every key; None: the configured one.
        tenant: part of every key; None: the configured one.
        kind: part of every key, unless an operation names another one.
        codec: None for str, bytes and int; `json` for what JSON can say.

    Raises:
        ConfigValidationError: the configuration is not valid, or has shared stores and no `[state]`.

    Example:
        >>> import ratesync
        >>> ratesync.state().increment("visits", ttl=60).wait()
        1
        >>> ratesync.state(tenant="acme").get("visits").wait() is None
        True
    """
    store, options = _registry.state()
    chosen = (
        options.namespace if namespace is None else namespace,
        options.tenant if tenant is None else tenant,
    )
    key = (options.prefix, *chosen, kind, codec, options.timeout)
    found = _states.get(key)
    if found is not None and found.store is store:
        return found
    made = store.state(options.prefix, *chosen, kind=kind, codec=codec, timeout=options.timeout)
    if len(_states) >= MAX_STATES:
        _states.clear()
    _states[key] = made
    return made
