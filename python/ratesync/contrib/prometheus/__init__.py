"""Prometheus metrics of limiters and stores.

    from ratesync.contrib.prometheus import enable_metrics

    enable_metrics()      # then serve prometheus_client's registry as usual

A collector that reads the engine's counters when it is scraped; acquisitions cost nothing more. Needs
`pip install "ratesync[prometheus]"`; without it `enable_metrics` answers False.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from ratesync.contrib.prometheus import metrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["PROMETHEUS_AVAILABLE", "add_metrics_endpoint", "disable_metrics", "enable_metrics", "is_enabled"]

#: Whether prometheus_client is installed.
PROMETHEUS_AVAILABLE = importlib.util.find_spec("prometheus_client") is not None


def enable_metrics(registry: CollectorRegistry | None = None) -> bool:
    """Registers the collector. Again does nothing.

    Args:
        registry: where; None takes the default registry of prometheus_client.

    Returns:
        Whether metrics are collected now; False when prometheus_client is not installed.

    Example:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> import ratesync
        >>> ratesync.configure_limiter("prometheus-doc", rate_per_second=10.0)
        >>> registry = CollectorRegistry()
        >>> enable_metrics(registry)
        True
        >>> b'group_id="prometheus-doc"' in generate_latest(registry)
        True
        >>> disable_metrics()
    """
    if not PROMETHEUS_AVAILABLE:
        logging.getLogger("ratesync.contrib.prometheus").warning(
            "metrics are off: prometheus_client is not installed: pip install ratesync[prometheus]"
        )
        return False
    metrics.enable(registry)
    return True


def disable_metrics() -> None:
    """Takes the collector out of its registry and forgets what the recorders recorded. For tests."""
    metrics.disable()


def is_enabled() -> bool:
    """Whether `enable_metrics` was called with success."""
    return metrics.is_enabled()


def add_metrics_endpoint(app: Any, path: str = "/metrics", include_in_schema: bool = False) -> bool:
    """Serves the metrics from a FastAPI or Starlette application, see `.fastapi.add_metrics_endpoint`."""
    from ratesync.contrib.prometheus import fastapi

    return fastapi.add_metrics_endpoint(app, path, include_in_schema)
