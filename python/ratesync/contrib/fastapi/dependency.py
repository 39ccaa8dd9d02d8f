"""Limits as FastAPI dependencies: `Depends(RateLimitDependency("api"))`.

No postponed annotations in this module: FastAPI reads the signature of `__call__` from an instance, where
the names in a string would not be found, and would take `request` for a query parameter.
"""

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ratesync.contrib.fastapi.admission import Admission, admit, admit_all, lets_pass, log
from ratesync.contrib.fastapi.headers import (
    HeaderStyle,
    RateLimitResult,
    check_style,
    merge_rate_limit_headers,
)
from ratesync.contrib.fastapi.identity import IdentifierExtractor, get_client_ip, parse_networks
from ratesync.contrib.fastapi.responses import RateLimitExceededError, RateLimitUnavailableError
from ratesync.errors import (
    ConfigValidationError,
    LimiterNotFoundError,
    RateLimiterAcquisitionError,
    RateLimiterError,
)

__all__ = ["CompositeRateLimitDependency", "RateLimitDependency", "rate_limit"]

_STRATEGIES = ("most_restrictive", "all_must_pass", "any_must_pass")


class _Use:
    """One call of a dependency: FastAPI iterates it and comes back after the response; others await it."""

    def __init__(self, limit: "_Limit", request: Request, response: Response) -> None:
        self._limit, self._request, self._response = limit, request, response
        self._steps = limit._during_request(request, response)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._limit._until_request_ends(self._request, self._response).__await__()

    def __aiter__(self) -> "_Use":
        return self

    def __anext__(self) -> Awaitable[None]:
        return self._steps.__anext__()

    def athrow(self, *error: Any) -> Awaitable[Any]:
        return self._steps.athrow(*error)  # type: ignore[attr-defined,no-any-return]

    def aclose(self) -> Awaitable[None]:
        return self._steps.aclose()  # type: ignore[attr-defined,no-any-return]


class _Held:
    """Slots of a request that nothing else ends: given back with the scope at the latest."""

    def __init__(self, admissions: Sequence[Admission]) -> None:
        self._admissions = admissions

    def release(self) -> None:
        for admission in self._admissions:
            admission.release()

    def __del__(self) -> None:
        self.release()


class _Limit:
    """What the two dependencies share: the life of the slots and the headers."""

    def __init__(self, headers: HeaderStyle) -> None:
        self.headers = check_style(headers)
        # FastAPI asks the attribute `__call__` whether it is an async generator function, and comes
        # back after the response if so. Calling goes to the class, whose result can be awaited as well.
        vars(self)["__call__"] = self._during_request

    def __call__(self, request: Request, response: Response) -> Any:
        """Limits the request; as a dependency, or awaited by hand: `await limit(request, response)`.

        Raises:
            RateLimitExceededError: refused; answered with 429.
            RateLimitUnavailableError: undecided, and it may not pass; answered with 503.
        """
        return _Use(self, request, response)

    async def _admit(self, request: Request) -> list[Admission]:
        raise NotImplementedError

    async def _enter(self, request: Request, response: Response) -> list[Admission]:
        admissions = await self._admit(request)
        results = [admission.result for admission in admissions if admission.result is not None]
        try:
            merge_rate_limit_headers(response.headers, results, self.headers)
        except BaseException:
            for admission in admissions:
                admission.release()
            raise
        return admissions

    async def _during_request(self, request: Request, response: Response) -> AsyncIterator[None]:
        admissions = await self._enter(request, response)
        try:
            yield
        finally:
            for admission in admissions:
                admission.release()

    async def _until_request_ends(self, request: Request, response: Response) -> None:
        held = _Held(await self._enter(request, response))
        stack = request.scope.get("fastapi_inner_astack")
        if isinstance(stack, AsyncExitStack):
            stack.callback(held.release)
        else:
            request.scope.setdefault("ratesync.held", []).append(held)


class RateLimitDependency(_Limit):
    """Limits the requests of each client, or of whatever the extractor names.

    Each identifier has the limiter's parameters and a state of its own (`acquire(limiter_id, key=...)`);
    nothing is registered per identifier. A concurrency slot is held until the response is sent and its
    background tasks are done. For HTTP requests, not for WebSockets.

    Args:
        limiter_id: the limiter; looked up when the first request comes.
        identifier_extractor: function of the request, plain or async, that names who is limited. None:
            the client's address. What it raises is logged and the address taken instead, except for an
            HTTPException, which is the response.
        timeout: seconds to wait for a turn; 0 refuses at once, None takes the limiter's default.
        fail_open: whether requests pass when the limiter fails. Never while the limiter itself is
            configured `fail_closed` and its store is out, nor when this process is overloaded.
        trusted_proxies: networks of proxies, as in `get_client_ip`.
        headers: `legacy` (X-RateLimit-*), `ietf` (RateLimit, RateLimit-Policy) or `both`.

    Example:
        >>> from fastapi import Depends, FastAPI
        >>> app = FastAPI()
        >>> @app.get("/", dependencies=[Depends(RateLimitDependency("api"))])
        ... async def index() -> str:
        ...     return "hello"
    """

    def __init__(
        self,
        limiter_id: str,
        identifier_extractor: IdentifierExtractor | None = None,
        timeout: float | None = 0,
        fail_open: bool = True,
        trusted_proxies: Sequence[str] | None = None,
        *,
        headers: HeaderStyle = "legacy",
    ) -> None:
        super().__init__(headers)
        if trusted_proxies is not None:
            parse_networks(tuple(trusted_proxies))
        self.limiter_id = limiter_id
        self.identifier_extractor = identifier_extractor
        self.timeout = timeout
        self.fail_open = fail_open
        self.trusted_proxies = trusted_proxies

    async def _admit(self, request: Request) -> list[Admission]:
        identifier = await self.identify(request)
        try:
            admission = await admit(self.limiter_id, identifier, self.timeout)
        except Exception as error:
            return [undecided(self.limiter_id, error, self.fail_open)]
        if admission.result is not None and not admission.allowed:
            raise refusal(identifier, admission.result, self.headers)
        return [admission]

    async def identify(self, request: Request) -> str:
        """The identifier of a request."""
        if self.identifier_extractor is not None:
            try:
                found = self.identifier_extractor(request)
                return str(await found if inspect.isawaitable(found) else found)
            except Exception as error:
                if hasattr(error, "status_code"):
                    raise
                warn_seldom(
                    ("identifier", self.limiter_id),
                    f"the identifier_extractor of limiter {self.limiter_id!r} failed; the client's address "
                    f"is limited instead ({type(error).__name__}: {error}; said at most once a minute)",
                )
        return get_client_ip(request, self.trusted_proxies)


def rate_limit(
    limiter_id: str,
    identifier_extractor: IdentifierExtractor | None = None,
    timeout: float | None = 0,
    fail_open: bool = True,
    *,
    headers: HeaderStyle = "legacy",
) -> RateLimitDependency:
    """A `RateLimitDependency`, for `Depends(rate_limit("api"))`. Arguments as there."""
    return RateLimitDependency(limiter_id, identifier_extractor, timeout, fail_open, headers=headers)


class CompositeRateLimitDependency(_Limit):
    """Limits a request by several limiters at once, such as one per address and one per account.

    Args:
        limiters: name -> limiter id.
        identifier_extractor: function of the request, plain or async, that gives an identifier for each of
            these names, no more and no fewer.
        strategy: `most_restrictive` and `all_must_pass`: all have to grant, which is decided at once, or
            nothing is charged. `any_must_pass`: each is asked, one grant is enough; refusals charge nothing.
        timeout: seconds to wait, for each with `any_must_pass`; None tries once.
        fail_open: as in `RateLimitDependency`.
        headers: as there; the legacy form tells of the limiter with the least remaining.

    Example:
        >>> both = CompositeRateLimitDependency(
        ...     {"address": "per-address", "user": "per-user"},
        ...     lambda request: {"address": get_client_ip(request), "user": request.headers["x-user"]},
        ... )
    """

    def __init__(
        self,
        limiters: Mapping[str, str],
        identifier_extractor: Callable[[Request], Mapping[str, str] | Awaitable[Mapping[str, str]]],
        strategy: str = "most_restrictive",
        timeout: float | None = None,
        fail_open: bool = True,
        *,
        headers: HeaderStyle = "legacy",
    ) -> None:
        super().__init__(headers)
        if not limiters:
            raise ConfigValidationError("limiters is empty", "limiters", "name -> limiter id", "{}")
        strategy = str(getattr(strategy, "value", strategy))
        if strategy not in _STRATEGIES:
            raise ConfigValidationError(
                "strategy is not valid", "strategy", " or ".join(_STRATEGIES), repr(strategy)[:80]
            )
        self.limiters = dict(limiters)
        self.identifier_extractor = identifier_extractor
        self.strategy = strategy
        self.timeout = timeout
        self.fail_open = fail_open

    async def _admit(self, request: Request) -> list[Admission]:
        found = self.identifier_extractor(request)
        identifiers = await found if inspect.isawaitable(found) else found
        if not isinstance(identifiers, Mapping) or set(identifiers) != set(self.limiters):
            raise ValueError(
                f"the identifiers must match limiter keys: expected a dict of {sorted(self.limiters)}"
            )
        limits = [(limiter_id, identifiers[name]) for name, limiter_id in self.limiters.items()]
        if self.strategy != "any_must_pass" and (admissions := await self._together(limits)):
            result = admissions[0].result
            if result is not None and not result.allowed:
                raise refusal(str(dict(identifiers)), result, self.headers)
            return admissions
        return await self._one_by_one(limits, str(dict(identifiers)))

    async def _together(self, limits: Sequence[tuple[str, object]]) -> list[Admission]:
        """Empty: each has to be asked for itself, where that may end otherwise."""
        try:
            return await admit_all(limits, self.timeout or 0)
        except RateLimiterAcquisitionError as error:
            if not lets_pass(error, self.fail_open):
                named = [name for name, _ in limits if (error.group_id or "").startswith(name)]
                undecided((named or [limits[0][0]])[0], error, self.fail_open)
            return []
        except RateLimiterError:  # one is not configured; or their store cannot decide these together
            return []

    async def _one_by_one(self, limits: Sequence[tuple[str, object]], identifiers: str) -> list[Admission]:
        admissions: list[Admission] = []
        try:
            for limiter_id, identifier in limits:
                try:
                    admissions.append(await admit(limiter_id, identifier, self.timeout or 0))
                except Exception as error:
                    admissions.append(undecided(limiter_id, error, self.fail_open))
                if self.strategy != "any_must_pass" and not admissions[-1].allowed:
                    break
        except BaseException:
            await _undo(admissions)
            raise
        refused = [admission.result for admission in admissions if admission.result and not admission.allowed]
        if refused and (self.strategy != "any_must_pass" or len(refused) == len(admissions)):
            await _undo(admissions)
            # Of several refusals, the client may come back after the earliest.
            first = min(refused, key=lambda result: result.reset_in)
            raise refusal(identifiers, first, self.headers)
        return [admission for admission in admissions if admission.allowed]


async def _undo(admissions: Sequence[Admission]) -> None:
    try:
        for admission in reversed(admissions):
            try:
                await admission.undo()
            except Exception as error:  # it stays charged: the rate is kept, not exceeded
                log.warning("a grant could not be given back: %s", error)
    finally:  # cancelled meanwhile: at least the slots
        for admission in admissions:
            admission.release()


def refusal(identifier: str, result: RateLimitResult, headers: HeaderStyle) -> RateLimitExceededError:
    """The exception for a refused result."""
    return RateLimitExceededError(
        identifier,
        result.limit,
        result.remaining,
        result.reset_at,
        result.retry_after,
        result.limiter_id,
        result=result,
        header_style=headers,
    )


def undecided(limiter_id: str, error: Exception, fail_open: bool) -> Admission:
    """The request passes unlimited, which is logged; or RateLimitUnavailableError."""
    if not lets_pass(error, fail_open):
        raise RateLimitUnavailableError(f"limiter {limiter_id!r} could not decide: {error}") from error
    kind = "not configured" if isinstance(error, LimiterNotFoundError) else "failing"
    warn_seldom(
        (kind, limiter_id),
        f"limiter {limiter_id!r} is {kind}; requests pass unlimited (fail_open): {error} "
        "(said at most once a minute)",
    )
    return Admission(None)


_SILENCE = 60.0  # seconds
_said: dict[tuple[str, str], float] = {}


def warn_seldom(subject: tuple[str, str], message: str) -> None:
    """Logs a warning about a subject at most once a minute: an outage must not fill the log."""
    now = time.monotonic()
    last = _said.get(subject)
    if last is None or now - last >= _SILENCE:
        _said[subject] = now
        log.warning("%s", message)
