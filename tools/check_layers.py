"""Checks the arrows of the architecture: who may include whom, and who may see which library.

    python tools/check_layers.py [ROOT]

Reads #include lines and Python imports; prints every violation and exits with status 1 when there is
one. The tables below are the rule; CMake's link edges say the same to the linker.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Folder of cpp/ratesync -> folders that it may include besides itself.
LAYERS: dict[str, set[str]] = {
    "base": set(),
    "limits": {"base"},
    "store": {"base", "limits"},
    "batch": {"base"},
    "pool": {"base"},
    "net": {"base"},
    "memory": {"base", "limits", "store"},
    "postgres": {"base", "limits", "store", "batch", "net", "pool"},
    "redis": {"base", "limits", "store", "batch", "net", "pool"},
    "engine": {"base", "limits", "store", "net", "memory", "postgres", "redis"},
    "bindings": {"base", "limits", "store", "engine"},
}

# Includes between folders that the table forbids, with the reason: (file, included).
EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "bindings/objects.h",
        "ratesync/memory/memory_store.h",
    ): "the embedded store decides on the calling thread, without a virtual call in between",
    ("bindings/state.h", "ratesync/memory/memory_state.h"): "the same, of state",
}

# Library header (pattern) -> {file or folder that may include it: why}.
LIBRARIES: list[tuple[str, dict[str, str]]] = [
    (
        r"libpq-fe\.h|libpq/.*|pg_config.*",
        {
            "postgres/libpq.h": "the owning wrappers around libpq's handles",
        },
    ),
    (
        r"asio/io_context\.hpp|asio/steady_timer\.hpp",
        {
            "net/": "the only owner of Asio",
            "engine/": "runs its timers on the I/O thread's loop",
            "postgres/": "waits with time-outs on the I/O thread's loop",
            "redis/": "waits with time-outs on the I/O thread's loop",
        },
    ),
    (
        r"asio/posix/stream_descriptor\.hpp|asio/post\.hpp|asio/error(_code)?\.hpp",
        {
            "net/": "the only owner of Asio",
            "postgres/": "libpq owns the socket; only its readiness is awaited",
            "engine/": "posts to the I/O thread",
            "redis/": "posts to the I/O thread",
        },
    ),
    (r"asio(/.*)?\.hpp", {"net/": "the only owner of Asio"}),
    (r"fmt/(core|format)\.h", {"base/format.h": "formatted(), whose printers are compiled once"}),
    (r"hiredis.*|openssl/.*", {"redis/": "the RESP reader", "net/": "TLS"}),
    (r"Python\.h|pybind11/.*|structmember\.h", {"bindings/": "the only folder that knows Python"}),
]

# Folders that decide and never act: no system calls, clocks, threads, files.
SANS_IO = {"limits", "batch", "pool"}
SANS_IO_FORBIDDEN = re.compile(
    r"thread|mutex|shared_mutex|condition_variable|future|fstream|iostream|filesystem|ctime"
    r"|sys/.*|unistd\.h|poll\.h|pthread\.h"
)

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def includes(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, included name, and whether it is one of ours (in quotes)."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = INCLUDE.match(line)
        if found:
            yield number, found[2], found[1] == '"'


def allowed_by(places: dict[str, str], file: str) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def check_cpp(root: Path) -> Iterator[str]:
    base = root / "cpp" / "ratesync"
    for path in sorted([*base.rglob("*.h"), *base.rglob("*.cc")]):
        file = path.relative_to(base).as_posix()
        layer = file.partition("/")[0]
        if layer not in LAYERS:
            yield f"cpp/ratesync/{file}: folder {layer!r} is not a layer; add it to LAYERS with its arrows"
            continue
        for line, name, quoted in includes(path):
            where = f"cpp/ratesync/{file}:{line}"
            if quoted:
                yield from check_own_include(where, file, layer, name)
                continue
            for pattern, places in LIBRARIES:
                if re.fullmatch(pattern, name):
                    if not allowed_by(places, file):
                        yield f"{where}: <{name}> belongs to {', '.join(places)} only"
                    break
            if layer in SANS_IO and SANS_IO_FORBIDDEN.fullmatch(name):
                yield f"{where}: {layer}/ decides without I/O, threads and clocks; <{name}> is none of its"


def check_own_include(where: str, file: str, layer: str, name: str) -> Iterator[str]:
    parts = PurePosixPath(name).parts
    if parts[0] != "ratesync" or len(parts) < 3:
        yield f'{where}: "{name}": include by full path, "ratesync/<layer>/<file>"'
        return
    target = parts[1]
    if target == layer or target in LAYERS[layer] or (file, name) in EXCEPTIONS:
        return
    may = ", ".join(sorted(LAYERS[layer])) or "nothing"
    yield f'{where}: {layer} may include {may}; not "{name}"'


# Python: module prefix -> the only files that may import it.
PYTHON_OWNERS = {"ratesync._core": {"_engine.py"}}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module, and of every name imported from one."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = ("ratesync." if node.level else "") + (node.module or "")
            yield node.lineno, module.rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{module.rstrip('.')}.{alias.name}"


def check_python(root: Path) -> Iterator[str]:
    base = root / "python" / "ratesync"
    for path in sorted(base.rglob("*.py")):
        file = path.relative_to(base).as_posix()
        seen: set[tuple[int, str]] = set()
        for line, module in imports(path):
            where = f"python/ratesync/{file}:{line}"
            for owned, owners in PYTHON_OWNERS.items():
                inside = module == owned or module.startswith(f"{owned}.")
                if inside and file not in owners and (line, owned) not in seen:
                    seen.add((line, owned))
                    yield f"{where}: {owned} is imported by {', '.join(sorted(owners))} only"
            if file.startswith("contrib/") and is_private(module):
                yield f"{where}: contrib/ may use the public API only, not {module}"


def is_private(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "ratesync" and any(part.startswith("_") for part in parts[1:])


def main(root: Path) -> int:
    violations = [*check_cpp(root), *check_python(root)]
    for violation in violations:
        print(violation)
    if violations:
        print(f"{len(violations)} violations of the layering (docs/architecture.md)")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent))
