# ruff: noqa: PT012 - what happens inside a `with` block is what is tested
"""The command line on [state]: check, migrate, doctor, locks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ratesync
from ratesync.cli import cli
from ratesync.config import read_config

pytestmark = pytest.mark.usefixtures("clean")

SEED = """
[server]
host = "127.0.0.1"

[state]
backend = "{backend}"
{url}

[audit]
enabled = true
backend = "postgres"
url = "postgres://acteon:acteon@localhost:5432/acteon"

[rules]
directory = "./rules"
"""


def run(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="ratesync", input=answer)


@pytest.fixture
def memory_file(clean: Path) -> Iterator[str]:
    (clean / "acteon.toml").write_text(SEED.format(backend="memory", url=""))
    yield "acteon.toml"
    ratesync.shutdown()


def test_check_shows_state_and_names_what_is_ignored() -> None:
    url = 'url = "postgres://acteon:geheim@localhost:5432/acteon"'
    Path("acteon.toml").write_text(SEED.format(backend="postgres", url=url))
    result = run("check", "acteon.toml")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("# acteon.toml: valid; 0 stores, 0 limiters, state in postgres\n")
    assert 'prefix = "acteon_"' in result.output
    assert "geheim" not in result.output
    assert "# ignored, not of ratesync: [server], [audit], [rules]" in result.output


def test_a_bad_state_table_is_one_line() -> None:
    Path("acteon.toml").write_text('[state]\nbackend = "postgress"\n')
    result = run("check", "acteon.toml")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "did you mean 'postgres'" in result.stderr


def test_init_shows_a_state_that_is_valid_when_it_is_uncommented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/app")
    assert run("init").exit_code == 0
    text = Path("rate-sync.toml").read_text()
    lines = text.partition("# [state]\n")[2].partition("\n\n")[0].splitlines()
    Path("state.toml").write_text("[state]\n" + "\n".join(line.removeprefix("# ") for line in lines))
    assert read_config("state.toml").state is not None


def test_migrate_names_what_it_ignores_and_has_nothing_to_do_in_memory(memory_file: str) -> None:
    result = run("migrate", "-c", memory_file)
    assert result.exit_code == 0, result.output
    assert result.stdout == "[state] 'acteon_' in memory: nothing to migrate\n"
    assert "ignored, not of ratesync: [server], [audit], [rules]" in result.stderr


def test_migrate_without_anything_says_so() -> None:
    Path("empty.toml").write_text("[server]\nport = 1\n")
    result = run("migrate", "-c", "empty.toml", "--dry-run")
    assert result.exit_code == 0
    assert "neither [stores] nor [state]" in result.stdout


def test_doctor_looks_at_the_store_of_state(memory_file: str) -> None:
    result = run("doctor", "-c", memory_file)
    assert result.exit_code == 0, result.output


def test_doctor_says_when_the_store_of_state_is_out(ratesync_registry: Path) -> None:
    url = 'url = "postgres://nobody@127.0.0.1:1/none"\nconnect_timeout = 2'
    Path("acteon.toml").write_text(SEED.format(backend="postgres", url=url))
    result = run("doctor", "-c", "acteon.toml")
    assert result.exit_code == 1
    assert "[state]" in result.output
    assert "127.0.0.1" in result.output


@pytest.mark.parametrize("words", ["locks list -c {}", "locks -c {}", "locks -c {} list"])
def test_no_locks_are_said_to_be_none(memory_file: str, words: str) -> None:
    result = run(*words.format(memory_file).split())
    assert result.exit_code == 0, result.output
    assert (
        "no locks are held (prefix 'acteon_' in memory, which is empty in every new process)" in result.output
    )


def test_without_state_there_is_no_store_of_locks() -> None:
    Path("rate-sync.toml").write_text("[limiters.api]\nrate_per_second = 1\n")
    result = run("locks")
    assert result.exit_code == 1
    assert "no [state]" in result.stderr


def test_locks_are_listed(memory_file: str) -> None:
    ratesync.load_config(memory_file)
    with ratesync.lock("invoice-42"), ratesync.lock("evil\x1b[31m[bold]", tenant="t"):
        result = run("locks", "list", "-c", memory_file)
        rows = json.loads(run("locks", "list", "-c", memory_file, "--json").output)
    assert result.exit_code == 0, result.output
    assert "invoice-42" in result.output
    assert "\x1b" not in result.output  # a name cannot play tricks with the terminal
    assert "[bold]" in result.output
    assert {row["name"] for row in rows} == {"invoice-42", "evil\x1b[31m[bold]"}


def test_breaking_asks_and_can_be_declined(memory_file: str) -> None:
    ratesync.load_config(memory_file)
    with ratesync.lock("invoice-42") as lease:
        result = run("locks", "break", "invoice-42", "-c", memory_file, answer="n\n")
        assert result.exit_code == 1
        assert "Its holder may go on working" in result.output
        assert not lease.lost
        assert ratesync.try_lock("invoice-42").wait() is None


@pytest.mark.parametrize(("options", "answer"), [((), "y\n"), (("--yes",), None)])
def test_breaking_takes_the_lock(memory_file: str, options: tuple[str, ...], answer: str | None) -> None:
    ratesync.load_config(memory_file)
    with pytest.raises(ratesync.LockLostError), ratesync.lock("invoice-42") as lease:
        result = run("locks", "break", "invoice-42", "-c", memory_file, *options, answer=answer)
        assert result.exit_code == 0, result.output
        assert f"under token {lease.token}" in result.output
        second = ratesync.try_lock("invoice-42").wait()
        assert second is not None
        assert second.release().wait()


def test_breaking_what_is_not_held_says_so(memory_file: str) -> None:
    ratesync.load_config(memory_file)
    result = run("locks", "break", "invoice-42", "-c", memory_file, "--yes")
    assert result.exit_code == 1
    assert "is not held; `ratesync locks` lists" in result.stderr
    with ratesync.lock("invoice-42") as lease:
        token = str(lease.token + 1)
        result = run("locks", "break", "invoice-42", "-c", memory_file, "--yes", "--token", token)
        assert result.exit_code == 1
        assert f"not held under token {token}" in result.stderr
        result = run("locks", "break", "invoice-42", "-c", memory_file, "--yes", "--tenant", "other")
        assert result.exit_code == 1
        assert not lease.lost
