"""The Lua of the Redis store, on a real server, with the clock in the test's hand.

Held against tests/vectors/windows.json for the windows, and against exact fractions for the token bucket.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

redis = pytest.importorskip("redis")

ROOT = Path(__file__).parents[2]
LUA = ROOT / "cpp" / "ratesync" / "redis" / "lua"
PARTS = ("clock", "token_bucket", "rates", "windows", "window_log", "slots", "limit")
VECTORS = json.loads((ROOT / "tests" / "vectors" / "windows.json").read_text())["cases"]
LETTERS = {"fixed_window": "f", "sliding_counter": "c", "sliding_window": "w"}
FOREVER = 2_000_000_000_000_000
NOW = 1_763_700_000_000_000
numbers = itertools.count()


def source(*parts: str) -> str:
    """The script, told the time by its last argument."""
    text = "\n".join((LUA / f"{part}.lua").read_text() for part in parts)
    told = text.replace("local server_time = redis.call('TIME')\n", "").replace(
        "local now = server_time[1] * 1000000 + server_time[2]", "local now = tonumber(table.remove(ARGV))"
    )
    assert told.count("table.remove(ARGV)") == 1
    return told


class Limit:
    """One limit on the server, asked with the parameters and the time of each call."""

    def __init__(self, client: Any, run: Callable[..., Any], letter: str) -> None:
        self.client, self.run, self.letter = client, run, letter
        self.key = f"scripts:{{{next(numbers)}}}:{letter}"

    def steps(self, now: int, limit: object, window: object, *steps: object) -> list[Any]:
        arguments = ["steps", "who", "me", "wake:", 1, 0, 1, self.letter, limit, window, 0]
        answer = self.run(keys=[self.key], args=[*arguments, *steps, now])
        assert answer[0] == []
        return answer[1:]


@pytest.fixture
def client(ratesync_redis_url: str) -> Iterator[Any]:
    with redis.from_url(ratesync_redis_url, decode_responses=True) as connected:
        yield connected


@pytest.fixture
def limit(client: Any) -> Callable[[str], Limit]:
    run = client.register_script(source(*PARTS))
    return lambda letter: Limit(client, run, letter)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['algorithm']}: {case['name']}")
def test_windows_do_the_sums_of_the_vectors(limit: Callable[[str], Limit], case: dict[str, Any]) -> None:
    tested = limit(LETTERS[case["algorithm"]])
    first = case["steps"][0]["now"]  # a fresh state counts from its moment
    for number, step in enumerate(case["steps"]):
        expect, where = step["expect"], (case["name"], number, step)
        at = (step["now"], step["limit"], step["window"])
        if not tested.client.exists(tested.key):
            first = step["now"]
        if step["op"] == "acquire":
            (answer,) = tested.steps(*at, "acquire", 1, 1, step["cost"], step["max_wait"], 0)
            granted, refusal, wait, _, (_, remaining, full_after, stamp, _), waits = answer
            assert (granted == 1) == expect["granted"], where
            assert refusal == (0 if granted else 1), where
            assert (waits[1] if granted else wait) == expect["wait" if granted else "retry_after"], where
            assert (remaining, full_after) == (expect["remaining"], expect["full_after"]), where
            assert stamp - first == expect["stamp"], where
        elif step["op"] == "peek":
            ((_, remaining, full_after, _, _), _, wait) = tested.steps(*at, "peek", 1)[0]
            assert remaining == expect["remaining"], where
            assert (wait, full_after) == (expect["retry_after"], expect["full_after"]), where
        else:
            rest = (step["cost"], first + step["stamp"]) if step["op"] == "refund" else (step["delta"],)
            before = tested.client.dump(tested.key)
            done = tested.steps(*at, step["op"], 1, *rest)
            ((_, _, _, stamp, _), _, _) = tested.steps(*at, "peek", 1)[0]
            assert stamp - first == expect["stamp"], where
            assert done[0] == 1 or tested.client.dump(tested.key) == before
        assert tested.client.pttl(tested.key) != -1, "a key without time to live"


@pytest.mark.parametrize("letter", ["f", "c", "w"])
def test_a_run_of_requests_is_dealt_like_one_after_the_other(
    limit: Callable[[str], Limit], letter: str
) -> None:
    chance = random.Random(7)
    together, single = limit(letter), limit(letter)
    now = NOW
    for _ in range(60):
        now += chance.choice([0, 1, 500_000, 3_000_000, 25_000_000])
        n, cost = chance.randint(1, 9), chance.randint(1, 3)
        room = chance.choice([0, 5_000_000, 40_000_000])
        quota = (now, 7, 10_000_000)
        granted, refusal, wait, _, standing, pairs = together.steps(*quota, "acquire", 1, n, cost, room, 0)[0]
        waits = [w for count, w in zip(pairs[::2], pairs[1::2], strict=True) for _ in range(count)]
        for number in range(n):
            one = single.steps(*quota, "acquire", 1, 1, cost, room, 0)[0]
            assert one[0] == (1 if number < granted else 0)
            if one[0]:
                assert one[5][1] == waits[number]
            else:
                assert (one[1], one[2]) == (refusal, wait)
        assert len(waits) == granted
        assert standing[:3] == one[4][:3]


class Bucket:
    """GCRA in exact fractions of a microsecond."""

    def __init__(self, interval: Fraction, burst: int) -> None:
        self.interval, self.burst, self.tat = interval, burst, Fraction(0)

    def take(self, now: int, n: int, cost: int, room: int) -> tuple[int, Fraction]:
        granted, wait = 0, Fraction(0)
        while granted < n:
            moved = max(self.tat, Fraction(now)) + cost * self.interval
            wait = moved - self.burst * self.interval - now
            if wait > room:
                break
            self.tat, granted = moved, granted + 1
        return granted, wait


@pytest.mark.parametrize("rate", [0.001, 1, 3, 100, 333, 7_000])
@pytest.mark.parametrize("burst", [1, 10])
def test_the_token_bucket_does_the_sums_of_exact_fractions(
    client: Any, limit: Callable[[str], Limit], rate: float, burst: int
) -> None:
    chance = random.Random(11)
    model = Bucket(Fraction(1_000_000) / Fraction(str(rate)), burst)
    interval = 1e6 / rate
    span = math.ceil(burst * interval - 0.001)
    quick = client.register_script(source("clock", "token_bucket", "rates"))
    slow, key = limit("t"), f"scripts:{{{next(numbers)}}}:t"
    now = NOW
    for _ in range(80):
        now += int(interval * chance.choice([0, chance.random(), 2.5 * chance.random(), 20]))
        n, cost, room = chance.randint(1, 6), chance.randint(1, 3), int(interval * 9 * chance.random())
        each = f"{cost * interval:.17g}"
        granted, ahead, tat = quick(keys=[key], args=["rates", n, each, room + span, now])
        answer = slow.steps(now, span, f"{interval:.17g}", "acquire", 1, n, cost, room, 0)[0]
        assert (answer[0], answer[3], answer[4][3]) == (granted, ahead, tat)
        expected, _ = model.take(now, n, cost, room)
        assert granted == expected
        # Each run rounds up to a microsecond at most, so the server is never ahead of the model.
        assert 0 <= tat - model.tat <= 200 or model.tat < now
        model.tat = max(model.tat, Fraction(tat))
        if granted:
            assert client.get(key) == str(tat)
            assert 0 < client.pttl(key) <= (tat - now) / 1000 + 1001
    assert client.get(key) == client.get(slow.key)
