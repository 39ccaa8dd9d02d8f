"""The programs of examples/, which the guides show, run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_every_background_job_is_done() -> None:
    assert run("background_jobs.py").startswith("60 jobs, ")


def test_a_tenant_is_served_up_to_its_own_limit() -> None:
    lines = run("per_tenant.py").splitlines()
    assert [line for line in lines if line.startswith("initech  429 free:initech, again in")] == lines[5:7]
    assert sum(line.startswith("acme     served") for line in lines) == 7
    assert lines[-1] == "initech: 5 used, 0 left"


def test_a_job_that_comes_twice_is_charged_once() -> None:
    assert run("exactly_once.py") == "40 deliveries, 20 charges, the same receipt for both: True\n"


def test_one_leads_at_a_time_and_late_writes_are_refused() -> None:
    assert run("leader_election.py") == "3 leaders, tokens grow: True, a late write passed: False\n"


def test_a_webhook_is_handled_once() -> None:
    assert run("webhook_dedup.py") == "200 deliveries, 50 handled, all answered 200: True\n"


@pytest.mark.parametrize(
    "name",
    ["background_jobs.py", "per_tenant.py", "exactly_once.py", "leader_election.py", "webhook_dedup.py"],
)
def test_a_guide_shows_it(name: str) -> None:
    guides = (EXAMPLES.parent / "docs" / "guides").glob("*.md")
    assert any(f'--8<-- "examples/{name}"' in guide.read_text(encoding="utf-8") for guide in guides)
