"""`ratesync top`: one look, rates between two looks, an outage, and once on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ratesync
from ratesync.cli import cli
from ratesync.cli._top import _Look

pytestmark = pytest.mark.usefixtures("ratesync_registry")

TOML = """
[stores.db]
engine = "postgres"
url = "{url}"
auto_create = true

[limiters.api]
store = "db"
rate_per_second = 0.01
burst = 10
max_concurrent = 5

[limiters.here]
rate_per_second = 1
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["top", *arguments], prog_name="ratesync")


@pytest.fixture
def configured(ratesync_postgres_url: str) -> str:
    Path("rate-sync.toml").write_text(TOML.format(url=ratesync_postgres_url))
    ratesync.load_config("rate-sync.toml")
    ratesync.initialize_limiter("api").wait()
    return ratesync_postgres_url


def test_once_as_json_shows_limiters_groups_holders_and_stores(configured: str) -> None:
    with ratesync.acquire("api"), ratesync.acquire("api", key="tenant"):
        result = run("--once", "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.output.splitlines()
    report = json.loads(line)
    api, here = report["limiters"]
    assert (api["limiter"], api["in_use"], api["remaining"]) == ("api", 1, 4)
    assert (here["limiter"], here["store"]) == ("here", "memory")
    assert {row["group"]: row["in_use"] for row in report["groups"] if row["store"] == "db"} == {
        "api": 1,
        "api:tenant": 1,
    }
    assert {row["group"]: row["slots"] for row in report["holders"]} == {"api": 1, "api:tenant": 1}
    assert {row["store"] for row in report["stores"]} == {"db", "memory"}
    assert report["errors"] == {}


def test_once_as_a_table(configured: str) -> None:
    with ratesync.acquire("api"):
        result = run("--once")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("ratesync top")
    assert any(line.startswith("api") and "1/5" in line for line in lines)
    assert any("postgres" in line and "ms" in line for line in lines)


def test_looking_charges_nothing_and_writes_nothing(configured: str) -> None:
    with ratesync.acquire("api"):
        pass
    while ratesync.get_limiter("api").peek().wait().in_use:  # the release is a write of its own
        time.sleep(0.01)
    first = json.loads(run("--once", "--json").output)
    second = json.loads(run("--once", "--json").output)
    assert [row["version"] for row in first["groups"]] == [row["version"] for row in second["groups"]]
    assert second["limiters"][0]["remaining"] == 5


def test_rates_come_from_two_looks(configured: str) -> None:
    ratesync.acquire("api", key="a").__enter__().release()
    look = _Look(None, 20)
    assert [row["writes_per_second"] for row in look.take()["groups"]] == [None]
    for _ in range(3):
        ratesync.acquire("api", key="a").__enter__().release()
    ratesync.acquire("api", key="b").__enter__().release()
    busy, new = look.take()["groups"]
    assert busy["group"] == "api:a"
    assert busy["writes_per_second"] > 0
    assert new["writes_per_second"] is None
    ratesync.get_limiter("api").reset("a").wait()
    assert all(
        row["writes_per_second"] is None or row["writes_per_second"] >= 0 for row in look.take()["groups"]
    )


def test_a_store_that_is_out_is_shown_and_the_others_too() -> None:
    Path("rate-sync.toml").write_text(TOML.format(url="postgresql://nobody:s3cret@127.0.0.1:1/none"))
    result = run("--once", "--json")
    assert result.exit_code == 1
    report = json.loads(result.output.splitlines()[0])
    assert "db" in report["errors"]
    assert [row["limiter"] for row in report["limiters"]] == ["here"]
    assert "s3cret" not in result.output


def test_no_configuration_is_said() -> None:
    result = run("--once")
    assert result.exit_code == 2
    assert "no configuration file" in result.stderr


def test_on_a_terminal_it_redraws_and_ctrl_c_ends_it(configured: str) -> None:
    with ratesync.acquire("api"):
        pass
    process, terminal = _on_terminal("top", "--interval", "0.1")
    try:
        shown = _read_until(terminal, lambda text: text.count("ratesync top") >= 3 and "api" in text)
        assert "\x1b[?1049h" in shown  # a screen of its own
        os.write(terminal, b"\x03")
        rest = _read_until(terminal, lambda text: "\x1b[?1049l" in text)
        assert process.wait(20) == 0
        assert "Traceback" not in shown + rest
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_json_without_once_writes_a_line_per_look(configured: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ratesync", "top", "--json", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert looks[0]["time"] < looks[1]["time"] < looks[2]["time"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()


def _on_terminal(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ratesync", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: _controlling_terminal(slave),
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(slave)
    return process, master


def _controlling_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that a typed Ctrl-C becomes SIGINT


def _read_until(terminal: int, enough: object, seconds: float = 40) -> str:
    text, end = "", time.monotonic() + seconds
    while not enough(text):  # type: ignore[operator]
        assert time.monotonic() < end, text[-2000:]
        ready, _, _ = select.select([terminal], [], [], 1)
        if ready:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other end was closed
                break
    return text
