"""`check_limiter` and `check_multi_limiters`: whether a call may go on, as a value with numbers to tell.

The numbers are the store's, from the decision itself or from one `peek`. A check holds nothing: a
concurrency slot that it was granted is given back before it answers, so that a check of `max_concurrent`
says whether a slot is free. Who wants to hold the slot during a body uses `acquire`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ratesync._engine import Permit, acquire_limits, log
from ratesync._pending import Pending, script
from ratesync._registry import _registry
from ratesync.errors import (
    AcquireTimeoutError,
    ConfigValidationError,
    RateLimiterAcquisitionError,
    StoreError,
    is_outage,
)
from ratesync.limits import RateLimiter, StoreLimiter
from ratesync.registry import group_id_for
from ratesync.schemas import MultiLimiterResult, RateLimitResult

__all__ = ["check_limiter", "check_multi_limiters"]


@script
def check_limiter(
    limiter_id: str, acquire_if_allowed: bool = True, timeout: float = 0
) -> Generator[Pending[Any], Any, RateLimitResult]:
    """Whether a call may go on: await the result, or `.wait()` for it.

    No concurrency slot is held afterwards: one that was granted is given back before this returns.

    Args:
        limiter_id: name of the limiter.
        acquire_if_allowed: take one unit when it is allowed. False: only look, and charge nothing.
        timeout: seconds to wait for the unit at most; 0 tries once. Without effect when only looking.

    Returns:
        A `RateLimitResult` with what the store says. During an outage it is the limiter's policy:
        `fail_closed` refuses, otherwise the call is allowed with everything remaining.

    Raises:
        LimiterNotFoundError: no such limiter.
        StoreError: the store failed in a way that is no outage, such as a missing table.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("check-doc", rate_per_second=1.0, burst=2)
        >>> first = check_limiter("check-doc").wait()
        >>> first.allowed, first.limit, first.remaining
        (True, 2, 1)
        >>> check_limiter("check-doc", acquire_if_allowed=False).wait().remaining
        1
    """
    limiter = _registry.limiter(limiter_id)
    if not acquire_if_allowed:
        looked: RateLimitResult = yield look(limiter, limiter_id)
        return looked
    (answer,) = yield acquire_all([Request(limiter, limiter_id)], timeout)
    result: RateLimitResult = answer
    return result


@script
def check_multi_limiters(
    limiter_ids: Sequence[str], acquire_if_allowed: bool = True, timeout: float = 0
) -> Generator[Pending[Any], Any, MultiLimiterResult]:
    """Whether a call may go on under several limits: await the result, or `.wait()` for it.

    All or nothing: when one limiter refuses, none is charged. No concurrency slot is held afterwards.

    Args:
        limiter_ids: names of limiters. None at all allows the call. A repeated name counts once.
        acquire_if_allowed: take one unit of each when all allow it. False: only look, and charge nothing.
        timeout: seconds to wait at most; 0 tries once. Without effect when only looking.

    Returns:
        A `MultiLimiterResult`; its `results` are in the order of the names, and `reset_in` of a refusal is
        the longest of those that refused.

    Raises:
        LimiterNotFoundError: one of the names is not configured; nothing was charged.
        StoreError: a store failed in a way that is no outage, such as a missing table.

    Example:
        >>> import ratesync
        >>> ratesync.configure_limiter("check-user", rate_per_second=1.0, burst=5)
        >>> ratesync.configure_limiter("check-ip", rate_per_second=1.0)
        >>> check_multi_limiters(["check-user", "check-ip"]).wait().allowed
        True
        >>> refused = check_multi_limiters(["check-user", "check-ip"]).wait()
        >>> refused.allowed, refused.blocking_limiter_id, refused.results[0].remaining
        (False, 'check-ip', 4)
    """
    if isinstance(limiter_ids, str):
        limiter_ids = [limiter_ids]
    requests = {name: Request(_registry.limiter(name), name) for name in limiter_ids}
    if not requests:
        return MultiLimiterResult.from_results([])
    if acquire_if_allowed:
        results: Sequence[RateLimitResult] = yield acquire_all(list(requests.values()), timeout)
    else:
        looked = []
        for request in requests.values():
            result = yield look(request.limiter, request.name, request.key)
            looked.append(result)
        results = looked
    answers = dict(zip(requests, results, strict=True))
    combined = MultiLimiterResult.from_results([answers[name] for name in limiter_ids])
    if combined.allowed:
        return combined
    # When the others are full again does not matter to who wants to try again.
    waits = [result.reset_in for result in combined.results if not result.allowed]
    return replace(combined, reset_in=max(waits))


# One limiter --------------------------------------------------------------------------------------


class Request:
    """One limit that is asked: a limiter, the key, and the name that results carry."""

    __slots__ = ("key", "limiter", "name")

    def __init__(self, limiter: StoreLimiter, name: str, key: str | None = None) -> None:
        self.limiter = limiter
        self.name = name
        self.key = key

    @property
    def quota(self) -> int:
        """Units that the limiter has; slots, where it only counts slots."""
        limiter = self.limiter
        if limiter.limit is not None:
            return limiter.limit
        if limiter.rate_per_second is not None:
            return limiter.burst
        return limiter.max_concurrent or 0

    @property
    def charges(self) -> bool:
        """Whether it counts units, and not only slots."""
        return self.limiter.limit is not None or self.limiter.rate_per_second is not None

    @property
    def group(self) -> str:
        """What the store calls it."""
        base = self.limiter.group_id
        return base if self.key is None else group_id_for(base, self.key)

    def refused(self, error: RateLimiterAcquisitionError) -> RateLimitResult:
        slots = error.reason == "concurrency_full"
        limit = (self.limiter.max_concurrent or 0) if slots else self.quota
        return RateLimitResult(False, limit, 0, error.retry_after or 0.0, self.name)

    def undecided(self) -> RateLimitResult:
        """Nobody decided, since the store is out: the limiter's policy does."""
        passes = not self.limiter.fail_closed
        return RateLimitResult(passes, self.quota, self.quota if passes else 0, 0.0, self.name)


class _Entering:
    """A permit as a Pending of itself."""

    __slots__ = ("_permit",)

    def __init__(self, permit: Permit) -> None:
        self._permit = permit

    def __await__(self) -> Generator[Any, Any, Permit]:
        return self._permit.__await__()

    def wait(self) -> Permit:
        return self._permit.__enter__()


def entering(permit: Permit) -> Pending[Permit]:
    """Acquires, in a script."""
    return cast("Pending[Permit]", _Entering(permit))  # scripts need no more of a Pending


@script
def look(
    limiter: StoreLimiter, name: str, key: str | None = None
) -> Generator[Pending[Any], Any, RateLimitResult]:
    """The answer of a limiter that charges nothing."""
    request = Request(limiter, name, key)
    try:
        state = yield limiter.peek(key)
    except StoreError as error:
        if not is_outage(error):
            raise
        return request.undecided()
    if state.allowed:
        return RateLimitResult(True, request.quota, state.remaining, state.reset_after, name)
    return RateLimitResult(False, request.quota, 0, state.retry_after, name)


# Several, all or nothing --------------------------------------------------------------------------


@script
def acquire_all(
    requests: Sequence[Request], timeout: float | None
) -> Generator[Pending[Any], Any, list[RateLimitResult]]:
    """Takes one unit of each, or nothing, and holds no slot afterwards. One answer per request."""
    distinct = {request.group: request for request in requests}
    outcome: _Outcome = yield _take(list(distinct.values()), timeout)
    answers: dict[str, RateLimitResult] = {}
    for request in distinct.values():
        if outcome.refusal is None:
            answer = yield _granted(request, *outcome.parts[len(answers)])
        elif request is outcome.blocking:
            answer = request.refused(outcome.refusal)
        else:
            answer = yield look(request.limiter, request.name, request.key)
        answers[request.group] = answer
    return [replace(answers[request.group], limiter_id=request.name) for request in requests]


@dataclass(slots=True)
class _Outcome:
    """Of taking one unit of each: either what was told of each, or who refused and why."""

    parts: Sequence[tuple[bool, int, float | None]] = ()
    blocking: Request | None = None
    refusal: RateLimiterAcquisitionError | None = None


@script
def _take(requests: Sequence[Request], timeout: float | None) -> Generator[Pending[Any], Any, _Outcome]:
    permit = permit_of([(request.limiter, request.key) for request in requests], timeout)
    try:
        yield entering(permit)
    except ConfigValidationError:
        if len(requests) == 1:
            raise
        # A store that cannot decide these together, such as a Redis Cluster that keeps them apart.
        outcome: _Outcome = yield _take_one_by_one(requests, timeout)
        return outcome
    except RateLimiterAcquisitionError as error:
        _check_refusal(error)
        by_group = {request.group: request for request in requests}
        return _Outcome(blocking=by_group.get(error.group_id or "", requests[0]), refusal=error)
    parts = told(permit)
    permit.release()
    return _Outcome(parts)


@script
def _take_one_by_one(
    requests: Sequence[Request], timeout: float | None
) -> Generator[Pending[Any], Any, _Outcome]:
    """Takes one after the other, and gives everything back when one refuses."""
    until = None if timeout is None else time.monotonic() + timeout
    permits: list[Permit] = []
    done = False
    try:
        for request in requests:
            left = timeout if not permits or until is None else max(0.0, until - time.monotonic())
            try:
                permit = yield entering(request.limiter.acquire_context(left, key=request.key))
            except RateLimiterAcquisitionError as error:
                _check_refusal(error)
                yield _give_back(permits)
                done = True
                return _Outcome(blocking=request, refusal=error)
            permits.append(permit)
        done = True
        return _Outcome([part for permit in permits for part in told(permit)])
    except GeneratorExit:  # closed from outside: nothing can be awaited any more
        done = True
        raise
    finally:
        if not done:
            yield _give_back(permits)
        for permit in permits:
            permit.release()


def _check_refusal(error: RateLimiterAcquisitionError) -> None:
    """Raises what is no refusal: a missing table, a bound of this process, a store that was closed."""
    if not isinstance(error, AcquireTimeoutError) and error.reason != "outage":
        raise error


def permit_of(limits: Sequence[tuple[RateLimiter, str | None]], timeout: float | None) -> Permit:
    """The permit of limiters with a key each: all or nothing, where they are several. Not entered yet."""
    if len(limits) == 1:
        limiter, key = limits[0]
        return limiter.acquire_context(timeout, key=key)
    return acquire_limits([(cast("StoreLimiter", limiter), key) for limiter, key in limits], timeout)


def told(permit: Permit) -> Sequence[tuple[bool, int, float | None]]:
    """Of each limit of an entered permit: whether it decided, what remains, seconds until all is there."""
    return permit._parts() or [(not permit.passed_open, permit.remaining, permit.reset_after)]


@script
def _granted(
    request: Request, decided: bool, remaining: int, reset: float | None
) -> Generator[Pending[Any], Any, RateLimitResult]:
    """What a permit said about a limiter; its store is asked where the permit does not know."""
    if not decided:
        return request.undecided()
    if reset is None and request.charges:
        state = yield look(request.limiter, request.name, request.key)
        reset = state.reset_in
    return RateLimitResult(True, request.quota, min(remaining, request.quota), reset or 0.0, request.name)


@script
def _give_back(permits: Sequence[Permit]) -> Generator[Pending[Any], Any, None]:
    """Undoes acquisitions: units and slots."""
    for permit in permits:
        try:
            if not permit.passed_open:
                yield permit.settle(0)
        except RateLimiterAcquisitionError as error:
            log.warning("a unit of %r was not given back: %s", permit.limiter_id, error)
        finally:
            permit.release()
