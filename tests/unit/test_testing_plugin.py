"""The pytest plugin as suites of users see it, in pytest runs of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STRICT = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
ratesync_strict_loop = true
ratesync_crash_sentinel = true
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # Another process: it must not share our engine, and one of the runs crashes.
    return pytester.runpytest_subprocess("-p", "no:randomly", *arguments)


def test_each_test_gets_a_registry_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest, ratesync

        @pytest.mark.parametrize("turn", [1, 2])
        def test_it(ratesync_registry, turn):
            assert ratesync.list_limiters() == {}
            ratesync.configure_limiter("api", rate_per_second=0.01)
            assert ratesync.try_acquire("api").wait()
        """
    )
    run(pytester).assert_outcomes(passed=2)


def test_errors_left_in_a_loop_fail_a_strict_suite(pytester: pytest.Pytester) -> None:
    pytester.makeini(STRICT)
    pytester.makepyfile(
        """
        import asyncio

        async def test_it():
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
            await asyncio.sleep(0)
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left in the event loop*", "*ZeroDivisionError*"])


def test_a_suite_that_asks_for_nothing_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import asyncio

        def test_it():
            async def main():
                asyncio.get_running_loop().call_soon(lambda: 1 / 0)
                await asyncio.sleep(0)
            asyncio.run(main())
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_a_crashed_run_is_reported_by_the_next_one_and_only_by_that(pytester: pytest.Pytester) -> None:
    pytester.makeini(STRICT)
    pytester.makepyfile("import os\ndef test_that_crashes(): os.kill(os.getpid(), 9)")
    assert run(pytester).ret != 0
    pytester.makepyfile("def test_fine(): pass")
    run(pytester).stdout.fnmatch_lines(["*PREVIOUS RUN CRASHED*::test_that_crashes"])
    run(pytester).stdout.no_fnmatch_line("*PREVIOUS RUN CRASHED*")


def test_the_plugin_costs_no_heavy_imports() -> None:
    code = (
        "import ratesync.testing.plugin, sys;"
        "print([m for m in ('asyncpg', 'msgspec', 'uvloop', 'aiohttp', 'ratesync.testing.postgres') "
        "if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "[]"


def test_the_contract_can_be_inherited(pytester: pytest.Pytester) -> None:
    pytester.makeini(STRICT)
    pytester.makepyfile(
        """
        import pytest
        from ratesync.testing import LimitContract

        class TestMine(LimitContract):
            @pytest.fixture
            def store_options(self):
                return {"engine": "memory"}
        """
    )
    result = run(pytester, "-k", "burst or peek")
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] >= 4
