"""`with acquire(...)` in plain threads: exclusion, Ctrl-C, no blocking of a running loop."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from ratesync._engine import Engine, Limiter
from ratesync.errors import RateLimiterAcquisitionError


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.shutdown()


def make(engine: Engine, **options: float) -> Limiter:
    return Limiter(engine.add_store("memory", "memory", {}), "x", **options)


def in_use(limiter: Limiter) -> int:
    return limiter._peek(None).wait()["in_use"]


class Meter:
    """How many are inside at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = self.most = self.entries = 0

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            self.entries += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            self.inside -= 1


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("bound", [False, True])
def test_fifty_threads_never_exceed_max_concurrent(engine: Engine, bound: bool) -> None:
    limiter = make(engine, max_concurrent=3)
    meter = Meter()

    def work() -> None:
        for _ in range(20):
            with limiter if bound else limiter.acquire_context(), meter:
                time.sleep(0)

    run_all([threading.Thread(target=work) for _ in range(50)])
    assert meter.entries == 1000
    assert meter.most <= 3
    assert in_use(limiter) == 0
    assert limiter._counters()["held"] == 0


def test_tasks_and_threads_share_one_limiter(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=2)
    meter = Meter()

    def work() -> None:
        for _ in range(50):
            with limiter.acquire_context(), meter:
                time.sleep(0)

    async def task() -> None:
        for _ in range(20):
            async with limiter.acquire_context():
                with meter:
                    await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(task() for _ in range(20))), 60)

    run_all(
        [threading.Thread(target=work) for _ in range(5)]
        + [threading.Thread(target=asyncio.run, args=(main(),))]
    )
    assert meter.entries == 650
    assert meter.most <= 2
    assert in_use(limiter) == 0


def test_a_thread_refused_within_its_timeout_raises_and_takes_nothing(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=1)
    with limiter.acquire_context():
        started = time.monotonic()
        with pytest.raises(RateLimiterAcquisitionError), limiter.acquire_context(0.05):
            pytest.fail("entered")
        assert time.monotonic() - started > 0.04
        assert limiter._try(0.01, 1, None).wait() is False
    assert in_use(limiter) == 0


@pytest.mark.parametrize("how", ["raise_signal", "pthread_kill"])
def test_ctrl_c_ends_a_blocked_acquire_soon_and_leaves_nothing(engine: Engine, how: str) -> None:
    limiter = make(engine, max_concurrent=1)
    holder = limiter.acquire_context()
    holder.__enter__()
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        if how == "raise_signal":
            signal.raise_signal(signal.SIGINT)
        else:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    timer = threading.Timer(0.05, interrupt)

    def wait() -> None:
        timer.start()  # inside of what expects it, however soon it comes
        with limiter.acquire_context():
            pytest.fail("entered")

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert time.monotonic() - sent[0] < 20  # nobody would have ended it
    timer.join()
    holder.release()
    with limiter.acquire_context(20):
        assert in_use(limiter) == 1
    assert in_use(limiter) == 0


def test_a_signal_whose_handler_returns_does_not_disturb_the_wait(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=1)
    holder = limiter.acquire_context()
    holder.__enter__()
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))

    def disturb() -> None:
        time.sleep(0.02)
        signal.raise_signal(signal.SIGUSR1)
        while not handled:
            time.sleep(0.001)
        time.sleep(0.1)
        holder.release()

    thread = threading.Thread(target=disturb)
    try:
        thread.start()
        with limiter.acquire_context(30):
            assert handled == [signal.SIGUSR1]
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


async def test_with_in_a_running_loop_waits_for_nothing_and_says_what_to_use(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=1)
    with limiter.acquire_context():  # need not wait: fine
        with pytest.raises(RuntimeError, match="async with"), limiter.acquire_context():
            pytest.fail("entered")
        with pytest.raises(RuntimeError, match="async with"), limiter:
            pytest.fail("entered")
        with pytest.raises(RateLimiterAcquisitionError), limiter.acquire_context(0):
            pytest.fail("entered")
        with pytest.raises(RuntimeError, match="await"):
            limiter._peek(None).wait()
    assert (await limiter._peek(None))["in_use"] == 0
    with limiter:
        pass


async def test_with_in_a_thread_beside_a_running_loop_may_wait(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=1)

    entered = threading.Event()

    def work() -> None:
        with limiter.acquire_context(30):
            entered.set()

    async with limiter.acquire_context():
        waiting = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.sleep(0.03)
        assert not entered.is_set()
    await asyncio.wait_for(waiting, 30)
    assert entered.is_set()


def test_a_slot_entered_in_one_thread_and_left_in_another_comes_back(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=1)
    limiter.__enter__()
    run_all([threading.Thread(target=limiter.__exit__, args=(None, None, None))])
    assert in_use(limiter) == 0


def test_shutdown_ends_the_wait_of_every_thread(engine: Engine) -> None:
    limiter = make(engine, max_concurrent=1)
    holder = limiter.acquire_context()
    holder.__enter__()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with limiter.acquire_context():
                pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    engine.shutdown()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(errors) == 10
    assert all("shut down" in str(error) for error in errors)
    holder.release()


def test_engines_shut_down_from_many_threads_at_once() -> None:
    for _ in range(20):
        engine = Engine()
        limiter = make(engine, max_concurrent=1)
        limiter._peek(None).wait()
        run_all([threading.Thread(target=engine.shutdown) for _ in range(4)])
