"""Processes that end, fork or are stopped while they hold locks or wait for them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from ratesync._core import Lock
from ratesync._engine import Engine

PRELUDE = """
import asyncio, atexit, os, sys, threading, time, warnings
def last(): pass
atexit.register(lambda: last())  # before ratesync's, so that it runs after it
import ratesync
from ratesync import _core, _engine, errors
warnings.filterwarnings("ignore", category=DeprecationWarning)

def make(kind="memory", **options):
    return _engine.default_engine().add_store(kind, kind, options)

def lock(store, name="a", **options):
    return _core.Lock(store, "acteon_", "default", "default", name, **options)
"""


def run(script: str, *args: str, code: int = 0, seconds: float = 60) -> str:
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PRELUDE + textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (code, "")
    return ended.stdout


def test_held_and_waited_for_in_memory_a_process_ends_at_once() -> None:
    run(
        """
        store = make()
        lease = lock(store).acquire().wait()
        def wait():
            try:
                lock(store).acquire().wait()
            except errors.StoreClosedError:
                pass
        threading.Thread(target=wait, daemon=True).start()
        async def main():
            tasks = [asyncio.create_task(lock(store).__aenter__()) for _ in range(100)]
            await asyncio.sleep(0.05)
        asyncio.run(main())
        sys.exit(3)
    """,
        code=3,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_holds_nothing_of_its_parents_and_takes_its_own() -> None:
    out = run("""
        parent = make()
        lease = lock(parent).acquire().wait()
        held = lock(parent, "line")
        held.__enter__()
        waiting = threading.Thread(target=lambda: lock(parent, "line").acquire().wait().release().wait())
        waiting.start()
        time.sleep(0.1)
        pid = os.fork()
        if pid == 0:
            assert lease.lost and lease.remaining == 0 and not lease.held
            for call in (lease.release, lease.lost_signal, lambda: lease.extend(1)):
                try:
                    call()
                except errors.StoreClosedError:
                    continue
                os._exit(2)
            try:
                lock(parent)
            except errors.StoreClosedError:
                pass
            else:
                os._exit(3)
            del lease
            held.__exit__(None, None, None)
            with lock(make()) as own:
                assert own.held and own.token == 1
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "child"
        assert lease.held
        held.__exit__(None, None, None)
        waiting.join()
        assert lease.release().wait()
        print("done")
    """)
    assert out == "done\n"


# On a server --------------------------------------------------------------------------------------


@pytest.fixture
async def witness(ratesync_postgres_url):
    engine = Engine()
    store = engine.add_store("db", "postgres", {"url": ratesync_postgres_url, "auto_create": True})
    await store.migrate_state("acteon_", False)
    yield store
    await asyncio.to_thread(engine.shutdown)


def lock(store, name: str = "a", **options: object) -> Lock:
    return Lock(store, "acteon_", "default", "default", name, **options)


async def test_locks_held_at_exit_are_given_back(witness, ratesync_postgres_url) -> None:
    script = """
        store = make("postgres", url=sys.argv[1])
        leases = [lock(store, sys.argv[2] + str(i), ttl=600).acquire().wait() for i in range(20)]
        def last(): print(time.monotonic() - begin)
        begin = time.monotonic()
        sys.exit(0)
    """
    for turn in "abcdef":
        took = float(await asyncio.to_thread(run, script, ratesync_postgres_url, turn))
        if took < 0.5:  # not given up, because the server had no turn meanwhile
            break
    else:
        pytest.fail(f"the process took its time to end, at last {took} s")
    for number in range(20):
        lease = await lock(witness, f"{turn}{number}").acquire(timeout=0)
        assert lease is not None, number
        await lease.release()


async def test_a_child_gives_nothing_back_of_its_parents(witness, ratesync_postgres_url) -> None:
    script = """
        store = make("postgres", url=sys.argv[1])
        lease = lock(store, ttl=600).acquire().wait()
        pid = os.fork()
        if pid == 0:
            del lease
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        other = _engine.default_engine().add_store("other", "postgres", {"url": sys.argv[1]})
        assert lock(other, "b").acquire().wait().release().wait()  # connected
        assert lock(other).acquire(timeout=0).wait() is None
        assert lease.release().wait()
    """
    await asyncio.to_thread(run, script, ratesync_postgres_url)


async def test_a_stopped_holder_sees_at_once_that_it_lost_the_lock(witness, ratesync_postgres_url) -> None:
    script = """
        store = make("postgres", url=sys.argv[1])
        lease = lock(store, ttl=1.0).acquire().wait()
        rang = []
        thread = threading.Thread(target=lambda: rang.append(lease.lost_signal().wait()))
        thread.start()
        print("held", lease.token, flush=True)
        sys.stdin.readline()
        print("lost" if lease.lost else "held", flush=True)
        thread.join(60)
        assert rang == [True]
        assert lease.release().wait() is False
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), ratesync_postgres_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    token = int((await asyncio.to_thread(holder.stdout.readline)).split()[1])
    os.kill(holder.pid, signal.SIGSTOP)
    heir = await lock(witness).acquire(timeout=60)
    assert heir is not None
    assert heir.token > token
    holder.stdin.write("\n")
    holder.stdin.flush()
    os.kill(holder.pid, signal.SIGCONT)
    out, err = await asyncio.to_thread(holder.communicate)
    assert (holder.returncode, out, err) == (0, "lost\n", "")
    assert heir.held
    await heir.release()
