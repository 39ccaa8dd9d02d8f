"""Is a recorded history of concurrent operations on one key of state linearizable?

Wing and Gong's search with the memory of states that Lowe added: pick, again and again, an operation
that began before any other one ended, and see whether its answer fits the key as it is then. A set of
operations done and a key's condition that failed once need not be tried again.

    from "Testing and Verifying Concurrent Objects", J. M. Wing and C. Gong, 1993, and
    "Testing for Linearizability", G. Lowe, 2016.

The model follows answers instead of predicting them, because a version after a deletion is only known
to be higher than all before. It knows no expiry: histories to be checked use no ttl.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["ABSENT", "Call", "Key", "check", "check_key", "step"]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One operation: what was asked and answered, and when, on one clock of the machine.

    `returned` is infinity and `answer` None for a call whose outcome nobody knows: it may have been
    executed at any time after it was made, or never.

    verb, argument -> answer:
        create, value -> bool                  check_and_set
        begin, value -> version or 0           compare_and_swap(expected=0); 0: there was one
        get, None -> (version, value) or None
        set, value -> version
        add, delta -> sum
        swap, (expected, value) -> (True, new version) or (False, the version found, 0 for none)
        delete, expected or None -> bool
    """

    key: str
    verb: str
    argument: Any
    answer: Any
    called: float
    returned: float = math.inf

    @property
    def pending(self) -> bool:
        return self.returned == math.inf


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key. `exact`: its version is `version`; otherwise it is that or higher."""

    living: bool = False
    value: Any = None
    version: int = 0
    exact: bool = True

    def seen(self, version: int) -> bool:
        """Whether the key can have this version."""
        return version == self.version if self.exact else version >= self.version


ABSENT = Key()


def _written(key: Key, value: Any, version: int | None) -> Key | None:
    """The key after a write that answered with this version, None: that did not say it."""
    least = key.version + 1
    # What is created anew may start higher, where versions of its neighbours were purged.
    exact = key.exact and (key.living or key.version == 0)
    if version is None:
        return Key(True, value, least, exact)
    if version < least or (exact and version != least):
        return None
    return Key(True, value, version, True)


def step(key: Key, call: Call) -> list[Key]:
    """What the key can be after this call, with its answer; empty: the answer does not fit."""
    if call.pending:
        return _unanswered(key, call)
    after = _answered(key, call)
    return [] if after is None else [after]


def _answered(key: Key, call: Call) -> Key | None:
    verb, argument, answer = call.verb, call.argument, call.answer
    if verb == "get":
        if answer is None:
            return key if not key.living else None
        version, value = answer
        fits = key.living and key.seen(version) and value == key.value
        return Key(True, key.value, version, True) if fits else None
    if verb == "create":
        if answer:
            return _written(key, argument, None) if not key.living else None
        return key if key.living else None
    if verb == "begin":
        if answer:
            return _written(key, argument, answer) if not key.living else None
        return key if key.living else None
    if verb == "set":
        return _written(key, argument, answer)
    if verb == "add":
        if answer != (key.value if key.living else 0) + argument:
            return None
        return _written(key, answer, None)
    if verb == "swap":
        expected, value = argument
        swapped, version = answer
        if swapped:
            if not key.living or not key.seen(expected) or version != expected + 1:
                return None
            return Key(True, value, version, True)
        if version == 0:
            return key if not key.living else None
        if not key.living or version == expected or not key.seen(version):
            return None
        return Key(True, key.value, version, True)
    if verb == "delete":
        if answer:
            if not key.living or not (argument is None or key.seen(argument)):
                return None
            return Key(False, None, argument or key.version, key.exact or argument is not None)
        if not key.living:
            return key
        # Refused: it has another version than the expected one.
        return key if argument is not None and not (key.exact and key.version == argument) else None
    raise ValueError(f"no verb {verb!r}")


def _unanswered(key: Key, call: Call) -> list[Key]:
    """Every outcome that executing the call could have had; that it never was, `check_key` tries itself."""
    verb, argument = call.verb, call.argument
    if verb in ("create", "begin"):
        after = _written(key, argument, None) if not key.living else None
    elif verb == "set":
        after = _written(key, argument, None)
    elif verb == "add":
        after = _written(key, (key.value if key.living else 0) + argument, None)
    elif verb == "swap":
        fits = key.living and key.seen(argument[0])
        after = Key(True, argument[1], argument[0] + 1, True) if fits else None
    elif verb == "delete":
        fits = key.living and (argument is None or key.seen(argument))
        after = Key(False, None, key.version, key.exact) if fits else None
    else:
        after = None
    return [] if after is None else [after]


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    """Which calls are done: of the answered ones all before `first` and bits after it; of the others bits."""

    first: int = 0
    later: int = 0
    pending: int = 0

    def with_answered(self, index: int) -> _Done:
        first, later = self.first, self.later | 1 << index - self.first
        while later & 1:
            first, later = first + 1, later >> 1
        return _Done(first, later, self.pending)


def check_key(calls: Sequence[Call], start: Key = ABSENT) -> list[Call] | None:
    """An order in which the calls of one key make sense, or None. Without the pending calls not in it."""
    ordered = sorted(calls, key=lambda call: call.called)
    answered = [call for call in ordered if not call.pending]
    pending = [call for call in ordered if call.pending]

    def choices(done: _Done, key: Key) -> Iterator[tuple[Call, _Done, Key]]:
        first_end = math.inf
        for index in range(done.first, len(answered)):
            call = answered[index]
            if call.called > first_end:
                break
            if not done.later >> index - done.first & 1:
                first_end = min(first_end, call.returned)
        for index in range(done.first, len(answered)):
            call = answered[index]
            if call.called > first_end:
                break
            if not done.later >> index - done.first & 1:
                for after in step(key, call):
                    yield call, done.with_answered(index), after
        for index, call in enumerate(pending):
            if call.called <= first_end and not done.pending >> index & 1:
                for after in step(key, call):
                    yield call, dataclasses.replace(done, pending=done.pending | 1 << index), after

    failed: set[tuple[_Done, Key]] = set()
    # One frame for each call picked: what is done, the key then, and what can still be tried there.
    begin = _Done()
    frames = [(begin, start, choices(begin, start))]
    path: list[Call] = []
    while frames:
        done, key, untried = frames[-1]
        if done.first == len(answered):
            return path
        for call, done_then, after in untried:
            if (done_then, after) not in failed:
                frames.append((done_then, after, choices(done_then, after)))
                path.append(call)
                break
        else:
            failed.add((done, key))
            frames.pop()
            if path:
                path.pop()
    return None


def check(history: Iterable[Call]) -> dict[str, list[Call]]:
    """The keys whose histories are not linearizable, with what happened to them, by time of call."""
    by_key: dict[str, list[Call]] = defaultdict(list)
    for call in history:
        by_key[call.key].append(call)
    return {
        key: sorted(calls, key=lambda call: call.called)
        for key, calls in by_key.items()
        if check_key(calls) is None
    }
