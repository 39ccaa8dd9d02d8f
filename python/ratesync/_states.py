"""The functions that name no store: they use the one that `[state]` or `configure_state` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ratesync import _engine
from ratesync._registry import _registry

if TYPE_CHECKING:
    from datetime import timedelta

    from ratesync._engine import Lease
    from ratesync._pending import Pending
    from ratesync.idempotency import Idempotent
    from ratesync.locks import Lock
    from ratesync.states import State

__all__ = ["configure_state", "idempotent", "lock", "state", "try_lock"]

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


def lock(
    name: str,
    ttl: float | timedelta = 30,
    timeout: float | None = None,
    *,
    auto_renew: bool = True,
    cancel_on_loss: bool = False,
    namespace: str | None = None,
    tenant: str | None = None,
) -> Lock:
    """A lock where `[state]` or `configure_state` says; in this process alone where nothing does.

    Args:
        name: of the lock, 1 to 255 bytes of UTF-8.
        ttl: seconds after which others may take it when its holder is gone.
        timeout: seconds to wait for it; 0 asks once, None waits as long as it takes.
        auto_renew: renew the lease until the body ends.
        cancel_on_loss: `async with` only: cancel the body when the lock is lost.
        namespace: part of the name; None: the configured one.
        tenant: part of the name; None: the configured one.

    Raises:
        ConfigValidationError: an argument or the configuration is not valid.

    Example:
        >>> import ratesync
        >>> with ratesync.lock("invoice-42", ttl=30, timeout=10) as lease:
        ...     print(lease.lost)
        False
    """
    store, options = _registry.state()
    return store.lock(
        name,
        ttl,
        timeout,
        auto_renew=auto_renew,
        cancel_on_loss=cancel_on_loss,
        prefix=options.prefix,
        namespace=options.namespace if namespace is None else namespace,
        tenant=options.tenant if tenant is None else tenant,
    )


def try_lock(
    name: str,
    ttl: float | timedelta = 30,
    *,
    auto_renew: bool = True,
    namespace: str | None = None,
    tenant: str | None = None,
) -> Pending[Lease | None]:
    """Takes the lock when it is free at this moment: a lease, to be released by the caller, or None.

    The arguments are those of `lock`.

    Example:
        >>> import ratesync
        >>> lease = ratesync.try_lock("nightly-report", ttl=60).wait()
        >>> ratesync.try_lock("nightly-report").wait() is None, lease.release().wait()
        (True, True)
    """
    return lock(name, ttl, 0, auto_renew=auto_renew, namespace=namespace, tenant=tenant).acquire()


def idempotent(
    key: str,
    fingerprint: str | bytes | None = None,
    ttl: float | timedelta | None = 86400,
    lease: float | timedelta = 30,
    wait: float | timedelta | None = None,
    *,
    on_error: Literal["free", "keep"] = "free",
    namespace: str | None = None,
    tenant: str | None = None,
) -> Idempotent:
    """An operation that is done once per key, where `[state]` or `configure_state` says.

    The arguments, and what entering and leaving raise, are those of `Store.idempotent`.

    Args:
        key: names the operation, 1 to 1024 bytes.
        fingerprint: of the request; another one under the same key is an error.
        ttl: seconds for which the result is kept; None: for ever.
        lease: seconds after which others may run the operation when its runner is gone.
        wait: when it is running elsewhere: seconds to wait for its result; None: do not.
        on_error: of a body that raises: `free` the key, or `keep` the failure.
        namespace: part of the key; None: the configured one.
        tenant: part of the key; None: the configured one.

    Example:
        >>> import ratesync
        >>> with ratesync.idempotent("webhook-99") as op:
        ...     op.result = "sent"
        >>> with ratesync.idempotent("webhook-99") as op:
        ...     print(op.done, op.result)
        True sent
    """
    store, options = _registry.state()
    return store.idempotent(
        key,
        fingerprint,
        ttl,
        lease,
        wait,
        on_error=on_error,
        prefix=options.prefix,
        namespace=options.namespace if namespace is None else namespace,
        tenant=options.tenant if tenant is None else tenant,
        timeout=options.timeout,
    )
