"""The vector file of the windows is what the model says; the core, SQL and Lua are held against the file."""

import window_histories


def test_the_vector_file_is_what_the_model_says():
    written = window_histories.FILE.read_text()
    assert written == window_histories.text(), "run: python tests/vectors/window_histories.py"
