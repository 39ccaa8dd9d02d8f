"""The functions that name no store: they use the one that `[state]` or `configure_state` names."""

from __future__ import annotations

from typing import Any

from ratesync._registry import _registry

__all__ = ["configure_state"]


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
