"""Several limits, one of them on a store that goes away: the policies of all decide, nothing is left held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

import ratesync
from ratesync import RateLimiterAcquisitionError
from ratesync.testing import TcpProxy
from ratesync.testing.limit_contract import eventually

OUTAGES: dict[str, Callable[[TcpProxy], None]] = {
    "silent": lambda proxy: proxy.stall(),
    "refusing": lambda proxy: (proxy.refuse_new(), proxy.cut())[-1],
}


async def configure(url: str, *, fail_closed: bool) -> None:
    ratesync.configure_store("db", "postgres", url=url, auto_create=True, connect_timeout=10.0)
    ratesync.configure_limiter("here", rate_per_second=0.01, burst=50, max_concurrent=3)
    ratesync.configure_limiter(
        "there", "db", max_concurrent=3, fail_closed=fail_closed, outage_budget=0.3, lease_seconds=2.0
    )
    await ratesync.initialize_all_limiters()


async def here_is(remaining: int, in_use: int) -> None:
    async def same() -> bool:
        state = await ratesync.get_limiter("here").peek()
        return (state.remaining, state.in_use) == (remaining, in_use)

    await eventually(same)


async def both_decide() -> None:
    """A call that both stores really decide, and which is the only one that was charged here."""

    async def decided() -> bool:
        await ratesync.get_limiter("here").reset()  # it goes on limiting while the other store is away
        try:
            async with ratesync.acquire("here", "there", timeout=5) as permit:
                return not permit.passed_open
        except RateLimiterAcquisitionError:
            return False

    await eventually(decided, 60)


async def recovers(proxy: TcpProxy) -> None:
    proxy.resume()
    await both_decide()

    async def free() -> bool:
        return (await ratesync.get_limiter("there").peek()).in_use == 0

    await eventually(free, 60)


@pytest.mark.parametrize("outage", list(OUTAGES))
async def test_open_limits_pass_and_the_healthy_store_still_limits(
    ratesync_postgres_url: str, ratesync_proxy: TcpProxy, outage: str
) -> None:
    await configure(ratesync_proxy.through(ratesync_postgres_url), fail_closed=False)
    await both_decide()
    before = ratesync.get_limiter("there").get_metrics().passed_open
    OUTAGES[outage](ratesync_proxy)
    permits = [await asyncio.wait_for(ratesync.acquire("there", "here", timeout=10), 30) for _ in range(3)]
    assert all(permit.passed_open for permit in permits)
    assert not await ratesync.try_acquire("here", "there"), "three are held here, in spite of the outage"
    assert ratesync.get_limiter("there").get_metrics().passed_open == before + 3
    await here_is(0, 3)  # no slot is free
    for permit in permits:
        permit.release()
    await here_is(3, 0)  # slots: of the units 46 are left
    assert await ratesync.try_acquire("here", cost=46)
    await ratesync.get_limiter("here").release()
    await recovers(ratesync_proxy)


@pytest.mark.parametrize("outage", list(OUTAGES))
async def test_one_closed_limit_refuses_and_the_healthy_store_gets_everything_back(
    ratesync_postgres_url: str, ratesync_proxy: TcpProxy, outage: str
) -> None:
    await configure(ratesync_proxy.through(ratesync_postgres_url), fail_closed=True)
    await both_decide()
    OUTAGES[outage](ratesync_proxy)
    for _ in range(5):
        with pytest.raises(RateLimiterAcquisitionError) as caught:
            await asyncio.wait_for(ratesync.acquire("here", "there", timeout=10), 30)
        assert caught.value.group_id == "there"
        assert caught.value.reason == "outage"
    await here_is(3, 0)
    assert await ratesync.try_acquire("here", cost=49), "only the first call was charged"
    await ratesync.get_limiter("here").release()
    await recovers(ratesync_proxy)


async def test_those_who_wait_when_the_store_goes_are_all_answered(
    ratesync_postgres_url: str, ratesync_proxy: TcpProxy
) -> None:
    await configure(ratesync_proxy.through(ratesync_postgres_url), fail_closed=True)
    ratesync.configure_limiter("here", max_concurrent=1000)
    await both_decide()
    permits: list[ratesync.Permit] = []

    async def three_are_held() -> bool:
        with contextlib.suppress(RateLimiterAcquisitionError):  # where the machine stood still for 0.3 s
            permits.append(await ratesync.acquire("here", "there", timeout=10))
        return len(permits) == 3

    await eventually(three_are_held)
    tasks = [asyncio.ensure_future(ratesync.try_acquire("there", "here", timeout=None)) for _ in range(50)]
    await asyncio.sleep(0.1)
    ratesync_proxy.stall()
    for permit in permits:
        permit.release()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    # What was under way may have been decided just before.
    assert sum(isinstance(result, RateLimiterAcquisitionError) for result in results) >= 47
    for _ in range(sum(result is True for result in results)):
        await ratesync.get_limiter("here").release()
        await ratesync.get_limiter("there").release()
    await recovers(ratesync_proxy)
