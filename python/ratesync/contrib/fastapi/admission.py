"""One request and its limiters: ask, and say what the store answered. No HTTP in here.

Values come from the permit, from the refusal, or - where a store says neither when all is available again -
from one `peek`. Where nobody decided (the store is out and the policy lets pass), there is no result,
rather than an invented one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ratesync import LimiterReadOnlyConfig, Permit, get_limiter
from ratesync.checks import permit_of, told
from ratesync.contrib.fastapi.headers import RateLimitResult, policies_of
from ratesync.contrib.fastapi.identity import safe_key
from ratesync.errors import AcquireTimeoutError, RateLimiterAcquisitionError, StoreExhaustedError
from ratesync.registry import group_id_for

__all__ = ["Admission", "admit", "admit_all", "lets_pass", "log"]

log = logging.getLogger("ratesync.contrib.fastapi")


@dataclass(slots=True)
class Admission:
    """The outcome for one limiter.

    Attributes:
        result: what the limiter answered; None when nobody decided and the request passes.
        permit: holds the slot until `release()`; None when refused, or when another admission of the request
            has it.
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


class _Ask:
    """One limit that a request needs: that of a limiter for an identifier."""

    def __init__(self, limiter_id: str, identifier: object) -> None:
        self.limiter_id = limiter_id
        self.limiter = get_limiter(limiter_id)
        self.key = safe_key(limiter_id, identifier)
        self._config = self.limiter.get_config()
        self._policies = policies_of(self._config)

    @property
    def group(self) -> str:
        """What stores, and refusals, call it."""
        return group_id_for(self.limiter.group_id, self.key)

    def refused(self, refusal: AcquireTimeoutError) -> Admission:
        slots = refusal.reason == "concurrency_full"
        policy = self._policies[-1] if slots else self._policies[0]
        limit = (self._config.max_concurrent or 0) if slots else _units(self._config)
        wait = refusal.retry_after or 0.0
        return Admission(RateLimitResult(False, limit, 0, wait, self.limiter_id, self._policies, policy.name))

    async def granted(self, decided: bool, remaining: int, reset: float | None) -> RateLimitResult | None:
        """What the permit said; None: nobody decided."""
        if not decided:
            return None
        if reset is None and self._policies[0].window is not None:
            reset = (await self.limiter.peek(self.key)).reset_after
        limit, name = _units(self._config), self._policies[0].name
        remaining = min(remaining, limit)
        return RateLimitResult(True, limit, remaining, reset or 0.0, self.limiter_id, self._policies, name)


async def admit(limiter_id: str, identifier: object, timeout: float | None) -> Admission:
    """Acquires from the limit that `limiter_id` has for this identifier.

    Raises what `acquire` raises, except for a refusal, which is a result.
    """
    (admission,) = await admit_all([(limiter_id, identifier)], timeout)
    return admission


async def admit_all(limits: Sequence[tuple[str, object]], timeout: float | None) -> list[Admission]:
    """Acquires from all of these limits at once, or from none.

    Args:
        limits: limiter ids with an identifier each.

    Returns:
        What each granted, in order; the first one has the permit of all. Or the refusal, alone.

    Raises:
        ConfigValidationError: their store cannot decide these together.
        RateLimiterError: whatever `acquire` raises, except for a refusal.
    """
    asks = [_Ask(*limit) for limit in limits]
    distinct = {ask.group: ask for ask in asks}
    permit = permit_of([(ask.limiter, ask.key) for ask in distinct.values()], timeout)
    try:
        await permit.__aenter__()
    except AcquireTimeoutError as refusal:
        return [distinct.get(refusal.group_id or "", asks[0]).refused(refusal)]
    try:
        results = {
            group: await ask.granted(*part)
            for (group, ask), part in zip(distinct.items(), told(permit), strict=True)
        }
    except BaseException:
        permit.release()
        raise
    return [Admission(results[ask.group], permit if place == 0 else None) for place, ask in enumerate(asks)]


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
