"""What a permit and the counters tell after a decision: the store's answer, on every store."""

from __future__ import annotations

import asyncio

import pytest

import ratesync

pytestmark = pytest.mark.usefixtures("ratesync_registry")


@pytest.fixture(params=["memory", "postgres", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        ratesync.configure_store("s", "memory")
    elif request.param == "redis":
        ratesync.configure_store("s", "redis", url=request.getfixturevalue("ratesync_redis_url"))
    else:
        url = request.getfixturevalue("ratesync_postgres_url")
        ratesync.configure_store("s", "postgres", url=url, auto_create=True)
    return "s"


@pytest.mark.parametrize("key", [None, "tenant"])
async def test_a_permit_says_what_is_left_and_when_all_is_back(store: str, key: str | None) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=0.1, burst=10, timeout=0)
    async with ratesync.acquire("api", cost=4, key=key) as permit:
        assert permit.remaining == 6
        assert permit.reset_after is not None
        assert 38 < permit.reset_after <= 40
        assert permit.passed_open is False


async def test_a_limit_without_a_rate_has_no_moment_of_reset(store: str) -> None:
    ratesync.configure_limiter("slots", store, max_concurrent=3, timeout=0)
    async with ratesync.acquire("slots") as permit:
        assert permit.remaining == 2
        assert permit.reset_after is None


async def test_where_both_are_limited_a_permit_counts_units_and_the_state_what_can_be_had(store: str) -> None:
    """A client is told of units that it may still use, not of the slots of this moment."""
    ratesync.configure_limiter("both", store, rate_per_second=0.001, burst=10, max_concurrent=2, timeout=0)
    async with ratesync.acquire("both") as permit:
        assert permit.remaining == 9
        assert (await ratesync.get_limiter("both").get_state()).remaining == 1
    checked = await ratesync.check_limiter("both")
    assert (checked.limit, checked.remaining) == (10, 8)


async def test_after_a_wait_the_reset_is_counted_from_the_grant(store: str) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=10.0, burst=1)
    await ratesync.acquire("api")
    async with asyncio.timeout(60):
        # Who comes a tenth of a second later does not wait.
        while (permit := await ratesync.acquire("api")).waited == 0:
            pass
    assert permit.remaining == 0
    assert permit.reset_after is not None
    assert 0 <= permit.reset_after <= 0.11


async def test_a_permit_of_a_dead_store_says_that_nobody_decided() -> None:
    ratesync.configure_store("dead", "postgres", url="postgresql://nobody@127.0.0.1:1/none")
    ratesync.configure_limiter("open", "dead", rate_per_second=1.0)
    async with ratesync.acquire("open") as permit:
        assert permit.passed_open is True
        assert permit.reset_after is None


async def test_the_histogram_of_waits_counts_every_grant_once(store: str) -> None:
    ratesync.configure_limiter("api", store, rate_per_second=1.0, burst=2)
    limiter = ratesync.get_limiter("api")
    await limiter.initialize()
    await asyncio.gather(*(limiter.acquire() for _ in range(4)))
    granted = 4
    while await limiter.try_acquire():  # this process stood still meanwhile
        granted += 1
    seen = limiter.get_metrics().snapshot()
    assert len(seen["wait_counts"]) == len(seen["wait_bounds"]) + 1
    assert sum(seen["wait_counts"]) == seen["total_acquisitions"] == granted
    slow = sum(seen["wait_counts"][3:])  # more than 10 ms: the third and the fourth grant
    assert slow >= 2
    assert (seen["refused_rate"], seen["timeouts"], seen["failed"]) == (1, 1, 0)
    assert list(seen["wait_bounds"]) == sorted(seen["wait_bounds"])


async def test_a_lost_race_is_counted_at_the_limiter_that_lost_it(
    ratesync_postgres_url: str, ratesync_asyncpg
) -> None:
    # A statement given up because it waited for the rival, and repeated, would be another race.
    patient = {"auto_create": True, "command_timeout": 60.0}
    ratesync.configure_store("s", "postgres", url=ratesync_postgres_url, **patient)
    ratesync.configure_limiter("api", "s", rate_per_second=100.0, outage_budget=60.0)
    ratesync.configure_limiter("other", "s", rate_per_second=100.0, outage_budget=60.0)
    await ratesync.initialize_limiter("api")
    await ratesync.acquire("other")
    async with ratesync_asyncpg.acquire() as rival:
        transaction = rival.transaction()
        await transaction.start()
        await rival.execute(
            "INSERT INTO rate_limiter_state (group_id, last_acquisition_at) VALUES ('api', now())"
        )
        ours = asyncio.ensure_future(asyncio.wait_for(_acquire("api"), 60))
        while not await ratesync_asyncpg.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            assert not ours.done()
            await asyncio.sleep(0.01)
        await transaction.commit()
        await ours
    assert ratesync.get_limiter("api").get_metrics().cas_failures == 1
    assert ratesync.get_limiter("other").get_metrics().cas_failures == 0


async def _acquire(limiter_id: str) -> None:
    await ratesync.acquire(limiter_id)


async def test_a_clone_for_one_identifier_names_its_base() -> None:
    ratesync.configure_limiter("api", rate_per_second=1.0)
    clone = await ratesync.get_or_clone_limiter("api", "tenant")
    listed = ratesync.list_limiters()
    assert listed["api"]["base"] is None
    assert listed[clone.group_id]["base"] == "api"
    ratesync.configure_limiter(clone.group_id, rate_per_second=2.0)
    assert ratesync.list_limiters()[clone.group_id]["base"] is None
