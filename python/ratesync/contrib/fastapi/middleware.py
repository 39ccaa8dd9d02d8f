"""Limits as pure ASGI middleware, for every request whose path it is told to look at.

It does not touch the response but for the headers of its start, so streaming works and slots are held
until the last byte is sent. WebSocket and lifespan pass through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ratesync.contrib.fastapi.admission import admit
from ratesync.contrib.fastapi.dependency import RateLimitDependency, undecided
from ratesync.contrib.fastapi.headers import HeaderStyle, merge_rate_limit_headers
from ratesync.contrib.fastapi.responses import RateLimitUnavailableError, create_rate_limit_response
from ratesync.errors import ConfigValidationError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ratesync.contrib.fastapi.identity import IdentifierExtractor

__all__ = ["RateLimitMiddleware"]


class RateLimitMiddleware:
    """Limits HTTP requests by client.

    Args:
        app: the ASGI application.
        limiter_id: the limiter; each client has its own state with these parameters.
        include_paths: regular expressions, matched at the start of the path; None: all paths.
        exclude_paths: the same for paths that are not limited; they win.
        fail_open: whether requests pass when the limiter fails, as in `RateLimitDependency`; False raises
            what failed.
        trusted_proxies: networks of proxies, as in `get_client_ip`.
        identifier_extractor: function of the request that names who is limited; None: the address. It sees
            the head of the request, not the body, and an HTTPException that it raises is the response.
        timeout: seconds to wait for a turn; 0 refuses at once, None takes the limiter's default.
        headers: `legacy`, `ietf` or `both`.

    Raises:
        ConfigValidationError: a path is not a regular expression, or another argument is not valid.

    Example:
        >>> from fastapi import FastAPI
        >>> app = FastAPI()
        >>> app.add_middleware(RateLimitMiddleware, limiter_id="api", exclude_paths=["/health$"])
    """

    def __init__(
        self,
        app: ASGIApp,
        limiter_id: str,
        include_paths: Iterable[str] | None = None,
        exclude_paths: Iterable[str] | None = None,
        fail_open: bool = True,
        trusted_proxies: Sequence[str] | None = None,
        *,
        identifier_extractor: IdentifierExtractor | None = None,
        timeout: float | None = 0,
        headers: HeaderStyle = "legacy",
    ) -> None:
        self.app = app
        self.limiter_id = limiter_id
        self.fail_open = fail_open
        self._limit = RateLimitDependency(
            limiter_id, identifier_extractor, timeout, fail_open, trusted_proxies, headers=headers
        )
        self._include = None if include_paths is None else _compile("include_paths", include_paths)
        self._exclude = _compile("exclude_paths", exclude_paths or ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.covers(scope["path"]):
            return await self.app(scope, receive, send)
        limit = self._limit
        try:
            identifier = await limit.identify(Request(scope))
        except HTTPException as error:  # nobody outside of the application would make a response of it
            response = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            return await response(scope, receive, send)
        try:
            admission = await admit(self.limiter_id, identifier, limit.timeout)
        except Exception as error:
            if not self.fail_open:
                raise
            try:
                admission = undecided(self.limiter_id, error, self.fail_open)
            except RateLimitUnavailableError as unavailable:
                response = JSONResponse(
                    {"detail": unavailable.detail}, unavailable.status_code, unavailable.headers
                )
                return await response(scope, receive, send)
        result = admission.result
        if result is not None and not result.allowed:
            refused = create_rate_limit_response(result, limiter_id=self.limiter_id, headers=limit.headers)
            return await refused(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and result is not None:
                merge_rate_limit_headers(MutableHeaders(scope=message), [result], limit.headers)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            admission.release()

    def covers(self, path: str) -> bool:
        """Whether requests for this path are limited."""
        if any(pattern.match(path) for pattern in self._exclude):
            return False
        return self._include is None or any(pattern.match(path) for pattern in self._include)


def _compile(field: str, patterns: Iterable[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ConfigValidationError(f"{field} is not valid", field, "a list of patterns", repr(patterns)[:80])
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ConfigValidationError(
                f"{field} is not valid ({error})", field, "regular expressions", repr(pattern)[:80]
            ) from None
    return compiled
