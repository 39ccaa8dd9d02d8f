"""A process that uses ratesync ends: at once, with its own exit code, without a word on stderr.

Whatever is under way - tasks that wait, permits held, threads blocked, calls made while the interpreter
is taken apart. Each test is a script in a process of its own. At once means: long before anything that
would end by itself, on a machine that may stand still for seconds.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import asyncio, atexit, gc, os, sys, threading, time
import ratesync
from ratesync import acquire, configure_limiter, get_limiter

configure_limiter("slot", "memory", max_concurrent=1)
configure_limiter("rate", "memory", rate_per_second=0.001)

def use_the_io_thread():
    get_limiter("slot")._peek(None).wait()
"""

SECONDS = 25.0


def run(script: str, *, code: int = 0, stderr: str = "", stdout: str | None = None) -> str:
    """Runs the script; it must end in time, with the code, and say nothing else on stderr."""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PRELUDE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    if stderr:
        assert stderr in ended.stderr
    else:
        assert ended.stderr == ""
    if stdout is not None:
        assert ended.stdout == stdout
    return ended.stderr


def test_nothing_was_used() -> None:
    run("")


def test_tasks_wait_when_run_ends() -> None:
    run("""
        async def main():
            async with acquire("slot"):
                tasks = [asyncio.create_task(get_limiter("slot")._try(None, 1, None)) for _ in range(100)]
                await asyncio.sleep(0.01)
        asyncio.run(main())
    """)


def test_tasks_wait_in_a_loop_that_is_just_left() -> None:
    run(
        """
        held = acquire("slot")
        async def main():
            await held.__aenter__()
            tasks.append(asyncio.create_task(get_limiter("slot")._try(None, 1, None)))
            await asyncio.sleep(0.01)
        tasks = []
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        tasks[0]._log_destroy_pending = False
        sys.exit(3)
    """,
        code=3,
    )


def test_ten_thousand_sleepers() -> None:
    run("""
        async def main():
            await acquire("rate")
            tasks = [asyncio.create_task(get_limiter("rate")._try(None, 1, None)) for _ in range(10_000)]
            await asyncio.sleep(0.05)
        asyncio.run(main())
    """)


def test_permits_are_held() -> None:
    run(
        """
        use_the_io_thread()
        permit = acquire("slot")
        permit.__enter__()
        get_limiter("slot")
        sys.exit(4)
    """,
        code=4,
    )


@pytest.mark.parametrize(
    "how", ["acquire('slot').__enter__()", "get_limiter('slot')._try(None, 1, None).wait()"]
)
def test_daemon_threads_block_in_acquire(how: str) -> None:
    run(
        f"""
        held = acquire("slot"); held.__enter__()
        def work():
            try:
                {how}
            except ratesync.RateLimiterError:
                pass
        for _ in range(10):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.1)
        sys.exit(5)
    """,
        code=5,
    )


def test_daemon_threads_call_all_the_time() -> None:
    for _ in range(3):
        run(
            """
            configure_limiter("many", "memory", max_concurrent=2)
            def work():
                while True:
                    try:
                        with acquire("many"):
                            pass
                        get_limiter("many")._peek(None).wait()
                    except ratesync.RateLimiterError:
                        pass
            for _ in range(6):
                threading.Thread(target=work, daemon=True).start()
            time.sleep(0.1)
            sys.exit(6)
        """,
            code=6,
        )


def test_a_loop_runs_in_a_daemon_thread() -> None:
    run("""
        async def work():
            while True:
                async with acquire("slot"):
                    await asyncio.sleep(0)
        async def main():
            await asyncio.gather(*(work() for _ in range(5)))
        def run():
            try:
                asyncio.run(main())
            except BaseException:  # that the engine was shut down, if there is still time to say so
                pass
        threading.Thread(target=run, daemon=True).start()
        time.sleep(0.1)
    """)


def test_an_exception_ends_the_process_inside_a_body() -> None:
    run(
        """
        with acquire("slot"):
            use_the_io_thread()
            raise ZeroDivisionError
    """,
        code=1,
        stderr="ZeroDivisionError",
    )


def test_os_exit_while_everything_is_under_way() -> None:
    run(
        """
        held = acquire("slot"); held.__enter__()
        threading.Thread(target=lambda: acquire("slot").__enter__(), daemon=True).start()
        time.sleep(0.05)
        os._exit(8)
    """,
        code=8,
    )


def test_calls_during_finalization_end_or_raise() -> None:
    run("""
        use_the_io_thread()
        permit = acquire("slot")
        class Late:
            def __init__(self, name): self.name = name
            def __del__(self, acquire=acquire, get_limiter=get_limiter, limiter=get_limiter("slot"),
                        BaseException=BaseException):
                for call in (
                    lambda: acquire("slot", 0.01).__enter__(),
                    lambda: acquire("unknown").__enter__(),
                    lambda: acquire("slot", key="k").__enter__(),
                    lambda: limiter.__enter__(),
                    lambda: limiter.__exit__(None, None, None),
                    lambda: limiter._try(0.01, 1, None).wait(),
                    lambda: limiter._peek(None).wait(),
                    lambda: limiter._counters(),
                    lambda: limiter.acquire_context().__aenter__(),
                    lambda: permit.release(),
                    lambda: repr(permit),
                    lambda: get_limiter("slot"),
                ):
                    try:
                        call()
                    except BaseException:
                        pass
        sys.late = Late("in sys")
        module_level = Late("in the module")
        cycle = [Late("in a cycle")]; cycle.append(cycle)
        import ratesync._core
        ratesync._core.late = Late("in the extension")
    """)


def test_calls_from_flush_and_from_exit_handlers_around_ours() -> None:
    run("""
        # Registered after ours runs before it: there everything works still.
        def before():
            assert get_limiter("slot")._peek(None).wait()["in_use"] == 0
            with acquire("slot"): pass
        atexit.register(before)

        class Stream:
            def __init__(self, real): self.real = real
            def write(self, text): return self.real.write(text)
            def flush(self):
                for call in (
                    lambda: acquire("slot", 0.01).__enter__(),
                    lambda: get_limiter("slot")._peek(None).wait(),
                ):
                    try:
                        call()
                    except BaseException:
                        pass
                return self.real.flush()
        sys.stderr = Stream(sys.stderr)
        sys.stdout = Stream(sys.stdout)
    """)


def test_exit_handlers_registered_before_the_import_get_a_clear_error() -> None:
    script = textwrap.dedent("""
        import atexit, sys
        def late():
            for call in (
                lambda: ratesync.acquire("slot").__enter__(),
                lambda: limiter._peek(None).wait(),
                lambda: limiter.__enter__(),
            ):
                try:
                    call()
                except ratesync.RateLimiterError as error:
                    print("shut down" in str(error))
        atexit.register(late)
        import ratesync
        ratesync.configure_limiter("slot", "memory", max_concurrent=1)
        limiter = ratesync.get_limiter("slot")
        limiter._peek(None).wait()
    """)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "True\nTrue\nTrue\n")


def test_an_engine_that_nobody_shut_down() -> None:
    run("""
        from ratesync._engine import Engine, Limiter
        engines = [Engine() for _ in range(5)]
        limiters = [Limiter(engine.add_store("m", "memory", {}), "x", max_concurrent=1) for engine in engines]
        permits = [limiter.acquire_context() for limiter in limiters]
        for limiter, permit in zip(limiters, permits):
            permit.__enter__()
            limiter._peek(None).wait()
            threading.Thread(target=limiter.acquire_context().__enter__, daemon=True).start()
        time.sleep(0.05)
        del engines[2:]
    """)


def test_sigterm_ends_the_process() -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PRELUDE + "with acquire('slot'):\n    print('in', flush=True)\n    acquire('slot').__enter__()\n",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.terminate()
    process.communicate(timeout=SECONDS)
    assert process.returncode == -15


def test_sigint_ends_a_blocked_process() -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PRELUDE + "with acquire('slot'):\n    print('in', flush=True)\n    acquire('slot').__enter__()\n",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(2)
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode in (-2, 130)
    assert "KeyboardInterrupt" in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="starves the process of threads by Linux's limits")
def test_a_system_that_gives_no_thread_is_an_error_and_no_abort() -> None:
    script = PRELUDE + textwrap.dedent("""
        with acquire("slot"):
            for _ in range(2):
                try:
                    with acquire("slot", 0.1):
                        pass
                except ratesync.StoreExhaustedError as error:
                    print("no further thread" in str(error))
    """)
    starve = textwrap.dedent("""
        import os, resource, sys
        resource.setrlimit(resource.RLIMIT_STACK, (4 << 30, resource.RLIM_INFINITY))  # of each new thread
        limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.RLIM_INFINITY))"
        os.execv(sys.executable, [sys.executable, "-c", limit + sys.argv[1]])
    """)
    ended = subprocess.run(
        [sys.executable, "-c", starve, script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "True\nTrue\n")
