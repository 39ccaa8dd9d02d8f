"""One request and one limiter: ask, and say what the store answered. No HTTP in here.

Values come from the permit, from the refusal, or - where a store says neither when all is available again -
from one `peek`. Where nobody decided (the store is out and the policy lets pass), there is no result,
rather than an invented one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ratesync import LimiterReadOnlyConfig, Permit, get_limiter
from ratesync.contrib.fastapi.headers import RateLimitResult, policies_of
from ratesync.contrib.fastapi.identity import safe_key
from ratesync.errors import AcquireTimeoutError, RateLimiterAcquisitionError, StoreExhaustedError

__all__ = ["Admission", "admit", "lets_pass", "log"]

log = logging.getLogger("ratesync.contrib.fastapi")


@dataclass(slots=True)
class Admission:
    """The outcome for one limiter.

    Attributes:
        result: what the limiter answered; None when nobody decided and the request passes.
        permit: holds the slot until `release()`; None when refused.
    """

    result: RateLimitResult | None
    permit: Permit | None = None

    @property
    def allowed(self) -> bool:
        return self.result is None or self.result.allowed

    def release(self) -> None:
        """Gives the concurrency slot back, if one is held. Again does nothing."""
        if self.permit is not None:
            self.permit.release()

    async def undo(self) -> None:
        """Gives everything back that was charged."""
        permit, self.permit = self.permit, None
        if permit is not None:
            try:
                if not permit.passed_open:
                    await permit.settle(0)
            finally:
                permit.release()


async def admit(limiter_id: str, identifier: object, timeout: float | None) -> Admission:
    """Acquires from the limit that `limiter_id` has for this identifier.

    Raises what `acquire` raises, except for a refusal, which is a result.
    """
    limiter = get_limiter(limiter_id)
    config = limiter.get_config()
    policies = policies_of(config)
    key = safe_key(limiter_id, identifier)
    permit = limiter.acquire_context(timeout, key=key)
    try:
        await permit.__aenter__()
    except AcquireTimeoutError as refusal:
        slots = refusal.reason == "concurrency_full"
        policy = policies[-1] if slots else policies[0]
        limit = (config.max_concurrent or 0) if slots else _units(config)
        wait = refusal.retry_after or 0.0
        return Admission(RateLimitResult(False, limit, 0, wait, limiter_id, policies, policy.name))
    if permit.passed_open:
        return Admission(None, permit)
    try:
        reset = permit.reset_after
        if reset is None and policies[0].window is not None:
            state = await limiter.peek(key)
            reset = state.reset_after
    except BaseException:
        permit.release()
        raise
    limit, name = _units(config), policies[0].name
    remaining = min(permit.remaining, limit)
    return Admission(
        RateLimitResult(True, limit, remaining, reset or 0.0, limiter_id, policies, name), permit
    )


def _units(config: LimiterReadOnlyConfig) -> int:
    """What there is when nothing is used."""
    if config.algorithm != "token_bucket" and config.limit is not None:
        return config.limit
    if config.algorithm == "token_bucket" and config.rate_per_second is not None:
        return config.burst
    return config.max_concurrent or 0


def lets_pass(error: Exception, fail_open: bool) -> bool:
    """Whether a request passes although the limiter failed with `error`.

    With `fail_open` it does, except where the limiter itself was told to refuse during an outage
    (`fail_closed`), and when a bound of this process is full: overload is no reason to stop limiting.
    """
    refused = isinstance(error, RateLimiterAcquisitionError) and getattr(error, "reason", None) == "outage"
    return fail_open and not refused and not isinstance(error, StoreExhaustedError)
