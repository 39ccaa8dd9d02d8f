"""A forked child leaves its parent's Redis connections and slots alone, whatever the deployment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

SCRIPT = """
import gc, os, signal, sys, traceback, warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)  # 3.12 on: fork with threads
import ratesync
from ratesync import acquire, get_limiter, try_acquire

ratesync.configure_store("r", "redis", url=sys.argv[1])
patient = {"fail_closed": True, "outage_budget": 30.0}
ratesync.configure_limiter("slots", "r", max_concurrent=2, lease_seconds=20.0, **patient)
ratesync.configure_limiter("rate", "r", rate_per_second=0.001, burst=3, **patient)

def in_use():
    return get_limiter("slots").peek().wait().in_use

def child(leave):
    with acquire("slots", timeout=60):
        assert in_use() == 2, in_use()
        assert not try_acquire("slots").wait()
    assert try_acquire("rate").wait()
    assert in_use() == 1, in_use()
    gc.collect()
    leave(0)

permit = acquire("slots", timeout=60)
permit.__enter__()
assert try_acquire("rate").wait()
for leave in (os._exit, sys.exit):  # the second with all of Python's own ends
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            child(leave)
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    assert in_use() == 1, in_use()
assert not try_acquire("rate").wait()  # the children counted
assert not permit.lost
permit.release()
with acquire("slots", timeout=60), acquire("slots", timeout=60):
    pass
print("done", flush=True)
"""


@pytest.mark.parametrize(
    "deployment", ["ratesync_redis_url", "ratesync_redis_cluster", "ratesync_redis_sentinel"]
)
def test_a_child_uses_connections_of_its_own(deployment: str, request: pytest.FixtureRequest) -> None:
    given = request.getfixturevalue(deployment)
    url = given if isinstance(given, str) else given.url
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, url], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
