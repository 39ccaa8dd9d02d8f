"""PostgreSQL set up by somebody who means us no good: settings, triggers, locks and roles in our way.

Each test ends with the limits holding, or with an error or an outage that the failure policy answers; never
with a hang, and never at the expense of a group that has nothing to do with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from urllib.parse import urlsplit, urlunsplit

import pytest

import ratesync

SPAWN = multiprocessing.get_context("spawn")
BUDGET = 0.3
# A call may cost its budget, and what a machine adds that stands still meanwhile.
AT_MOST = BUDGET + 8


def configure(url: str, *, store: dict[str, object] | None = None, **limiter: object) -> None:
    ratesync.configure_store("db", "postgres", url=url, auto_create=True, **(store or {}))
    limiter.setdefault("fail_closed", True)
    limiter.setdefault("outage_budget", 20.0)
    ratesync.configure_limiter("api", "db", **limiter)


def database(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


@pytest.fixture
async def role(ratesync_postgres_url, ratesync_asyncpg):
    """A role of its own that owns nothing, and the URL that logs in as it; the tables are there."""
    configure(ratesync_postgres_url, rate_per_second=1.0)
    await ratesync.get_store("db").initialize()
    ratesync.shutdown()
    name = database(ratesync_postgres_url).replace("rs_", "role_")
    await ratesync_asyncpg.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'")
    for table in ("rate_limiter_state", "rate_limiter_state_leases"):
        await ratesync_asyncpg.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {name}")
    parts = urlsplit(ratesync_postgres_url)
    yield name, urlunsplit(parts._replace(netloc=f"{name}:x@{parts.netloc.rpartition('@')[2]}"))
    ratesync.shutdown()
    await ratesync_asyncpg.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def _work(url: str, cache: str, slots: int, tasks: int, rounds: int) -> tuple[int, int]:
    async def main() -> tuple[int, int]:
        import asyncpg

        configure(url, store={"statement_cache": cache}, max_concurrent=slots, outage_budget=30.0)
        ratesync.configure_limiter(
            "budget", "db", rate_per_second=0.0001, burst=37, fail_closed=True, outage_budget=30.0
        )
        most = granted = 0
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:

            async def mark(sql: str) -> int:
                while True:
                    try:
                        return await pool.fetchval(sql)
                    except asyncpg.SerializationError:
                        continue

            async def worker() -> None:
                nonlocal most, granted
                for _ in range(rounds):
                    async with ratesync.acquire("api"):
                        inside = await mark("UPDATE inside SET n = n + 1 RETURNING n")
                        most = max(most, inside)
                        await mark("UPDATE inside SET n = n - 1 RETURNING n")
                    got = await ratesync.try_acquire("budget")
                    granted += got

            await asyncio.gather(*(worker() for _ in range(tasks)))
        return most, granted

    return asyncio.run(main())


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
@pytest.mark.parametrize("cache", ["auto", "off"])  # off: nothing is set on the session
async def test_limits_hold_whatever_isolation_the_database_prescribes(
    ratesync_postgres_url, ratesync_asyncpg, isolation, cache
):
    name = database(ratesync_postgres_url)
    await ratesync_asyncpg.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{isolation}'"
    )
    await ratesync_asyncpg.execute("CREATE TABLE inside (n int); INSERT INTO inside VALUES (0)")
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(4, mp_context=SPAWN) as executor:
        work = [
            loop.run_in_executor(executor, _work, ratesync_postgres_url, cache, 3, 6, 4) for _ in range(4)
        ]
        results = await asyncio.gather(*work)
    assert max(most for most, _ in results) <= 3
    assert sum(granted for _, granted in results) == 37


@pytest.mark.parametrize("what", ["limit", "lock", "state"])
async def test_refusals_for_passing_reasons_are_outlasted(ratesync_postgres_url, ratesync_asyncpg, what):
    """A session writes our row all the time: each attempt waits for it and then finds it changed."""
    name = database(ratesync_postgres_url)
    await ratesync_asyncpg.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'"
    )
    configure(
        ratesync_postgres_url, store={"statement_cache": "off"}, rate_per_second=1e6, outage_budget=30.0
    )
    store = ratesync.get_store("db")
    state = store.state(prefix="t_", timeout=60)

    async def use() -> object:
        match what:
            case "limit":
                return await ratesync.acquire("api")
            case "lock":
                async with store.lock("api", ttl=60) as lease:
                    return lease.token
            case _:
                return await state.increment("api")

    await use()
    table, column = {
        "limit": ("rate_limiter_state", "version"),
        "lock": ("acteon_locks", "token"),
        "state": ("t_state", "version"),
    }[what]
    refused = (await store.stats())["conflicts"] + 14
    async with ratesync_asyncpg.acquire() as session:
        change = f"UPDATE {table} SET {column} = {column}"
        await session.execute(f"BEGIN; {change}")
        asking = asyncio.ensure_future(use())
        while (await store.stats())["conflicts"] < refused and not asking.done():
            await session.execute(f"COMMIT; BEGIN; {change}")
        await session.execute("COMMIT")
    await asking


async def test_a_trigger_that_refuses_one_group_does_not_fail_its_neighbours(
    ratesync_postgres_url, ratesync_asyncpg
):
    configure(ratesync_postgres_url, rate_per_second=1e6, burst=1000)
    ratesync.configure_limiter("slot", "db", max_concurrent=5, outage_budget=20.0)
    await ratesync.get_store("db").initialize()
    await ratesync_asyncpg.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          IF NEW.group_id LIKE '%:bad' THEN RAISE EXCEPTION 'not this one'; END IF;
          RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON rate_limiter_state
        FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    for limiter in ("api", "slot"):
        keys = [*(f"k{i}" for i in range(30)), "bad", *(f"m{i}" for i in range(30))]
        calls = (ratesync.try_acquire(limiter, key=key) for key in keys)
        answers = dict(zip(keys, await asyncio.gather(*calls, return_exceptions=True), strict=True))
        assert "not this one" in str(answers.pop("bad"))
        assert {key: answer for key, answer in answers.items() if answer is not True} == {}


async def test_a_row_locked_by_others_costs_the_budget_and_it_recovers(
    ratesync_postgres_url, ratesync_asyncpg
):
    configure(ratesync_postgres_url, rate_per_second=1e6, burst=1000, fail_closed=False, outage_budget=BUDGET)
    durations: dict[int, float] = {}

    async def call(i: int) -> None:
        start = time.monotonic()
        async with ratesync.acquire("api", key=str(i)):
            durations[i] = time.monotonic() - start

    metrics = ratesync.get_limiter("api").get_metrics()

    async def decided(*numbers: int) -> None:  # not let pass because the machine stood still
        async with asyncio.timeout(60):
            before = -1
            while metrics.passed_open != before:
                before = metrics.passed_open
                await asyncio.gather(*(call(i) for i in numbers))

    await ratesync.get_store("db").initialize()
    await decided(*range(20))
    async with ratesync_asyncpg.acquire() as locker, locker.transaction():
        await locker.execute("SELECT 1 FROM rate_limiter_state WHERE group_id = 'api:7' FOR UPDATE")
        for i in range(20):
            await call(i)
        assert BUDGET * 0.8 < durations[7] < AT_MOST
        # Groups that share its lane wait with it, also no longer than the budget; the others do not.
        assert max(durations.values()) < AT_MOST
        assert min(durations.values()) < BUDGET / 2
    await decided(7)


async def test_a_row_that_stays_locked_does_not_collect_backends(ratesync_postgres_url, ratesync_asyncpg):
    if await ratesync_asyncpg.fetchval("SELECT current_setting('server_version_num')::int") < 140000:
        pytest.skip("needs client_connection_check_interval, PostgreSQL 14")
    configure(
        ratesync_postgres_url,
        store={"command_timeout": 0.4},
        rate_per_second=1e6,
        burst=1000,
        fail_closed=False,
        outage_budget=0.05,
    )
    await ratesync.get_store("db").initialize()
    await ratesync.acquire("api")
    waiting = """
        SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
    """
    async with ratesync_asyncpg.acquire() as locker, locker.transaction():
        await locker.execute("SELECT 1 FROM rate_limiter_state FOR UPDATE")
        begin = time.monotonic()
        count = 0
        # Without the check it is 10 by then, 23 after ten seconds, and so on, and never less.
        async with asyncio.timeout(60):
            while time.monotonic() < begin + 4 or count > 8:
                await ratesync.acquire("api")
                count = await ratesync_asyncpg.fetchval(waiting)
                await asyncio.sleep(0.05)
    assert await ratesync.try_acquire("api")


@pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout"])
async def test_a_timeout_of_the_role_is_an_outage(role, ratesync_asyncpg, setting):
    name, url = role
    await ratesync_asyncpg.execute(f"ALTER ROLE {name} SET {setting} = '100ms'")
    configure(url, rate_per_second=1e6, burst=10, outage_budget=3.0)
    ratesync.configure_limiter("open", "db", rate_per_second=1e6, burst=10, outage_budget=3.0)
    metrics = ratesync.get_limiter("open").get_metrics()

    async def decided() -> None:  # a machine that stands still is an outage, too
        async with asyncio.timeout(60):
            while True:
                passed = metrics.passed_open
                with contextlib.suppress(ratesync.RateLimiterAcquisitionError):
                    await ratesync.acquire("api")
                    await ratesync.acquire("open")
                    if metrics.passed_open == passed:
                        return

    await decided()
    async with ratesync_asyncpg.acquire() as locker, locker.transaction():
        await locker.execute("SELECT 1 FROM rate_limiter_state FOR UPDATE")
        async with asyncio.timeout(60):
            why = ""
            while "timeout" not in why:
                with pytest.raises(ratesync.RateLimiterAcquisitionError) as caught:
                    await ratesync.acquire("api")
                why = str(caught.value)
        passed = metrics.passed_open
        await ratesync.acquire("open")
        assert metrics.passed_open == passed + 1
    await decided()


async def test_idle_sessions_that_the_server_ends_are_replaced(role, ratesync_asyncpg):
    name, url = role
    version = await ratesync_asyncpg.fetchval("SELECT current_setting('server_version_num')::int")
    for setting in ("idle_in_transaction_session_timeout", *(["idle_session_timeout"] * (version >= 140000))):
        await ratesync_asyncpg.execute(f"ALTER ROLE {name} SET {setting} = '500ms'")
    configure(url, rate_per_second=1e6, burst=10, outage_budget=30.0)
    for _ in range(4):
        await asyncio.gather(*(ratesync.acquire("api", key=str(i)) for i in range(5)))
        await asyncio.sleep(1.2)


async def test_one_connection_is_enough(role, ratesync_asyncpg):
    name, url = role
    await ratesync_asyncpg.execute(f"ALTER ROLE {name} CONNECTION LIMIT 1")
    configure(url, max_concurrent=3, rate_per_second=1e6, burst=1000, outage_budget=30.0, lease_seconds=12.0)
    ratesync.configure_limiter(
        "rate", "db", rate_per_second=1e6, burst=1000, fail_closed=True, outage_budget=30.0
    )

    async def work(i: int) -> None:
        async with ratesync.acquire("api", timeout=60):
            await ratesync.acquire("rate", key=str(i))
            await asyncio.sleep(0.01)

    async with ratesync.acquire("api") as permit:
        ends = "SELECT max(expires_at) FROM rate_limiter_state_leases"
        begun = await ratesync_asyncpg.fetchval(ends)
        await asyncio.gather(*(work(i) for i in range(60)))
        async with asyncio.timeout(60):
            while await ratesync_asyncpg.fetchval(ends) <= begun:  # until it is renewed
                await asyncio.sleep(0.05)
        assert not permit.lost


async def test_a_full_server_is_an_outage_that_ends(role, ratesync_asyncpg):
    import asyncpg

    name, url = role
    await ratesync_asyncpg.execute(f"ALTER ROLE {name} CONNECTION LIMIT 3")
    others = [await asyncpg.connect(url) for _ in range(3)]
    configure(url, rate_per_second=1e6, burst=10, outage_budget=2.0)
    async with asyncio.timeout(60):
        why = ""
        while "53300" not in why:  # a machine that stands still says nothing
            start = time.monotonic()
            with pytest.raises(ratesync.RateLimiterAcquisitionError) as caught:
                await ratesync.acquire("api")
            assert time.monotonic() - start < 2.0 + AT_MOST
            why = str(caught.value)
    for other in others:
        await other.close()
    async with asyncio.timeout(60):
        while True:
            try:
                await ratesync.acquire("api")
                break
            except ratesync.RateLimiterAcquisitionError:
                await asyncio.sleep(0.05)


async def test_a_read_only_database_is_an_outage_that_says_so(role, ratesync_asyncpg):
    name, url = role
    await ratesync_asyncpg.execute(f"ALTER ROLE {name} SET default_transaction_read_only = on")
    configure(url, rate_per_second=1e6, burst=10, outage_budget=2.0)
    async with asyncio.timeout(60):
        why = ""
        while "read-only" not in why:  # a machine that stands still says nothing
            with pytest.raises(ratesync.RateLimiterAcquisitionError) as caught:
                await ratesync.acquire("api")
            why = str(caught.value)


async def test_a_hostile_search_path_changes_nothing(role, ratesync_asyncpg):
    name, url = role
    await ratesync_asyncpg.execute(
        """
        CREATE SCHEMA evil;
        CREATE TABLE evil.rate_limiter_state (group_id text);
        CREATE FUNCTION evil.date_part(text, interval) RETURNS float8 LANGUAGE sql AS $$ SELECT 0::float8 $$;
        CREATE FUNCTION evil.floor(float8) RETURNS float8 LANGUAGE sql AS $$ SELECT 1e6::float8 $$;
        GRANT USAGE ON SCHEMA evil TO PUBLIC;
        """
    )
    for path in ("evil", "''"):
        await ratesync_asyncpg.execute(f"ALTER ROLE {name} SET search_path = {path}")
        configure(url, rate_per_second=0.0001, burst=3, max_concurrent=2)
        ratesync.configure_limiter(
            "rate", "db", rate_per_second=0.0001, burst=3, fail_closed=True, outage_budget=20.0
        )
        granted = [await ratesync.try_acquire("rate", key=path) for _ in range(5)]
        assert sum(granted) == 3, path
        ratesync.shutdown()


async def test_limits_go_on_while_the_table_is_rewritten(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url, rate_per_second=0.0001, burst=60, outage_budget=20.0)
    ratesync.configure_limiter("slot", "db", max_concurrent=2, fail_closed=True, outage_budget=20.0)
    await ratesync.get_store("db").initialize()
    done = False
    granted = inside = most = 0

    async def load(i: int) -> None:
        nonlocal granted, inside, most
        while not done:
            got = await ratesync.try_acquire("api")
            granted += got
            async with ratesync.acquire("slot"):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

    tasks = [asyncio.create_task(load(i)) for i in range(8)]
    for round_number in range(5):
        for table in ("rate_limiter_state", "rate_limiter_state_leases"):
            await ratesync_asyncpg.execute(f"VACUUM FULL {table}")
            await ratesync_asyncpg.execute(
                f"ALTER TABLE {table} ADD COLUMN extra{round_number} text DEFAULT 'x'"
            )
            await ratesync_asyncpg.execute(f"ALTER TABLE {table} DROP COLUMN extra{round_number}")
            await ratesync_asyncpg.execute(f"ANALYZE {table}")
    done = True
    await asyncio.gather(*tasks)
    while await ratesync.try_acquire("api"):
        granted += 1
    assert granted == 60
    assert most <= 2


NAMES = [
    "'; DROP TABLE rate_limiter_state; --",
    '"quoted" \\ back\\slash {0} {1} @last@ $1 %s %',
    '{},NULL,{"a"}',
    "NULL",
    "tab\t newline\n return\r bell\x07 delete\x7f",
    "e\u0301 \u00e9 \u212b \u00c5",
    "\u202eright to left \u200b\u200d\ufeff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ue000 \ufffe",
    "\u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    " leading and trailing ",
    "\U0001f600" * 240,
]


async def test_names_of_every_kind_are_groups_of_their_own(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url, rate_per_second=0.0001, burst=2)
    ratesync.configure_limiter("slot", "db", max_concurrent=1, outage_budget=20.0)
    for limiter, expected in (("api", 2), ("slot", 1)):
        calls = [ratesync.acquire(limiter, key=name, timeout=0) for name in NAMES for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, ratesync.AcquireTimeoutError)]
        assert len(refused) == (3 - expected) * len(NAMES), answers
        stored = await ratesync_asyncpg.fetch(
            "SELECT group_id FROM rate_limiter_state WHERE starts_with(group_id, $1)", f"{limiter}:"
        )
        escaped = [name.replace("\\", "\\\\").replace(":", "\\:") for name in NAMES]
        assert {row["group_id"] for row in stored} == {f"{limiter}:{name}" for name in escaped}
        for answer in answers:
            if not isinstance(answer, Exception):
                answer.release()


async def test_ten_thousand_waiting_tasks_are_cancelled_at_once(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url, max_concurrent=1)

    async def wait() -> None:
        async with ratesync.acquire("api"):
            raise AssertionError("nobody gives the slot back")

    async with ratesync.acquire("api"):
        tasks = [asyncio.create_task(wait()) for _ in range(10_000)]
        await asyncio.sleep(0.5)
        start = time.monotonic()
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert time.monotonic() - start < 20
        assert {type(outcome) for outcome in done} == {asyncio.CancelledError}
        assert await ratesync_asyncpg.fetchval("SELECT sum(slots) FROM rate_limiter_state_leases") == 1
    assert await ratesync.try_acquire("api", timeout=60)


async def test_fifty_threads_share_slots_and_a_budget(ratesync_postgres_url, ratesync_asyncpg):
    configure(ratesync_postgres_url, max_concurrent=4)
    ratesync.configure_limiter(
        "budget", "db", rate_per_second=0.0001, burst=33, fail_closed=True, outage_budget=20.0
    )
    inside = [0]
    most = [0]
    lock = threading.Lock()

    def work() -> int:
        with ratesync.acquire("api", timeout=120):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            with lock:
                inside[0] -= 1
        return int(ratesync.try_acquire("budget").wait())

    def run() -> int:
        with ThreadPoolExecutor(50) as executor:
            return sum(executor.map(lambda _: work(), range(200)))

    assert await asyncio.to_thread(run) == 33
    assert most[0] <= 4
    async with contextlib.AsyncExitStack() as held:  # and all four were given back
        for _ in range(4):
            await held.enter_async_context(ratesync.acquire("api", timeout=60))
