"""An endpoint that serves the metrics from a FastAPI or Starlette application."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ratesync.contrib.prometheus import enable_metrics

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["add_metrics_endpoint"]


def add_metrics_endpoint(app: Any, path: str = "/metrics", include_in_schema: bool = False) -> bool:
    """Adds a route that answers with the default registry of prometheus_client; enables the metrics.

    Args:
        app: a FastAPI or Starlette application.
        path: where.
        include_in_schema: whether OpenAPI shows it.

    Returns:
        False, and logged, when prometheus_client or Starlette is not installed.
    """
    if not enable_metrics():
        return False
    try:
        from starlette.responses import Response
    except ModuleNotFoundError:
        logging.getLogger("ratesync.contrib.prometheus").warning(
            "no metrics endpoint: Starlette is not installed: pip install ratesync[fastapi]"
        )
        return False
    from prometheus_client import REGISTRY
    from prometheus_client.exposition import choose_encoder

    def serve(request: Request) -> Response:  # a plain function: Starlette runs it in a thread
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), headers={"Content-Type": content_type})

    app.add_route(path, serve, methods=["GET"], include_in_schema=include_in_schema)
    return True
