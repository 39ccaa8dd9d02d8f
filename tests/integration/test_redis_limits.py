"""Limits on Redis, with redis-py as the independent witness of what is really stored."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

import ratesync
from ratesync import ConfigValidationError, RateLimiterAcquisitionError, RateLimiterError

pytest.importorskip("redis")

SLOW = 0.01  # units per second
SOON = 60_000  # ms that a few operations take at most, on a machine that stands still now and then
HOSTILE = [
    "plain",
    "a:b",
    "with space",
    "}{",
    "{tag}",
    "}:t",
    "%7B",
    "%",
    "a}b{c",
    "*?[a-z]\\",
    "new\nline\r\n$3\r\nfoo",
    "ünïcode 日本 🦜",
    "w",
    "x" * 200,
]


def configure(url: str, **options: object) -> None:
    ratesync.configure_store("db", strategy="redis", url=url, **options)


def limit(name: str, **options: Any) -> ratesync.RateLimiter:
    ratesync.configure_limiter(name, "db", fail_closed=True, outage_budget=30, **options)
    return ratesync.get_limiter(name)


def as_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}"))


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.01)


async def contents(client: Any) -> dict[str, Any]:
    """Every key with what it holds."""
    found = {}
    async for key in client.scan_iter():
        found[key] = await _value(client, key)
    return found


async def _value(client: Any, key: str) -> Any:
    kind = await client.type(key)
    if kind == "string":
        return await client.get(key)
    if kind == "hash":
        return await client.hgetall(key)
    return await client.zrange(key, 0, -1, withscores=True)


async def server_us(client: Any) -> int:
    seconds, micros = await client.time()
    return seconds * 1_000_000 + micros


# What is stored -----------------------------------------------------------------------------------------


async def test_a_token_bucket_is_one_string_with_the_servers_time(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url, timing_margin_ms=0)
    limiter = limit("api", rate_per_second=0.005, burst=3)
    before = await server_us(ratesync_redis_py)
    await limiter.acquire()
    after = await server_us(ratesync_redis_py)
    assert await ratesync_redis_py.keys() == ["rate_limit:{api}:t"]
    tat = int(await ratesync_redis_py.get("rate_limit:{api}:t"))
    assert before + 200_000_000 <= tat <= after + 200_000_000
    assert 200_000 - SOON < await ratesync_redis_py.pttl("rate_limit:{api}:t") <= 201_000
    assert await limiter.try_acquire(cost=2)
    assert int(await ratesync_redis_py.get("rate_limit:{api}:t")) == tat + 400_000_000


async def test_slots_are_a_lease_with_an_absolute_count(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("pool", max_concurrent=3, lease_seconds=200)
    async with limiter, limiter:
        ((_, lease),) = (await ratesync_redis_py.hgetall("rate_limit:{pool}:s")).items()
        slots, expires, since, who = lease.split(" ", 3)
        now = await server_us(ratesync_redis_py)
        assert slots == "2"
        assert 200_000 - SOON < (int(expires) - now) / 1000 <= 200_000
        assert 0 <= (now - int(since)) / 1000 < SOON
        assert who.endswith(" ratesync")
        assert 200_000 - SOON < await ratesync_redis_py.pttl("rate_limit:{pool}:s") <= 201_000

    async def nothing_left() -> bool:
        return not await ratesync_redis_py.keys()

    await eventually(nothing_left)


async def test_a_refusal_writes_nothing(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    rate = limit("rate", rate_per_second=SLOW, burst=2)
    slots = limit("slots", max_concurrent=1, lease_seconds=600)  # not renewed meanwhile
    both = limit("both", rate_per_second=SLOW, max_concurrent=5, lease_seconds=600)
    assert await rate.try_acquire(cost=2)
    assert await both.try_acquire()
    async with slots:
        stored = await contents(ratesync_redis_py)
        times = {key: await ratesync_redis_py.pexpiretime(key) for key in stored}
        for limiter in (rate, slots, both):
            for _ in range(3):
                assert not await limiter.try_acquire()
        assert not await rate.try_acquire(timeout=50)
        with pytest.raises(RateLimiterAcquisitionError):
            async with ratesync.acquire("rate", "both", "slots", 0):
                pytest.fail("refused")
        assert (await rate.peek()).remaining == 0
        assert await contents(ratesync_redis_py) == stored
        assert {key: await ratesync_redis_py.pexpiretime(key) for key in stored} == times


async def test_no_key_is_left_without_time_to_live(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    waited = limit("waited", rate_per_second=SLOW, burst=1)
    task = [asyncio.ensure_future(waited.acquire()) for _ in range(20)]  # up to 1900 s ahead
    limiter = limit("both", rate_per_second=SLOW, burst=9, max_concurrent=2, lease_seconds=1000)

    async def dealt() -> bool:
        return await ratesync_redis_py.pttl("rate_limit:{waited}:t") > 2_000_000 - SOON

    async with limiter.acquire_context(cost=3) as permit:
        await permit.settle(1)
        await eventually(dealt)
        for key in await ratesync_redis_py.keys():
            assert await ratesync_redis_py.pttl(key) > 0, key
        assert await ratesync_redis_py.pttl("rate_limit:{both}:s") > 1_000_000 - SOON
        assert await ratesync_redis_py.pttl("rate_limit:{both}:t") > 100_000 - SOON
    for one in task:
        one.cancel()
    await asyncio.gather(*task, return_exceptions=True)


async def test_names_that_look_like_keys_stay_apart(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("base", rate_per_second=SLOW, max_concurrent=1)
    for key in HOSTILE:
        assert await limiter.try_acquire(key=key), key
    for key in HOSTILE:
        assert not await limiter.try_acquire(key=key), key
        assert (await limiter.peek(key)).in_use == 1
    keys = await ratesync_redis_py.keys()
    assert len(keys) == 2 * len(HOSTILE)
    for key in keys:
        # One pair of braces: the hash tag of Redis is the whole name.
        assert key.startswith("rate_limit:{base:")
        assert key.count("{") == key.count("}") == 1
        assert key[-3:] in ("}:t", "}:s")
    listed = {group["group"] for group in (await ratesync.get_store("db").list(100))["groups"]}
    assert len(listed) == len(HOSTILE)
    assert {name for name in listed if name.startswith("base:")} == listed


async def test_the_hash_tag_option_keeps_all_keys_in_one_slot(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url, key_prefix="p", hash_tag="one")
    limiter = limit("base", rate_per_second=SLOW, max_concurrent=1)
    for key in HOSTILE:
        assert await limiter.try_acquire(key=key)
        assert not await limiter.try_acquire(key=key)
    keys = await ratesync_redis_py.keys()
    assert len(keys) == 2 * len(HOSTILE)
    assert all(key.startswith("p:{one}:base:") for key in keys)


async def test_prefixes_keep_stores_apart(ratesync_redis_url):
    for prefix in ("a", "b"):
        ratesync.configure_store(prefix, "redis", url=ratesync_redis_url, key_prefix=prefix)
        ratesync.configure_limiter(f"in-{prefix}", prefix, rate_per_second=SLOW, fail_closed=True)
    assert await ratesync.try_acquire("in-a")
    assert await ratesync.get_limiter("in-b").try_acquire()
    listings = [(await ratesync.get_store(prefix).list(10))["groups"] for prefix in ("a", "b")]
    assert [[group["group"] for group in listing] for listing in listings] == [["in-a"], ["in-b"]]


@pytest.mark.parametrize(
    "options",
    [
        {"key_prefix": "a{b}"},
        {"key_prefix": ""},
        {"hash_tag": "{x}"},
        {"hash_tag": ""},
        {"db": -1},
        {"socket_timeout": 0},
        {"pool_max_size": 0},
        {"url": "http://h"},
        {"table_name": "t"},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    def use() -> None:
        ratesync.configure_store("db", "redis", **{"url": "redis://127.0.0.1", **options})
        ratesync.get_store("db").initialize().wait()

    with pytest.raises(ConfigValidationError):
        use()


async def test_the_password_is_shown_nowhere(ratesync_redis_url):
    ratesync.configure_store(
        "a", "redis", url="redis://u:topsecret@127.0.0.1:1/0", socket_connect_timeout=0.5
    )
    ratesync.configure_store("b", "redis", url="redis://127.0.0.1:1", password="topsecret")
    assert "topsecret" not in repr(ratesync.list_stores())
    for store in ("a", "b"):
        with pytest.raises(RateLimiterError) as caught:
            await ratesync.get_store(store).initialize()
        assert "topsecret" not in str(caught.value)
        assert "topsecret" not in repr(await ratesync.get_store(store).doctor())


# Memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"rate_per_second": SLOW, "burst": 5}, 130),
        ({"max_concurrent": 5}, 230),
    ],
)
async def test_a_limit_takes_few_bytes(ratesync_redis_url, ratesync_redis_py, options, most):
    configure(ratesync_redis_url)
    limiter = limit("l", **options)
    assert await limiter.try_acquire(key="0123456789abc")
    (key,) = await ratesync_redis_py.keys()
    assert await ratesync_redis_py.memory_usage(key) <= most


async def test_keys_that_went_quiet_are_forgotten(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("l", rate_per_second=1000.0)
    await asyncio.gather(*(limiter.try_acquire(key=f"k{i}") for i in range(300)))

    async def forgotten() -> bool:
        return await ratesync_redis_py.dbsize() == 0

    await eventually(forgotten)


# Batching -----------------------------------------------------------------------------------------------


async def test_waiting_requests_of_one_limit_become_few_calls(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("hot", rate_per_second=1e6, burst=100_000)
    await limiter.acquire()
    before = (await ratesync_redis_py.info("commandstats"))["cmdstat_evalsha"]["calls"]
    await asyncio.gather(*(limiter.acquire() for _ in range(5000)))
    calls = (await ratesync_redis_py.info("commandstats"))["cmdstat_evalsha"]["calls"] - before
    assert calls <= 1_500


async def test_many_keys_share_calls(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("many", rate_per_second=SLOW)
    await limiter.acquire()
    before = (await ratesync_redis_py.info("commandstats"))["cmdstat_evalsha"]["calls"]
    granted = await asyncio.gather(*(limiter.try_acquire(key=f"k{i % 1000}") for i in range(2000)))
    calls = (await ratesync_redis_py.info("commandstats"))["cmdstat_evalsha"]["calls"] - before
    assert sum(granted) == 1000
    assert calls <= 400
    assert await ratesync_redis_py.dbsize() == 1001


async def test_requests_of_different_cost_and_patience_are_dealt_in_order(ratesync_redis_url):
    configure(ratesync_redis_url, timing_margin_ms=0)
    limiter = limit("mixed", rate_per_second=SLOW, burst=10)
    results = await asyncio.gather(
        limiter.try_acquire(cost=4),
        limiter.try_acquire(cost=5),
        limiter.try_acquire(cost=4, timeout=50),  # would have to wait 300 s
        limiter.try_acquire(cost=1),
        limiter.try_acquire(cost=1),
    )
    assert results == [True, True, False, True, False]


# One bad key --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"rate_per_second": SLOW}, {"rate_per_second": SLOW, "max_concurrent": 2}]
)
async def test_a_key_of_somebody_else_fails_its_limit_alone(ratesync_redis_url, ratesync_redis_py, options):
    configure(ratesync_redis_url)
    limiter = limit("l", **options)
    await limiter.acquire()
    await ratesync_redis_py.rpush("rate_limit:{l:k7}:t", "not", "ours")
    await ratesync_redis_py.set("rate_limit:{l:k9}:t", "no number")
    results = await asyncio.gather(
        *(limiter.try_acquire(key=f"k{i}") for i in range(40)), return_exceptions=True
    )
    failed = {i for i, result in enumerate(results) if isinstance(result, BaseException)}
    assert failed == {7, 9}
    assert "WRONGTYPE" in str(results[7])
    assert all(result is True for i, result in enumerate(results) if i not in failed)
    # Charged once, although the call was sent again.
    assert not any([await limiter.try_acquire(key=f"k{i}") for i in range(40) if i not in failed])
    assert await ratesync_redis_py.lrange("rate_limit:{l:k7}:t", 0, -1) == ["not", "ours"]


# The server ---------------------------------------------------------------------------------------------


async def test_forgotten_scripts_are_loaded_again(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("l", rate_per_second=SLOW, burst=1000, max_concurrent=1000)
    for _ in range(5):
        await ratesync_redis_py.script_flush()
        assert all(await asyncio.gather(*(limiter.try_acquire() for _ in range(20))))
    assert (await limiter.peek()).in_use == 100
    assert (await limiter.peek()).remaining == 900


ACL = ["~rate_limit:*", "&rate_limit:*"]
_COMMANDS = """
    ping hello info role client|setname select evalsha script|load get set del pexpire pttl hgetall hkeys hget
    hset hdel zadd zrange zrangebyscore zrevrangebyscore zrem zremrangebyscore time publish subscribe scan
"""
COMMANDS = _COMMANDS.split()


async def acl_user(client: Any, name: str, commands: list[str]) -> None:
    await client.execute_command(
        "ACL", "SETUSER", name, "reset", "on", ">secret", *ACL, *(f"+{command}" for command in commands)
    )


async def test_a_user_with_just_the_needed_rights(ratesync_redis_url, ratesync_redis_py):
    await acl_user(ratesync_redis_py, "worker", COMMANDS)
    configure(as_user(ratesync_redis_url, "worker", "secret"))
    limiter = limit("l", rate_per_second=1000.0, burst=10, max_concurrent=1)
    async with limiter:
        waiter = asyncio.ensure_future(limiter.acquire())
        await asyncio.sleep(0.05)
        assert not waiter.done()
    await waiter
    findings = await ratesync.get_store("db").doctor()
    assert [finding for finding in findings if finding["level"] != "ok"] == []
    await limiter.reset()


async def test_doctor_names_the_rights_that_are_missing(ratesync_redis_url, ratesync_redis_py):
    missing = {"zadd", "publish", "pttl", "hset"}
    await acl_user(ratesync_redis_py, "poor", [c for c in COMMANDS if c not in missing])
    configure(as_user(ratesync_redis_url, "poor", "secret"))
    limiter = limit("l", max_concurrent=1)
    with pytest.raises(RateLimiterError, match="ACL SETUSER poor"):
        await limiter.acquire()
    (finding,) = [
        finding for finding in await ratesync.get_store("db").doctor() if finding["level"] == "error"
    ]
    assert finding["subject"] == "rights"
    for command in missing:
        assert command.upper() in finding["message"]
        assert f"+{command}" in finding["message"]
    assert "+get" not in finding["message"]


@pytest.mark.parametrize(
    ("policy", "lost", "kept"),
    [("allkeys-lru", "keys of state", "refused"), ("volatile-ttl", "limits and locks", "keys of state")],
)
async def test_doctor_warns_of_a_server_that_evicts(
    ratesync_redis_url, ratesync_redis_py, policy, lost, kept
):
    configure(ratesync_redis_url)
    await ratesync_redis_py.config_set("maxmemory", "500mb")
    await ratesync_redis_py.config_set("maxmemory-policy", policy)
    try:
        findings = await ratesync.get_store("db").doctor()
    finally:
        await ratesync_redis_py.config_set("maxmemory", "0")
        await ratesync_redis_py.config_set("maxmemory-policy", "noeviction")
    (warning,) = [finding for finding in findings if finding["level"] == "warning"]
    assert policy in warning["message"]
    assert lost in warning["message"]
    assert kept not in warning["message"]
    assert await ratesync_redis_py.dbsize() == 0


async def test_a_full_server_is_an_outage_with_its_cure(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limiter = limit("l", rate_per_second=SLOW, burst=5)
    await limiter.acquire()
    ratesync.configure_limiter("open", "db", rate_per_second=SLOW, fail_closed=False)
    await ratesync_redis_py.config_set("maxmemory", "1")
    try:
        with pytest.raises(RateLimiterError, match="maxmemory"):
            await limiter.acquire()
        assert await ratesync.try_acquire("open")
    finally:
        await ratesync_redis_py.config_set("maxmemory", "0")
    assert (await limiter.peek()).remaining == 4  # and it recovers
    await limiter.acquire()


# Several limits at once -----------------------------------------------------------------------------------


async def test_several_limits_are_charged_together_or_not_at_all(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limit("wide", rate_per_second=SLOW, burst=5, max_concurrent=5)
    limit("narrow", rate_per_second=SLOW, burst=2)
    granted = 0
    for _ in range(4):
        try:
            async with ratesync.acquire("wide", "narrow", 0):
                granted += 1
        except RateLimiterAcquisitionError:
            pass
    assert granted == 2
    assert (await ratesync.get_limiter("wide").peek()).remaining == 3
    assert (await ratesync.get_limiter("narrow").peek()).remaining == 0


async def test_calls_for_several_limits_and_single_ones_never_exceed_the_slots(ratesync_redis_url):
    configure(ratesync_redis_url)
    limit("a", max_concurrent=3)
    limit("b", max_concurrent=2)
    inside = {"a": 0, "b": 0}

    async def work(number: int) -> None:
        names = [("a", "b"), ("b", "a"), ("a",), ("b",)][number % 4]
        async with ratesync.acquire(*names):
            for name in names:
                inside[name] += 1
            assert inside["a"] <= 3
            assert inside["b"] <= 2
            await asyncio.sleep(0)
            for name in names:
                inside[name] -= 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(work(number) for number in range(80)))
    for name in ("a", "b"):
        limiter = ratesync.get_limiter(name)

        async def free(limiter: ratesync.RateLimiter = limiter) -> bool:
            return (await limiter.peek()).in_use == 0

        await eventually(free)


async def test_an_operation_is_one_round_trip(ratesync_redis_url, ratesync_redis_py):
    configure(ratesync_redis_url)
    limit("a", rate_per_second=1e6, burst=100, max_concurrent=100)
    limit("b", rate_per_second=1e6, burst=100)
    first = await ratesync.acquire("a")
    started = time.monotonic()
    stats = (await ratesync_redis_py.info("commandstats"))["cmdstat_evalsha"]["calls"]
    held = [await ratesync.acquire("a", "b") for _ in range(10)]
    calls = (await ratesync_redis_py.info("commandstats"))["cmdstat_evalsha"]["calls"] - stats
    renewals = (time.monotonic() - started) / 10 + 1
    assert calls <= 10 + renewals
    for permit in [first, *held]:
        permit.release()
