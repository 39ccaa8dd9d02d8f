"""tools/check_layers.py: what it must refuse, on small trees that break one rule each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(root: Path, file: str, text: str) -> Path:
    for folder in ("cpp/ratesync", "python/ratesync"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("cpp/ratesync/base/a.h", '#include "ratesync/limits/gcra.h"', "base may include nothing"),
        ("cpp/ratesync/memory/a.cc", '#include "ratesync/postgres/pg_pool.h"', "memory may include"),
        ("cpp/ratesync/postgres/a.cc", '  #  include "ratesync/redis/resp.h"', "postgres may include"),
        ("cpp/ratesync/pool/a.cc", '#include "ratesync/net/io_thread.h"', "pool may include base"),
        ("cpp/ratesync/base/a.h", '#include "status.h"', "full path"),
        ("cpp/ratesync/redis/a.cc", "#include <fmt/format.h>", "base/format.h only"),
        ("cpp/ratesync/extra/a.h", "", "not a layer"),
        (
            "cpp/ratesync/engine/a.cc",
            "#include <libpq-fe.h>",
            "belongs to postgres/libpq.h only",
        ),
        ("cpp/ratesync/memory/a.cc", "#include <asio/io_context.hpp>", "<asio/io_context.hpp> belongs to"),
        ("cpp/ratesync/postgres/a.cc", "#include <asio.hpp>", "<asio.hpp> belongs to net/"),
        ("cpp/ratesync/engine/a.cc", "#include <Python.h>", "<Python.h> belongs to bindings/"),
        ("cpp/ratesync/engine/a.cc", "#include <pybind11/pybind11.h>", "belongs to bindings/"),
        ("cpp/ratesync/batch/a.h", "#include <mutex>", "without I/O, threads and clocks"),
        ("python/ratesync/limits.py", "from ratesync import _core", "_engine.py only"),
        ("python/ratesync/limits.py", "import ratesync._core as c", "_engine.py only"),
        ("python/ratesync/limits.py", "from ._core import Engine", "_engine.py only"),
        ("python/ratesync/contrib/web.py", "from ratesync import _registry", "public API only"),
        ("python/ratesync/contrib/web.py", "from ratesync._engine import log", "public API only"),
    ],
)
def test_a_forbidden_edge_is_reported(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, named: str
) -> None:
    assert tool.main(tree(tmp_path, file, text)) == 1
    out = capsys.readouterr().out
    assert named in out
    assert file in out


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cpp/ratesync/postgres/a.cc", '#include "ratesync/batch/batcher.h"\n#include <vector>'),
        ("cpp/ratesync/postgres/libpq.h", "#include <libpq-fe.h>"),
        ("cpp/ratesync/net/a.cc", "#include <asio.hpp>\n#include <thread>"),
        ("cpp/ratesync/engine/a.cc", '#include "ratesync/memory/memory_store.h"'),
        ("cpp/ratesync/bindings/a.cc", "#include <Python.h>"),
        ("python/ratesync/_engine.py", "from ratesync import _core"),
        (
            "python/ratesync/contrib/web.py",
            "from ratesync.limits import RateLimiter",
        ),
    ],
)
def test_an_allowed_edge_passes(tool: ModuleType, tmp_path: Path, file: str, text: str) -> None:
    assert tool.main(tree(tmp_path, file, text)) == 0


def test_this_repository_keeps_its_layers(tool: ModuleType) -> None:
    assert tool.main(ROOT) == 0
