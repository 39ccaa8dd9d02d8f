"""`CompositeRateLimiter`: several limits with an identifier each, decided together by a strategy.

by_login = CompositeRateLimiter({"by_ip": "login-ip", "by_user": "login-user"})
answer = await by_login.check({"by_ip": "192.0.2.7", "by_user": "ada"})
if not answer.allowed:
    ...answer.triggered_by, answer.most_restrictive.retry_after
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ratesync._pending import Pending, script
from ratesync._registry import _registry
from ratesync.checks import Request, acquire_all, look
from ratesync.errors import ConfigValidationError, nearest
from ratesync.schemas import RateLimitResult

__all__ = ["CompositeLimitCheck", "CompositeRateLimiter", "RateLimitResult", "StrategyType"]

#: `most_restrictive`: all have to pass; when refused, `most_restrictive` is the answer with the least
#: remaining. `all_must_pass`: all have to pass; when refused, `most_restrictive` is the first refusal.
#: `any_must_pass`: one is enough.
StrategyType = Literal["most_restrictive", "all_must_pass", "any_must_pass"]


@dataclass(frozen=True, slots=True)
class CompositeLimitCheck:
    """The answer of a `CompositeRateLimiter`.

    Attributes:
        allowed: whether the call may go on.
        results: the answer of each limiter, by its name in the composite.
        most_restrictive: the answer to tell a client.
        triggered_by: name of the first limiter that refused; `all` when `any_must_pass` found none that
            allows; None when the call is allowed.
    """

    allowed: bool
    results: dict[str, RateLimitResult]
    most_restrictive: RateLimitResult
    triggered_by: str | None = None


class CompositeRateLimiter:
    """Several configured limiters, each with an identifier of its own, as one check.

    Args:
        limiters: limiter ids by a name of your choice.
        strategy: `most_restrictive`, `all_must_pass` or `any_must_pass`; see `StrategyType`.

    Raises:
        ConfigValidationError: no limiters, or another strategy (also a ValueError).

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("login-ip", rate_per_second=1.0, burst=20)
        >>> ratesync.configure_limiter("login-user", rate_per_second=1.0)
        >>> login = CompositeRateLimiter({"ip": "login-ip", "user": "login-user"}, "all_must_pass")
        >>> login.check({"ip": "192.0.2.7", "user": "ada"}).wait().allowed
        True
        >>> answer = login.check({"ip": "192.0.2.7", "user": "ada"}).wait()
        >>> answer.allowed, answer.triggered_by, answer.results["ip"].remaining
        (False, 'user', 19)
    """

    def __init__(self, limiters: Mapping[str, str], strategy: StrategyType = "most_restrictive") -> None:
        if not limiters:
            raise ConfigValidationError(
                "CompositeRateLimiter: limiters is empty: name at least one limiter", "limiters"
            )
        if strategy not in get_args(StrategyType):
            raise ConfigValidationError(
                f"CompositeRateLimiter: strategy is not valid{nearest(strategy, get_args(StrategyType))}",
                "strategy",
                " or ".join(repr(name) for name in get_args(StrategyType)),
                repr(strategy)[:80],
            )
        self.limiters: dict[str, str] = dict(limiters)
        self.strategy: StrategyType = strategy

    @script
    def check(
        self, identifiers: Mapping[str, object], timeout: float | None = None
    ) -> Generator[Pending[Any], Any, CompositeLimitCheck]:
        """Takes one unit of the limits of these identifiers: await the answer, or `.wait()` for it.

        The limit of an identifier is that of `acquire(limiter_id, key=identifier)`. A refused check charges
        nothing: where all have to pass, it is all or nothing; with `any_must_pass` each limiter that allows
        it is charged. No concurrency slot is held afterwards.

        Args:
            identifiers: for each name of `limiters` the identifier; its text is the key.
            timeout: seconds to wait at most; None and 0 try once.

        Raises:
            ConfigValidationError: the names do not match, or an identifier is empty (also a ValueError).
            LimiterNotFoundError: a limiter is not configured; nothing was charged.
        """
        if identifiers.keys() != self.limiters.keys():
            raise ConfigValidationError(
                "CompositeRateLimiter: the identifiers must match limiter keys",
                "identifiers",
                ", ".join(sorted(self.limiters)),
                ", ".join(sorted(map(str, identifiers))) or "none",
            )
        requests = {
            name: Request(_registry.limiter(limiter_id), limiter_id, str(identifiers[name]))
            for name, limiter_id in self.limiters.items()
        }
        together = self.strategy != "any_must_pass"
        answers: list[RateLimitResult] = yield (
            acquire_all(list(requests.values()), timeout or 0)
            if together
            else _acquire_any(list(requests.values()), timeout or 0)
        )
        results = dict(zip(requests, answers, strict=True))
        refused = [name for name, result in results.items() if not result.allowed]
        tightest = min(answers, key=lambda result: (result.remaining, result.allowed, -result.reset_in))
        if not together:
            allowed = len(refused) < len(results)
            return CompositeLimitCheck(allowed, results, tightest, None if allowed else "all")
        if not refused:
            return CompositeLimitCheck(True, results, tightest)
        if self.strategy == "all_must_pass":
            tightest = results[refused[0]]
        return CompositeLimitCheck(False, results, tightest, refused[0])


@script
def _acquire_any(
    requests: list[Request], timeout: float
) -> Generator[Pending[Any], Any, list[RateLimitResult]]:
    """Asks each for itself. When none allows it, waits for the one that will be the first to."""
    answers: list[RateLimitResult] = []
    for request in requests:
        (answer,) = yield acquire_all([request], 0)
        answers.append(answer)
    if timeout > 0 and not any(answer.allowed for answer in answers):
        soonest = min(range(len(answers)), key=lambda place: answers[place].reset_in)
        (answers[soonest],) = yield acquire_all([requests[soonest]], timeout)
        for place, request in enumerate(requests):
            if place != soonest and answers[soonest].allowed:
                answers[place] = yield look(request.limiter, request.name, request.key)
    return answers
