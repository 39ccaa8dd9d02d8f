"""Fixtures of the Python unit tests: a registry without configuration, in an empty directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ratesync._registry import _registry


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing configured and nothing to discover, before and after; yields the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RATE_SYNC_CONFIG", raising=False)
    _registry.clear()
    yield tmp_path
    _registry.clear()
