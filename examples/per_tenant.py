"""A limit for everybody together, one for each tenant, and a higher one for those who pay.

python examples/per_tenant.py
"""

import asyncio

from ratesync import AcquireTimeoutError, acquire, configure_limiter, get_limiter

configure_limiter("global", rate_per_second=1000.0, burst=200)
configure_limiter("free", algorithm="sliding_window", limit=5, window_seconds=60.0)
configure_limiter("paid", algorithm="sliding_window", limit=50, window_seconds=60.0)

PLANS = {"acme": "paid", "initech": "free"}


async def handle(tenant: str) -> str:
    try:
        # The tenant's own limit and the common one, in one step: a refusal by either charges neither.
        async with acquire("global", f"{PLANS[tenant]}:{tenant}", timeout=0) as permit:
            return f"served, {permit.remaining} left"
    except AcquireTimeoutError as error:
        return f"429 {error.group_id}, again in {error.retry_after:.0f} s"


async def main() -> None:
    for tenant in ("initech", "acme"):
        for _ in range(7):
            print(f"{tenant:8} {await handle(tenant)}")
    # What a dashboard shows, without charging anything:
    state = await get_limiter("free").peek(key="initech")
    print(f"initech: {state.current_usage} used, {state.remaining} left")


if __name__ == "__main__":
    asyncio.run(main())
