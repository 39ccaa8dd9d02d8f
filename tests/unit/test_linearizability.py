"""The checker of concurrent histories finds what is wrong, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from linearizability import ABSENT, Call, Key, check, check_key, step


def history(*rows: tuple[float, float, str, object, object]) -> list[Call]:
    return [Call("k", verb, argument, answer, begin, end) for begin, end, verb, argument, answer in rows]


INF = float("inf")

GOOD = {
    "nothing": [],
    "one after the other": [(0, 1, "set", "a", 1), (2, 3, "get", None, (1, "a")), (4, 5, "set", "b", 2)],
    "a read during a write may see either": [
        (0, 1, "set", "a", 1),
        (2, 9, "set", "b", 2),
        (3, 4, "get", None, (1, "a")),
        (5, 6, "get", None, (2, "b")),
    ],
    "overlapping adds in the other order": [(0, 5, "add", 1, 3), (1, 4, "add", 2, 2)],
    "one of two creates wins": [(0, 5, "create", "a", False), (1, 6, "create", "b", True)],
    "what nobody heard of happened": [(0, INF, "set", "a", None), (5, 6, "get", None, (1, "a"))],
    "what nobody heard of happened later": [
        (0, INF, "add", 1, None),
        (5, 6, "get", None, None),
        (7, 8, "add", 1, 2),
    ],
    "what nobody heard of did not happen": [(0, INF, "create", "a", None), (5, 6, "create", "b", True)],
    "anew after a deletion, with a higher version": [
        (0, 1, "set", "a", 1),
        (2, 3, "delete", None, True),
        (4, 5, "get", None, None),
        (6, 7, "begin", "b", 9),
        (8, 9, "swap", (9, "c"), (True, 10)),
        (10, 11, "swap", (9, "d"), (False, 10)),
        (12, 13, "delete", 9, False),
        (14, 15, "delete", 10, True),
        (16, 17, "swap", (10, "d"), (False, 0)),
    ],
    "a version that only a later read tells": [
        (0, 1, "create", 5, True),
        (2, 3, "delete", 1, True),
        (4, 5, "create", 7, True),
        (6, 7, "add", 1, 8),
        (8, 9, "get", None, (30, 8)),
        (10, 11, "set", 1, 31),
    ],
}

BAD = {
    "a stale read": [(0, 1, "set", "a", 1), (2, 3, "set", "b", 2), (4, 5, "get", None, (1, "a"))],
    "two reads that go back": [
        (0, 1, "set", "a", 1),
        (2, 9, "set", "b", 2),
        (3, 4, "get", None, (2, "b")),
        (5, 6, "get", None, (1, "a")),
    ],
    "two winners": [(0, 5, "create", "a", True), (1, 6, "create", "b", True)],
    "no winner": [(0, 5, "create", "a", False), (1, 6, "create", "b", False)],
    "a lost update": [(0, 5, "add", 1, 1), (1, 6, "add", 1, 1)],
    "a version twice": [(0, 5, "set", "a", 1), (1, 6, "set", "b", 1)],
    "a version left out": [(0, 1, "set", "a", 1), (2, 3, "set", "b", 3)],
    "a version again after a deletion": [
        (0, 1, "set", "a", 1),
        (2, 3, "delete", None, True),
        (4, 5, "begin", "b", 1),
    ],
    "a version again after a deletion, seen by a read": [
        (0, 1, "set", "a", 1),
        (2, 3, "delete", None, True),
        (4, 5, "create", "a", True),
        (6, 7, "get", None, (1, "a")),
    ],
    "a write that was lost": [(0, 1, "set", "a", 1), (2, 3, "get", None, None)],
    "a deletion that was lost": [
        (0, 1, "set", "a", 1),
        (2, 3, "delete", None, True),
        (4, 5, "get", None, (1, "a")),
    ],
    "two swaps of one version": [
        (0, 1, "set", "a", 1),
        (2, 9, "swap", (1, "b"), (True, 2)),
        (3, 8, "swap", (1, "c"), (True, 2)),
    ],
    "a swap that came back with what it expected": [
        (0, 1, "set", "a", 1),
        (2, 3, "swap", (1, "b"), (False, 1)),
    ],
    "an answer from nowhere": [(0, 1, "get", None, (1, "a"))],
    "unheard of, but before it was asked": [(0, 1, "get", None, (1, "a")), (2, INF, "set", "a", None)],
    "unheard of, and twice": [
        (0, INF, "add", 1, None),
        (1, 2, "get", None, (1, 1)),
        (3, 4, "get", None, (2, 2)),
    ],
    "two deletions of one row": [
        (0, 1, "set", "a", 1),
        (2, 5, "delete", None, True),
        (3, 6, "delete", None, True),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_lawful_history_is_accepted(name: str) -> None:
    assert check(history(*GOOD[name])) == {}


@pytest.mark.parametrize("name", BAD)
def test_an_unlawful_history_is_found(name: str) -> None:
    bad = history(*BAD[name])
    assert list(check(bad)) == ["k"]
    other = [Call("other", "add", 1, 1, 0, 1)]
    assert list(check(bad + other)) == ["k"]


def execute(random_: random.Random, calls: int, width: int) -> list[Call]:
    """A history that really happened: each call takes effect at a moment between its two times."""
    key = ABSENT
    made: list[Call] = []
    for number in range(calls):
        moment = float(number)
        verb = random_.choice(["create", "begin", "get", "set", "add", "swap", "delete"])
        guess = max(0, key.version - random_.choice([0, 0, 1]))
        argument = {
            "get": None,
            "add": random_.randint(-3, 3),
            "swap": (guess, number),
            "delete": random_.choice([None, guess]),
        }.get(verb, number)
        living = key.living
        answers = {
            "create": not living,
            "begin": 0 if living else key.version + 1,
            "get": (key.version, key.value) if living else None,
            "set": key.version + 1,
            "add": (key.value if living else 0) + argument if verb == "add" else None,
            "swap": (living and guess == key.version, key.version + (guess == key.version) if living else 0),
            "delete": living and argument in (None, key.version),
        }
        call = Call(
            "k",
            verb,
            argument,
            answers[verb],
            moment - random_.uniform(0, width),
            moment + random_.uniform(0, width),
        )
        key = known(key, call)
        made.append(call)
    return made


def known(key: Key, call: Call) -> Key:
    after = step(key, call)
    assert len(after) == 1, (key, call)
    # The maker of the history knows every version, whether the answer said it or not.
    return Key(after[0].living, after[0].value, after[0].version, True)


@pytest.mark.parametrize("seed", range(20))
def test_a_history_that_happened_is_accepted_in_an_order_that_keeps_to_the_times(seed: int) -> None:
    made = execute(random.Random(seed), 120, 4)
    order = check_key(made)
    assert order is not None
    assert len(order) == len(made)
    for earlier, later in itertools.pairwise(order):
        assert earlier.called <= later.returned


@pytest.mark.parametrize("seed", range(20))
def test_one_wrong_answer_in_a_long_history_is_found(seed: int) -> None:
    random_ = random.Random(seed)
    made = execute(random_, 60, 0.4)
    index = random_.choice([index for index, call in enumerate(made) if call.verb in ("set", "add")])
    made[index] = dataclasses.replace(made[index], answer=made[index].answer - 1)
    assert check_key(made) is None


def test_many_calls_at_once_are_searched_in_time() -> None:
    # 2,000 calls by 12 callers, one of which is wrong: without its memory the search would not end.
    made = execute(random.Random(1), 2000, 6)
    assert check_key(made) is not None
    index = max(index for index, call in enumerate(made) if call.verb == "add")
    made[index] = dataclasses.replace(made[index], answer=made[index].answer + 1000)
    assert check_key(made) is None
