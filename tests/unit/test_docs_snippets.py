"""What the documentation shows is true: its Python compiles, its TOML is valid, its tables match the code.

The quick start of the README is run; blocks that need a database or a server are compiled only.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
import tomllib
from pathlib import Path

import msgspec
import pytest

from ratesync import _schemas, _state_schema, errors

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "decisions" not in page.parts
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, dedented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [textwrap.dedent(text) for _, text in found]


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_the_quick_start_of_the_readme_runs(
    ratesync_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert re.fullmatch(r"waited \d+\.\d{3} s\n", capsys.readouterr().out)


def test_the_session_in_the_readme_runs(ratesync_registry: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "pycon")
    session = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    assert doctest.DocTestRunner().run(session).failed == 0
    assert len(session.examples) > 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_import_names_that_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = compile(block, str(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ratesync":
                module = __import__(node.module or "", fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_blocks_are_valid_configurations(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ratesync.config import read_config

    monkeypatch.setenv("DATABASE_URL", "postgresql://app@localhost/app")
    for block in blocks(page, "toml"):
        if not re.search(r"^\[", block, re.M):
            continue  # a line of a store's table
        assert tomllib.loads(block)
        path = tmp_path / "rate-sync.toml"
        path.write_text(block, encoding="utf-8")
        read_config(path)


@pytest.mark.parametrize(
    ("heading", "options"),
    [
        ('`[stores.<id>]`, engine `"postgres"`', _schemas.PostgresOptions),
        ('`[stores.<id>]`, engine `"redis"`', _schemas.RedisOptions),
        ("`[limiters.<id>]`", _schemas.LimiterOptions),
        ("`[state]`", _state_schema.StateOptions),
    ],
)
def test_the_table_of_options_has_every_option_with_its_default(
    heading: str, options: type[msgspec.Struct]
) -> None:
    documented = {
        row[0].strip("`"): row[2]
        for row in table_rows(ROOT / "docs" / "reference" / "configuration.md", heading)
    }
    expected = {}
    for field in msgspec.structs.fields(options):
        if field.required:
            expected[field.name] = "required"
        elif field.default is None:
            expected[field.name] = "none"
        elif isinstance(field.default, bool):
            expected[field.name] = f"`{str(field.default).lower()}`"
        elif isinstance(field.default, str):
            expected[field.name] = f'`"{field.default}"`'
        else:
            expected[field.name] = f"`{field.default!r}`"
    assert documented == expected


def test_the_tree_of_errors_has_every_class_in_its_place() -> None:
    (tree,) = blocks(ROOT / "docs" / "reference" / "errors.md", "")
    parents: list[str] = []
    documented = {}
    for line in tree.splitlines():
        match = re.match(r"([│├└─ ]*)(\w+)", line)
        assert match
        depth = len(match[1]) // 4
        parents = [*parents[:depth], match[2]]
        documented[match[2]] = parents[depth - 1] if depth else "Exception"
    actual = {
        name: error.__bases__[0].__name__
        for name, error in vars(errors).items()
        if inspect.isclass(error) and issubclass(error, errors.RateLimiterError)
    }
    assert documented == actual


def test_the_manual_table_is_the_same_everywhere_it_is_printed() -> None:
    page = (ROOT / "docs" / "guides" / "production-postgres.md").read_text(encoding="utf-8")
    columns = re.search(r"CREATE TABLE rate_limiter_state \((.*?)\n\);", page, re.S)
    schema = (ROOT / "cpp" / "ratesync" / "postgres" / "schema.cc").read_text(encoding="utf-8")
    created = re.search(r"CREATE \{\}TABLE IF NOT EXISTS \{\} \(\\n\"(.*?)\"\) WITH", schema, re.S)
    assert columns
    assert created

    def words(text: str) -> list[str]:
        return text.replace('"', " ").replace("\\n", " ").split()

    assert words(columns[1]) == words(created[1])
