"""What a refused request gets: an exception, a 429 response, and the handler that makes one of the other.

The exceptions are HTTPExceptions: without any handler registered, FastAPI answers them with the status,
body and headers that `create_rate_limit_response` gives.
"""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ratesync.contrib.fastapi.headers import HeaderStyle, RateLimitResult, get_rate_limit_headers

__all__ = [
    "RateLimitExceededError",
    "RateLimitUnavailableError",
    "create_rate_limit_response",
    "rate_limit_exception_handler",
]


class RateLimitExceededError(HTTPException):
    """A request was refused by a limiter. Answered with 429.

    Attributes:
        identifier: whose limit it was. Not part of the response.
        limit: units per window, or slots.
        remaining: units left.
        reset_at: epoch second of the next try.
        retry_after: seconds until it, at least 1.
        limiter_id: the limiter, else None.
        result: all of this as a `RateLimitResult`.
    """

    def __init__(
        self,
        identifier: str,
        limit: int,
        remaining: int,
        reset_at: int,
        retry_after: int,
        limiter_id: str | None = None,
        *,
        result: RateLimitResult | None = None,
        header_style: HeaderStyle = "legacy",
    ) -> None:
        self.identifier = identifier
        self.limit = limit
        self.remaining = remaining
        self.reset_at = reset_at
        self.retry_after = retry_after
        self.limiter_id = limiter_id
        self.result = result or RateLimitResult(False, limit, remaining, float(retry_after), limiter_id)
        self.header_style = header_style
        super().__init__(
            429,
            detail=_detail(self.result, None, limiter_id),  # type: ignore[arg-type]
            headers=get_rate_limit_headers(self.result, headers=header_style),
        )

    def to_result(self) -> RateLimitResult:
        """The refusal as a `RateLimitResult`."""
        return self.result

    def __str__(self) -> str:
        limiter = f" of limiter {self.limiter_id!r}" if self.limiter_id else ""
        return f"rate limit{limiter} exceeded for {self.identifier!r}: retry after {self.retry_after} s"


class RateLimitUnavailableError(HTTPException, RuntimeError):
    """The limiter could not decide and the request may not pass undecided. Answered with 503."""

    def __init__(self, message: str) -> None:
        self.message = message
        # The body says nothing about the inside; the message is for the log.
        super().__init__(503, detail="Rate limiter unavailable", headers={"Retry-After": "1"})

    def __str__(self) -> str:
        return self.message


async def rate_limit_exception_handler(request: Request, exc: Exception) -> Response:
    """Answers a RateLimitExceededError with 429.

    FastAPI does so by itself; an application of plain Starlette has to register it:
    `app.add_exception_handler(RateLimitExceededError, rate_limit_exception_handler)`.
    """
    if not isinstance(exc, RateLimitExceededError):
        raise exc
    return JSONResponse({"detail": exc.detail}, status_code=exc.status_code, headers=exc.headers)


def create_rate_limit_response(
    result: Any,
    message: str | None = None,
    identifier: str | None = None,
    limiter_id: str | None = None,
    *,
    headers: HeaderStyle = "legacy",
) -> JSONResponse:
    """The 429 response for a refusal.

    Args:
        result: a `RateLimitResult`.
        message: text of `msg`; None says when to retry.
        identifier: not shown; accepted so that callers need not care.
        limiter_id: shown as `context.limiter` when given.
        headers: `legacy`, `ietf` or `both`.
    """
    return JSONResponse(
        {"detail": _detail(result, message, limiter_id)},
        status_code=429,
        headers=get_rate_limit_headers(result, headers=headers),
    )


def _detail(result: Any, message: str | None, limiter_id: str | None) -> list[dict[str, Any]]:
    seconds = int(result.retry_after)
    context: dict[str, Any] = {"retry_after_seconds": seconds, "limit": int(result.limit)}
    if limiter_id:
        context["limiter"] = limiter_id
    return [
        {
            "type": "rate_limit_exceeded",
            "msg": message or f"Rate limit exceeded. Try again in {seconds} seconds.",
            "context": context,
        }
    ]
