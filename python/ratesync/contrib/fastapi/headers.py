"""What a limiter answered, and how it is told in HTTP headers.

Two forms. `legacy`: X-RateLimit-Limit, -Remaining and -Reset (epoch seconds), as many clients expect.
`ietf`: RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers, lists of structured
fields (RFC 9651), to which each limiter of a request adds its own item. Both say Retry-After when refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ratesync.errors import ConfigValidationError

if TYPE_CHECKING:
    from starlette.datastructures import MutableHeaders

    from ratesync import LimiterReadOnlyConfig

__all__ = [
    "HeaderStyle",
    "Policy",
    "RateLimitResult",
    "check_style",
    "get_rate_limit_headers",
    "merge_rate_limit_headers",
    "policies_of",
    "set_rate_limit_headers",
]

HeaderStyle = Literal["legacy", "ietf", "both"]
LIMIT, REMAINING, RESET = "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"
POLICY, STATE, RETRY_AFTER = "RateLimit-Policy", "RateLimit", "Retry-After"

_SF_INTEGER_MAX = 999_999_999_999_999


@dataclass(frozen=True, slots=True)
class Policy:
    """One quota of a limiter: `quota` units per `window` seconds, or at the same time where it is None."""

    name: str
    quota: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class RateLimitResult:
    """The answer of one limiter to one request.

    Attributes:
        allowed: whether the request may go on.
        limit: units that there are when none is used: the burst, or those of a window; slots, where it is
            about concurrency.
        remaining: units (or slots) left.
        reset_in: seconds until all is available again; for a refused request, until it may be tried
            again. 0 where nobody can know, as with slots that others hold.
        limiter_id: the limiter.
        policies: its quotas, for `RateLimit-Policy`; the first one that `policy` names has the state.
        policy: name of the quota that `limit` and `remaining` are about.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_in: float
    limiter_id: str | None = None
    policies: tuple[Policy, ...] = ()
    policy: str | None = None

    @property
    def reset_at(self) -> int:
        """The epoch second, rounded up, at which `reset_in` is over; counted from now at each access."""
        return math.ceil(time.time() + self.reset_in)

    @property
    def retry_after(self) -> int:
        """`reset_in` in whole seconds, rounded up, at least 1."""
        return max(1, math.ceil(self.reset_in))


def policies_of(config: LimiterReadOnlyConfig) -> tuple[Policy, ...]:
    """The quotas of a limiter, that of its rate first.

    A token bucket of `burst` units at `rate_per_second` is `burst` per the time of refilling it, or the
    rate per second where that is more than the burst. Windows are rounded up to whole seconds, so what is
    announced is never more than what is granted.
    """
    found = []
    if config.algorithm != "token_bucket" and config.limit is not None and config.window_seconds is not None:
        found.append(Policy(config.id, config.limit, max(1, math.ceil(config.window_seconds))))
    elif config.algorithm == "token_bucket" and config.rate_per_second is not None:
        if config.burst >= config.rate_per_second:
            window = max(1, math.ceil(config.burst / config.rate_per_second - 1e-9))
            found.append(Policy(config.id, config.burst, window))
        else:
            found.append(Policy(config.id, int(config.rate_per_second), 1))
    if config.max_concurrent is not None:
        name = f"{config.id}:concurrent" if found else config.id
        found.append(Policy(name, config.max_concurrent))
    return tuple(found)


def check_style(style: str) -> HeaderStyle:
    """`style`, when it is one; ConfigValidationError otherwise."""
    if style not in ("legacy", "ietf", "both"):
        raise ConfigValidationError(
            "headers is not valid", "headers", "'legacy', 'ietf' or 'both'", repr(style)[:80]
        )
    return style  # type: ignore[return-value]


def get_rate_limit_headers(result: Any, *, headers: HeaderStyle = "legacy") -> dict[str, str]:
    """The headers that tell `result`.

    Args:
        result: a `RateLimitResult`, or anything with its first four fields, `reset_at` and `retry_after`.
        headers: `legacy`, `ietf` or `both`.

    Example:
        >>> result = RateLimitResult(False, 100, 0, 29.5, "api", (Policy("api", 100, 60),), "api")
        >>> get_rate_limit_headers(result, headers="ietf")
        {'RateLimit-Policy': '"api";q=100;w=60', 'RateLimit': '"api";r=0;t=30', 'Retry-After': '30'}
    """
    told: dict[str, str] = {}
    if headers != "ietf":
        told[LIMIT] = str(max(0, int(result.limit)))
        told[REMAINING] = str(max(0, int(result.remaining)))
        told[RESET] = str(int(result.reset_at))
    if headers != "legacy":
        name = getattr(result, "policy", None) or getattr(result, "limiter_id", None) or "default"
        items = [_policy_item(policy) for policy in getattr(result, "policies", ())]
        told[POLICY] = ", ".join(items) or f"{_sf_string(name)};q={_sf_integer(result.limit)}"
        state = f"{_sf_string(name)};r={_sf_integer(result.remaining)}"
        if result.reset_in > 0:
            state += f";t={_sf_integer(math.ceil(result.reset_in))}"
        told[STATE] = state
    if not result.allowed:
        told[RETRY_AFTER] = str(int(result.retry_after))
    return told


def set_rate_limit_headers(response: Any, result: Any, *, headers: HeaderStyle = "legacy") -> None:
    """Sets the headers that tell `result` on a response, replacing those that are there."""
    for name, value in get_rate_limit_headers(result, headers=headers).items():
        response.headers[name] = value


def merge_rate_limit_headers(
    target: MutableHeaders, results: Iterable[RateLimitResult], style: HeaderStyle
) -> None:
    """Adds results to headers that may tell of other limiters already.

    The legacy form has room for one limiter: the one with the least remaining stays. The lists of the
    IETF form grow; Retry-After takes the longest.
    """
    for result in results:
        told = get_rate_limit_headers(result, headers=style)
        present = _number(target.get(REMAINING))
        if REMAINING in told and present is not None and present <= result.remaining:
            for name in (LIMIT, REMAINING, RESET):
                told.pop(name)
        for name in (POLICY, STATE):
            if name in told:
                told[name] = ", ".join([*target.getlist(name), told[name]])
        waiting = _number(target.get(RETRY_AFTER))
        if RETRY_AFTER in told and waiting is not None and waiting >= int(told[RETRY_AFTER]):
            told.pop(RETRY_AFTER)
        for name, value in told.items():
            target[name] = value


def _policy_item(policy: Policy) -> str:
    item = f"{_sf_string(policy.name)};q={_sf_integer(policy.quota)}"
    if policy.window is None:
        return item + ';qu="concurrent-requests"'
    return f"{item};w={_sf_integer(policy.window)}"


def _sf_string(text: str) -> str:
    """A structured field string: ASCII in quotes. Other characters are percent-encoded as UTF-8."""
    written = []
    for char in text:
        if char in '"\\':
            written.append("\\" + char)
        elif " " <= char <= "~":
            written.append(char)
        else:
            written.extend(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
    return f'"{"".join(written)}"'


def _sf_integer(value: float) -> int:
    return max(0, min(_SF_INTEGER_MAX, int(value)))


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
