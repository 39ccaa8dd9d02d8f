"""Limits for FastAPI and Starlette: a dependency, a middleware, headers, and the client's address.

    @app.get("/", dependencies=[Depends(RateLimitDependency("api"))])
    async def index(): ...

Needs `pip install "ratesync[fastapi]"`. Without it this package can be imported and says so
(`FASTAPI_AVAILABLE`); its names that need Starlette raise RuntimeError.
"""

import importlib.util
from typing import Any

from ratesync.contrib.fastapi.headers import (
    RateLimitResult,
    get_rate_limit_headers,
    set_rate_limit_headers,
)
from ratesync.contrib.fastapi.identity import (
    DEFAULT_TRUSTED_PROXY_NETWORKS,
    IdentifierExtractor,
    get_client_ip,
    is_private_ip,
    validate_ip,
)
from ratesync.identifiers import combine_identifiers, hash_identifier

#: Whether Starlette, on which all of this works, is installed.
FASTAPI_AVAILABLE = importlib.util.find_spec("starlette") is not None
#: Whether `CompositeRateLimitDependency` can be used.
COMPOSITE_AVAILABLE = FASTAPI_AVAILABLE

if FASTAPI_AVAILABLE:
    from ratesync.contrib.fastapi.dependency import (
        CompositeRateLimitDependency,
        RateLimitDependency,
        rate_limit,
    )
    from ratesync.contrib.fastapi.middleware import RateLimitMiddleware
    from ratesync.contrib.fastapi.responses import (
        RateLimitExceededError,
        RateLimitUnavailableError,
        create_rate_limit_response,
        rate_limit_exception_handler,
    )

__all__ = [
    "COMPOSITE_AVAILABLE",
    "DEFAULT_TRUSTED_PROXY_NETWORKS",
    "FASTAPI_AVAILABLE",
    "CompositeRateLimitDependency",
    "IdentifierExtractor",
    "RateLimitDependency",
    "RateLimitExceededError",
    "RateLimitMiddleware",
    "RateLimitResult",
    "RateLimitUnavailableError",
    "combine_identifiers",
    "create_rate_limit_response",
    "get_client_ip",
    "get_rate_limit_headers",
    "hash_identifier",
    "is_private_ip",
    "rate_limit",
    "rate_limit_exception_handler",
    "set_rate_limit_headers",
    "validate_ip",
]


def __getattr__(name: str) -> Any:
    if name in __all__ and not FASTAPI_AVAILABLE:
        raise RuntimeError(f"ratesync.contrib.fastapi.{name} needs Starlette: pip install ratesync[fastapi]")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
