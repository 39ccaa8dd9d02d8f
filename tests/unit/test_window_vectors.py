"""The vector file of the windows is what the model says; the core, SQL and Lua are held against the file."""

from pathlib import Path

import pytest


def test_the_vector_file_is_what_the_model_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "vectors"))
    import window_histories  # type: ignore[import-not-found]

    written = window_histories.FILE.read_text()
    assert written == window_histories.text(), "run: python tests/vectors/window_histories.py"
