"""The windows by their definition: slow, exact, and written without looking at the core.

Times are integers of one unit since the Unix epoch. Every unit that was dealt is an item of a list, a
slot is found by trying the moments at which something could change, and quotients are fractions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Any


@dataclass
class Model:
    """What the three have in common: granting within the patience, and stamps."""

    total: int = 0

    def acquire(self, limit: int, window: int, now: int, cost: int, max_wait: int) -> dict[str, Any]:
        slot = self.slot(limit, window, now, cost)
        wait = slot - now
        granted = wait <= max_wait
        if granted:
            self.total += cost
            self.deal(window, slot, cost)
        return {
            "granted": granted,
            "wait": wait if granted else 0,
            "retry_after": 0 if granted else wait,
            "remaining": self.remaining(limit, window, now),
            "full_after": self.full_after(window, now),
            "stamp": self.total,
        }

    def peek(self, limit: int, window: int, now: int) -> dict[str, Any]:
        return {
            "remaining": self.remaining(limit, window, now),
            "retry_after": self.slot(limit, window, now, 1) - now,
            "full_after": self.full_after(window, now),
        }

    def refund(self, limit: int, window: int, cost: int, stamp: int) -> dict[str, Any]:
        if stamp == self.total:
            self.total -= cost
            self.take_back(limit, window, cost)
        return {"stamp": self.total}

    def settle(self, window: int, now: int, delta: int) -> None:
        self.total += max(0, delta)
        self.adjust(window, now, delta)

    def slot(self, limit: int, window: int, now: int, cost: int) -> int:
        raise NotImplementedError

    def deal(self, window: int, slot: int, cost: int) -> None:
        raise NotImplementedError

    def remaining(self, limit: int, window: int, now: int) -> int:
        raise NotImplementedError

    def full_after(self, window: int, now: int) -> int:
        raise NotImplementedError

    def take_back(self, limit: int, window: int, cost: int) -> None:
        raise NotImplementedError

    def adjust(self, window: int, now: int, delta: int) -> None:
        raise NotImplementedError


@dataclass
class CalendarWindow(Model):
    """Units of the calendar window of the latest slot, and of the one before."""

    latest: int = 0
    counts: tuple[int, int] = (0, 0)  # before, in it

    def seen_from(self, window: int, number: int) -> tuple[int, int]:
        passed = number - self.latest // window
        before, within = self.counts
        return {0: (before, within), 1: (within, 0)}.get(passed, (0, 0))

    def deal(self, window: int, slot: int, cost: int) -> None:
        before, within = self.seen_from(window, slot // window)
        self.counts = (before, within + cost)
        self.latest = slot

    def take_back(self, limit: int, window: int, cost: int) -> None:
        for _ in range(cost):
            while not self.counts[1]:
                self.go_back(limit, window)
            before, within = self.counts
            self.counts = (before, within - 1)
        if not self.counts[1]:
            self.go_back(limit, window)

    def go_back(self, limit: int, window: int) -> None:
        """To the window before, since nothing is dealt in this one; what came before that is not known."""
        self.latest = (self.latest // window - 1) * window
        self.counts = (limit, self.counts[0])

    def adjust(self, window: int, now: int, delta: int) -> None:
        latest = max(now, self.latest)
        before, within = self.seen_from(window, latest // window)
        self.counts = (before, max(0, within + delta))
        self.latest = latest


@dataclass
class FixedWindow(CalendarWindow):
    """Each calendar window has the whole limit."""

    def number(self, window: int, now: int) -> int:
        return max(now // window, self.latest // window)

    def slot(self, limit: int, window: int, now: int, cost: int) -> int:
        number = self.number(window, now)
        if self.seen_from(window, number)[1] + cost > limit:
            number += 1
        return max(now, number * window)

    def deal(self, window: int, slot: int, cost: int) -> None:
        super().deal(window, slot // window * window, cost)

    def remaining(self, limit: int, window: int, now: int) -> int:
        if self.number(window, now) > now // window:
            return 0
        return max(0, limit - self.seen_from(window, now // window)[1])

    def full_after(self, window: int, now: int) -> int:
        number = self.number(window, now)
        return (number + 1) * window - now if self.seen_from(window, number)[1] else 0

    def adjust(self, window: int, now: int, delta: int) -> None:
        super().adjust(window, now, delta)
        self.latest = self.latest // window * window


@dataclass
class SlidingCounter(CalendarWindow):
    """Units of the window before count for as much of it as a window back from now still covers."""

    def estimate(self, window: int, t: int) -> Fraction:
        before, within = self.seen_from(window, t // window)
        return within + before * (1 - Fraction(t % window, window))

    def slot(self, limit: int, window: int, now: int, cost: int) -> int:
        earliest = max(now, self.latest)
        for number in range(earliest // window, earliest // window + 3):
            start = max(earliest, number * window)
            before, within = self.seen_from(window, number)
            if within + cost > limit:
                continue
            # The estimate falls steadily through the window: where is it low enough?
            if self.estimate(window, start) + cost <= limit:
                return start
            slot = (number + 1) * window - floor(Fraction((limit - cost - within) * window, before))
            assert floor(float(limit - cost - within) * float(window) / float(before)) == floor(
                Fraction((limit - cost - within) * window, before)
            ), "a history that tells double precision from exact sums is of no use in the file"
            if slot < (number + 1) * window:
                return slot
        raise AssertionError("the third window at the latest has nothing before it")

    def remaining(self, limit: int, window: int, now: int) -> int:
        if self.latest > now:
            return 0
        before, _ = self.seen_from(window, now // window)
        left = window - now % window
        assert ceil(float(before) * float(left) / float(window)) == ceil(Fraction(before * left, window))
        return max(0, floor(limit - self.estimate(window, now)))

    def full_after(self, window: int, now: int) -> int:
        number = max(now, self.latest) // window
        before, within = self.seen_from(window, number)
        if within:
            return (number + 2) * window - now
        return (number + 1) * window - now if before else 0


@dataclass
class SlidingWindow(Model):
    """The moment of every unit, in order."""

    units: list[int] = field(default_factory=list)

    def forget(self, window: int, now: int) -> None:
        self.units = [at for at in self.units if at + window > now]

    def slot(self, limit: int, window: int, now: int, cost: int) -> int:
        earliest = max([now, *self.units[-1:]])
        moments = sorted({earliest, *(at + window for at in self.units if at + window > earliest)})
        return next(
            t
            for t in moments
            if sum(t - window < at <= t for at in self.units if at + window > now) + cost <= limit
        )

    def acquire(self, limit: int, window: int, now: int, cost: int, max_wait: int) -> dict[str, Any]:
        self.forget(window, now)
        return super().acquire(limit, window, now, cost, max_wait)

    def deal(self, window: int, slot: int, cost: int) -> None:
        self.units += [slot] * cost

    def remaining(self, limit: int, window: int, now: int) -> int:
        return max(0, limit - sum(at > now - window for at in self.units))

    def full_after(self, window: int, now: int) -> int:
        return max(0, self.units[-1] + window - now) if self.units else 0

    def take_back(self, limit: int, window: int, cost: int) -> None:
        self.units = self.units[: max(0, len(self.units) - cost)]

    def adjust(self, window: int, now: int, delta: int) -> None:
        self.forget(window, now)
        if delta > 0:
            self.units += [max([now, *self.units[-1:]])] * delta
        else:
            past = [at for at in self.units if at <= now]
            self.units = past[: max(0, len(past) + delta)] + [at for at in self.units if at > now]


MODELS: dict[str, type[Model]] = {
    "fixed_window": FixedWindow,
    "sliding_counter": SlidingCounter,
    "sliding_window": SlidingWindow,
}
