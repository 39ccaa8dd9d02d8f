"""The command line: what it prints, its exit status, and that a failure is one line without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ratesync
from ratesync.cli import cli
from ratesync.config import read_config

pytestmark = pytest.mark.usefixtures("clean")

FILE = """
[stores.db]
engine = "postgres"
url = "${RS_URL:-postgresql://app:s3cret@localhost/mydb}"

[limiters.api]
store = "db"
rate_per_second = 100
max_concurrent = 50

[limiters."a \\"b\\".c"]
rate_per_second = 0.5
burst = 4

[fastapi]
trusted_proxy_networks = ["10.0.0.0/8"]
"""
MEMORY = "[limiters.api]\nrate_per_second = 2\nburst = 4\nmax_concurrent = 3\n"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="ratesync")


def one_line(result: Result, exit_code: int) -> str:
    assert result.exit_code == exit_code, result.output
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


def test_check_prints_the_effective_configuration_with_passwords_masked() -> None:
    Path("rs.toml").write_text(FILE)
    result = run("check", "rs.toml")
    assert result.exit_code == 0, result.output
    assert "s3cret" not in result.output
    assert result.output.startswith("# rs.toml: valid; 1 stores, 2 limiters\n")
    effective = tomllib.loads(result.output)
    assert effective["stores"]["db"]["url"] == "postgresql://app:***@localhost/mydb"
    assert effective["stores"]["db"]["pool_max_size"] == 10
    assert effective["limiters"]["api"]["max_concurrent"] == 50
    assert effective["limiters"]['a "b".c']["burst"] == 4
    assert effective["fastapi"] == {"trusted_proxy_networks": ["10.0.0.0/8"]}


def test_what_check_prints_is_itself_a_valid_file() -> None:
    Path("rs.toml").write_text(FILE)
    Path("again.toml").write_text(run("check", "rs.toml").output)
    assert read_config("again.toml").limiters == read_config("rs.toml").limiters


def test_check_without_a_file_uses_discovery() -> None:
    assert "ratesync init" in one_line(run("check"), 2)
    Path("rate-sync.toml").write_text(FILE)
    assert run("check").exit_code == 0


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[limiters.api]\nrate_per_second = 0", "rs.toml: [limiters.api]: rate_per_second"),
        ("[limiters.api]\nrat_per_second = 1", "'rate_per_second'"),
        ("[stores.db]\nengine = 'postgres'\nurl = '${RS_UNDEFINED}'", "RS_UNDEFINED"),
        ("x = ", "not valid TOML"),
    ],
)
def test_check_of_an_invalid_file_is_one_line_and_status_1(content: str, part: str) -> None:
    Path("rs.toml").write_text(content)
    assert part in one_line(run("check", "rs.toml"), 1)


def test_check_of_a_missing_file_is_status_2_and_a_directory_status_1() -> None:
    assert "does not exist" in one_line(run("check", "absent.toml"), 2)
    os.mkdir("dir")
    assert "is a directory" in one_line(run("check", "dir"), 1)


def test_init_writes_a_valid_file_and_does_not_overwrite() -> None:
    assert "ratesync check" in run("init").output
    assert read_config("rate-sync.toml").limiters["api"].rate_per_second == 100.0
    Path("rate-sync.toml").write_text("mine")
    assert "--force" in one_line(run("init"), 1)
    assert Path("rate-sync.toml").read_text() == "mine"
    assert run("init", "--force").exit_code == 0
    assert run("init", "deep/er/rs.toml").exit_code == 0
    assert read_config("deep/er/rs.toml").limiters
    assert "cannot be written" in one_line(run("init", "rate-sync.toml/x"), 1)


def test_every_option_of_the_template_is_one_that_exists() -> None:
    run("init")
    lines = Path("rate-sync.toml").read_text().splitlines()
    code = [line.removeprefix("# ") for line in lines if " = " in line or line.startswith(("[", "# ["))]
    text = "\n".join(code).replace("${DATABASE_URL}", "postgresql://h/d").replace("${REDIS_URL}", "redis://h")
    Path("all.toml").write_text(text)
    config = read_config("all.toml")
    assert config.limiters["api"].store == "db"
    assert config.limiters["api"].max_hold_seconds == 600


def test_migrate_of_the_memory_store_has_nothing_to_do() -> None:
    Path("rs.toml").write_text(MEMORY)
    assert run("migrate", "-c", "rs.toml").output == "memory: nothing to migrate\n"
    assert run("migrate", "-c", "rs.toml", "--sql").output == "-- store memory: 0 outstanding steps\n"
    assert "'nope'" in one_line(run("migrate", "-c", "rs.toml", "--store", "nope"), 1)


def test_doctor_is_content_with_the_memory_store() -> None:
    Path("rs.toml").write_text(MEMORY)
    result = run("doctor", "-c", "rs.toml")
    assert result.exit_code == 0, result.output
    assert "error" not in result.output


def test_status_shows_how_full_the_limits_are_and_who_holds_slots() -> None:
    Path("rs.toml").write_text(MEMORY)
    ratesync.load_config("rs.toml")
    with ratesync.acquire("api"):
        result = run("status", "-c", "rs.toml")
        report = json.loads(run("status", "-c", "rs.toml", "--json").output)
    assert result.exit_code == 0, result.output
    assert "api" in result.output
    assert "1/3" in result.output
    assert "█" in result.output
    (row,) = report["limiters"]
    assert (row["limiter"], row["store"], row["in_use"], row["remaining"]) == ("api", "memory", 1, 2)
    assert row["used"] == pytest.approx(1 / 3)
    assert report["errors"] == {}


def test_status_without_limiters_says_so() -> None:
    Path("rs.toml").write_text("")
    assert "no limiters" in run("status", "-c", "rs.toml").output


@pytest.mark.parametrize("command", ["", "check", "init", "migrate", "doctor", "status"])
def test_help_has_examples(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert "ratesync" in result.output


def test_version() -> None:
    assert run("--version").output == f"ratesync, version {ratesync.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["check", "--nonsense"], ["status", "--limit", "0"]])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_an_unforeseen_error_is_one_line_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("ratesync.config.read_config", fail)
    assert "RATESYNC_DEBUG=1" in one_line(run("check", "rs.toml"), 1)


def test_python_dash_m_works_and_a_missing_library_is_named(clean: Path) -> None:
    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=clean, capture_output=True, text=True, check=False
        )

    run_module = "import sys; sys.argv = ['ratesync', '--version']; import ratesync.__main__ as m; m.main()"
    assert python(run_module).stdout.startswith("ratesync, version ")
    for library in ("click", "rich"):
        done = python(f"import sys; sys.modules[{library!r}] = None; {run_module}")
        assert done.returncode == 1
        assert done.stderr == f'ratesync: the command line needs {library}: pip install "ratesync[cli]"\n'
