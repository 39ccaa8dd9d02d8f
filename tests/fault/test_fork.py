"""A forked child starts afresh and leaves its parent alone.

Each test is a script in a process of its own: a suite that forks itself tests pytest. In the scripts
`in_child(f)` forks, runs `f` in the child, and fails when the child hangs, dies or returns anything but
what is expected.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

PRELUDE = """
import asyncio, gc, multiprocessing, os, signal, sys, threading, time, traceback, warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)  # 3.12 on: fork with threads
import ratesync
from ratesync import acquire, configure_limiter, get_limiter

configure_limiter("slots", "memory", max_concurrent=2)
configure_limiter("rate", "memory", rate_per_second=1000.0)

def in_use():
    return get_limiter("slots")._peek(None).wait()["in_use"]

def in_child(f, seconds=60.0, exit=os._exit):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(seconds))  # a hang ends as a signal
        try:
            f()
        except BaseException:
            traceback.print_exc()
            exit(1)
        exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child ended with status {status}"

def use_the_io_thread():
    assert get_limiter("slots")._try(0, 1, None).wait()
    get_limiter("slots")._release_bare()
    in_use()

def take_both_and_be_refused():
    with acquire("slots"), acquire("slots"):
        try:
            with acquire("slots", 0.01):
                raise AssertionError("a third slot")
        except ratesync.RateLimiterAcquisitionError:
            pass
    assert in_use() == 0, in_use()
"""


def run(script: str, *, expect: int = 0, seconds: float = 150, stdout: str = "done\n") -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script) + "\nprint('done', flush=True)\n"],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (expect, stdout, "")


def test_a_child_acquires_with_an_engine_of_its_own() -> None:
    run("""
        use_the_io_thread()
        in_child(take_both_and_be_refused)
        take_both_and_be_refused()
    """)


def test_a_child_of_a_child() -> None:
    run("""
        use_the_io_thread()
        def child():
            take_both_and_be_refused()
            in_child(take_both_and_be_refused)
            take_both_and_be_refused()
        in_child(child)
    """)


def test_the_parents_permits_stay_the_parents() -> None:
    run("""
        use_the_io_thread()
        limiter = get_limiter("slots")
        quick = acquire("slots")
        quick.__enter__()
        waited = acquire("slots")
        thread = threading.Thread(target=waited.__enter__)
        blocker = acquire("slots"); blocker.__enter__()
        thread.start(); time.sleep(0.05); blocker.release(); thread.join()
        assert in_use() == 2

        def child():
            with acquire("slots"), limiter:  # the child has two slots of its own
                quick.release()
                waited.__exit__(None, None, None)
                try:
                    with acquire("slots", 0.01):
                        raise AssertionError("a third slot: the parent's was freed here")
                except ratesync.RateLimiterAcquisitionError:
                    pass
                assert in_use() == 2, in_use()
            assert in_use() == 0

        in_child(child)
        assert in_use() == 2
        quick.release(); waited.release()
        while in_use():
            time.sleep(0.001)
    """)


def test_permits_dropped_by_the_child_warn_nobody_and_free_nothing() -> None:
    run("""
        warnings.simplefilter("error", ResourceWarning)
        permit = acquire("slots"); permit.__enter__()
        bare = [acquire("slots")]
        bare[0].__enter__()
        def child():
            global permit
            del permit
            bare.clear()
            gc.collect()
            take_both_and_be_refused()
        in_child(child)
        assert in_use() == 2
        permit.release(); bare[0].release()
    """)


def test_a_limiter_object_and_a_body_held_across_fork() -> None:
    run("""
        limiter = get_limiter("slots")
        with limiter, limiter.acquire_context() as permit:
            def child():
                take_both_and_be_refused()
                assert permit.limiter_id == "slots"
                assert permit.remaining >= 0
                with limiter:
                    assert in_use() == 1
            in_child(child)
            assert in_use() == 2
        assert in_use() == 0
    """)


def test_a_child_that_leaves_the_parents_body_by_an_exception() -> None:
    run("""
        limiter = get_limiter("slots")
        try:
            with limiter, acquire("slots"):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(60)
                    raise ZeroDivisionError
                _, status = os.waitpid(pid, 0)
                assert status == 0, status
                assert in_use() == 2
        except ZeroDivisionError:
            take_both_and_be_refused()
            os._exit(0)
        assert in_use() == 0
    """)


def test_fork_with_tasks_waiting_and_from_inside_the_loop() -> None:
    run("""
        async def body():
            async with acquire("slots"):
                await asyncio.sleep(0.01)

        async def many():
            await asyncio.wait_for(asyncio.gather(*(body() for _ in range(20))), 60)

        async def main():
            tasks = [asyncio.create_task(body()) for _ in range(20)]
            await asyncio.sleep(0.005)
            in_child(lambda: asyncio.run(many()))
            in_child(take_both_and_be_refused)
            await asyncio.wait_for(asyncio.gather(*tasks), 60)
        asyncio.run(main())
        assert in_use() == 0
    """)


def test_fork_while_threads_submit_never_hangs_the_child() -> None:
    run("""
        stop = False
        def busy():
            while not stop:
                with acquire("slots"):
                    pass
                acquire("slots", key="k")
                get_limiter("rate")._peek(None).wait()
        threads = [threading.Thread(target=busy) for _ in range(6)]
        for thread in threads: thread.start()
        for _ in range(25):
            in_child(take_both_and_be_refused)
        stop = True
        for thread in threads: thread.join()
        assert in_use() == 0
    """)


def test_fork_from_a_thread() -> None:
    run("""
        use_the_io_thread()
        failed = []
        def work():
            try:
                in_child(take_both_and_be_refused)
            except BaseException as error:
                failed.append(error)
        thread = threading.Thread(target=work)
        thread.start(); thread.join()
        assert not failed, failed
    """)


def test_a_child_may_end_like_any_process() -> None:
    run("""
        use_the_io_thread()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            take_both_and_be_refused()
            sys.exit(7)  # through atexit and finalization
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7, status
    """)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(
        PRELUDE
        + textwrap.dedent(f"""
        from concurrent.futures import ProcessPoolExecutor
        def work(_):
            take_both_and_be_refused()
            return os.getpid()
        if __name__ == "__main__":
            use_the_io_thread()
            with acquire("slots"):
                context = multiprocessing.get_context({method!r})
                with ProcessPoolExecutor(2, mp_context=context) as pool:
                    assert os.getpid() not in set(pool.map(work, range(8), timeout=60))
                with context.Pool(2) as pool:
                    pool.map_async(work, range(8)).get(60)
                process = context.Process(target=take_both_and_be_refused)
                process.start(); process.join(60)
                assert process.exitcode == 0
                assert in_use() == 1
            print("done")
    """)
    )
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=170, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")
def test_a_child_keeps_none_of_the_loops_queues_open() -> None:
    run("""
        def eventfds():
            paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            return sum("eventfd" in os.readlink(path) for path in paths if os.path.lexists(path))

        async def main():
            async with acquire("slots"), acquire("slots"):
                waiting = asyncio.create_task(get_limiter("slots")._try(0.02, 1, None))
                await asyncio.sleep(0.005)
                before = eventfds()
                def child():
                    assert eventfds() == before - 1, (before, eventfds())
                in_child(child)
                assert await waiting is False
                assert eventfds() == before
        asyncio.run(main())
    """)


def test_a_limiter_without_a_name_renews_itself_in_the_child() -> None:
    run("""
        limiter = ratesync.MemoryRateLimiter("direct", rate_per_second=0.001, max_concurrent=1)
        configure_limiter("direct", rate_per_second=0.001, burst=50)  # not this one
        assert limiter.try_acquire().wait()

        def child():
            assert limiter._release_bare() is False  # the slot is the parent's
            assert [limiter.try_acquire().wait() for _ in range(2)] == [True, False]
            in_child(lambda: limiter.try_acquire().wait() or os._exit(9))

        in_child(child)
        assert not limiter.try_acquire().wait()
        assert limiter.release().wait() is True
    """)


def test_children_of_a_preloading_server_share_a_limit_in_the_database(ratesync_postgres_url: str) -> None:
    run(f"""
        url = {ratesync_postgres_url!r}
        options = {{"auto_create": True, "fail_closed": True, "outage_budget": 30.0}}
        limiter = ratesync.PostgresRateLimiter(url, "api", rate_per_second=0.001, burst=3, **options)
        assert limiter.try_acquire().wait()

        @ratesync.rate_limited(limiter, timeout=0, mode="try")
        def work():
            return True

        def child():
            assert work()
            limiter.disconnect().wait()
            limiter.initialize().wait()

        in_child(child)
        in_child(child)
        assert work() is None
    """)


def test_a_store_of_a_preloading_server_gives_locks_and_state_in_its_children(
    ratesync_postgres_url: str,
) -> None:
    run(f"""
        ratesync.configure_store("db", "postgres", url={ratesync_postgres_url!r}, auto_create=True)
        store = ratesync.get_store("db")
        held = store.lock("parents").acquire(timeout=60).wait()
        assert held is not None

        def child():
            with store.lock("first", timeout=60):
                pass  # connected
            assert store.try_lock("parents").wait() is None
            with store.lock("childs", timeout=60) as lease:
                assert [row["name"] for row in store.locks().wait()] == ["childs", "parents"]
            store.state(timeout=60).increment("children").wait()
            with store.idempotent("once", timeout=60) as op:
                if not op.done:
                    op.result = os.getpid()
            assert not store.break_lock("childs").wait()

        in_child(child)
        in_child(child)
        assert store.state(timeout=60).get("children").wait() == 2
        assert held.release().wait()
    """)
