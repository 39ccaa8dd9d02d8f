"""The histories of windows.json, and what the model says to them.

`python tests/vectors/window_histories.py` writes the file anew; a test holds it against this.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from window_model import MODELS

FILE = Path(__file__).with_name("windows.json")
MS, S = 1_000, 1_000_000
NOW = 1_763_700_000 * S  # 2025-11-21 04:40:00 UTC: on the minute and on the hour's grid of 10 minutes


def play(algorithm: str, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps with what the model answers. A refund names the step that it takes back: `of`."""
    model = MODELS[algorithm]()
    played: list[dict[str, Any]] = []
    for given in steps:
        step = dict(given)
        quota = (step["limit"], step["window"])
        if step["op"] == "acquire":
            step["expect"] = model.acquire(*quota, step["now"], step["cost"], step["max_wait"])
        elif step["op"] == "peek":
            step["expect"] = model.peek(*quota, step["now"])
        elif step["op"] == "settle":
            model.settle(step["window"], step["now"], step["delta"])
            step["expect"] = {"stamp": model.total}
        else:
            source = played[step.pop("of")]
            step |= {"cost": source["cost"], "stamp": source["expect"]["stamp"]}
            step["expect"] = model.refund(*quota, step["cost"], step["stamp"])
        played.append(step)
    return played


class Story:
    """Writes a history down: times relative to NOW, limit and window as they stand."""

    def __init__(self, limit: int, window: int) -> None:
        self.limit, self.window = limit, window
        self.steps: list[dict[str, Any]] = []

    def _add(self, op: str, now: int, **more: Any) -> int:
        self.steps.append({"op": op, "now": NOW + now, "limit": self.limit, "window": self.window, **more})
        return len(self.steps) - 1

    def acquire(self, now: int, cost: int = 1, max_wait: int = 0) -> int:
        return self._add("acquire", now, cost=cost, max_wait=max_wait)

    def peek(self, now: int) -> int:
        return self._add("peek", now)

    def settle(self, now: int, delta: int) -> int:
        return self._add("settle", now, delta=delta)

    def refund(self, of: int) -> None:
        self._add("refund", self.steps[-1]["now"] - NOW, of=of)


def told() -> dict[str, Story]:
    """Histories that go to the edges."""
    stories: dict[str, Story] = {}

    def story(name: str, limit: int, window: int) -> Story:
        stories[name] = Story(limit, window)
        return stories[name]

    s = story("a fresh limit is all there", 3, 10 * S)
    s.peek(0)
    s = story("the limit at once, then nothing", 3, 10 * S)
    for _ in range(4):
        s.acquire(4 * S)
    s.peek(4 * S)
    s = story("the last moment of a window and the first of the next", 2, 10 * S)
    for t in (10 * S - 1, 10 * S - 1, 10 * S - 1, 10 * S, 10 * S, 10 * S, 20 * S - 2, 20 * S - 1, 20 * S):
        s.acquire(t)
        s.peek(t)
    s = story("a patience of exactly the wait, and of one less", 1, 10 * S)
    s.acquire(3 * S)
    wait = {"fixed_window": 7 * S, "sliding_counter": 17 * S, "sliding_window": 10 * S}
    for patience in sorted({w - d for w in wait.values() for d in (1, 0)}):
        s.acquire(3 * S, max_wait=patience)
    s = story("waits far ahead, in order of arrival", 2, S)
    for _ in range(9):
        s.acquire(400 * MS, max_wait=3600 * S)
    for t in (400 * MS, 2 * S, 4 * S + 500 * MS, 9 * S):
        s.peek(t)
        s.acquire(t)
    s = story("a large cost waits for what it needs, and nobody overtakes it", 10, 10 * S)
    s.acquire(S, cost=7)
    s.acquire(2 * S, cost=5)
    s.acquire(2 * S, cost=5, max_wait=60 * S)
    s.acquire(3 * S, cost=1, max_wait=0)
    s.acquire(3 * S, cost=1, max_wait=60 * S)
    s.acquire(3 * S, cost=10, max_wait=600 * S)
    s.peek(15 * S)
    s = story("costs that just fit", 10, 10 * S)
    for cost in (4, 4, 3, 2, 1):
        s.acquire(5 * S, cost=cost)
    s.acquire(5 * S, cost=10, max_wait=60 * S)
    s = story("the limit lowered below what is used", 5, 10 * S)
    for _ in range(4):
        s.acquire(S)
    s.limit = 2
    for t in (S, 5 * S, 10 * S, 11 * S - 1, 11 * S, 20 * S, 25 * S):
        s.peek(t)
        s.acquire(t)
    s = story("the limit raised", 2, 10 * S)
    for _ in range(3):
        s.acquire(S)
    s.limit = 4
    for _ in range(3):
        s.acquire(2 * S)
    s = story("a longer window", 3, S)
    for t in (0, 100 * MS, 200 * MS, 300 * MS):
        s.acquire(t)
    s.window = 10 * S
    for t in (300 * MS, 900 * MS, 1500 * MS, 9999 * MS, 10 * S, 10 * S + 200 * MS):
        s.peek(t)
        s.acquire(t)
    s = story("a shorter window", 3, 10 * S)
    for t in (0, S, 2 * S, 3 * S):
        s.acquire(t)
    s.window = S
    for t in (3 * S, 3 * S + 1, 4 * S, 10 * S):
        s.peek(t)
        s.acquire(t)
    s = story("only the newest deal is refunded, and then the one before it", 5, 10 * S)
    first, second, third = s.acquire(S, 2), s.acquire(2 * S, 1), s.acquire(3 * S, 2)
    s.refund(first)
    s.peek(3 * S)
    s.refund(third)
    s.peek(3 * S)
    s.refund(second)
    s.peek(3 * S)
    s.refund(second)
    s.peek(3 * S)
    s.refund(first)
    s.peek(3 * S)
    s = story("a sleeper that leaves takes its units with it", 2, 10 * S)
    s.acquire(S, 2)
    asleep = s.acquire(S, 1, max_wait=60 * S)
    s.refund(asleep)
    s.peek(S)
    s.acquire(12 * S, 2, max_wait=60 * S)
    s.peek(12 * S)
    s = story("sleepers that leave give windows to come back", 3, 10 * S)
    for t in (S, 14 * S):
        asleep = [s.acquire(t, max_wait=90 * S) for _ in range(14)]
        for one in reversed(asleep[4:]):
            s.refund(one)
            s.peek(t)
        s.acquire(t, 2, max_wait=90 * S)
        s.peek(t + S)
    s = story("sleepers of several units that leave, under another limit", 5, 10 * S)
    asleep = [s.acquire(S, cost, max_wait=200 * S) for cost in (2, 3, 1, 4, 2, 5, 1, 1, 3)]
    for number, one in enumerate(reversed(asleep)):
        s.limit = 4 if number == 4 else s.limit
        s.refund(one)
        s.peek(S + number * S)
    s.acquire(30 * S, 4)
    s = story("a refund long after its window is harmless", 2, S)
    late = s.acquire(0, 2)
    s.peek(5 * S)
    s.refund(late)
    s.peek(5 * S)
    s.acquire(5 * S, 2)
    s.acquire(5 * S, 1)
    s = story("settle charges more than the limit", 3, 10 * S)
    s.acquire(S)
    s.settle(2 * S, 4)
    for t in (2 * S, 9 * S, 10 * S, 11 * S, 12 * S, 18 * S, 20 * S, 25 * S):
        s.peek(t)
        s.acquire(t)
    s = story("settle gives back, down to nothing", 4, 10 * S)
    s.acquire(S, 3)
    s.settle(2 * S, -2)
    s.peek(2 * S)
    s.settle(2 * S, -5)
    s.peek(2 * S)
    s.acquire(2 * S, 4)
    s = story("settle leaves those alone who still sleep", 2, 10 * S)
    s.acquire(S, 2)
    asleep = s.acquire(2 * S, 2, max_wait=60 * S)
    s.settle(3 * S, -2)
    s.peek(3 * S)
    s.acquire(3 * S, 1, max_wait=60 * S)
    s.refund(asleep)
    s.peek(3 * S)
    s = story("a charge by settle makes older stamps stale", 5, 10 * S)
    old = s.acquire(S, 2)
    s.settle(2 * S, 1)
    s.refund(old)
    s.peek(2 * S)
    s = story("giving back by settle does not", 5, 10 * S)
    s.acquire(S, 2)
    young = s.acquire(S, 1)
    s.settle(2 * S, -1)
    s.refund(young)
    s.peek(2 * S)
    s = story("a clock that steps back", 3, 10 * S)
    s.acquire(25 * S, 2)
    for t in (14 * S, 24 * S, 24 * S):
        s.peek(t)
        s.acquire(t)
        s.acquire(t, max_wait=15 * S)
    s = story("windows of a millisecond", 2, MS)
    for t in (0, 1, 500, 999, 1000, 1001, 1500, 2000):
        s.acquire(t)
    s = story("a window of 366 days and a limit of a billion", 10**9, 366 * 86_400 * S)
    s.acquire(0, 10**9 - 1)
    s.peek(S)
    s.acquire(S)
    s.acquire(S)
    s.acquire(S, max_wait=10**16)
    s.peek(2 * S)
    s = story("the estimate falls steadily", 10, 10 * S)
    s.acquire(9 * S, 10)
    for t in range(10 * S, 21 * S, S // 2):
        s.peek(t)
        s.acquire(t)
    s = story("a window of an odd length", 7, 7_000_003)
    for t in range(0, 40 * S, 900_001):
        s.acquire(t, 2, max_wait=t % 3 * S)
        s.peek(t)
    return stories


def dreamt(seed: int, steps: int) -> Story:
    """A random history; reproducible."""
    rng = random.Random(seed)
    window = rng.choice([MS, 17_389, S, 10 * S, 60 * S, 3600 * S])
    s = Story(rng.choice([1, 2, 3, 5, 10]), window)
    now = rng.randrange(window)
    granted: list[int] = []
    for _ in range(steps):
        now += rng.choice([0, 0, 1, rng.randrange(window), rng.randrange(max(1, window // s.limit)), window])
        kind = rng.random()
        if kind < 0.62:
            patience = rng.choice([0, 0, rng.randrange(window), window, 10 * window])
            granted.append(s.acquire(now, rng.randint(1, s.limit), patience))
        elif kind < 0.78:
            s.peek(now)
        elif kind < 0.88 and granted:
            s.refund(rng.choice([granted[-1], granted[-1], rng.choice(granted)]))
        elif kind < 0.96:
            s.settle(now, rng.choice([-3, -1, -1, 1, 1, 2]))
        else:
            s.limit = rng.choice([1, 2, 3, 5, 10])
            if rng.random() < 0.3:
                s.window = rng.choice([window, window * 2, max(1000, window // 2)])
    return s


def cases() -> list[dict[str, Any]]:
    stories = told() | {f"random history {seed}": dreamt(seed, 36) for seed in range(6)}
    out = []
    for name, story in stories.items():
        for algorithm in MODELS:
            if algorithm == "sliding_window" and story.limit > 10**6:
                continue  # this model keeps every unit
            try:
                steps = play(algorithm, _with_granted_refunds(algorithm, story.steps))
            except AssertionError as error:
                if "double precision" not in str(error):
                    raise
                continue
            out.append({"name": name, "algorithm": algorithm, "steps": steps})
    return out


def _with_granted_refunds(algorithm: str, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A refund of what was refused, for which there is no stamp, becomes a peek: numbers stay in place."""
    kept: list[dict[str, Any]] = []
    for step in steps:
        if step["op"] == "refund" and not play(algorithm, kept)[step["of"]]["expect"]["granted"]:
            step = {"op": "peek"} | {name: step[name] for name in ("now", "limit", "window")}
        kept.append(step)
    return kept


ABOUT = [
    "Histories of one limit and what has to come out; written by window_histories.py with window_model.py.",
    "Times are whole microseconds since the Unix epoch. A state starts fresh, with a total of 0.",
    "acquire: cost units, a slot at most max_wait after now. granted -> wait, else retry_after.",
    "stamp: the total after the step, granted or not. refund: acts while its stamp is the total.",
    "settle: a positive delta adds to the total, a negative one leaves it alone.",
    "remaining: units to be had at now. full_after: until nothing counts any more. peek: as for cost 1.",
]


def text() -> str:
    lines = [
        "    "
        + json.dumps({"name": case["name"], "algorithm": case["algorithm"], "steps": []})[:-2]
        + "\n"
        + ",\n".join("      " + json.dumps(step) for step in case["steps"])
        + "\n    ]}"
        for case in cases()
    ]
    return (
        json.dumps({"about": ABOUT}, indent=2)[:-2] + ',\n  "cases": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
    )


if __name__ == "__main__":
    FILE.write_text(text())
