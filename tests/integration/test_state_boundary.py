"""What crosses from Python to the core and back: calls, values, times, errors; and that nothing stays.

On the embedded store a call is decided inside the await; elsewhere it goes to the I/O thread and back. Both
have to look the same.
"""

from __future__ import annotations

import asyncio
import copy
import enum
import gc
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import ratesync
from ratesync import _core, ops
from ratesync._engine import KEEP, CoreState, Engine

MOST = 2**63 - 1


@pytest.fixture(params=["memory", "redis", "postgres"])
def store(request: pytest.FixtureRequest, ratesync_registry: object) -> ratesync.Store:
    if request.param == "memory":
        ratesync.configure_store("s", "memory")
    elif request.param == "redis":
        ratesync.configure_store("s", "redis", url=request.getfixturevalue("ratesync_redis_url"))
    else:
        url = request.getfixturevalue("ratesync_postgres_url")
        ratesync.configure_store("s", "postgres", url=url, auto_create=True)
    return ratesync.get_store("s")


@pytest.fixture
def state(store: ratesync.Store) -> ratesync.State:
    return store.state()


@pytest.fixture
def memory(ratesync_registry: object) -> ratesync.State:
    ratesync.configure_store("s", "memory")
    return ratesync.get_store("s").state()


# A call is made when it is consumed, once ----------------------------------------------------------


async def test_nothing_happens_before_a_call_is_consumed(state: ratesync.State) -> None:
    call = state.set("a", "1")
    assert await state.get("a") is None
    assert await call == 1
    assert await state.get("a") == "1"


async def test_a_call_is_made_once(state: ratesync.State) -> None:
    call = state.increment("n")
    assert await call == 1
    with pytest.raises(RuntimeError, match="made already"):
        await call
    with pytest.raises(RuntimeError, match="made already"):
        call.wait()
    assert await state.get("n") == 1


async def test_calls_are_coroutines_to_asyncio(state: ratesync.State) -> None:
    assert asyncio.iscoroutine(state.get("a"))
    assert await asyncio.create_task(state.set("a", "x")) == 1
    assert await asyncio.gather(state.get("a"), state.get("b"), state.increment("n")) == ["x", None, 1]
    assert await asyncio.wait_for(state.get("a"), 60) == "x"
    assert await asyncio.shield(state.get("a")) == "x"
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        tasks = [group.create_task(state.increment("n")) for _ in range(20)]
    assert sorted(task.result() for task in tasks) == list(range(2, 22))


def test_a_call_can_be_the_main_coroutine(state: ratesync.State) -> None:
    assert asyncio.run(state.set("a", "1")) == 1
    assert state.get("a").wait() == "1"


async def test_calls_of_one_key_keep_their_order(state: ratesync.State) -> None:
    versions = await asyncio.gather(*(state.set("k", n) for n in range(300)))
    assert versions == list(range(1, 301))
    assert await state.get("k") == 299


@pytest.mark.parametrize("how", ["close", "throw"])
async def test_a_call_that_is_given_up_first_never_happens(state: ratesync.State, how: str) -> None:
    call = state.set("a", "1")
    if how == "close":
        call.close()
    else:
        with pytest.raises(ZeroDivisionError):
            call.throw(ZeroDivisionError())
    with pytest.raises(RuntimeError, match="made already"):
        await call
    assert await state.get("a") is None


async def test_wait_does_not_block_a_running_loop(state: ratesync.State, store: ratesync.Store) -> None:
    call = state.set("a", "1")
    if store.engine == "memory":
        assert call.wait() == 1  # nothing to wait for
        return
    with pytest.raises(RuntimeError, match="await it"):
        call.wait()
    assert await call == 1  # it was not used up


async def test_keyword_names_need_not_be_interned(state: ratesync.State) -> None:
    await state.set(**{"".join(["ke", "y"]): "a", "".join(["val", "ue"]): "v"})
    assert await state.get(**{"".join(["ke", "y"]): "a"}) == "v"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.get(), "missing required argument 'key'"),
        (lambda s: s.get("a", "b"), "at most 1 positional"),
        (lambda s: s.get("a", key="a"), "multiple values for argument 'key'"),
        (lambda s: s.get("a", nonsense=1), "unexpected keyword argument 'nonsense'"),
        (lambda s: s.get_versioned("a", "b"), "get_versioned\\(\\) takes"),
        (lambda s: s.compare_and_swap("a", value="b"), "'expected'"),
        (lambda s: s.many([], True), "positional"),
    ],
)
def test_arguments_that_do_not_fit_are_type_errors(
    memory: ratesync.State, call: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        call(memory)


# Values --------------------------------------------------------------------------------------------


class Number(enum.IntEnum):
    ONE = 1


VALUES = ["", "text", "0", "\x00\U0001f600é", b"", b"\x00\xff\xfe", 0, -1, MOST, -MOST - 1, "x" * 70_000]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
async def test_values_come_back_as_they_were(state: ratesync.State, value: object) -> None:
    await state.set("k", value)
    back = await state.get("k")
    assert (type(back), back) == (type(value), value)
    assert await state.check_and_set("other", value)
    found = await state.get_versioned("other")
    assert found is not None
    assert (type(found.value), found.value, found.version, found.expires_at) == (type(value), value, 1, None)
    assert await state.compare_and_swap("other", expected=1, value=value) == 2


async def test_what_can_change_is_read_when_the_call_is_made(state: ratesync.State) -> None:
    data = bytearray(b"before")
    call = state.set("k", data)
    data[:] = b"after!"
    await call
    assert await state.get("k") == b"before"
    await state.set("k", memoryview(b"view"))
    assert await state.get("k") == b"view"
    await state.set("k", Number.ONE)
    assert await state.increment("k") == 2


JSON = [{"a": [1, None, True, 1.5]}, [], "", "5", 5, 2**70, True, None, 1.25, "é"]


@pytest.mark.parametrize("value", JSON, ids=repr)
async def test_json_values_come_back_as_they_were(store: ratesync.Store, value: object) -> None:
    state = store.state(codec="json")
    await state.set("k", value)
    back = await state.get("k")
    assert (type(back), back) == (type(value), value)
    assert [row async for row in state.scan()] == [("k", value)]


async def test_a_json_integer_is_a_counter_and_a_json_text_is_none(store: ratesync.Store) -> None:
    state = store.state(codec="json")
    await state.set("n", 5)
    assert await state.increment("n") == 6
    await state.set("t", "5")
    with pytest.raises(ratesync.NotAnIntegerError):
        await state.increment("t")
    assert await store.state().get("t") == '"5"'  # without the codec: the text of it


async def test_what_a_codec_raises_reaches_the_caller(memory: ratesync.State) -> None:
    state = memory.store.state(codec="json")
    with pytest.raises(ratesync.ConfigValidationError, match="written as JSON"):
        state.set("k", object())
    await memory.set("k", "text")
    assert await state.get("k") == "text"  # not written by the codec: as it is

    class Broken(CoreState):
        pass

    engine = Engine()
    core = engine.add_store("m", "memory", {})

    def fails(text: str) -> object:
        raise ZeroDivisionError(text)

    for encode in (lambda value: 5, lambda value: b"\xff"):
        broken = Broken(
            core, "p", namespace="n", tenant="t", kind="k", timeout=1, encode=encode, decode=fails
        )
        with pytest.raises(ratesync.ConfigValidationError, match="the codec must give"):
            broken.set("k", "v")
    broken = Broken(
        core, "p", namespace="n", tenant="t", kind="k", timeout=1, encode=json.dumps, decode=fails
    )
    assert await broken.set("k", "v") == 1
    with pytest.raises(ZeroDivisionError, match='"v"'):
        await broken.get("k")
    (outcome,) = await broken.many([("get", "k", None, None, None, None, 1, False, None)])
    assert isinstance(outcome, ZeroDivisionError)
    engine.shutdown()


# What is refused, before anything is sent ----------------------------------------------------------

NAMES = ["", "a\x00b", "\ud800", 5, None, b"bytes", "x" * 1025, "é" * 513]
REFUSED: list[Callable[[Any], object]] = [
    *(lambda s, name=name: s.get(name) for name in NAMES),
    *(lambda s, name=name: s.check_and_set(name) for name in NAMES),
    *(lambda s, kind=kind: s.get("k", kind=kind) for kind in ["", "a\x00", "\udfff", 5, "x" * 256]),
    *(
        lambda s, value=value: s.set("k", value)
        for value in [None, True, 1.5, object(), [], MOST + 1, -MOST - 2, "\ud800", b"x" * (2**26 + 1)]
    ),
    *(
        lambda s, ttl=ttl: s.set("k", "v", ttl=ttl)
        for ttl in [
            *(0, 0.0, -1, -0.001, float("nan"), float("inf"), "5", True, 1e11, 2**70, -(2**70), KEEP),
            *(timedelta(0), timedelta(seconds=-1), timedelta.max, b"1", object()),
        ]
    ),
    *(lambda s, delta=delta: s.increment("k", delta) for delta in [1.0, "1", None, True, MOST + 1]),
    *(lambda s, n=n: s.compare_and_swap("k", expected=n, value="v") for n in [-1, 1.0, None, MOST + 1, True]),
    *(lambda s, n=n: s.delete("k", n) for n in [0, -1, "1", 2**64]),
    *(lambda s, n=n: s.touch("k", 5, expected=n) for n in [0, -1, "1"]),
    *(lambda s, n=n: s.unschedule("k", claim=n) for n in [0, -1, "1"]),
    *(
        lambda s, at=at: s.schedule("k", at)
        for at in [datetime(2030, 1, 1), None, "now", True, float("nan"), 1e12, timedelta.max]
    ),
    *(lambda s, n=n: s.claim_due(n) for n in [0, -1, 1.0, 10_001, "1"]),
    *(lambda s, n=n: s.claim_due(1, n) for n in [0, -1, None, KEEP]),
    lambda s: s.claim_due(kind=""),
    *(lambda s, n=n: s.purge(n) for n in [0, -1, None, 1.5]),
    *(lambda s, op=op: s.many([op]) for op in [None, "get", ("get", "k"), ("drop", *[None] * 8), (5,) * 9]),
    lambda s: s.many([ops.set("", "v")]),
    lambda s: s.many([ops.get("k")] * 10_001),
    lambda s: s.many([ops.set("k", "v"), ops.get("k")], atomic=True),
    lambda s: s.many([s.many([])]),
    lambda s: s.many([s.store.state(tenant="other").get("k")]),
    lambda s: s._scan(None, "a\x00", "", 10),
    lambda s: s._scan(None, "", "\ud800", 10),
    lambda s: s._scan(None, "", "", 0),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_input_is_refused_with_its_cure(memory: ratesync.State, number: int) -> None:
    with pytest.raises(ratesync.ConfigValidationError) as refused:
        REFUSED[number](memory)
    assert isinstance(refused.value, ValueError)
    assert len(str(refused.value)) > 20
    assert refused.value.field
    assert memory.purge().wait() == 0
    assert list(memory.scan()) == []


@pytest.mark.parametrize(
    "given",
    [
        {"prefix": 5},
        {"prefix": "\ud800"},
        {"namespace": ""},
        {"namespace": "a\x00"},
        {"tenant": "x" * 256},
        {"kind": ""},
        {"timeout": 0},
        {"timeout": -1.0},
        {"timeout": "5"},
    ],
    ids=repr,
)
def test_bad_spaces_are_refused(memory: ratesync.State, given: dict[str, Any]) -> None:
    fine = {"prefix": "p", "namespace": "n", "tenant": "t", "kind": "k", "timeout": 1.0}
    options = {**fine, **given}
    with pytest.raises(ratesync.ConfigValidationError):
        CoreState(memory.store._core, options.pop("prefix"), **options)


@pytest.mark.parametrize("ttl", [1, 1.0, timedelta(seconds=1), 0.9996, 1.0004], ids=repr)
def test_times_to_live_of_any_type_are_the_same(ratesync_clock: Any, ttl: Any) -> None:
    state = ratesync.get_store("memory").state()
    state.set("k", "v", ttl=ttl).wait()
    ratesync_clock.advance(0.999)
    assert state.get("k").wait() == "v"
    ratesync_clock.advance(0.001)
    assert state.get("k").wait() is None


@pytest.mark.parametrize("ttl", [1e-9, timedelta(microseconds=1), 0.0004], ids=repr)
def test_less_than_a_millisecond_is_one(ratesync_clock: Any, ttl: Any) -> None:
    state = ratesync.get_store("memory").state()
    assert state.check_and_set("k", ttl=ttl).wait()
    assert not state.check_and_set("k", ttl=ttl).wait()
    ratesync_clock.advance(0.001)
    assert state.check_and_set("k", ttl=ttl).wait()


def test_moments_of_any_type_are_the_same(memory: ratesync.State) -> None:
    moment = datetime(2020, 2, 29, 12, 0, 0, 250_000, tzinfo=UTC)
    for at in (moment, moment.timestamp(), moment.astimezone()):
        memory.schedule("k", at).wait()
        (due,) = memory.claim_due().wait()
        assert (due.key, due.kind, due.due_at) == ("k", "state", moment)
    memory.schedule("k", timedelta(hours=1)).wait()
    assert memory.claim_due().wait() == []


def test_keep_is_one_object(memory: ratesync.State) -> None:
    assert repr(KEEP) == "KEEP"
    assert copy.deepcopy(KEEP) is KEEP
    assert pickle.loads(pickle.dumps(KEEP)) is KEEP


# Errors --------------------------------------------------------------------------------------------


async def test_errors_of_operations_say_what_was_found(state: ratesync.State) -> None:
    await state.set("t", "5")
    with pytest.raises(ratesync.StaleVersionError) as stale:
        await state.compare_and_swap("t", expected=7, value="x")
    assert (stale.value.expected, stale.value.actual) == (7, 1)
    with pytest.raises(ratesync.StaleVersionError) as stale:
        await state.compare_and_swap("t", expected=0, value="x")
    assert (stale.value.expected, stale.value.actual) == (0, 1)
    with pytest.raises(ratesync.StaleVersionError) as stale:
        await state.compare_and_swap("nobody", expected=3, value="x")
    assert (stale.value.expected, stale.value.actual) == (3, 0)
    with pytest.raises(ratesync.NotAnIntegerError) as no_counter:
        await state.increment("t")
    assert no_counter.value.key == "t"
    await state.set("n", MOST)
    with pytest.raises(ratesync.CounterOverflowError) as overflow:
        await state.increment("n")
    assert overflow.value.key == "n"
    assert await state.get("n") == MOST


async def test_many_answer_each_for_itself(state: ratesync.State) -> None:
    await state.set("t", "5")
    call = state.get_versioned("n")
    outcomes = await state.many(
        [
            ops.set("n", 1, ttl=60),
            ops.increment("n", 2),
            ops.get("n"),
            ops.increment("t"),
            ops.compare_and_swap("t", expected=9, value="x"),
            ops.check_and_set("t"),
            ops.delete("t", 7),
            ops.delete("t"),
            ops.touch("nobody", 5),
            ops.schedule("n", 0),
            ops.unschedule("n"),
            ops.set("n", "other", kind="another"),
            call,
        ]
    )
    found = outcomes.pop()
    assert (found.value, found.version) == (3, 2)
    assert isinstance(outcomes[3], ratesync.NotAnIntegerError)
    assert isinstance(outcomes[4], ratesync.StaleVersionError)
    assert outcomes[:3] == [1, 3, 3]
    assert outcomes[5:] == [False, False, True, False, None, True, 1]
    with pytest.raises(RuntimeError, match="made already"):
        await call
    with pytest.raises(RuntimeError, match="made already"):
        state.many([call])
    assert await state.many([]) == []
    assert await state.many([], atomic=True) == []
    assert await state.many(ops.get(key) for key in "ab") == [None, None]


async def test_an_atomic_call_does_all_or_nothing(state: ratesync.State) -> None:
    assert await state.many([ops.set("a", 1), ops.check_and_set("b"), ops.get("c")], atomic=True) == [
        1,
        True,
        None,
    ]
    with pytest.raises(ratesync.RolledBackError) as rolled_back:
        await state.many(
            [ops.set("a", 2), ops.check_and_set("b"), ops.compare_and_swap("c", expected=4, value="x")],
            atomic=True,
        )
    outcomes = rolled_back.value.outcomes
    assert outcomes[1] is False
    assert isinstance(outcomes[2], ratesync.StaleVersionError)
    assert await state.get("a") == 1


# Loops, threads, the engine's end ------------------------------------------------------------------


def test_two_loops_in_two_threads_at_the_same_time(state: ratesync.State) -> None:
    async def count() -> None:
        for _ in range(50):
            await state.increment("n")

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(count() for _ in range(10))), 30)

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.get("n").wait() == 1000


def test_threads_and_a_loop_share_a_state(state: ratesync.State) -> None:
    def count() -> None:
        for _ in range(200):
            state.increment("n").wait()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()

    async def main() -> None:
        for _ in range(200):
            await state.increment("n")

    asyncio.run(main())
    for thread in threads:
        thread.join()
    assert state.get("n").wait() == 1000


def test_outside_of_a_loop_the_error_says_what_to_do(state: ratesync.State, store: ratesync.Store) -> None:
    call = state.set("a", "1")
    if store.engine == "memory":
        with pytest.raises(StopIteration) as stop:
            call.send(None)
        assert stop.value.value == 1
        return
    with pytest.raises(RuntimeError, match="no running event loop"):
        call.send(None)


async def test_calls_after_the_engines_end_raise_a_clear_error(state: ratesync.State) -> None:
    call = state.get("a")
    await state.set("a", "1")
    ratesync.shutdown()
    with pytest.raises(ratesync.StoreClosedError, match="shut down"):
        await call
    for late in (state.set("a", "1"), state.many([ops.get("a")]), state.claim_due(), state.initialize()):
        with pytest.raises(ratesync.StoreClosedError, match="shut down"):
            await late
    with pytest.raises(ratesync.StoreClosedError, match="shut down"):
        await asyncio.to_thread(lambda: state.get("a").wait())


async def test_calls_after_their_stores_end_raise_a_clear_error(state: ratesync.State) -> None:
    await state.set("a", "1")
    await state.store.close()
    for late in (state.get("a"), state.many([ops.get("a")])):
        with pytest.raises(ratesync.StoreClosedError, match="was closed"):
            await late


async def test_a_state_that_was_not_initialised_says_so(memory: ratesync.State) -> None:
    bare = CoreState.__new__(CoreState)
    with pytest.raises(RuntimeError, match="not initialised"):
        await bare.get("a")
    with pytest.raises(RuntimeError, match="not initialised"):
        bare.many([])
    with pytest.raises(RuntimeError, match="initialised once"):
        memory.__init__(  # type: ignore[misc]
            memory.store._core, "p", namespace="n", tenant="t", kind="k", timeout=None
        )
    with pytest.raises(TypeError, match=r"_core\.Store"):
        CoreState(object(), "p", namespace="n", tenant="t", kind="k", timeout=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="namespace, tenant and kind"):
        CoreState(memory.store._core, "p")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="cannot create"):
        _core.StateCall()  # type: ignore[attr-defined]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_the_embedded_store_needs_no_thread_and_no_turn_of_the_loop() -> None:
    script = """
        import asyncio, os, ratesync
        from ratesync import ops
        state = ratesync.get_store("memory").state()
        async def main():
            turned = []
            asyncio.get_running_loop().call_soon(turned.append, 1)
            assert await state.check_and_set("a", ttl=5)
            assert await state.many([ops.get("a"), ops.increment("n")]) == ["1", 1]
            assert turned == []
        asyncio.run(main())
        assert len(os.listdir("/proc/self/task")) == 1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=30)


# What is left behind -------------------------------------------------------------------------------


async def test_a_hundred_thousand_calls_leave_no_memory(state: ratesync.State, store: ratesync.Store) -> None:
    rounds = {"memory": 100_000, "redis": 10_000, "postgres": 3_000}[store.engine]

    async def use(count: int) -> None:
        for n in range(count):
            await state.set("k", n)
            await state.get("k")
            if n % 50 == 0:
                await asyncio.gather(state.get("k"), asyncio.create_task(state.get("k")))
                await state.many([ops.get("k"), ops.increment("n")])

    await use(500)
    gc.collect()
    before = sys.getallocatedblocks()
    await use(rounds // 10)
    gc.collect()
    assert sys.getallocatedblocks() - before < 500


async def test_calls_are_no_work_for_the_collector(state: ratesync.State) -> None:
    call_type = type(state.get("a"))

    def alive() -> int:
        return sum(type(one) is call_type for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        await state.set("a", "1")
        await asyncio.gather(*(asyncio.create_task(state.get("a")) for _ in range(50)))
        await asyncio.gather(*(state.get("a") for _ in range(50)))
        await state.many([ops.get("a")])
        await asyncio.sleep(0)
        assert alive() == 0
    finally:
        gc.enable()


def test_cycles_through_calls_and_codecs_are_collected(ratesync_registry: object) -> None:
    engine = Engine()
    core = engine.add_store("m", "memory", {})

    class Mine(CoreState):
        def encode(self, value: object) -> str:
            return json.dumps(value)

        def __init__(self) -> None:
            super().__init__(
                core,
                "p",
                namespace="n",
                tenant="t",
                kind="k",
                timeout=1,
                encode=self.encode,
                decode=json.loads,
            )
            self.unused = [self.get("a"), self.many([self.set("a", "b")])]

    mine = Mine()
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is None
    engine.shutdown()
