"""The programs of examples/, which the guides show, run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)], capture_output=True, text=True, timeout=60
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


@pytest.mark.parametrize("name", ["background_jobs.py", "per_tenant.py"])
def test_a_guide_shows_it(name: str) -> None:
    guides = (EXAMPLES.parent / "docs" / "guides").glob("*.md")
    assert any(f'--8<-- "examples/{name}"' in guide.read_text(encoding="utf-8") for guide in guides)
