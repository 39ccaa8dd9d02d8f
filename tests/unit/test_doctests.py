"""The examples in docstrings run, each module's with nothing configured before."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import ratesync

# Need packages of the extras, or are of the command line.
OUTSIDE = ("ratesync.contrib.", "ratesync.cli", "ratesync.__main__", "ratesync.testing.")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ratesync.__path__, "ratesync.")
    if not module.name.startswith(OUTSIDE)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, ratesync_registry: Path) -> None:
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module)
    assert failures == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    documented = [
        name for name in MODULES if any(t.examples for t in finder.find(importlib.import_module(name)))
    ]
    assert len(documented) > 8
